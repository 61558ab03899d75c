"""Events as lines of standard error; test_systemd_protocols has them as entries of the journal."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

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


def logging_program(body: str) -> str:
    return (
        "import logging, os, sys, time\n"
        "from rkcached.host.logs import configure, log\n"
        f"configure('info')\n{body}\n"
        "print('went on', flush=True)\n"
    )


def test_a_reader_that_stops_or_goes_stops_nobody() -> None:
    """A pipe holds some 64 kB. When its reader reads on, it is told how much it missed."""
    program = logging_program(
        "for number in range(5000): log.info('said', number=number)\n"
        "print('full', flush=True)\n"
        "sys.stdin.readline()\n"
        "log.info('last')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "full\n"
        taken = [process.stderr.readline() for _ in range(200)]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "went on\n"
        rest = process.stderr.read().splitlines()
    assert taken[0].endswith("said number=0\n")
    said = len(taken) + sum("said number=" in line for line in rest)
    assert rest[-2][9:] == f"warning {5000 - said} lines were lost: nobody took them"
    assert rest[-1][9:] == "info    last"


@pytest.mark.parametrize("to", ["gone", "full", "closed"])
def test_a_log_that_cannot_be_written_costs_lines_only(to: str) -> None:
    """Its reader is gone, its disk is full, or there is none: no traceback, and no other file."""
    redirection = {"gone": "2> >(exec true)", "full": "2>/dev/full", "closed": "2>&-"}[to]
    program = logging_program(
        "time.sleep(0.2)\n"
        "first = os.open(os.devnull, os.O_WRONLY)\n"
        "assert first > 2, first\n"
        "for number in range(3): log.info('said', number=number)"
    )
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("went on\n", 0), done.stderr
    assert done.stderr == ""
