"""`rkcached doctor`: whether this board is ready for what the manifest declares.

Only reads: /sys, /proc, /dev, the runtime library, the ends of model files. What belongs to the
board is read below `root`, so that a test can give it a board made of files; what the manifest
names is read where that is. Each check is one sentence and one next step, and none stops the
others. What only RKLLM needs is a failure where the manifest asks for it or is absent, and
no more than a warning where it asks for another engine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkcached.api import words
from rkcached.cli import first_answer, output, service_checks
from rkcached.cli.board import Board, Check, Outcome, model_bytes, order, size_of
from rkcached.cli.service_view import running_status, view_of
from rkcached.cli.store_check import store_check
from rkcached.cli.windows import context_bytes
from rkcached.engines.llamacpp.header import read_header
from rkcached.engines.registry import ENGINES
from rkcached.errors import ManifestError, RkcachedError, SourceError, counted
from rkcached.host import confine, landlock
from rkcached.host.digests import Digests
from rkcached.host.settings import Settings
from rkcached.messages.sandbox import Renderer
from rkcached.plan.desired import Resolver
from rkcached.plan.remarks import Remark, notices
from rkcached.sources.manifest import Manifest, ModelConfig
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import Key, ModelSource, RuntimeSource, Sources, Trouble

if TYPE_CHECKING:
    from rkcached.cli import forms

NO_NPU: Final = (
    "no Rockchip NPU here: the RKLLM engine cannot run; `engine: {kind: llamacpp}` works here, "
    "and so do check, plan, explain, inspect and every other command"
)
_TOOLKIT: Final = re.compile(rb"rkllm-toolkit version: ([0-9][0-9A-Za-z.]{0,31})")
_TAIL_BYTES: Final = 64 << 10


_STYLE: Final = {
    Outcome.OK: "green",
    Outcome.WARN: "yellow",
    Outcome.FAIL: "red",
    Outcome.SKIP: "dim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    npu: bool
    """Whether this machine has a Rockchip NPU, by its SoC or its device nodes."""
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.outcome is Outcome.FAIL for check in self.checks)


def run(settings: Settings, *, want_json: bool) -> int:
    # Without a name, a manifest that is not there is no mistake.
    named = "manifest" in settings.model_fields_set or not _is_missing(settings.manifest)
    report = examine(settings.manifest if named else None, settings.cache_dir)
    if named:
        report = replace(report, checks=service_checks.merged(report.checks, settings))

    if want_json:
        output.print_json(report_data(report))
    else:
        print_report(output.console(), report)

    if report.failed:
        return 1
    return os.EX_OK


def _is_missing(path: Path) -> bool:
    """Whether it is known not to be there: who may not look into its folder does not know."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def examine(manifest_file: Path | None, cache_dir: Path, *, root: Path = Path("/")) -> Report:
    """Every check that applies.

    Blocking; never raises for what it finds. Without a manifest: the board alone.
    """
    manifest, about_manifest = _read_manifest(manifest_file)
    uses_rkllm = None
    if manifest:
        uses_rkllm = ENGINES[manifest.engine.kind].on_npu

    board = Board(root, uses_rkllm=uses_rkllm)
    checks = [about_manifest, board.soc(), board.library(manifest), board.devices(), board.driver()]
    checks += [board.npu_clock(), board.ddr_clock(), board.cpu_clock()]
    checks.append(_confinement(manifest))
    if manifest is not None:
        files = _look_at(manifest)
        checks += _engine(manifest)
        checks += _models(manifest, board.runtime_version, files)
        checks += board.cpus(manifest)
        checks += [
            _prompts(files),
            board.memory(manifest, _windowed_bytes(manifest, files.sources)),
            store_check(manifest, files.sources, cache_dir),
            *first_answer.checks(manifest, files.status),
        ]

    return Report(npu=board.has_npu, checks=tuple(checks))


def report_data(report: Report) -> forms.Examined:
    """The report as `rkcached doctor --json` prints it."""
    return {
        "format": 1,
        "ready": not report.failed,
        "npu": report.npu,
        "checks": list(map(_finding, report.checks)),
    }


def _finding(check: Check) -> forms.Finding:
    return {
        "name": check.name,
        "outcome": check.outcome.value,
        "finding": check.finding,
        "next_step": check.next_step,
    }


def print_report(console: Console, report: Report) -> None:
    if not report.npu:
        console.print(Text(NO_NPU, style="bold"))

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    for check in report.checks:
        text = Text(check.finding, style="dim" if check.outcome is Outcome.SKIP else "")
        if check.next_step:
            text.append(f"\n{check.next_step}", style="dim")
        table.add_row(Text(check.outcome.value, style=_STYLE[check.outcome]), check.name, text)

    console.print(table)
    counts = Counter(check.outcome for check in report.checks)
    words = {
        Outcome.OK: "ok",
        Outcome.WARN: "to look at",
        Outcome.FAIL: "failed",
        Outcome.SKIP: "skipped",
    }
    summary = ", ".join(
        f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome]
    )
    console.print(Text(summary, style="bold"))


def _read_manifest(file: Path | None) -> tuple[Manifest | None, Check]:
    if file is None:
        finding = "no manifest, so only the board is examined"
        return None, Check("manifest", Outcome.SKIP, finding, "name one with --manifest")

    try:
        manifest = read_manifest(file)
    except ManifestError as error:
        finding = f"{error.message}; only the board is examined"
        next_step = f"rkcached check --manifest {file}"
        return None, Check("manifest", Outcome.FAIL, finding, next_step)

    models = counted(len(manifest.models), "model")
    finding = f"{file}: engine {manifest.engine.kind.value}, {models}"
    return manifest, Check("manifest", Outcome.OK, finding)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Troubles of the files that the manifest names, as the daemon sees them."""

    models: Mapping[str, Trouble]
    unlisted_models: Mapping[str, Trouble]
    prompts: Mapping[Key, Trouble]
    sources: Sources
    remarks: Sequence[Remark]
    status: dict[str, Any] | None
    """Of the daemon that runs with this manifest."""


class _Unread(Digests):
    """Opens a file, and does not read it."""

    def _sha256(self, _: BufferedReader) -> str:
        return ""


def _look_at(manifest: Manifest) -> _Found:
    """Without what is wrong with the engine, which is a check of its own."""
    sources = SourceReader(_Unread()).scan(manifest)
    runtime = sources.runtime
    if isinstance(runtime, Trouble):
        sources = replace(sources, runtime=RuntimeSource(version="", digest=""))

    desired = Resolver(Renderer().compile).resolve(manifest, sources)
    settings = Settings(manifest=manifest.file).of_client()
    service = view_of(settings, manifest, sources).without(runtime)
    return _Found(
        models=service.models_in_trouble(manifest, desired),
        unlisted_models={**sources.unlisted_models, **service.unlisted_models},
        prompts=service.prompts_in_trouble(manifest, sources, desired),
        sources=sources,
        remarks=notices(manifest, sources),
        status=running_status(settings),
    )


def _windowed_bytes(manifest: Manifest, sources: Sources) -> dict[str, int]:
    """The bytes that the context of each model with sliding windows takes in memory."""
    engine = ENGINES[manifest.engine.kind]
    sizes = {}
    for name, config in manifest.models.items():
        source = sources.models[name]
        if isinstance(source, ModelSource):
            with contextlib.suppress(OSError):
                sizes[name] = context_bytes(engine, config, source)

    return sizes


def _engine(manifest: Manifest) -> Iterator[Check]:
    """Check the installation of an engine other than RKLLM, whose library is the board's."""
    kind = manifest.engine.kind
    if ENGINES[kind].on_npu:
        return

    try:
        runtime = ENGINES[kind].locate_runtime(manifest.engine.library, manifest.engine.abi)
    except RkcachedError as error:
        yield Check("engine", Outcome.FAIL, error.message, error.hint)
    else:
        yield Check("engine", Outcome.OK, f"{kind.value} {runtime.version}")


def _confinement(manifest: Manifest | None) -> Check:
    """Whether the kernel confines workers, which run foreign code on foreign files."""
    name = "confinement"
    if manifest is not None and not manifest.engine.confine:
        finding = "workers are not confined: the manifest says engine.confine: false"
        return Check(name, Outcome.WARN, finding, "remove it, unless the library needs it")

    version = landlock.version()
    lacks = []
    if not version:
        lacks.append("it cannot deny them files (Landlock, since Linux 5.13)")
    if not confine.has_filters():
        lacks.append("it cannot filter their system calls (seccomp, on x86_64 and aarch64)")
    if lacks:
        finding = f"this kernel confines workers only in part: {' and '.join(lacks)}"
        step = (
            "everything works without it, but code that took over a worker could do more "
            "(docs/security.md)"
        )
        return Check(name, Outcome.WARN, finding, step)
    finding = "workers can open only their own files, and use only the system calls that they need"
    return Check(name, Outcome.OK, f"{finding} (Landlock {version}, seccomp)")


def _prompts(files: _Found) -> Check:
    troubles = [*files.unlisted_models.values(), *files.prompts.values()]
    if not troubles:
        finding = f"{counted(len(files.sources.prompts), 'prompt')}, all readable"
        empty = [notice.text for notices in files.sources.notices.values() for notice in notices]
        if empty:
            next_step = "mount the folder or put its files back; or take it out of prompts_from"
            return Check("prompts", Outcome.WARN, f"{finding}; {empty[0]}", next_step)
        return Check("prompts", Outcome.OK, finding)

    more = ""
    if len(troubles) > 1:
        more = f", and {len(troubles) - 1} more with such problems"

    finding = troubles[0].message + more
    next_step = troubles[0].hint or "`rkcached check` names its line"
    return Check("prompts", Outcome.FAIL, finding, next_step)


def _models(manifest: Manifest, runtime_version: str | None, files: _Found) -> Iterator[Check]:
    for model, config in manifest.models.items():
        name = f"model {model}"
        path = config.path
        size = size_of(path)
        trouble = files.models.get(model)

        if trouble is not None:
            yield Check(name, Outcome.FAIL, trouble.message, trouble.hint)
        elif size is None:
            finding = f"{path} is not a file" if os.path.lexists(path) else f"{path} is missing"
            next_step = "`rkcached check` names its line"
            yield Check(name, Outcome.FAIL, finding, next_step)
        elif ENGINES[manifest.engine.kind].on_npu:
            yield _with_remarks(_rkllm_model(name, path, size, runtime_version), files.remarks)
        else:
            yield _with_remarks(_other_model(name, manifest, config), files.remarks)


def _with_remarks(check: Check, remarks: Sequence[Remark]) -> Check:
    """The check of a model, with what works but gives less than its owner may know."""
    texts = [remark.text for remark in remarks if f"model {remark.place[1]}" == check.name]
    if check.outcome is not Outcome.OK or not texts:
        return check
    return replace(check, outcome=Outcome.WARN, finding="; ".join((check.finding, *texts)))


def _other_model(name: str, manifest: Manifest, config: ModelConfig) -> Check:
    """The model of an engine other than RKLLM."""
    try:
        files = ENGINES[manifest.engine.kind].inspect_model(config.path, read_header).files
    except SourceError as error:
        return Check(name, Outcome.FAIL, error.message, error.hint)
    except OSError as error:
        finding = f"{error.filename or config.path} cannot be read: {error.strerror}"
        next_step = "check its permissions, and those of the directories above it"
        return Check(name, Outcome.FAIL, finding, next_step)

    finding = f"{config.path}, {words.size(model_bytes(manifest, config))}"
    if len(files) > 1:
        finding += f" in {len(files)} files"
    return Check(name, Outcome.OK, finding)


def _rkllm_model(name: str, path: Path, size: int, runtime_version: str | None) -> Check:
    try:
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            toolkits = _TOOLKIT.findall(file.read(_TAIL_BYTES))
    except OSError as error:
        return Check(name, Outcome.FAIL, f"{path} cannot be read: {error.strerror}")

    shown = f"{path}, {words.size(size)}"
    if not toolkits:
        finding = f"{shown}: it does not name the rkllm-toolkit that made it; not an RKLLM model?"
        next_step = "the RKLLM engine loads .rkllm files only, which rkllm-toolkit makes on a PC"
        return Check(name, Outcome.WARN, finding, next_step)

    toolkit = toolkits[-1].decode().rstrip(".")
    if runtime_version is None:
        finding = (
            f"{shown}, made by rkllm-toolkit {toolkit}; there is no runtime to compare it with"
        )
        return Check(name, Outcome.OK, finding)

    finding = f"{shown}, made by rkllm-toolkit {toolkit} for runtime {runtime_version}"
    if order(toolkit) > order(runtime_version):
        finding = (
            f"{shown}: made by rkllm-toolkit {toolkit}, which is newer than the runtime, "
            f"{runtime_version}"
        )
        next_step = (
            f"install runtime {toolkit} or newer, or convert the model with toolkit "
            f"{runtime_version}"
        )
        return Check(name, Outcome.FAIL, finding, next_step)

    return Check(name, Outcome.OK, finding)
