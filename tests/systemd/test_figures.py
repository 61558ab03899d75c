"""The figures of the service.

What does not depend on other programs is held, the rest is shown (`pytest -s`).

docs/figures.md has what was measured on a machine that was left alone.
"""

from __future__ import annotations

import os
import re
import time

import pytest
from machine import UNIT, Machine

from tests.waiting import wait_until

pytestmark = pytest.mark.long

RUNS = int(os.environ.get("RKCACHED_FIGURE_RUNS", "3"))
IDLE_S = float(os.environ.get("RKCACHED_IDLE_S", "5"))


def test_start_memory_and_idle_wakeups_with_200_fresh_prompts(machine: Machine) -> None:
    """Less than 70 MB without a model, and at rest only the watchdog and the rescan wake it."""
    machine.declare({f"p{number:03}": f"You are prompt {number}.\n" * 20 for number in range(200)})
    machine.systemctl("start", UNIT)
    machine.wait_line("200 fresh")
    ready_s, reload_s = [], []
    for _ in range(RUNS):
        machine.systemctl("restart", UNIT)
        assert machine.show("StatusText") == "200 fresh, 0 blocked"
        ready_us, started_us = (
            int(machine.show(name))
            for name in ("ActiveEnterTimestampMonotonic", "ExecMainStartTimestampMonotonic")
        )
        ready_s.append((ready_us - started_us) / 1e6)
        started = time.monotonic()
        machine.systemctl("reload", UNIT)
        reload_s.append(time.monotonic() - started)
    [resident_kb] = re.findall(
        r"VmRSS:\s+(\d+) kB", machine.read(f"/proc/{machine.main_pid}/status")
    )
    assert int(resident_kb) / 1000 <= 70
    woke = []

    def rests() -> bool:
        before = wakeups(machine)
        time.sleep(IDLE_S)  # this is what is measured
        woke.append(wakeups(machine) - before)
        return woke[-1] <= 15 * IDLE_S / 5

    wait_until(rests, lambda: f"it comes to rest; it woke {woke} times in {IDLE_S} s")
    print(
        f"\nexec to READY {ready_s} s; reload {reload_s} s; resident {int(resident_kb) / 1000} MB; "
        f"woke {woke} times in {IDLE_S} s"
    )


def wakeups(machine: Machine) -> int:
    """How often any thread of the daemon went to sleep so far."""
    lines = machine.run("sh", "-c", f"cat /proc/{machine.main_pid}/task/*/status").stdout
    return sum(
        int(count)
        for count in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", lines, re.MULTILINE)
    )
