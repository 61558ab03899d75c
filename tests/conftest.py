"""Settings of all tests: which stay together when several processes run them, and Hypothesis's."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

# A daemon that compiles its modules again at each start takes a third longer for it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes says more of the machine than of the program.
settings.register_profile("rkcached", deadline=None)
settings.load_profile("rkcached")

TOGETHER = ("tests/system/test_client_on_model.py", "tests/system/test_fuzz_api.py")
"""Files of tests/system whose tests share a daemon; elsewhere there each test has its own."""


def scope(nodeid: str) -> str:
    """The tests of one scope run one after the other, in one process.

    tests/systemd shares a booted machine. Tests of a file share fixtures of their module, apart
    from those of the installed program: there each goes to whoever is free, since some take long.
    """
    file = nodeid.partition("::")[0]
    if file.startswith("tests/systemd/"):
        return "tests/systemd"
    if file.startswith("tests/system/") and file not in TOGETHER:
        return nodeid
    return file


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where RKCACHED_NO_SKIPS is set, a test that skips has failed: CI has everything."""
    report = yield
    if report.skipped and "RKCACHED_NO_SKIPS" in os.environ:
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} may not skip here: {report.longrepr[2]}"
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Distribute the tests by `scope`, those with the most tests first."""
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByScope(config, log)
