"""Puts what the daemon sees over what the caller of a command sees.

Who runs `check` may read more than the daemon, or less. Root looks with its eyes from the start
(see `unit.become_it`). For others the word of a running daemon counts; where none runs, what its
unit would hide.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rkcached.cli.client import Client
from rkcached.errors import RkcachedError
from rkcached.host import places, unit
from rkcached.host.access import hidden
from rkcached.host.settings import Settings
from rkcached.plan.desired import Desired
from rkcached.plan.records import Assessment, Blocked, State
from rkcached.reconcile.observer import Observation
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import model_files
from rkcached.sources.records import Key, RuntimeSource, Sources, Trouble

AS_SERVICE: Final = "as the daemon sees it"
AS_CALLER: Final = "as you see it; `sudo rkcached check` says what the service sees"
_PATIENCE_S: Final = 5.0
_IN_TROUBLE: Final = (State.BLOCKED, State.UNCACHEABLE, State.QUARANTINED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A prompt as the daemon sees it: its state, and its trouble if there is one."""

    state: str
    trouble: Trouble | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """The daemon's view, as far as it is known; for the rest the caller's own look counts."""

    models: Mapping[str, Trouble | None] = field(default_factory=dict)
    prompts: Mapping[Key, Seen] = field(default_factory=dict)
    unlisted_models: Mapping[str, Trouble] = field(default_factory=dict)
    whose: str = ""
    """With whose eyes that is, for a summary; empty where there is no service."""

    def without(self, runtime: RuntimeSource | Trouble) -> ServiceView:
        """The view without troubles of the engine, which are no model's or prompt's own."""

        def of_engine(trouble: Trouble | None) -> bool:
            return trouble is not None and str(trouble) == str(runtime)

        models = {
            name: None if of_engine(trouble) else trouble for name, trouble in self.models.items()
        }
        prompts = {key: seen for key, seen in self.prompts.items() if not of_engine(seen.trouble)}
        return replace(self, models=models, prompts=prompts)

    def models_in_trouble(self, manifest: Manifest, desired: Desired) -> dict[str, Trouble]:
        troubles = {}
        for name, model in desired.models.items():
            trouble = None
            if isinstance(model, Trouble):
                trouble = model
            if name in self.models:
                trouble = _of_both(trouble, self.models[name], [manifest.models[name].path])
            if trouble is not None:
                troubles[name] = trouble

        return troubles

    def prompts_in_trouble(
        self, manifest: Manifest, sources: Sources, desired: Desired
    ) -> dict[Key, Trouble]:
        """Troubles of prompts; that of a model is reported once, for the model.

        A prompt may have a trouble of its own besides.
        """
        models = self.models_in_trouble(manifest, desired)
        troubles: dict[Key, Trouble] = {}
        for key, prompt in desired.prompts.items():
            declared = sources.prompts[key]
            trouble = prompt.trouble
            if isinstance(desired.models[key.model], Trouble):
                trouble = None
                if isinstance(declared.source, Trouble):
                    trouble = declared.source

            if (seen := self.prompts.get(key)) is not None:
                of_daemon = None
                if str(seen.trouble) != str(models.get(key.model)):
                    of_daemon = seen.trouble
                trouble = _of_both(trouble, of_daemon, declared.files)

            if trouble is not None:
                troubles[key] = trouble

        return troubles

    def over(self, look: Observation) -> Observation:
        """The look, with the daemon's assessments of what it knows better than the caller."""
        return look.with_assessments(tuple(self._assessment(own, look) for own in look.assessments))

    def _assessment(self, own: Assessment, look: Observation) -> Assessment:
        seen = self.prompts.get(own.key)
        if seen is None and (trouble := self.models.get(own.key.model)) is not None:
            seen = Seen(state=State.BLOCKED, trouble=trouble)
        if seen is None or seen.state not in set(State):
            return own

        if seen.trouble is not None:
            reason = seen.trouble.message
            hint = seen.trouble.hint
            blocked = Blocked(key=own.key, reason=reason, hint=hint)
            return replace(
                own, state=State(seen.state), reason=reason, hint=hint, changes=(), action=blocked
            )

        declared = look.sources.prompts.get(own.key)
        model = look.manifest.models.get(own.key.model)
        files: list[Path | str] = []
        if declared:
            files += declared.files
        if model:
            files.append(model.path)

        if own.state is not State.BLOCKED or _may_read(files):
            return own
        return replace(own, state=State(seen.state), reason="", hint="", action=None)


def _of_both(
    own: Trouble | None, of_daemon: Trouble | None, files: Iterable[Path | str]
) -> Trouble | None:
    """The caller's trouble where the daemon sees the same or the caller can know. Else its own."""
    if str(own) == str(of_daemon) or (of_daemon is None and _may_read(files)):
        return own
    return of_daemon


def _may_read(files: Iterable[Path | str]) -> bool:
    """Whether the caller may read the files, and so sees what is wrong with their content."""
    for file in map(Path, files):
        try:
            file.stat()
        except PermissionError:
            return False
        except OSError:
            continue

        if not os.access(file, os.R_OK, effective_ids=True):
            return False

    return True


def view_of(
    settings: Settings, manifest: Manifest, sources: Sources, *, ask: bool = False
) -> ServiceView:
    """Asks the daemon, if one runs with this manifest; else the unit.

    Never fails: nobody may be there.

    Who looks with its eyes, or has started it himself, needs to hear it only for what no eyes see,
    with `ask`: until it has looked again, it speaks of what was.
    """
    seeing = os.environ.get(unit.MARK)
    installed = unit.installed()
    if installed is not None and not installed.uses(manifest=settings.manifest):
        installed = None
    if installed is None and not ask:
        return ServiceView(whose=AS_SERVICE if seeing is not None else "")

    if (status := running_status(settings)) is not None:
        return _view_in(status)

    if installed is None:
        return ServiceView()
    return hidden_by(installed, manifest, sources)


def running_status(settings: Settings) -> dict[str, Any] | None:
    """The status of the daemon that runs with this manifest; None if none is known to.

    It is asked if that does not start it. `settings` are those of a client.
    """
    installed = unit.installed()
    if installed is not None and not installed.uses(manifest=settings.manifest):
        installed = None

    socket = _socket(settings, installed)
    status = _status(socket) if socket is not None else None
    if status is None or not status["ready"]:
        return None
    return status if status["manifest"]["file"] == str(settings.manifest) else None


def _view_in(status: Mapping[str, Any]) -> ServiceView:
    """The view that a status document gives."""
    prompts = {}
    for prompt in status["prompts"]:
        troubled = prompt["state"] in _IN_TROUBLE
        trouble = None
        if troubled:
            trouble = Trouble(message=prompt["reason"], hint=prompt["hint"])
        prompts[Key(prompt["model"], prompt["prompt"])] = Seen(
            state=prompt["state"], trouble=trouble
        )

    # Of a model there is one text; its prompts have message and hint apart.
    apart = {str(seen.trouble): seen.trouble for seen in prompts.values()}
    models: dict[str, Trouble | None] = {}
    for model in status["models"]:
        text = model["trouble"]
        models[model["name"]] = None
        if text:
            models[model["name"]] = apart.get(text, Trouble(message=text))

    return ServiceView(models=models, prompts=prompts, whose=AS_SERVICE)


def hidden_by(installed: unit.Unit, manifest: Manifest, sources: Sources) -> ServiceView:
    """The view without the files that the unit hides."""
    models: dict[str, Trouble | None] = {}
    unlisted: dict[str, Trouble] = {}
    for name, model in manifest.models.items():
        for trouble in _hidden_files(installed, model.path, *model_files(model)):
            models.setdefault(name, trouble)

        for pattern in model.prompts_from:
            folder = Path(pattern).parent
            if place := installed.hides(folder):
                words = hidden(place, Path(os.path.realpath(folder)))
                message = f"{folder} cannot be listed: {words.reason}"
                unlisted.setdefault(name, Trouble(message=message, hint=words.hint))

    prompts = {}
    for key, declared in sources.prompts.items():
        for trouble in _hidden_files(installed, *declared.files):
            prompts[key] = Seen(state=State.BLOCKED, trouble=trouble)

    return ServiceView(models=models, prompts=prompts, unlisted_models=unlisted, whose=AS_CALLER)


def _hidden_files(installed: unit.Unit, *paths: Path | str | None) -> Iterator[Trouble]:
    """A trouble for each file that the unit hides."""
    for path in paths:
        if path is not None and (place := installed.hides(path)):
            words = hidden(place, Path(os.path.realpath(path)).parent)
            yield Trouble(message=f"{path} cannot be read: {words.reason}", hint=words.hint)


def _socket(settings: Settings, installed: unit.Unit | None) -> Path | None:
    """The socket to ask; None where asking would start the daemon, or there is none."""
    system = Path(os.environ.get("RKCACHED_SOCKET") or places.SYSTEM_RUNTIME / places.SOCKET_NAME)
    if installed is not None:
        if installed.pid:
            return system
        return None

    if (pid := os.environ.get(unit.MARK)) is not None:
        if pid != "0":
            return system
        return None

    own = settings.socket
    if own.parent != places.SYSTEM_RUNTIME and os.path.lexists(own):
        return own
    return None


def _status(socket: Path) -> dict[str, Any] | None:
    try:
        with Client(socket, patience_s=_PATIENCE_S) as client:
            return client.status()
    except RkcachedError:
        return None
