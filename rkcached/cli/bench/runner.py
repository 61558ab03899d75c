"""Measures on the running daemon what its clients gain from each prompt cache."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import platform
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rkcached import __version__
from rkcached.cli.bench import sweep, trust
from rkcached.cli.bench.alone import Alone, NotPossible, look_at, model_facts
from rkcached.cli.bench.asking import ANSWER_TOKENS, QUESTION, Asker
from rkcached.cli.bench.machine import Steal, machine
from rkcached.cli.bench.measuring import Measuring
from rkcached.cli.bench.progress import Shown
from rkcached.cli.bench.results import (
    SCHEMA,
    Ended,
    Measured,
    Parameters,
    PromptResult,
    Results,
    State,
    Versions,
)
from rkcached.cli.client import Client
from rkcached.cli.names import hint_for
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.errors import (
    DaemonUnreachable,
    ModelLoadError,
    RequestError,
    RkcachedError,
    SourceError,
    UsageError,
)
from rkcached.host.settings import Settings
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key

NOT_ON_NPU = (
    "the NPU would have to hold the model twice; with --direct the daemon unloads it meanwhile"
)

# So many prompts a warning names; it counts the others.
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    runs: int
    sweep: bool
    direct: bool | None
    """Measure the engine alone, too. None: unless that would load a model twice into an NPU."""


def run(settings: Settings, wanted: Sequence[str], options: Options, console: Console) -> Results:
    """Measure the prompts that `wanted` names, or all; with a sweep, the models.

    `console` gets the progress.

    A prompt that cannot be measured does not keep the others from it, and neither does a daemon
    that dies meanwhile take what was measured before. Errors: SourceError for a name of nothing,
    UsageError for a prompt to sweep; DaemonUnreachable, RequestError, SourceError, ModelLoadError
    if nothing could be measured.
    """
    _check(wanted, options)
    _unwind_on_signals()
    facts = machine()
    steal = Steal()

    with Client(settings.socket) as client:
        before = client.status()
        keys = []
        if not options.sweep:
            keys = _keys(before, wanted)

        models = _models(before, wanted)
        places = _places(settings, before)
        kept = sweep.Stored()

        with contextlib.ExitStack() as stack:
            shown = stack.enter_context(Shown(console))
            if options.sweep:
                look, _ = _try_look(places)
                kept = stack.enter_context(
                    sweep.stored(
                        settings.socket,
                        settings.admin_socket,
                        models,
                        lambda model: _context_tokens(look, model),
                        shown.preparing,
                    )
                )
                keys = list(kept.lengths)

            look, why = _try_look(places)
            on_npu = ENGINES[EngineKind(before["engine"])].on_npu
            direct = not on_npu if options.direct is None else options.direct
            bench = _Bench(client, options.runs, kept.lengths, look, shown, direct=direct)
            if on_npu and direct:
                bench.lender = stack.enter_context(Client(settings.admin_socket))

            bench.measure(keys)

    runtimes = {model["name"]: model["runtime"] for model in bench.status["models"]}
    stolen = steal.percent()
    warnings = [
        *bench.warnings,
        *trust.warnings(facts, stolen, options.runs, bench.prompts, bench.meanwhile()),
    ]
    if kept.left:
        warnings.append(
            f"stored prompts are left in the daemon, which was gone: {len(kept.left)}; another "
            "sweep removes them"
        )

    not_asked = "not asked for"
    if options.direct is None:
        not_asked = NOT_ON_NPU

    why_not_direct = [why if direct else not_asked, *bench.why_not_direct]
    return Results(
        schema=SCHEMA,
        date=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        machine=facts,
        versions=Versions(
            rkcached=__version__, daemon=before["version"], python=platform.python_version()
        ),
        parameters=Parameters(
            runs=options.runs,
            answer_tokens=ANSWER_TOKENS,
            question=QUESTION,
            sweep=sweep.LENGTHS if options.sweep else (),
        ),
        models={
            name: model_facts(look, before["engine"], runtimes.get(name), name, before["pid"])
            for name in models
        },
        prompts=tuple(bench.prompts),
        direct="; ".join(dict.fromkeys(filter(None, why_not_direct))),
        steal_percent=stolen,
        warnings=tuple(warnings),
        refused=(*kept.refused, *bench.refused),
        ended=bench.ended,
    )


def end(results: Results) -> None:
    """Once they are shown and kept. Errors: what ended it before its time."""
    if results.ended is Ended.INTERRUPTED:
        raise KeyboardInterrupt

    if results.ended is Ended.DAEMON_GONE:
        raise DaemonUnreachable(
            "the daemon went away: what was measured until then is all there is",
            hint="its log says why; measure the rest when it is back",
        )


class _Bench:
    """Measures prompt after prompt, and keeps what comes of each."""

    def __init__(
        self,
        client: Client,
        runs: int,
        lengths: Mapping[Key, int],
        look: Observation | None,
        shown: Shown,
        *,
        direct: bool,
    ) -> None:
        """Without a look, the engine alone and the texts are left out.

        Errors: DaemonUnreachable, RequestError.
        """
        self._client = client
        self._runs = runs
        self._lengths = lengths
        self._direct = look if direct else None
        self.lender: Client | None = None
        """The client to borrow a model with that must not be loaded twice.

        The engine alone then follows the daemon's runs.
        """
        self._look = look
        self._shown = shown
        self._asked = 0
        self._errors: list[RkcachedError] = []
        self._first = client.status()
        self.status = self._first
        """The last one."""
        self.prompts: list[PromptResult] = []
        self.refused: list[str] = []
        self.warnings: list[str] = []
        self.why_not_direct: list[str] = []
        self.ended = Ended.WELL

    def measure(self, keys: Sequence[Key]) -> None:
        """Measure all, until the daemon is gone or somebody interrupts: then what there is counts.

        Errors: why there is nothing, if there is nothing.
        """
        self._shown.plan(
            prompts=len(keys), answers=len(keys) * self._answers(direct=self._direct is not None)
        )
        left = list(keys)
        try:
            self._measure_all(keys, left)
        except KeyboardInterrupt:
            if not self.prompts:
                raise
            self.ended = Ended.INTERRUPTED

        if not self.prompts and self._errors:
            raise self._why_nothing()
        if self._is_gone:
            self.ended = Ended.DAEMON_GONE

        if self.ended is not Ended.WELL:
            rest = [self._name(key) for key in left]
            more = ""
            if len(rest) > _NAMED:
                more = f" and {len(rest) - _NAMED} more"

            not_measured = ""
            if rest:
                not_measured = f"; not measured: {', '.join(rest[:_NAMED])}{more}"

            self.warnings.append(
                f"{self.ended}, this is what was measured until then{not_measured}"
            )

    def _measure_all(self, keys: Sequence[Key], left: list[Key]) -> None:
        """Takes from `left` what was measured, or could not be."""
        for model in dict.fromkeys(key.model for key in keys):
            if self._is_gone:
                break

            with contextlib.ExitStack() as loaded:
                alone = self._start(model)
                if alone is not None:
                    loaded.callback(alone.close)

                of_model = [key for key in keys if key.model == model]
                if alone is None and self._direct is not None and self.lender is None:
                    self._shown.drop(len(of_model) * self._runs * len(State))

                for key in of_model:
                    if not self._is_gone:
                        self._measure(key, alone)
                        left.remove(key)

    def meanwhile(self) -> trust.Meanwhile:
        answers = (
            sum(self.status["answers"].values())
            - sum(self._first["answers"].values())
            - self._asked
        )
        builds = self.status["reconcile"]["builds"] - self._first["reconcile"]["builds"]
        return trust.Meanwhile(answers=answers, builds=builds)

    @property
    def _is_gone(self) -> bool:
        return bool(self._errors) and isinstance(self._errors[-1], DaemonUnreachable)

    def _answers(self, *, direct: bool) -> int:
        """Of one prompt."""
        return self._runs * len(State) * (2 if direct else 1)

    def _start(self, model: str) -> Alone | None:
        if self._direct is None or self.lender is not None:
            return None

        self._shown.preparing(model, "loading a second one")
        try:
            return Alone(self._direct, model)
        except NotPossible as error:
            self.why_not_direct.append(str(error))
            return None

    def _measure(self, key: Key, alone: Alone | None) -> None:
        before = _status_of(self.status, key)
        name = self._name(key)
        self._shown.prompt(name)
        text = None
        if self._look is not None:
            text = self._look.desired.texts.get(key)

        if self._is_another(key, before):
            text = None
            if alone is not None:  # it would compute what was there at first
                alone = None
                self.why_not_direct.append(f"{name} changed meanwhile")
                self._shown.drop(self._runs * len(State))

        borrows = self.lender is not None and self._direct is not None
        if self._is_another(key, before) and borrows:
            borrows = False
            self.why_not_direct.append(f"{name} changed meanwhile")

        asker = Asker(self._client, *key)
        measuring = Measuring(asker, alone, key, self._shown)
        measuring.run(self._runs)
        if borrows and measuring.stopped is None:
            self._measure_borrowed(key, measuring)

        self._shown.drop(self._answers(direct=alone is not None or borrows) - measuring.steps)
        self._asked += asker.answers
        self.why_not_direct.append(measuring.why_not_direct)

        with contextlib.suppress(
            DaemonUnreachable, RequestError
        ):  # the next question fails likewise
            self.status = self._client.status()

        stopped = measuring.stopped
        if stopped is not None:
            self._errors.append(stopped)
            if not measuring.counts():
                refusal = stopped.message
                if str(key) not in refusal:
                    refusal = f"{name}: {refusal}"
                self.refused.append(refusal)
                return

            self.warnings.append(
                f"{name}: {min(measuring.counts())} of {self._runs} runs, then {stopped.message}"
            )

        states = measuring.states()
        if trust.changed(before, _status_of(self.status, key)):
            states = dict.fromkeys(State, Measured(missing=trust.CHANGED))

        self.prompts.append(_result(key, self._lengths.get(key), text, before, states))

    def _measure_borrowed(self, key: Key, measuring: Measuring) -> None:
        """The engine alone, while the daemon has the model unloaded and waits."""
        if self.lender is None or self._direct is None:
            return

        self._shown.preparing(key.model, "borrowing it from the daemon")
        try:
            with (
                self.lender.lent(key.model),
                contextlib.closing(Alone(self._direct, key.model)) as alone,
            ):
                measuring.run_alone(alone)
        except NotPossible as error:
            measuring.why_not_direct = str(error)
        except (RequestError, DaemonUnreachable) as error:
            measuring.why_not_direct = (
                f"{key.model} cannot be borrowed from the daemon: {error.message}"
            )

    def _is_another(self, key: Key, status: dict[str, Any]) -> bool:
        """Whether it is no longer what the look at the beginning saw."""
        if self._look is None or status["state"] != "fresh":
            return False
        wanted = self._look.desired.fingerprint(key)
        return wanted is None or wanted.digest != status["artifact"]["fingerprint"]

    def _name(self, key: Key) -> str:
        """As its result is called."""
        length = self._lengths.get(key)
        return PromptResult(
            model=key.model,
            prompt=key.prompt,
            tokens=None,
            size_bytes=None,
            build_ms=None,
            length=length,
            states={},
        ).name

    def _why_nothing(self) -> RkcachedError:
        """The error of the only prompt, or what all have met.

        Its kind decides about the exit code.
        """
        error = self._errors[-1] if self._is_gone else self._errors[0]
        if not isinstance(error, RequestError):
            return error

        more = ""
        if len(self._errors) > 1:
            more = f"; {len(self._errors) - 1} more could not be measured either"

        hint = "`rkcached status` says what is wrong with each prompt"
        kinds: dict[str, type[RkcachedError]] = {
            "prompt_blocked": SourceError,
            "model_unavailable": ModelLoadError,
        }
        if error.code in kinds:  # 503 for a client; for this command, an input that cannot be used
            return kinds[error.code](error.message + more, hint=hint)
        return RequestError(error.status, error.message + more, code=error.code, hint=hint)


def _result(
    key: Key,
    length: int | None,
    text: str | None,
    status: dict[str, Any],
    states: dict[State, Measured],
) -> PromptResult:
    artifact = status.get("artifact") or {}
    build_ms = None
    if artifact:
        build_ms = round(artifact["build_ms"], 1)
    text_digest = ""
    if text is not None and length is None:
        text_digest = hashlib.sha256(text.encode()).hexdigest()

    return PromptResult(
        model=key.model,
        prompt=key.prompt,
        tokens=artifact.get("tokens"),
        size_bytes=artifact.get("size_bytes"),
        build_ms=build_ms,
        length=length,
        text_digest=text_digest,
        states=states,
        no_gain=trust.why_no_gain(status, states),
        reduction=trust.reductions(states),
        build_saw_no_gain=bool(artifact) and not artifact["gain"],
    )


def _check(wanted: Sequence[str], options: Options) -> None:
    """Errors: UsageError."""
    prompts = [name for name in wanted if "/" in name]
    if options.sweep and prompts:
        model = prompts[0].partition("/")[0]
        raise UsageError(
            f"a sweep measures models, and {prompts[0]!r} names a prompt",
            hint=f"name models only, as in `rkcached bench --sweep {model}`, or leave --sweep out",
        )


def _keys(status: dict[str, Any], wanted: Sequence[str]) -> list[Key]:
    known = [Key(p["model"], p["prompt"]) for p in status["prompts"] if p["state"] != "orphan"]
    for text in wanted:
        if not any(text in (key.model, str(key)) for key in known):
            hint = hint_for(text, map(str, known))
            raise SourceError(f"there is no prompt of {text!r}", hint=hint)

    chosen = [key for key in known if not wanted or key.model in wanted or str(key) in wanted]
    if not chosen:
        raise SourceError(
            "the daemon has no prompts", hint="declare one in the manifest, or measure with --sweep"
        )

    return chosen


def _models(status: dict[str, Any], wanted: Sequence[str]) -> list[str]:
    """Errors: SourceError."""
    known = [model["name"] for model in status["models"] if not model["embedding"]]
    named = [text.partition("/")[0] for text in wanted]
    for name in named:
        if name not in known:
            raise SourceError(
                f"there is no model {name!r} that answers", hint=hint_for(name, known)
            )

    if not known:
        raise SourceError(
            "the daemon has no model that answers", hint="declare one in the manifest"
        )

    return [name for name in known if not named or name in named]


def _places(settings: Settings, status: dict[str, Any]) -> Settings:
    """The places of the daemon's manifest and store, by its own status unless others were named."""
    places: dict[str, Any] = {
        "manifest": Path(status["manifest"]["file"]),
        "cache_dir": Path(status["cache"]["directory"]),
    }
    for name in ("manifest", "cache_dir", "state_dir"):
        if name in settings.model_fields_set:
            places[name] = getattr(settings, name)
    return Settings(**places)


def _try_look(places: Settings) -> tuple[Observation | None, str]:
    try:
        return look_at(places.manifest, places.cache_dir, places.state_dir), ""
    except NotPossible as error:
        return None, str(error)


def _context_tokens(look: Observation | None, model: str) -> int | None:
    config = None
    if look is not None:
        config = look.manifest.models.get(model)
    if config is not None:
        return config.params.max_context_len or None
    return None


def _status_of(status: dict[str, Any], key: Key) -> dict[str, Any]:
    gone = {"state": "missing", "reason": "it was removed meanwhile", "hint": ""}
    return next((p for p in status["prompts"] if (p["model"], p["prompt"]) == key), gone)


def _unwind_on_signals() -> None:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that stored prompts and the engine go.

    Nohup stays.
    """
    signal.signal(signal.SIGTERM, _leave)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _leave)


def _leave(_number: int, _frame: object) -> NoReturn:
    """Once: a closed terminal sends more than one, and none must break off what is taken down."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt
