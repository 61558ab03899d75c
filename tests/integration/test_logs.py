"""Events as lines of standard error; test_systemd_protocols has them as entries of the journal."""

from __future__ import annotations

import re
import subprocess
import sys

PROGRAM = """
import logging
from rkcached.host.logs import configure, log
configure({level!r})
log.debug("looked", took_ms=1.5)
log.info("built", model="m", prompt="", bytes=0, why=None, name="two words", text="a\\nb")
logging.getLogger("library").warning("its %s words", "own")
try:
    raise ValueError("of a defect")
except ValueError:
    log.exception("crashed", model="m")
log.error("reported", exception="its traceback")
"""


def lines(level: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(level=level)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_an_event_is_a_line_with_fields() -> None:
    """Empty fields are left out, zero is not; a field is one word or is quoted."""
    shown = lines("info")
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in shown[:3])
    assert [line[9:] for line in shown[:3]] == [
        r"info    built model=m bytes=0 name='two words' text='a\nb'",
        "warning library: its own words",
        "error   crashed model=m",
    ]
    assert shown[3] == "Traceback (most recent call last):"
    assert shown[-3] == "ValueError: of a defect"
    assert (shown[-2][9:], shown[-1]) == ("error   reported", "its traceback")


def test_the_level_is_that_of_our_events() -> None:
    assert lines("debug")[0][9:] == "debug   looked took_ms=1.5"
    assert [line[9:] for line in lines("warning")[:2]] == [
        "warning library: its own words",
        "error   crashed model=m",
    ]
