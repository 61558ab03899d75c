"""Measures on the running daemon what its clients gain from each prompt cache."""

from __future__ import annotations

import contextlib
import datetime as dt
import platform
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from rkcached import __version__
from rkcached.cli.bench import sweep, trust
from rkcached.cli.bench.alone import NotPossible, look_at, model_facts
from rkcached.cli.bench.asking import ANSWER_TOKENS, QUESTION
from rkcached.cli.bench.machine import Steal, machine
from rkcached.cli.bench.progress import Shown
from rkcached.cli.bench.results import FORMAT, Ended, Parameters, Results, Versions
from rkcached.cli.bench.series import Series
from rkcached.cli.client import Client
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.errors import DaemonUnreachable, SourceError, UsageError
from rkcached.host.settings import Settings
from rkcached.reconcile.observer import Observation
from rkcached.sources.names import hint_for
from rkcached.sources.records import Key

NOT_ON_NPU = (
    "the NPU would have to hold the model twice; with --direct the daemon unloads it meanwhile"
)


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
            bench = Series(client, options.runs, kept.lengths, look, shown, direct=direct)
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
        format=FORMAT,
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
        first_answers=bench.first_answers,
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
            "the daemon ended: the results have only what was measured until then",
            hint="its log says why; measure the rest when it is back",
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
