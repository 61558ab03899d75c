"""`rkcached doctor`: whether this board is ready for what the manifest declares.

Only reads: /sys, /proc, /dev, the runtime library, the ends of model files. What belongs to the board is read below
`root`, so that a test can give it a board made of files; what the manifest names is read where the manifest says.
Each check is one sentence and one next step, and none stops the others. What only RKLLM needs is a failure where the
manifest asks for it or says nothing, and no more than a warning where it asks for another engine.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkcached import show
from rkcached.board import Board, Check, Outcome, model_bytes, order, size_of
from rkcached.engines.gguf import read_header
from rkcached.engines.registry import ENGINES
from rkcached.errors import ManifestError, SourceError
from rkcached.manifest import EngineKind, Manifest, ModelConfig
from rkcached.observe import read_manifest

NO_NPU: Final = (
    "no Rockchip NPU here: the RKLLM engine cannot run; `engine: {kind: llamacpp}` works here, "
    "and so do check, plan, explain, inspect and every other command"
)
ROUGH_BYTES_PER_PROMPT: Final = 100_000_000
"""About 870 tokens of Qwen3-0.6B (114,688 bytes a token); models differ by a factor of ten."""

_TOOLKIT: Final = re.compile(rb"rkllm-toolkit version: ([0-9][0-9A-Za-z.]{0,31})")
_TAIL_BYTES: Final = 64 << 10


_STYLE: Final = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red", Outcome.SKIP: "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    npu: bool
    """Whether this machine has a Rockchip NPU, by its SoC or its device nodes."""
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.outcome is Outcome.FAIL for check in self.checks)


def examine(manifest_file: Path | None, cache_dir: Path, *, root: Path = Path("/")) -> Report:
    """Every check that applies. Blocking; never raises for what it finds. Without a manifest: the board alone."""
    manifest, about_manifest = _read_manifest(manifest_file)
    board = Board(root, uses_rkllm=manifest.engine.kind is EngineKind.RKLLM if manifest else None)
    checks = [about_manifest, board.soc(), board.library(manifest), board.devices(), board.driver()]
    checks += [board.npu_clock(), board.ddr_clock(), board.cpu_clock()]
    if manifest is not None:
        checks += _models(manifest, board.runtime_version)
        checks += [board.memory(manifest), _disk(manifest, cache_dir)]
    return Report(npu=board.has_npu, checks=tuple(checks))


def report_data(report: Report) -> dict[str, Any]:
    """The report as `rkcached doctor --json` prints it."""
    return {
        "ready": not report.failed,
        "npu": report.npu,
        "checks": [
            {"name": c.name, "outcome": c.outcome.value, "finding": c.finding, "next_step": c.next_step}
            for c in report.checks
        ],
    }


def print_report(console: Console, report: Report) -> None:
    if not report.npu:
        console.print(Text(NO_NPU, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        said = Text(check.finding, style="dim" if check.outcome is Outcome.SKIP else "")
        if check.next_step:
            said.append(f"\n{check.next_step}", style="dim")
        table.add_row(Text(check.outcome.value, style=_STYLE[check.outcome]), check.name, said)
    console.print(table)
    counts = Counter(check.outcome for check in report.checks)
    words = {Outcome.OK: "ok", Outcome.WARN: "to look at", Outcome.FAIL: "failed", Outcome.SKIP: "skipped"}
    summary = ", ".join(f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome])
    console.print(Text(summary, style="bold"))


def _read_manifest(file: Path | None) -> tuple[Manifest | None, Check]:
    if file is None:
        finding = "no manifest, so only the board is examined"
        return None, Check(name="manifest", outcome=Outcome.SKIP, finding=finding, next_step="name one with --manifest")
    try:
        manifest = read_manifest(file)
    except ManifestError as error:
        finding = f"{error.message}; only the board is examined"
        next_step = f"rkcached check --manifest {file}"
        return None, Check(name="manifest", outcome=Outcome.FAIL, finding=finding, next_step=next_step)
    models = "1 model" if len(manifest.models) == 1 else f"{len(manifest.models)} models"
    finding = f"{file}: engine {manifest.engine.kind.value}, {models}"
    return manifest, Check(name="manifest", outcome=Outcome.OK, finding=finding)


def _models(manifest: Manifest, runtime_version: str | None) -> Iterator[Check]:
    for model, config in manifest.models.items():
        name, path = f"model {model}", config.path
        size = size_of(path)
        if size is None:
            finding = f"{path} is not a file" if os.path.lexists(path) else f"{path} is missing"
            next_step = "rkcached check names its line"
            yield Check(name=name, outcome=Outcome.FAIL, finding=finding, next_step=next_step)
        elif manifest.engine.kind is EngineKind.RKLLM:
            yield _rkllm_model(name, path, size, runtime_version)
        else:
            yield _other_model(name, manifest, config)


def _other_model(name: str, manifest: Manifest, config: ModelConfig) -> Check:
    """The model of an engine other than RKLLM."""
    try:
        files = ENGINES[manifest.engine.kind].inspect_model(config.path, read_header).files
    except SourceError as error:
        return Check(name=name, outcome=Outcome.FAIL, finding=error.message, next_step=error.hint)
    except OSError as error:
        finding = f"{error.filename or config.path} cannot be read: {error.strerror}"
        return Check(name=name, outcome=Outcome.FAIL, finding=finding)

    finding = f"{config.path}, {show.size(model_bytes(manifest, config))}"
    if len(files) > 1:
        finding += f" in {len(files)} files"
    return Check(name=name, outcome=Outcome.OK, finding=finding)


def _rkllm_model(name: str, path: Path, size: int, runtime_version: str | None) -> Check:
    try:
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            found = _TOOLKIT.findall(file.read(_TAIL_BYTES))
    except OSError as error:
        return Check(name=name, outcome=Outcome.FAIL, finding=f"{path} cannot be read: {error.strerror}")
    shown = f"{path}, {show.size(size)}"
    if not found:
        finding = f"{shown}: it does not name the rkllm-toolkit that made it; not an RKLLM model?"
        next_step = "the RKLLM engine loads .rkllm files only, which rkllm-toolkit makes on a PC"
        return Check(name=name, outcome=Outcome.WARN, finding=finding, next_step=next_step)
    toolkit = found[-1].decode().rstrip(".")
    if runtime_version is None:
        finding = f"{shown}, made by rkllm-toolkit {toolkit}; there is no runtime to compare it with"
        return Check(name=name, outcome=Outcome.OK, finding=finding)
    finding = f"{shown}, made by rkllm-toolkit {toolkit} for runtime {runtime_version}"
    if order(toolkit) > order(runtime_version):
        finding = f"{shown}: made by rkllm-toolkit {toolkit}, which is newer than the runtime, {runtime_version}"
        next_step = f"install runtime {toolkit} or newer, or convert the model with toolkit {runtime_version}"
        return Check(name=name, outcome=Outcome.FAIL, finding=finding, next_step=next_step)
    return Check(name=name, outcome=Outcome.OK, finding=finding)


def _disk(manifest: Manifest, cache_dir: Path) -> Check:
    free = _free_bytes(cache_dir)
    used = sum(size_of(path) or 0 for path in cache_dir.glob("*/*_cache"))
    if manifest.cache.max_bytes:
        wanted, why = int(manifest.cache.max_bytes), "allowed by cache.max_bytes"
    else:
        count = _count_prompts(manifest)
        wanted = count * ROUGH_BYTES_PER_PROMPT
        prompts = "1 prompt" if count == 1 else f"{count} prompts"
        why = f"roughly needed by {prompts} (100 MB each; the real size depends on model and length)"
    finding = f"{show.size(free)} free at {cache_dir}, {show.size(used)} in the store; {show.size(wanted)} {why}"
    if free + used < wanted:
        next_step = "make room, name a larger disk with --cache-dir, or set cache.max_bytes"
        return Check(name="disk", outcome=Outcome.WARN, finding=finding, next_step=next_step)
    return Check(name="disk", outcome=Outcome.OK, finding=finding)


def _free_bytes(folder: Path) -> int:
    """Of the disk that `folder` is on, or will be on once it is made."""
    for place in (folder, *folder.parents):
        try:
            disk = os.statvfs(place)
        except OSError:
            continue
        return disk.f_bavail * disk.f_frsize
    return 0


def _count_prompts(manifest: Manifest) -> int:
    """Prompts declared, and those that the patterns find."""
    count = 0
    for model in manifest.models.values():
        found = {path.stem for pattern in map(Path, model.prompts_from) for path in pattern.parent.glob(pattern.name)}
        count += len(found | model.prompts.keys())
    return count
