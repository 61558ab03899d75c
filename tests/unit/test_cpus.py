"""The kernel's lists of CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.host.cpus import absent, numbers_in


@pytest.mark.parametrize(
    ("listed", "numbers"), [("0", {0}), ("0-3", {0, 1, 2, 3}), ("0,2-3,8", {0, 2, 3, 8})]
)
def test_lists_of_the_kernel(listed: str, numbers: set[int]) -> None:
    """Single numbers and ranges."""
    assert numbers_in(listed) == numbers


def test_cpus_of_this_machine() -> None:
    """It has the first, and says which it has where one is absent."""
    assert absent([]) == absent([0]) == ""
    assert absent([0, 99_999]).startswith("CPU 99999 does not exist here, this machine has CPUs 0")


@pytest.mark.parametrize("text", [None, "", "many"])
def test_where_nobody_knows_nothing_is_said(tmp_path: Path, text: str | None) -> None:
    """Without the kernel's list, or with one that cannot be understood."""
    if text is not None:
        (tmp_path / "sys/devices/system/cpu").mkdir(parents=True)
        (tmp_path / "sys/devices/system/cpu/present").write_text(text)
    assert absent([99], tmp_path) == ""
