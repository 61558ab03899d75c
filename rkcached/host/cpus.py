"""Tells which CPUs this machine has, and which of them are fast.

Boards have fast and slow cores: on RK3588 four Cortex-A76 and four A55. Where all take a share of
one computation, the fast ones wait for the slow ones.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

_PRESENT: Final = "sys/devices/system/cpu/present"

# What Linux says of the speed of a CPU (Documentation/ABI/testing/sysfs-devices-system-cpu): its
# capacity where the device tree tells it, else the highest frequency.
_SPEEDS: Final = ("cpu_capacity", "cpufreq/cpuinfo_max_freq")

_NEARLY: Final = 0.8
"""The fast cores of one machine differ by some per cent of speed, slow ones by a quarter or more:
on RK3588 A76 have 2.2 to 2.4 GHz, A55 1.8 GHz."""


def absent(wanted: Iterable[int], root: Path = Path("/")) -> str:
    """A sentence on the numbers that no CPU here has; empty if there are none, or nobody knows."""
    try:
        listed = (root / _PRESENT).read_text().strip()
        present = numbers_in(listed)
    except (OSError, ValueError):
        return ""

    missing = sorted(set(wanted) - present)
    if not missing:
        return ""

    named = ", ".join(map(str, missing))
    subject = f"CPU {named} does"
    if len(missing) > 1:
        subject = f"CPUs {named} do"
    return f"{subject} not exist here, this machine has CPUs {listed}"


def usable() -> set[int]:
    """Those that this process may run on."""
    return os.sched_getaffinity(0)


def fast(candidates: Collection[int], root: Path = Path("/")) -> set[int]:
    """Those that are not much slower than the fastest; all, if the kernel does not tell."""
    for speed in _SPEEDS:
        try:
            speeds = {
                cpu: int((root / f"sys/devices/system/cpu/cpu{cpu}" / speed).read_text())
                for cpu in candidates
            }
        except (OSError, ValueError):
            continue

        fastest = max(speeds.values(), default=0)
        return {cpu for cpu, one in speeds.items() if one >= _NEARLY * fastest}

    return set(candidates)


def listed(numbers: Iterable[int]) -> str:
    """The numbers as the kernel lists them, such as 0-3,6."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])

    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def numbers_in(listed: str) -> set[int]:
    """The numbers in a list of the kernel's, such as 0-3,6. Errors: ValueError."""
    numbers: set[int] = set()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
