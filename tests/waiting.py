"""Waiting, with an end and a word about what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

DEADLINE_S = 120.0
"""Long, because disks of test machines stall; a test that passes never waits for it."""

BEFORE_RESCAN_S = 50.0
"""Less than the daemon lets pass between two looks at everything: what comes within it was seen by
its event."""


def wait_until(
    condition: Callable[[], Any], what: Callable[[], str] | str, deadline_s: float = DEADLINE_S
) -> Any:
    """Poll until `condition` is truthy and return its value; fail with `what` was waited for."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited_s = time.monotonic() - began
        if waited_s > deadline_s:
            pytest.fail(
                f"after {deadline_s} s still not: {what if isinstance(what, str) else what()}"
            )
        # What is asked costs the daemon time, too: what takes long is asked for less often.
        time.sleep(min(max(0.02, waited_s / 5), 0.15))
