"""Fuzzes the parsers of the program, one after the other: `make fuzz MINUTES=30`.

The time is shared among all targets; with names, among these. It is CPU time: minutes beside other
work count as much as minutes alone, and take longer. What the fuzzer learns stays in
`build/fuzz/corpus`, where the next run goes on. Each finding is a file that is named at the end,
and it ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

try:
    from fuzz.child import Order, work
except ModuleNotFoundError as missing:
    if missing.name != "atheris":
        raise
    sys.exit("the fuzzer needs the package atheris, which exists for x86_64: use make fuzz there")

from fuzz.targets import TARGETS

ROOT: Final = Path(__file__).parents[1]
START: Final = ROOT / "fuzz" / "corpus"
OUT: Final = ROOT / "build" / "fuzz"

MAX_ENDS: Final = 20
"""After so many ends of its process a target is given up."""

MAX_WAIT: Final = 20
"""A target is given up after this many times its share by the clock."""

MEMORY: Final = Path("/dev/shm")
"""Some targets write files at each execution, which takes long on a disk."""

NICE: Final = 10
"""Whoever works on the machine goes first."""

# libFuzzer's lines, such as `#512  NEW  cov: 81 ft: 90 corp: 7/200b lim: 21 exec/s: 0 rss: 65Mb`.
_LINE: Final = re.compile(
    r"#(?P<runs>\d+)\s.*\bcov: (?P<cov>\d+) ft: (?P<ft>\d+) corp: (?P<corp>\d+)/(?P<size>\S+)"
)
_UNITS: Final = re.compile(r"stat::number_of_executed_units:\s+(\d+)")


@dataclass(kw_only=True)
class Result:
    target: str
    seconds: float = 0.0
    """CPU time."""
    executions: int = 0
    edges: int = 0
    """Of the instrumented code, and the comparisons in it."""
    features: int = 0
    corpus: int = 0
    """Inputs that the corpus has at the end."""
    ends: int = 0
    """The process ended before its time."""
    findings: list[str] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        return self.executions / self.seconds if self.seconds else 0.0


def main() -> int:
    options = _options()
    names = options.targets or sorted(TARGETS)
    unknown = sorted(set(names) - set(TARGETS))
    if unknown:
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(sorted(TARGETS))}")
        return 2

    commit = _commit() if options.json else ""
    os.nice(NICE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the child is ended
    left_s = 60 * options.minutes - time.thread_time()  # the imports took a part of it
    each_s = max(1, int(left_s / len(names)))
    results = [_fuzz(name, each_s, options.seed) for name in names]

    print()
    print(_table(results))
    findings = [file for result in results for file in result.findings]
    if findings:
        print("\nFindings; the reason of each is in the .txt of its name:")
        print("\n".join(f"  {file}" for file in findings))
    if options.json:
        _write(options.json, results, commit)
    return 1 if findings else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=1, help="shared among the targets")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def _fuzz(name: str, seconds: int, seed: int) -> Result:
    result = Result(target=name)
    folders = {"start": START / name, "corpus": OUT / "corpus" / name}
    findings = OUT / "findings" / name
    shutil.rmtree(findings, ignore_errors=True)
    for folder in (*folders.values(), findings):
        folder.mkdir(parents=True, exist_ok=True)

    give_up_at = time.monotonic() + MAX_WAIT * seconds
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    runs = 0
    while (left_s := round(seconds - result.seconds)) > 0:
        if result.ends >= MAX_ENDS or time.monotonic() > give_up_at:
            break
        own_seed = seed + runs if seed else 0
        runs += 1
        with tempfile.TemporaryDirectory(prefix="rkcached-fuzz-", dir=place) as scratch:
            order = Order(
                target=name,
                findings=findings,
                scratch=Path(scratch),
                seconds=left_s,
                seed=own_seed,
                **folders,
            )
            code, last_words = _in_a_child(order, result)
        if code != 0:
            result.ends += 1
            (findings / f"end-{result.ends}.txt").write_text("\n".join(last_words))

    result.findings = [
        str(file.relative_to(ROOT))
        for file in sorted(findings.iterdir())
        if file.suffix != ".txt" or file.name.startswith("end-")
    ]
    print(f"{_clear()}{_progress(result)}", flush=True)
    return result


def _in_a_child(order: Order, result: Result) -> tuple[int, list[str]]:
    """Work in a forked process; return its exit code, and the last lines that it printed."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(ours)
        os.dup2(theirs, sys.stderr.fileno())
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        work(order)

    os.close(theirs)
    before = result.executions
    last: deque[str] = deque(maxlen=60)
    try:
        with os.fdopen(ours, errors="replace") as lines:
            for line in lines:
                last.append(line.rstrip())
                _take_in(line, result, before)
                if sys.stdout.isatty():
                    print(f"{_clear()}{_progress(result)}", end="", flush=True)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status, usage = os.wait4(child, 0)
        result.seconds += usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), list(last)


def _take_in(line: str, result: Result, before: int) -> None:
    """Learn from a line of libFuzzer's; `before` executions were in other processes."""
    if match := _LINE.search(line):
        result.executions = before + int(match["runs"])
        result.edges = max(result.edges, int(match["cov"]))
        result.features = max(result.features, int(match["ft"]))
        result.corpus = int(match["corp"])
    elif match := _UNITS.search(line):
        result.executions = before + int(match[1])


def _clear() -> str:
    return "\r\x1b[K" if sys.stdout.isatty() else ""


def _progress(result: Result) -> str:
    return (
        f"{result.target}: {result.executions:,} executions, "
        f"{result.edges:,} edges, {len(result.findings)} findings"
    )


def _table(results: list[Result]) -> str:
    head = ("target", "executions", "per second", "edges", "features", "corpus", "findings")
    rows = [
        (
            result.target,
            f"{result.executions:,}",
            f"{result.per_s:,.0f}",
            f"{result.edges:,}",
            f"{result.features:,}",
            f"{result.corpus:,}",
            str(len(result.findings)),
        )
        for result in results
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def _write(file: Path, results: list[Result], commit: str) -> None:
    figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "targets": [{**asdict(result), "per_s": round(result.per_s, 1)} for result in results],
    }
    file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
