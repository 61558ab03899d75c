"""The promised figures, with room for machines that are busy; docs/systemd.md has what was measured."""

from __future__ import annotations

import re
import time

from machine import UNIT, Machine


def test_start_memory_and_idle_wakeups_with_200_fresh_prompts(machine: Machine) -> None:
    """READY soon, less than 70 MB without a model, and at rest only the watchdog and the rescan."""
    machine.declare({f"p{number:03}": f"You are prompt {number}.\n" * 20 for number in range(200)})
    machine.systemctl("start", UNIT)
    machine.wait_line("200 fresh")
    machine.systemctl("restart", UNIT)
    assert machine.show("StatusText") == "200 fresh, 0 blocked"
    ready_us, started_us = (
        int(machine.show(name)) for name in ("ActiveEnterTimestampMonotonic", "ExecMainStartTimestampMonotonic")
    )
    assert (ready_us - started_us) / 1e6 < 2.0
    started = time.monotonic()
    machine.systemctl("reload", UNIT)
    assert time.monotonic() - started < 1.0
    [resident_kb] = re.findall(r"VmRSS:\s+(\d+) kB", machine.read(f"/proc/{machine.main_pid}/status"))
    assert int(resident_kb) / 1000 <= 70
    before = wakeups(machine)
    time.sleep(5)  # this is what is measured
    assert wakeups(machine) - before <= 15


def wakeups(machine: Machine) -> int:
    """How often any thread of the daemon went to sleep so far."""
    lines = machine.run("sh", "-c", f"cat /proc/{machine.main_pid}/task/*/status").stdout
    return sum(int(count) for count in re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", lines, re.MULTILINE))
