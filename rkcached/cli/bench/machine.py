"""Reads what machine it is, and whether it is quiet."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from rkcached.cli.bench.results import MachineFacts
from rkcached.cli.board import Board, Outcome

QUIET_LOAD = 0.5
"""Load average (1 min) above which figures are not to be trusted."""


def machine() -> MachineFacts:
    """Taken before anything is started: what runs then is somebody else's."""
    board = Board(Path("/"), uses_rkllm=None)
    checks = [board.cpu_clock()]
    if board.has_npu:
        checks += [board.npu_clock(), board.ddr_clock()]

    known = [check for check in checks if check.outcome is not Outcome.SKIP]
    clocks_fixed = None
    if known:
        clocks_fixed = all(check.outcome is Outcome.OK for check in known)

    return MachineFacts(
        board=board.model,
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes("MemTotal"),
        kernel=f"{platform.system()} {platform.release()} {platform.machine()}",
        clocks={check.name: check.finding for check in checks},
        clocks_fixed=clocks_fixed,
        load_average=round(os.getloadavg()[0], 2),
    )


def available_bytes() -> int:
    """Memory that a new process may take; 0 where that is unknown."""
    return _memory_bytes("MemAvailable")


def _cpu_model() -> str:
    """The name from /proc/cpuinfo.

    ARM kernels give none there, but the device tree names the board.
    """
    match = re.search(r"^model name\s*:\s*(.+)$", _text("cpuinfo"), re.MULTILINE)
    if match:
        return match[1].strip()
    return _text("device-tree/model").strip("\0\n") or platform.machine()


class Steal:
    """Measures how much CPU time a hypervisor gave to others, until `percent()` (/proc/stat)."""

    def __init__(self) -> None:
        self._before = self._read()

    def percent(self) -> float:
        now = self._read()
        stolen = now[0] - self._before[0]
        total = now[1] - self._before[1]
        if total > 0:
            return round(100 * stolen / total, 2)
        return 0.0

    def _read(self) -> tuple[int, int]:
        fields = [int(word) for word in _text("stat").partition("\n")[0].split()[1:9]]
        if len(fields) == 8:
            return (fields[7], sum(fields))
        return (0, 0)


def _memory_bytes(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", _text("meminfo"), re.MULTILINE)
    if match:
        return int(match[1]) * 1024
    return 0


def _text(name: str) -> str:
    """A file of /proc; empty where there is none."""
    try:
        return Path("/proc", name).read_text(errors="replace")
    except OSError:
        return ""
