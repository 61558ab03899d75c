"""Checks the machine for `rkcached doctor`: SoC, library, NPU, driver, clocks, memory.

Only reads, below `root`, so that a test can give it a board made of files. Each check is one
sentence and the next thing to do.
"""

from __future__ import annotations

import grp
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from rkcached.api import words
from rkcached.engines.registry import ENGINES
from rkcached.engines.rkllm.abi import ABIS
from rkcached.engines.rkllm.identify import choose_abi, identify
from rkcached.errors import RuntimeLibraryError
from rkcached.host import cpus
from rkcached.sources.manifest import EngineConfig, Manifest, ModelConfig

OLDEST_DRIVER: Final = (0, 9, 8)
"""Documented by the vendor for RKLLM 1.1 and later."""
_SOCS: Final = ("rk3588", "rk3576", "rk3562", "rv1126b")
_SOC: Final = re.compile(
    f"({'|'.join(_SOCS)})[a-z0-9]{{0,2}}"
)  # a variant's name is longer: rk3588s
_NPU_DEVICE: Final = re.compile(r"[0-9a-f]+\.npu|npu@[0-9a-f]+|RKNPU")
_VERSION: Final = re.compile(r"\d+(?:\.\d+)+")
_MAX_FACT_BYTES: Final = 64 << 10


class Outcome(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Check:
    """One check: the finding in a sentence, and the next thing to do about it (may be empty)."""

    name: str
    outcome: Outcome
    finding: str
    next_step: str = ""


class Board:
    """The facts of the machine, read below `root`.

    `uses_rkllm` is None without a manifest.
    """

    def __init__(self, root: Path, *, uses_rkllm: bool | None) -> None:
        self._root = root
        self._uses_rkllm = uses_rkllm
        self._nodes = list(self._npu_nodes())
        self.model = self._fact("/proc/device-tree/model") or ""
        compatible = re.split("[\0\n]", self._fact("/proc/device-tree/compatible") or "")
        self._soc = ""
        for entry in reversed(compatible):
            vendor, _, name = entry.partition(",")
            if vendor == "rockchip" and _SOC.fullmatch(name):
                self._soc = name

        self.has_npu = bool(self._soc or self._nodes)
        self.runtime_version: str | None = None

    # Facts

    def _below(self, path: str) -> Path:
        return self._root / path.lstrip("/")

    def _shown(self, path: Path) -> str:
        """A path as it is on the board."""
        return f"/{path.relative_to(self._root)}"

    def _glob(self, *patterns: str) -> list[Path]:
        paths: list[Path] = []
        for pattern in patterns:
            paths += sorted(self._root.glob(pattern.lstrip("/")))

        return paths

    def _fact(self, path: str | Path) -> str | None:
        """A small file of the kernel's, without the white space and the NUL at its end.

        None when it cannot be read.
        """
        if isinstance(path, str):
            path = self._below(path)

        try:
            with path.open("rb") as stream:
                return stream.read(_MAX_FACT_BYTES).decode(errors="replace").strip("\0 \t\r\n")
        except OSError:
            return None

    def _npu_nodes(self) -> Iterator[Path]:
        """The device nodes of the NPU.

        Numbers vary by kernel, so the parent device identifies them.
        """
        for node in self._glob("/dev/dri/renderD*", "/dev/dri/card*"):
            device = self._below(f"/sys/class/drm/{node.name}/device")
            try:
                # A fake root's link may lead nowhere.
                parent = os.readlink(device).rpartition("/")[2]  # noqa: PTH115 - text, not a path
            except OSError:
                parent = ""

            if _NPU_DEVICE.fullmatch(parent) or _NPU_DEVICE.search(
                self._fact(device / "uevent") or ""
            ):
                yield node

        yield from self._glob("/dev/rknpu")

    def _wanting(self, name: str, finding: str, next_step: str = "") -> Check:
        """Something that RKLLM needs is not as it must be."""
        outcome = Outcome.WARN if self._uses_rkllm is False else Outcome.FAIL
        return Check(name, outcome, finding, next_step)

    def _without_npu(self, name: str, finding: str, next_step: str = "") -> Check:
        """A check of an NPU that is not there: skipped unless the manifest needs the NPU."""
        if self._uses_rkllm:
            return Check(name, Outcome.FAIL, finding, next_step)
        return Check(name, Outcome.SKIP, finding)

    # Checks

    def soc(self) -> Check:
        supported = ", ".join(_SOCS).upper()
        if self._soc:
            return Check("board", Outcome.OK, f"{self.model or 'a board'}, {self._soc.upper()}")

        here = "this machine is"
        if self.model:
            here = f"{self.model} is"

        if not self.has_npu:
            next_step = "use `engine: {kind: llamacpp}` on this machine, or run this on the board"
            return self._without_npu("board", f"{here} no board with one of {supported}", next_step)
        return self._wanting("board", f"{here} none of {supported}, which RKLLM supports")

    def library(self, manifest: Manifest | None) -> Check:
        """The runtime library; sets `runtime_version`."""
        name = "runtime library"
        if not self.has_npu and not self._uses_rkllm:
            return Check(name, Outcome.SKIP, "not looked for: there is no NPU to use it")

        path = self._below(str(EngineConfig().library))
        override = None
        if manifest is not None and self._uses_rkllm:
            override = manifest.engine.abi
            if "library" in manifest.engine.model_fields_set:
                path = manifest.engine.library

        try:
            facts = identify(path)
            abi = choose_abi(facts, override)
        except RuntimeLibraryError as error:
            return self._wanting(name, error.message, error.hint)

        self.runtime_version = facts.version or abi.name
        description = (
            f"RKLLM {facts.version or '(version unknown)'}, ABI {abi.name} (group {abi.group})"
        )
        if override:
            description += ", as engine.abi says"

        if (
            facts.version is not None
            and facts.version not in abi.versions
            and any(facts.version in known.versions for known in ABIS)
        ):
            step = "remove engine.abi from the manifest: a wrong one crashes the worker"
            return Check(name, Outcome.WARN, f"{path}: {description}, which contradicts", step)

        return Check(name, Outcome.OK, f"{path}: {description}")

    def devices(self) -> Check:
        name = "NPU devices"
        heap = []
        if any(node.name == "rknpu" for node in self._nodes):
            heap = self._glob("/dev/dma_heap/*")

        nodes = [*self._nodes, *heap]
        if not self.has_npu:
            return self._without_npu(name, "there is no device node of an NPU")

        if not self._nodes:
            return self._wanting(
                name,
                "no device node in /dev/dri belongs to an NPU, and there is no /dev/rknpu",
                "boot the vendor's kernel (5.10 or 6.1) with its RKNPU driver; RKLLM cannot use "
                "that of mainline Linux",
            )

        closed = [
            node for node in nodes if not os.access(node, os.R_OK | os.W_OK, effective_ids=True)
        ]
        names = ", ".join(map(self._shown, closed or nodes))
        if not closed:
            return Check(name, Outcome.OK, f"{names} can be opened by this user")

        finding = f"{names} cannot be opened by this user for reading and writing"
        if len(closed) < len(nodes):  # which of them a runtime opens differs by kernel and version
            return Check(name, Outcome.WARN, finding, _how_to_open(closed))

        return self._wanting(name, finding, _how_to_open(closed))

    def driver(self) -> Check:
        name = "NPU driver"
        if not self.has_npu:
            return self._without_npu(name, "there is no NPU driver")

        places = ("/sys/module/rknpu/version", "/sys/kernel/debug/rknpu/version")
        match = None
        for place in places:
            match = match or _VERSION.search(self._fact(place) or "")
        if match is None:
            finding = "the driver's version cannot be read"
            next_step = "mount debugfs, and check with lsmod that the module rknpu is loaded"
            if os.geteuid():
                next_step = f"as root: sudo cat {places[1]}"
            return Check(name, Outcome.SKIP, finding, next_step)

        version = match[0]
        if tuple(map(int, version.split("."))) < OLDEST_DRIVER:
            wanted = ".".join(map(str, OLDEST_DRIVER))
            finding = f"version {version} is older than {wanted}, which RKLLM asks for"
            next_step = f"update the board's kernel to one with RKNPU driver {wanted} or newer"
            return Check(name, Outcome.WARN, finding, next_step)

        return Check(name, Outcome.OK, f"version {version}")

    def npu_clock(self) -> Check:
        name = "NPU clock"
        if not self.has_npu:
            return self._without_npu(name, "there is no NPU clock")
        return self._devfreq(name, self._glob("/sys/class/devfreq/*npu*"))

    def ddr_clock(self) -> Check:
        return self._devfreq("DDR clock", self._glob("/sys/class/devfreq/dmc"))

    def _devfreq(self, name: str, folders: list[Path]) -> Check:
        clocks = []
        files = []
        for folder in folders:
            governor = folder / "governor"
            files.append(self._shown(governor))
            now = folder / "cur_freq"
            clocks.append(self._clock(governor, now, folder / "max_freq", 1_000_000))

        command = f"echo performance | sudo tee {' '.join(files)}"
        return _judge_clocks(name, clocks, command)

    def _clock(self, governor: Path, now: Path, most: Path, per_megahertz: int) -> _Clock:
        return _Clock(
            governor=self._fact(governor) or "",
            now=_megahertz(self._fact(now), per_megahertz),
            most=_megahertz(self._fact(most), per_megahertz),
        )

    def cpu_clock(self) -> Check:
        clocks = []
        for policy in self._glob("/sys/devices/system/cpu/cpufreq/policy*"):
            governor = policy / "scaling_governor"
            now = policy / "scaling_cur_freq"
            clocks.append(self._clock(governor, now, policy / "scaling_max_freq", 1000))

        command = (
            "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
        )
        return _judge_clocks("CPU clock", clocks, command)

    def cpus(self, manifest: Manifest) -> Iterator[Check]:
        """Say which CPUs llama.cpp computes on; warn of models that shall run on absent ones."""
        findings = []
        for name, model in manifest.models.items():
            if absent := cpus.absent(model.npu.enabled_cpus, self._root):
                findings.append(f"npu.enabled_cpus of {name}: {absent}")

        if findings:
            next_step = "list CPUs that exist, or remove npu.enabled_cpus"
            yield Check("CPUs", Outcome.WARN, "; ".join(findings), next_step)

        engine = manifest.engine
        present = self._fact("/sys/devices/system/cpu/present")
        if not ENGINES[engine.kind].thread_per_core or engine.threads or present is None:
            return
        usable = cpus.numbers_in(present.strip())
        fast = cpus.fast(usable, self._root)
        finding = f"llama.cpp computes on all {len(usable)} CPUs"
        if fast != usable:
            finding = (
                f"llama.cpp computes on the {len(fast)} fast CPUs of {len(usable)}: "
                f"{cpus.listed(fast)}"
            )
        yield Check("CPUs", Outcome.OK, finding)

    def memory(self, manifest: Manifest, windowed_bytes: Mapping[str, int]) -> Check:
        """One model at a time is taken for granted: more of them fit or not by what else runs.

        `windowed_bytes`: what the contexts of models with sliding windows take.
        """
        name = "memory"
        match = re.search(
            r"^MemAvailable:\s+(\d+) kB", self._fact("/proc/meminfo") or "", re.MULTILINE
        )
        if match is None:
            return Check(name, Outcome.SKIP, "/proc/meminfo does not say what is available")

        available = int(match[1]) * 1024
        sizes = {}
        for model, config in manifest.models.items():
            size = model_bytes(manifest, config)
            sizes[model] = size * 5 // 4 + windowed_bytes.get(model, 0)

        largest = max(sizes, key=lambda model: sizes[model])
        needed = sizes[largest]
        if not needed:
            finding = (
                f"{words.size(available)} available; there is no model file to compare it with"
            )
            return Check(name, Outcome.SKIP, finding)

        finding = (
            f"{words.size(available)} available; {largest}, the largest model, needs about "
            f"{words.size(needed)}"
        )
        of_context = windowed_bytes.get(largest, 0)
        if of_context:
            finding += (
                f", {words.size(of_context)} of them for its context, as its sliding windows are "
                "kept in full for the prompt caches"
            )

        if available < needed:
            next_step = (
                "end other programs, or use a smaller model; the figure is the file's size and 25 %"
            )
            if of_context:
                next_step += ", and the context: a smaller max_context_len takes less"
            return Check(name, Outcome.WARN, finding, next_step)

        return Check(name, Outcome.OK, finding)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Clock:
    governor: str
    now: float
    most: float
    """MHz, 0 where unknown."""

    @property
    def at_most(self) -> bool:
        """`userspace` at the top is what the vendor's own fix_freq scripts set."""
        return self.governor == "performance" or (
            self.governor == "userspace" and 0 < self.most <= self.now
        )

    def __str__(self) -> str:
        if self.now and self.most:
            return f"{self.governor} ({self.now:.0f} of {self.most:.0f} MHz)"
        return self.governor


def _judge_clocks(name: str, clocks: list[_Clock], command: str) -> Check:
    known = [clock for clock in clocks if clock.governor]
    if not known:
        return Check(name, Outcome.SKIP, "no governor can be seen")

    finding = "governor " + ", ".join(dict.fromkeys(map(str, known)))
    if all(clock.at_most for clock in known):
        return Check(name, Outcome.OK, finding)

    finding += ": figures will be lower and vary"
    return Check(name, Outcome.WARN, finding, command)


def _megahertz(text: str | None, per_megahertz: int) -> float:
    if text and text.isascii() and text.isdigit():
        return int(text) / per_megahertz
    return 0.0


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
    return (
        " and ".join(f"sudo usermod -aG {group} $USER" for group in sorted(groups))
        + ", and log in again"
    )


# What the manifest names


def size_of(path: Path) -> int | None:
    try:
        info = path.stat()
    except OSError:
        return None
    if stat.S_ISREG(info.st_mode):
        return info.st_size
    return None


def model_bytes(manifest: Manifest, config: ModelConfig) -> int:
    """Bytes of the files of a model that are there."""
    return sum(
        size_of(path) or 0 for path in ENGINES[manifest.engine.kind].model_files(config.path)
    )


def order(version: str) -> tuple[int, int, int, float]:
    """For comparing: 1.2.1b1 comes before 1.2.1."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[A-Za-z]+(\d*))?", version)
    major, minor, patch, beta = match.groups() if match else (None, None, None, None)
    return (
        int(major or 0),
        int(minor or 0),
        int(patch or 0),
        float("inf") if beta is None else int(beta or 0),
    )
