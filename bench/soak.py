"""Soaks two daemons, one of them on a real model: `python bench/soak.py --help`.

Clients ask in every way there is, and some go away; prompts are edited, manifests reloaded and
broken, workers killed with SIGKILL: at random, by a printed seed. Every answer is checked
(`_soak`). At the end nothing is disturbed any more but that each prompt is edited once, for a
prompt whose builds were killed three times is left alone until it changes; then all must be fresh
by itself, and the daemons must hold what they held after warming up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from _daemon import Daemon
from _soak import PROMPTS, QUESTIONS, Site, WrongAnswerError, replace
from rich.console import Console
from rich.table import Table

from rkcached.cli.launcher import Workspace, small_model
from rkcached.engines.memory import MemoryModel
from rkcached.errors import RkcachedError

MEMORY_GROWTH_MB = 16.0
"""Resident, of the daemon, over the whole soak: the allocator's play, not a leak that a day would
show."""

SETTLE_S = 180.0
REPORT_S = 10.0
WARM_UP = 200
ROWS = (
    "requests",
    "hit",
    "edits",
    "reloads",
    "builds",
    "kills",
    "restarts",
    "clients that left",
    "clean failures",
)

_console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Soak:
    """Both sites, their threads, and what they found."""

    def __init__(self, sites: list[Site], seed: int) -> None:
        self.sites = sites
        self._seed = seed
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, site: Site, clients: int, pause_s: float) -> None:
        """Run so many clients of a site, and one hand that disturbs it every `pause_s` or so."""
        self._run(site, "hand", lambda chance: self._disturb(site, chance, pause_s))
        for number in range(clients):
            self._run(site, f"client {number}", site.visit)

    def _disturb(self, site: Site, chance: random.Random, pause_s: float) -> None:
        if not self._over.wait(chance.uniform(0.2, 1.8) * pause_s):
            site.disturb(chance)

    def _run(self, site: Site, name: str, step: Callable[[random.Random], None]) -> None:
        def work() -> None:
            chance = random.Random(f"{self._seed}/{site.name}/{name}")
            while not self._over.is_set():
                try:
                    step(chance)
                except Exception as error:  # noqa: BLE001 - whatever it is, the soak found it
                    kind = (
                        "" if isinstance(error, WrongAnswerError) else f"{type(error).__name__}: "
                    )
                    site.wrong.append(f"{time.strftime('%H:%M:%S')} {name}: {kind}{error}")
                    _console.print(f"[red]{site.name}[/] {site.wrong[-1]}", markup=True)
                    self._over.wait(1)

        thread = threading.Thread(target=work, name=f"{site.name} {name}")
        thread.start()
        self._threads.append(thread)

    def watch(self, minutes: float) -> None:
        """Say how it goes until the time is over. Errors: DaemonUnreachable when a daemon ended."""
        end = time.monotonic() + minutes * 60
        while (left_s := end - time.monotonic()) > 0:
            time.sleep(min(REPORT_S, left_s))
            for site in self.sites:
                site.daemon.check_alive()
                site.note_status()
            progress = "; ".join(
                f"{s.name}: {s.counts['requests']} asked, {s.counts['hit']} hits, "
                f"{s.counts['builds']} builds, "
                f"{s.counts['restarts']} restarts, {len(s.wrong)} wrong"
                for s in self.sites
            )
            _console.print(f"{left_s / 60:5.1f} min left; {progress}", style="dim")

    def stop(self) -> None:
        """End the threads, each after its request."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def main() -> int:
    """Exit code 1 for a wrong answer, a leak, or a daemon that is not all fresh at the end."""
    parser = argparse.ArgumentParser(description="Soak two daemons and check every answer.")
    parser.add_argument(
        "--minutes", type=float, default=10.0, metavar="N", help="how long to disturb (default 10)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=secrets.randbelow(10**6),
        metavar="N",
        help="of what happens when",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was counted to FILE")
    options = parser.parse_args()
    # SIGTERM unwinds as Ctrl-C does, so that daemons and workspaces go.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _console.print(f"seed {options.seed}, {options.minutes:g} min")
    with (
        tempfile.TemporaryDirectory(prefix="rkcached-soak-") as root,
        _real(Path(root) / "real") as real,
        _memory(Path(root) / "memory") as memory,
    ):
        document = _soak([real, memory], options)
    _print_table(document)
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    for problem in document["problems"]:
        _console.print(problem, style="red", markup=False)
    return 1 if document["problems"] else 0


def _soak(sites: list[Site], options: argparse.Namespace) -> dict[str, Any]:
    soak = Soak(sites, options.seed)
    problems: list[str] = []
    for site in sites:
        site.daemon.wait_fresh()
        site.restore(SETTLE_S)
    _warm_up(sites, options.seed)
    before = {site.name: site.held() for site in sites}
    started = time.monotonic()
    try:
        soak.start(sites[0], clients=3, pause_s=4.0)
        soak.start(sites[1], clients=6, pause_s=0.7)
        soak.watch(options.minutes)
    except RkcachedError as error:
        problems.append(str(error))
    finally:
        soak.stop()
    took_s = time.monotonic() - started
    for site in sites:
        try:
            site.restore(SETTLE_S)
            site.note_status()
            site.ask(random.Random(options.seed))  # a worker that was killed last comes back
        except (RkcachedError, WrongAnswerError) as error:
            problems.append(str(error))
    after = {site.name: site.held() for site in sites}
    for site in sites:
        problems += [f"{site.name}: {wrong}" for wrong in site.wrong]
        problems += _leaks(site.name, before[site.name], after[site.name])
    shown = {}
    for site in sites:
        shown[site.name] = {
            "counts": site.counts,
            "failures": site.failures,
            "wrong": len(site.wrong),
            "start": before[site.name],
            "end": after[site.name],
        }
    minutes = round(took_s / 60, 2)
    return {"seed": options.seed, "minutes": minutes, "sites": shown, "problems": problems}


def _warm_up(sites: list[Site], seed: int) -> None:
    """Ask until nothing grows any more, and learn the real model's undisturbed answers."""
    real, memory = sites
    _console.print("asking the real model cold, for what is right ...", style="dim")
    for prompt in PROMPTS:
        for number in range(_VERSIONS):
            for question in QUESTIONS:
                for kind in ("chat", "tools", "completion"):
                    real.reference(kind, real.text(prompt, number), question)
    _console.print(
        f"an answer from another text would be noticed in {real.power():.0%} of cases", style="dim"
    )
    chance = random.Random(f"{seed}/warm-up")
    for site, times in ((real, WARM_UP // 10), (memory, WARM_UP)):
        for _ in range(times):
            site.ask(chance)
        site.counts.clear()
        site.settle(SETTLE_S)


def _leaks(name: str, before: dict[str, float], after: dict[str, float]) -> list[str]:
    leaks = []
    if (grown := after["memory"] - before["memory"]) > MEMORY_GROWTH_MB:
        leaks.append(
            f"{name}: the daemon's resident memory grew by {grown:.1f} MB, more than "
            f"{MEMORY_GROWTH_MB:g} MB"
        )
    return leaks + [
        f"{name}: {after[what]:g} {what} at the end, {before[what]:g} at the start"
        for what in ("descriptors", "children", "zombies")
        if after[what] > before[what]
    ]


def _print_table(document: dict[str, Any]) -> None:
    sites = document["sites"]
    table = Table(
        title=f"{document['minutes']:g} minutes, seed {document['seed']}",
        title_justify="left",
        box=None,
    )
    table.add_column("")
    for name in sites:
        table.add_column(name, justify="right")
    for row in ROWS:
        table.add_row(
            "hits" if row == "hit" else row,
            *(str(site["counts"][row]) for site in sites.values()),
        )
    table.add_row("wrong answers", *(str(site["wrong"]) for site in sites.values()))
    for what, unit in (("memory", " MB"), ("descriptors", ""), ("children", "")):
        texts = (
            f"{site['start'][what]:.1f} → {site['end'][what]:.1f}{unit}" for site in sites.values()
        )
        table.add_row(
            f"{what}, start → end",
            *(text.replace(".0", "") if not unit else text for text in texts),
        )
    _console.print(table)


# The two sites

# Texts of each prompt on the real model: few, so that what is right can be learned beforehand.
_VERSIONS = 2

# Who are you? is answered differently by each.
_ROLES = {
    ("first", 0): ("a cook on a ship", "salt"),
    ("first", 1): ("a gardener", "tomatoes"),
    ("second", 0): ("a clockmaker", "brass"),
    ("second", 1): ("a pilot", "clouds"),
}


def _real_text(prompt: str, number: int) -> str:
    role, word = _ROLES[prompt, number % _VERSIONS]
    return (
        f"You are {role}. Your job is to be {role}."
        + f" Your password is {word} {word} {word}." * 3
    )


def _memory_text(prompt: str, number: int) -> str:
    return (
        f"You are {prompt}, edit {number}."
        + " You answer in one short sentence, and you keep your word." * 4
    )


def _manifest(kind: str, path: str, variant: int) -> str:
    """A comment, a rebuild of everything, a guest that comes and goes: by the number."""
    prompts = {"first": "first.md", "second": "second.md"} | (
        {"guest": "guest.md"} if variant % 2 else {}
    )
    params = {
        "max_context_len": 1024,
        "max_new_tokens": 64,
        "temperature": 0,
        "top_k": 40 + variant % 3,
    }
    engine = {
        "kind": kind,
        "threads": 1,
    }  # with one for each core, a busy machine makes them wait for each other
    model = {"path": path, "chat_template": "chatml", "params": params, "prompts": prompts}
    return f"# variant {variant}\n" + json.dumps(
        {"version": 1, "engine": engine, "models": {"m": model}}, indent=1
    )


@contextlib.contextmanager
def _real(root: Path) -> Iterator[Site]:
    manifest = partial(_manifest, "llamacpp", str(small_model()))
    with _daemon(root, manifest(0)) as daemon:
        yield Site(
            name="SmolLM2-135M",
            daemon=daemon,
            write_manifest=manifest,
            text=_real_text,
            pause_s=3.0,
        )


@contextlib.contextmanager
def _memory(root: Path) -> Iterator[Site]:
    manifest = partial(_manifest, "memory", "m.json")
    model = msgspec.json.encode(MemoryModel(prefill_us_per_token=50, decode_us_per_token=1000))
    replace(root / "m.json", model)
    with _daemon(root, manifest(0)) as daemon:
        yield Site(
            name="memory",
            daemon=daemon,
            write_manifest=manifest,
            text=_memory_text,
            pause_s=1.0,
            memory_model=model,
        )


def _daemon(root: Path, manifest: str) -> Daemon:
    for name in (*PROMPTS, "guest"):
        replace(root / f"{name}.md", f"You are not here yet, {name}.\n".encode())
    workspace = Workspace.at(root)
    replace(workspace.manifest, manifest.encode())
    return Daemon(workspace)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
