"""`rkcached bench`: what a prompt cache gains, measured on the running daemon as its clients feel it."""

from __future__ import annotations

import contextlib
import datetime as dt
import platform
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from rkcached import __version__
from rkcached.benchmark import sweep, trust
from rkcached.benchmark.alone import Alone, NotPossible, look_at, model_facts
from rkcached.benchmark.asking import ANSWER_TOKENS, QUESTION, Asker, NotMade
from rkcached.benchmark.machine import Steal, machine
from rkcached.benchmark.results import (
    SCHEMA,
    DirectRun,
    Measured,
    Parameters,
    PromptResult,
    Results,
    Run,
    State,
    Versions,
)
from rkcached.client import Client
from rkcached.errors import SourceError
from rkcached.observe import Look
from rkcached.plan import Key
from rkcached.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    runs: int
    sweep: bool
    direct: bool


def run(settings: Settings, wanted: Sequence[str], options: Options, console: Console) -> Results:
    """Measure the prompts that `wanted` names, or all; with a sweep, the models. `console` gets the progress.

    Errors: DaemonUnreachable, RequestError; SourceError for a name of nothing.
    """
    signal.signal(signal.SIGTERM, _leave)
    facts, steal = machine(), Steal()
    with Client(settings.socket) as client:
        before = client.status()
        lengths: dict[Key, int] = {}
        keys = [] if options.sweep else _keys(before, wanted)
        models = _models(before, wanted)
        places = _places(settings, before)
        with contextlib.ExitStack() as stack:
            shown = stack.enter_context(_progress(console))
            task = shown.add_task("", total=None)
            refused: list[str] = []
            if options.sweep:
                look, _ = _try_look(places)
                lengths, refused = stack.enter_context(
                    sweep.stored(
                        settings.socket,
                        settings.admin_socket,
                        models,
                        lambda model: _context_tokens(look, model),
                        lambda said: shown.update(task, description=said),
                    )
                )
                keys = list(lengths)
            look, why = _try_look(places)
            direct = look if options.direct else None
            why_not_direct = [why] if options.direct else ["not asked for"]
            status = client.status()
            shown.update(task, total=len(keys) * options.runs * len(State), completed=0)
            prompts = []
            for model in dict.fromkeys(key.model for key in keys):
                shown.update(task, description=f"{model}: loading")
                alone, why = _start(direct, model)
                why_not_direct.append(why)
                with contextlib.ExitStack() as loaded:
                    if alone is not None:
                        loaded.callback(alone.close)
                    for key in (key for key in keys if key.model == model):
                        shown.update(task, description=str(key))
                        measuring = _Measuring(Asker(client, *key), alone, key)
                        for _ in measuring.rounds(options.runs):
                            shown.advance(task, len(State))
                        why_not_direct.append(measuring.why_not_direct)
                        prompts.append(_result(key, lengths.get(key), _status_of(status, key), measuring.states()))
            after = client.status()
    runtimes = {model["name"]: model["runtime"] for model in after["models"]}
    stolen = steal.percent()
    return Results(
        schema=SCHEMA,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        machine=facts,
        versions=Versions(rkcached=__version__, daemon=before["version"], python=platform.python_version()),
        parameters=Parameters(
            runs=options.runs,
            answer_tokens=ANSWER_TOKENS,
            question=QUESTION,
            sweep=sweep.LENGTHS if options.sweep else (),
        ),
        models={name: model_facts(look, before["engine"], runtimes[name], name) for name in models},
        prompts=tuple(prompts),
        direct="; ".join(dict.fromkeys(filter(None, why_not_direct))),
        steal_percent=stolen,
        warnings=tuple(trust.warnings(facts, stolen, options.runs, prompts)),
        refused=tuple(refused),
    )


class _Measuring:
    """The runs of one prompt, in turns: cold, from the file, in memory; each through the socket and on the engine."""

    def __init__(self, asker: Asker, alone: Alone | None, key: Key) -> None:
        self._asker = asker
        self._alone = alone
        self._key = key
        self._runs: dict[State, list[Run]] = {state: [] for state in State}
        self._direct: dict[State, list[DirectRun]] = {state: [] for state in State}
        self._missing: dict[State, str] = {}
        self.why_not_direct = ""

    def rounds(self, count: int) -> Iterator[int]:
        """The first answer is not counted: it may have to load the model. Errors: RequestError, DaemonUnreachable."""
        with contextlib.suppress(NotMade):
            self._asker.ask(State.COLD)
        for number in range(count):
            for state in State:
                if not any(earlier in self._missing for earlier in list(State)[: list(State).index(state) + 1]):
                    self._once(state)
            yield number

    def _once(self, state: State) -> None:
        try:
            run, question = self._asker.ask(state)
        except NotMade as error:
            self._missing[state] = str(error)
            return
        self._runs[state].append(run)
        if self._alone is None:
            return
        try:
            self._direct[state].append(self._alone.ask(self._key, state, question, ANSWER_TOKENS))
        except NotPossible as error:
            self.why_not_direct = str(error)
            self._alone = None

    def states(self) -> dict[State, Measured]:
        """What could not be made once is not reported at all: what else came would be of another kind."""
        found, missing = {}, ""
        for state in State:
            missing = self._missing.get(state) or (missing and f"{State.FILE}: {missing}")
            found[state] = (
                Measured(missing=missing)
                if missing
                else Measured(runs=tuple(self._runs[state]), direct=self._whole(state)).summarised()
            )
        return found

    def _whole(self, state: State) -> tuple[DirectRun, ...]:
        """Pairs need both."""
        return () if self.why_not_direct else tuple(self._direct[state])


def _result(key: Key, length: int | None, status: dict[str, Any], states: dict[State, Measured]) -> PromptResult:
    artifact = status.get("artifact") or {}
    return PromptResult(
        model=key.model,
        prompt=key.prompt,
        tokens=artifact.get("tokens"),
        size_bytes=artifact.get("size_bytes"),
        build_ms=round(artifact["build_ms"], 1) if artifact else None,
        length=length,
        states=states,
        no_gain=trust.why_no_gain(status, states),
        reduction=trust.reductions(states),
    )


def _keys(status: dict[str, Any], wanted: Sequence[str]) -> list[Key]:
    known = [Key(p["model"], p["prompt"]) for p in status["prompts"] if p["state"] != "orphan"]
    for text in wanted:
        if not any(text in (key.model, str(key)) for key in known):
            names = ", ".join(map(str, known)) or "none"
            raise SourceError(f"there is no prompt of {text!r}", hint=f"known: {names}")
    chosen = [key for key in known if not wanted or key.model in wanted or str(key) in wanted]
    if not chosen:
        raise SourceError("the daemon has no prompts", hint="declare one in the manifest, or measure with --sweep")
    return chosen


def _models(status: dict[str, Any], wanted: Sequence[str]) -> list[str]:
    """Errors: SourceError."""
    known = [model["name"] for model in status["models"] if not model["embedding"]]
    named = [text.partition("/")[0] for text in wanted]
    for name in named:
        if name not in known:
            raise SourceError(f"there is no model {name!r} that answers", hint=f"known: {', '.join(known) or 'none'}")
    if not known:
        raise SourceError("the daemon has no model that answers", hint="declare one in the manifest")
    return [name for name in known if not named or name in named]


def _places(settings: Settings, status: dict[str, Any]) -> Settings:
    """Where the daemon's manifest and store are: as it says itself, unless somebody named others."""
    places: dict[str, Any] = {
        "manifest": Path(status["manifest"]["file"]),
        "cache_dir": Path(status["cache"]["directory"]),
    }
    for name in ("manifest", "cache_dir", "state_dir"):
        if name in settings.model_fields_set:
            places[name] = getattr(settings, name)
    return Settings(**places)


def _try_look(places: Settings) -> tuple[Look | None, str]:
    try:
        return look_at(places.manifest, places.cache_dir, places.state_dir), ""
    except NotPossible as error:
        return None, str(error)


def _start(look: Look | None, model: str) -> tuple[Alone | None, str]:
    if look is None:
        return None, ""
    try:
        return Alone(look, model), ""
    except NotPossible as error:
        return None, str(error)


def _context_tokens(look: Look | None, model: str) -> int | None:
    config = look.manifest.models.get(model) if look is not None else None
    return (config.params.max_context_len or None) if config is not None else None


def _status_of(status: dict[str, Any], key: Key) -> dict[str, Any]:
    gone = {"state": "missing", "reason": "it was removed meanwhile", "hint": ""}
    return next((p for p in status["prompts"] if (p["model"], p["prompt"]) == key), gone)


def _progress(console: Console) -> Progress:
    """Only a terminal gets one, and it is gone at the end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _leave(_number: int, _frame: object) -> NoReturn:
    """SIGTERM unwinds as Ctrl-C does, so that stored prompts and the engine go."""
    raise KeyboardInterrupt
