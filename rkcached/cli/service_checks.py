"""Takes the service's word for the checks of `rkcached doctor` that depend on who looks.

Root may read and open what the daemon may not, so for root and the unit's manifest the command is
run a second time, as the daemon's user and in its sandbox. Of the machine itself that sandbox shows
less: there root's look counts.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from rkcached.cli.board import Check, Outcome
from rkcached.host import isolated, unit
from rkcached.host.settings import Settings

_OF_THE_MACHINE: Final = ("board", "NPU driver", "NPU clock", "DDR clock", "CPU clock", "memory")
_CHILD_S: Final = 60.0


def merged(checks: Sequence[Check], settings: Settings) -> tuple[Check, ...]:
    """The checks as the service sees them, if root asks about its unit; else as they are."""
    installed = unit.installed()
    if os.geteuid() != 0 or installed is None or not installed.uses(manifest=settings.manifest):
        return tuple(checks)

    try:
        seen = _checks_of(installed, settings)
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as error:
        finding = f"cannot look as the service does, so this is what root sees: {error}"
        next_step = "run `sudo rkcached check`, and read `systemctl status rkcached`"
        return (*checks, Check("service", Outcome.WARN, finding, next_step))

    return tuple(_of_both(own, seen[own.name]) for own in checks if own.name in seen)


def _checks_of(installed: unit.Unit, settings: Settings) -> dict[str, Check]:
    """The service's checks by name. Errors: those of starting it and of reading what it prints."""
    words = [
        "doctor",
        "--json",
        f"--manifest={settings.manifest}",
        f"--cache-dir={settings.cache_dir}",
    ]
    printed = subprocess.run(
        installed.command(words),
        env={**isolated.environment(), unit.MARK: str(installed.pid)},
        capture_output=True,
        text=True,
        timeout=_CHILD_S,
        check=False,
    ).stdout

    checks = {}
    for data in json.loads(printed)["checks"]:
        check = Check(**data)
        checks[check.name] = replace(check, outcome=Outcome(check.outcome))
    return checks


def _of_both(own: Check, seen: Check) -> Check:
    if own.name in _OF_THE_MACHINE:
        return own
    if seen.outcome is Outcome.SKIP:  # the sandbox hides what tells that there is a board
        return own
    return seen
