"""The kernel's lists of CPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rkcached.host.cpus import absent, fast, listed, numbers_in


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


def test_lists_like_the_kernels() -> None:
    for text in ("", "0", "0-3", "0,2-3,8"):
        assert listed(numbers_in(text) if text else ()) == text


CAPACITY, FREQUENCY = "cpu_capacity", "cpufreq/cpuinfo_max_freq"

MACHINES = {
    "RK3588: 4 A55, 4 A76 of two clusters": (CAPACITY, [414] * 4 + [1015] * 2 + [1024] * 2, "4-7"),
    "RK3588 whose kernel tells frequencies only": (
        FREQUENCY,
        [1_800_000] * 4 + [2_256_000] * 2 + [2_400_000] * 2,
        "4-7",
    ),
    "RK3576: 4 A53, 4 A72": (CAPACITY, [430] * 4 + [1024] * 4, "4-7"),
    "RK3562: 4 A53": (CAPACITY, [1024] * 4, "0-3"),
    "RK3568: 4 A55": (FREQUENCY, [1_992_000] * 4, "0-3"),
    "RV1126B: 4 A53": (FREQUENCY, [1_600_000] * 4, "0-3"),
    "Raspberry Pi 5: 4 A76": (FREQUENCY, [2_400_000] * 4, "0-3"),
    "big cores first": (CAPACITY, [1024] * 2 + [381] * 6, "0-1"),
    "x86: 4 fast cores of two speeds, 4 slow ones": (
        FREQUENCY,
        [5_200_000] * 6 + [5_400_000] * 2 + [3_900_000] * 4,
        "0-7",
    ),
    "one core": (FREQUENCY, [1_200_000], "0"),
}


def machine(root: Path, kind: str, speeds: list[int]) -> set[int]:
    """Make the files of such a machine; returns its CPUs."""
    for cpu, speed in enumerate(speeds):
        file = root / f"sys/devices/system/cpu/cpu{cpu}" / kind
        file.parent.mkdir(parents=True)
        file.write_text(f"{speed}\n")
    return set(range(len(speeds)))


@pytest.mark.parametrize("name", MACHINES)
def test_fast_ones(tmp_path: Path, name: str) -> None:
    kind, speeds, expected = MACHINES[name]
    assert listed(fast(machine(tmp_path, kind, speeds), tmp_path)) == expected


def test_llama_cpp_stays_on_them() -> None:
    """In a process of its own, which then keeps to them."""
    code = (
        "from rkcached.engines.llamacpp import engine; first = min(engine.cpus.usable());"
        "engine.cpus.fast = lambda usable: {first};"
        "assert engine._take_fast_cpus() == 1; assert engine.cpus.usable() == {first}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_those_that_may_be_used_are_compared(tmp_path: Path) -> None:
    """As in a container, or under taskset: the fastest of them may be slow ones."""
    machine(tmp_path, CAPACITY, [414] * 4 + [1024] * 4)
    assert fast({0, 1}, tmp_path) == {0, 1}
    assert fast({3, 4}, tmp_path) == {4}
    assert fast((), tmp_path) == set()


def test_all_are_fast_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    """Virtual machines tell neither; nor is half of an answer one."""
    assert fast({0, 1}, tmp_path) == {0, 1}
    machine(tmp_path, CAPACITY, [1024, 414])
    assert fast({0, 1, 2}, tmp_path) == {0, 1, 2}
    (tmp_path / "sys/devices/system/cpu/cpu1/cpu_capacity").write_text("fast")
    assert fast({0, 1}, tmp_path) == {0, 1}
