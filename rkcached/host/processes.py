"""Tells what a process of this machine uses (proc(5))."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

# Fields of /proc/PID/stat after the name of the program, which may have blanks.
_USER_TIME: Final = 11
_SYSTEM_TIME: Final = 12


class Usage(NamedTuple):
    memory_bytes: int
    """Resident, with the pages of files that it maps, such as a model's."""
    cpu_s: float
    """CPU time since its start, in seconds."""


def usage(pid: int, proc: Path = Path("/proc")) -> Usage | None:
    """None if the process has ended, or nothing may be read of it."""
    try:
        pages = int((proc / str(pid) / "statm").read_text().split()[1])
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
    except (OSError, ValueError, IndexError):
        return None
    return Usage(
        memory_bytes=pages * os.sysconf("SC_PAGE_SIZE"), cpu_s=ticks / os.sysconf("SC_CLK_TCK")
    )
