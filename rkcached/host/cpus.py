"""Tells which CPUs this machine has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

_PRESENT: Final = "sys/devices/system/cpu/present"


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


def numbers_in(listed: str) -> set[int]:
    """The numbers in a list of the kernel's, such as 0-3,6. Errors: ValueError."""
    numbers: set[int] = set()
    for part in listed.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
