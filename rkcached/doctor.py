"""`rkcached doctor`: whether this board is ready for what the manifest declares.

Only reads: /sys, /proc, /dev, the runtime library, the ends of model files. What belongs to the board is read below
`root`, so that a test can give it a board made of files; what the manifest names is read where the manifest says.
Each check is one sentence and one next step, and none stops the others. What only RKLLM needs is a failure where the
manifest asks for it or says nothing, and no more than a warning where it asks for another engine.
"""

from __future__ import annotations

import grp
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkcached import show
from rkcached.engines.rkllm.abi import ABIS
from rkcached.engines.rkllm.identify import choose_abi, identify
from rkcached.errors import ManifestError, RuntimeLibraryError
from rkcached.manifest import EngineConfig, EngineKind, Manifest
from rkcached.observe import read_manifest

NO_NPU: Final = (
    "no Rockchip NPU here: the RKLLM engine cannot run; `engine: {kind: llamacpp}` works here, "
    "and so do check, plan, explain, inspect and every other command"
)
OLDEST_DRIVER: Final = (0, 9, 8)
"""Documented by the vendor for RKLLM 1.1 and later."""
ROUGH_BYTES_PER_PROMPT: Final = 100_000_000
"""About 870 tokens of Qwen3-0.6B (114,688 bytes a token); models differ by a factor of ten."""

_SOCS: Final = ("rk3588", "rk3576", "rk3562", "rv1126b")
_SOC: Final = re.compile(f"({'|'.join(_SOCS)})[a-z0-9]{{0,2}}")  # a variant's name is longer: rk3588s
_NPU_DEVICE: Final = re.compile(r"[0-9a-f]+\.npu|npu@[0-9a-f]+|RKNPU")
_VERSION: Final = re.compile(r"\d+(?:\.\d+)+")
_TOOLKIT: Final = re.compile(rb"rkllm-toolkit version: ([0-9][0-9A-Za-z.]{0,31})")
_TAIL_BYTES: Final = 64 << 10
_MAX_FACT_BYTES: Final = 64 << 10


class Outcome(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


_STYLE: Final = {Outcome.OK: "green", Outcome.WARN: "yellow", Outcome.FAIL: "red", Outcome.SKIP: "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at: the finding in a sentence, and the next thing to do about it (may be empty)."""

    name: str
    outcome: Outcome
    finding: str
    next_step: str = ""


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


class Board:
    """What belongs to the machine, read below `root`. `uses_rkllm` is None where no manifest says."""

    def __init__(self, root: Path, *, uses_rkllm: bool | None) -> None:
        self._root = root
        self._uses_rkllm = uses_rkllm
        self._nodes = list(self._npu_nodes())
        self.model = self._fact("/proc/device-tree/model") or ""
        compatible = re.split("[\0\n]", self._fact("/proc/device-tree/compatible") or "")
        names = [entry.removeprefix("rockchip,") for entry in compatible if entry.startswith("rockchip,")]
        self._soc = next((name for name in names if _SOC.fullmatch(name)), "")
        self.has_npu = bool(self._soc or self._nodes)
        self.runtime_version: str | None = None

    # Facts

    def _below(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _shown(self, path: Path) -> str:
        """A path as it is on the board."""
        return f"/{path.relative_to(self._root)}"

    def _glob(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted(self._root.glob(pattern.lstrip("/")))]

    def _fact(self, path: str | Path) -> str | None:
        """A small file of the kernel's, without the white space and the NUL at its end; None when it cannot be read."""
        file = self._below(path) if isinstance(path, str) else path
        try:
            with file.open("rb") as stream:
                return stream.read(_MAX_FACT_BYTES).decode(errors="replace").strip("\0 \t\r\n")
        except OSError:
            return None

    def _npu_nodes(self) -> Iterator[Path]:
        """The device nodes of the NPU. Numbers vary by kernel, so its parent device tells which they are."""
        for node in self._glob("/dev/dri/renderD*", "/dev/dri/card*"):
            device = self._below(f"/sys/class/drm/{node.name}/device")
            try:
                parent = os.readlink(device).rpartition("/")[2]  # noqa: PTH115 - a fake root's link may lead nowhere
            except OSError:
                parent = ""
            if _NPU_DEVICE.fullmatch(parent) or _NPU_DEVICE.search(self._fact(device / "uevent") or ""):
                yield node
        yield from self._glob("/dev/rknpu")

    def _wanting(self, name: str, finding: str, next_step: str = "") -> Check:
        """Something that RKLLM needs is not as it must be."""
        outcome = Outcome.WARN if self._uses_rkllm is False else Outcome.FAIL
        return Check(name=name, outcome=outcome, finding=finding, next_step=next_step)

    def _without_npu(self, name: str, finding: str, next_step: str = "") -> Check:
        """Something of the NPU that this machine cannot have: no trouble unless the manifest wants it."""
        if self._uses_rkllm:
            return Check(name=name, outcome=Outcome.FAIL, finding=finding, next_step=next_step)
        return Check(name=name, outcome=Outcome.SKIP, finding=finding)

    # Checks

    def soc(self) -> Check:
        supported = ", ".join(_SOCS).upper()
        if self._soc:
            return Check(name="board", outcome=Outcome.OK, finding=f"{self.model or 'a board'}, {self._soc.upper()}")
        here = f"{self.model} is" if self.model else "this machine is"
        if not self.has_npu:
            next_step = "use `engine: {kind: llamacpp}` on this machine, or run this on the board"
            return self._without_npu("board", f"{here} no board with one of {supported}", next_step)
        return self._wanting("board", f"{here} none of {supported}, which RKLLM supports")

    def library(self, manifest: Manifest | None) -> Check:
        """The runtime library; sets `runtime_version`."""
        name = "runtime library"
        if not self.has_npu and not self._uses_rkllm:
            return Check(name=name, outcome=Outcome.SKIP, finding="not looked for: there is no NPU to use it")
        path, told = self._below(str(EngineConfig().library)), None
        if manifest is not None and self._uses_rkllm:
            told = manifest.engine.abi
            if "library" in manifest.engine.model_fields_set:
                path = manifest.engine.library
        try:
            facts = identify(path)
            abi = choose_abi(facts, told)
        except RuntimeLibraryError as error:
            return self._wanting(name, error.message, error.hint)
        self.runtime_version = facts.version or abi.name
        said = f"RKLLM {facts.version or '(version unknown)'}, ABI {abi.name} (group {abi.group})"
        said += ", as engine.abi says" if told else ""
        if (
            facts.version is not None
            and facts.version not in abi.versions
            and any(facts.version in known.versions for known in ABIS)
        ):
            step = "remove engine.abi from the manifest: a wrong one crashes the worker"
            return Check(name=name, outcome=Outcome.WARN, finding=f"{path}: {said}, which contradicts", next_step=step)
        return Check(name=name, outcome=Outcome.OK, finding=f"{path}: {said}")

    def devices(self) -> Check:
        name = "NPU devices"
        heap = self._glob("/dev/dma_heap/*") if any(node.name == "rknpu" for node in self._nodes) else []
        nodes = [*self._nodes, *heap]
        if not self.has_npu:
            return self._without_npu(name, "there is no device node of an NPU")
        if not self._nodes:
            return self._wanting(
                name,
                "no device node in /dev/dri belongs to an NPU, and there is no /dev/rknpu",
                "boot the vendor's kernel (5.10 or 6.1) with its RKNPU driver; RKLLM cannot use that of mainline Linux",
            )
        closed = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK, effective_ids=True)]
        names = ", ".join(map(self._shown, closed or nodes))
        if not closed:
            return Check(name=name, outcome=Outcome.OK, finding=f"{names} can be opened by this user")
        finding = f"{names} cannot be opened by this user for reading and writing"
        if len(closed) < len(nodes):  # which of them a runtime opens differs by kernel and version
            return Check(name=name, outcome=Outcome.WARN, finding=finding, next_step=_how_to_open(closed))
        return self._wanting(name, finding, _how_to_open(closed))

    def driver(self) -> Check:
        name = "NPU driver"
        if not self.has_npu:
            return self._without_npu(name, "there is no NPU driver")
        places = ("/sys/module/rknpu/version", "/sys/kernel/debug/rknpu/version")
        found = next((match[0] for text in map(self._fact, places) if (match := _VERSION.search(text or ""))), None)
        if found is None:
            finding = "the driver's version cannot be read"
            next_step = (
                f"as root: sudo cat {places[1]}" if os.geteuid() else "is debugfs mounted, and the module loaded?"
            )
            return Check(name=name, outcome=Outcome.SKIP, finding=finding, next_step=next_step)
        if tuple(map(int, found.split("."))) < OLDEST_DRIVER:
            wanted = ".".join(map(str, OLDEST_DRIVER))
            finding = f"version {found} is older than {wanted}, which RKLLM asks for"
            next_step = f"update the board's kernel to one with RKNPU driver {wanted} or newer"
            return Check(name=name, outcome=Outcome.WARN, finding=finding, next_step=next_step)
        return Check(name=name, outcome=Outcome.OK, finding=f"version {found}")

    def npu_clock(self) -> Check:
        name = "NPU clock"
        if not self.has_npu:
            return self._without_npu(name, "there is no NPU clock")
        return self._devfreq(name, self._glob("/sys/class/devfreq/*npu*"))

    def ddr_clock(self) -> Check:
        return self._devfreq("DDR clock", self._glob("/sys/class/devfreq/dmc"))

    def _devfreq(self, name: str, folders: list[Path]) -> Check:
        found = [
            _Clock(
                governor=self._fact(folder / "governor") or "",
                now=_megahertz(self._fact(folder / "cur_freq"), 1_000_000),
                most=_megahertz(self._fact(folder / "max_freq"), 1_000_000),
            )
            for folder in folders
        ]
        command = f"echo performance | sudo tee {' '.join(self._shown(folder / 'governor') for folder in folders)}"
        return _judge_clocks(name, found, command)

    def cpu_clock(self) -> Check:
        found = [
            _Clock(
                governor=self._fact(policy / "scaling_governor") or "",
                now=_megahertz(self._fact(policy / "scaling_cur_freq"), 1000),
                most=_megahertz(self._fact(policy / "scaling_max_freq"), 1000),
            )
            for policy in self._glob("/sys/devices/system/cpu/cpufreq/policy*")
        ]
        command = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
        return _judge_clocks("CPU clock", found, command)

    def memory(self, manifest: Manifest) -> Check:
        """One model at a time is taken for granted: more of them fit or not by what else runs."""
        name = "memory"
        match = re.search(r"^MemAvailable:\s+(\d+) kB", self._fact("/proc/meminfo") or "", re.MULTILINE)
        if match is None:
            return Check(name=name, outcome=Outcome.SKIP, finding="/proc/meminfo does not say what is available")
        available = int(match[1]) * 1024
        sizes = {model: _size_of(config.path) or 0 for model, config in manifest.models.items()}
        largest = max(sizes, key=lambda model: sizes[model])
        if not sizes[largest]:
            finding = f"{show.size(available)} available; there is no model file to compare it with"
            return Check(name=name, outcome=Outcome.SKIP, finding=finding)
        needed = sizes[largest] * 5 // 4
        finding = f"{show.size(available)} available; {largest}, the largest model, needs about {show.size(needed)}"
        if available < needed:
            next_step = "end other programs, or use a smaller model; the figure is the file's size and 25 %"
            return Check(name=name, outcome=Outcome.WARN, finding=finding, next_step=next_step)
        return Check(name=name, outcome=Outcome.OK, finding=finding)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clock:
    governor: str
    now: float
    most: float
    """MHz, 0 where unknown."""

    @property
    def at_most(self) -> bool:
        """`userspace` at the top is what the vendor's own fix_freq scripts set."""
        return self.governor == "performance" or (self.governor == "userspace" and 0 < self.most <= self.now)

    def __str__(self) -> str:
        return f"{self.governor} ({self.now:.0f} of {self.most:.0f} MHz)" if self.now and self.most else self.governor


def _judge_clocks(name: str, clocks: list[_Clock], command: str) -> Check:
    known = [clock for clock in clocks if clock.governor]
    if not known:
        return Check(name=name, outcome=Outcome.SKIP, finding="no governor can be seen")
    finding = "governor " + ", ".join(dict.fromkeys(map(str, known)))
    if all(clock.at_most for clock in known):
        return Check(name=name, outcome=Outcome.OK, finding=finding)
    finding += ": figures will be lower and vary"
    return Check(name=name, outcome=Outcome.WARN, finding=finding, next_step=command)


def _megahertz(text: str | None, per_megahertz: int) -> float:
    return int(text) / per_megahertz if text and text.isascii() and text.isdigit() else 0.0


def _how_to_open(nodes: list[Path]) -> str:
    """The group that may, if the nodes have one; root's group is nobody to join."""
    groups = set()
    for node in nodes:
        try:
            info = node.stat()
            if info.st_gid and info.st_mode & 0o060 == 0o060:
                groups.add(grp.getgrgid(info.st_gid).gr_name)
        except (OSError, KeyError):
            continue
    if not groups:
        return 'a udev rule must give them to a group, for example GROUP="render", MODE="0660"'
    return " and ".join(f"sudo usermod -aG {group} $USER" for group in sorted(groups)) + ", and log in again"


# What the manifest names


def _size_of(path: Path) -> int | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _models(manifest: Manifest, runtime_version: str | None) -> Iterator[Check]:
    for model, config in manifest.models.items():
        name, path = f"model {model}", config.path
        size = _size_of(path)
        if size is None:
            finding = f"{path} is not a file" if os.path.lexists(path) else f"{path} is missing"
            next_step = "rkcached check names its line"
            yield Check(name=name, outcome=Outcome.FAIL, finding=finding, next_step=next_step)
        elif manifest.engine.kind is EngineKind.RKLLM:
            yield _rkllm_model(name, path, size, runtime_version)
        else:
            yield Check(name=name, outcome=Outcome.OK, finding=f"{path}, {show.size(size)}")


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
    if _order(toolkit) > _order(runtime_version):
        finding = f"{shown}: made by rkllm-toolkit {toolkit}, which is newer than the runtime, {runtime_version}"
        next_step = f"install runtime {toolkit} or newer, or convert the model with toolkit {runtime_version}"
        return Check(name=name, outcome=Outcome.FAIL, finding=finding, next_step=next_step)
    return Check(name=name, outcome=Outcome.OK, finding=finding)


def _order(version: str) -> tuple[int, int, int, float]:
    """For comparing: 1.2.1b1 comes before 1.2.1."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[A-Za-z]+(\d*))?", version)
    major, minor, patch, beta = match.groups() if match else (None, None, None, None)
    return int(major or 0), int(minor or 0), int(patch or 0), float("inf") if beta is None else int(beta or 0)


def _disk(manifest: Manifest, cache_dir: Path) -> Check:
    free = _free_bytes(cache_dir)
    used = sum(_size_of(path) or 0 for path in cache_dir.glob("*/*_cache"))
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
