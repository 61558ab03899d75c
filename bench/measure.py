"""Measures the real daemon against its targets: `python bench/measure.py --help`.

Every part starts daemons of its own in a temporary workspace, which is removed at the end, also
after Ctrl-C. A part checks that it measured what it says (a hit was a hit, a loaded file was
loaded) and gives no figure otherwise.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _bodies import measure_bodies
from _clients import measure_clients
from _daemon import BenchError
from _figures import Figure, document, is_quiet, machine, print_tables
from _gain import measure_share, measure_sweep, measure_ttft
from _peers import measure_peers
from _pictures import draw_scale
from _rkllm import measure_rkllm
from _scale import measure_scale
from _shapes import measure_shapes
from _upkeep import measure_edit, measure_idle
from _workspaces import Bench
from rich.console import Console

from rkcached.errors import RkcachedError

FILE_COLUMNS = 1000
"""Enough for the longest row: the tables of a file are Markdown, which has no second line."""

_say = Console(stderr=True, highlight=False).print

PARTS: dict[str, Callable[[Bench], list[Figure]]] = {
    "idle": measure_idle,
    "ttft": measure_ttft,
    "share": measure_share,
    "clients": measure_clients,
    "bodies": measure_bodies,
    "edit": measure_edit,
    "sweep": measure_sweep,
    "scale": measure_scale,
    "peers": measure_peers,
    "shapes": measure_shapes,
    "rkllm": measure_rkllm,
}


def main() -> int:
    """Exit code 0 when every target was met, 1 when one was missed, 2 when a part failed."""
    parser = argparse.ArgumentParser(description="Measure the real daemon against its targets.")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help=f"of: {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--runs",
        type=int,
        default=10,
        metavar="N",
        help="samples of each figure (share: 6 N pairs)",
    )
    parser.add_argument(
        "--idle-seconds", type=float, default=60.0, metavar="S", help="length of the idle part"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw ttft.svg and scale.svg there"
    )
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs is at least 1")
    # SIGTERM unwinds as Ctrl-C does, so that daemons and workspaces go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts = machine()
    if not is_quiet(facts):
        _say(
            f"load average {facts['load_average']:.2f}: others use this machine, do "
            "not trust the figures"
        )
    figures: list[Figure] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="rkcached-bench-") as root:
        bench = Bench(
            root=Path(root),
            runs=options.runs,
            idle_s=options.idle_seconds,
            pictures=options.pictures,
        )
        for name in [part for part in PARTS if part in (options.only or PARTS)]:
            bench.say = functools.partial(_step, name)
            bench.say("...")
            try:
                figures += PARTS[name](bench)
            except (BenchError, RkcachedError) as error:
                _say(f"{name}: {error}", style="red", markup=False)
                failed = True
    if options.pictures is not None:
        draw_scale(figures, facts, options.pictures / "scale.svg")
    if options.json is not None:
        options.json.write_text(json.dumps(document(facts, figures), indent=1) + "\n")
    width = None if sys.stdout.isatty() else FILE_COLUMNS
    print_tables(Console(highlight=False, width=width), facts, figures)
    if failed:
        return 2
    return 1 if any(figure.met is False for figure in figures) else 0


def _step(part: str, step: str) -> None:
    _say(f"{time.strftime('%H:%M:%S')} {part}: {step}", markup=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
