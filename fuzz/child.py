"""Fuzzes one target in a process that `run` has forked, until its time is over.

A finding does not end it: its input is written to a file, with the traceback beside it, and of what
is found at the same place again nothing more is kept. What ends the process (a crash of native
code, memory, a run without an end) is written to a file by libFuzzer, and `run` starts another.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import resource
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import atheris

# It prints the name of each module.
with (
    contextlib.redirect_stderr(io.StringIO()),
    atheris.instrument_imports(include=["rkcached", "jinja2"]),
):
    from fuzz import targets

from fuzz import mutate

MEMORY_BYTES: Final = 768 << 20
"""A target may allocate so much beyond what the imports take."""

HANG_S: Final = 120
"""By the clock: a run that goes on for so long ends the process."""

MAX_WORDS: Final = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    target: str
    start: Path
    """The folder of the start corpus."""
    corpus: Path
    """The folder of what was learned; it grows."""
    findings: Path
    scratch: Path
    """For temporary files."""
    seconds: int
    seed: int


class Findings:
    """Writes each finding once for each place in the program."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = {path.name.removesuffix(".txt") for path in folder.glob("finding-*.txt")}

    def add(self, place: str, data: bytes, details: str) -> None:
        name = f"finding-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
        if name in self._known:
            return

        self._known.add(name)
        (self._folder / name).write_bytes(data)
        (self._folder / f"{name}.txt").write_text(f"{place}\n\n{details}", errors="replace")


def place_of(error: BaseException) -> str:
    """The kind of an error, and the last line of this project that it came through."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if "rkcached" in file.parts or file.name == "targets.py":
            place = f"{file.name}:{line}"
    return f"{type(error).__name__} {place}"


def work(order: Order) -> NoReturn:
    """Do as ordered, and end the process."""
    try:
        _fuzz(order)
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it is
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # the fuzzer has not ended it


def _fuzz(order: Order) -> None:
    tempfile.tempdir = str(order.scratch)
    target = targets.TARGETS[order.target]
    findings = Findings(order.findings)

    def test_one_input(data: bytes) -> None:
        began = time.thread_time()
        try:
            with contextlib.suppress(targets.Late):
                target.run(data)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            findings.add(place_of(error), data, traceback.format_exc())
        took_s = time.thread_time() - began
        if took_s > target.limit_s:
            findings.add("slow", data, f"{took_s:.1f} s, {target.limit_s} s are allowed\n")

    words = _words_of(order.start)
    dictionary = order.scratch / "words"
    dictionary.write_text("".join(f'"{_escaped(word)}"\n' for word in words))

    how: dict[str, Any] = {}
    form = target.form
    if form is not None:

        def mutator(data: bytes, most: int, seed: int) -> bytes:
            return mutate.mutated(data, most, seed, form=form, words=words, own=atheris.Mutate)

        how["custom_mutator"] = mutator

    arguments = [
        "fuzz",
        f"-max_total_time={order.seconds}",
        f"-max_len={target.max_bytes}",
        f"-timeout={HANG_S}",
        "-rss_limit_mb=2048",
        f"-seed={order.seed}",
        f"-dict={dictionary}",
        f"-artifact_prefix={order.findings}/",
        "-print_final_stats=1",
        "-report_slow_units=1000",
    ]

    _limit_memory()
    atheris.Setup([*arguments, str(order.corpus), str(order.start)], test_one_input, **how)
    atheris.Fuzz()


def _words_of(start: Path) -> list[str]:
    """The words of the start corpus, which the fuzzer puts into inputs."""
    found: set[str] = set()
    for file in sorted(start.iterdir()):
        text = file.read_bytes().decode(errors="replace")
        found.update(re.findall(r"[A-Za-z_<>|/.$#%{}\[\]=-]{2,40}", text))
    return sorted(found)[:MAX_WORDS] or ["a"]


def _escaped(word: str) -> str:
    return "".join(c if c.isalnum() else f"\\x{ord(c):02x}" for c in word)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
