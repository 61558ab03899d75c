"""Reports what a cache gains and what the daemon adds, as `rkcached bench --json` measures it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from _daemon import BenchError, Daemon
from _figures import Figure, difference, of_median
from _workspaces import Bench, alone, llama, memory

from rkcached.cli.bench import results
from rkcached.cli.bench.results import Measured, State
from rkcached.cli.launcher import Workspace

PAIRS_PER_RUN = 6
REDUCTIONS = {"greenhouse": 80, "reviewer": 90}
"""Percent of the time to first token that a cache must save; by prompt."""

_WORDS = {
    State.COLD: "cold",
    State.FILE: "warm, file loaded",
    State.MEMORY: "warm, in memory",
}


def measure_ttft(bench: Bench) -> list[Figure]:
    """Cold; warm with the file loaded; warm with the prefix in memory."""
    figures = []
    for prompt in _measured(bench, llama, bench.runs, "--no-direct").prompts:
        name = f"{prompt.tokens:,} tokens"
        aim = REDUCTIONS[prompt.prompt]
        for state, words in _WORDS.items():
            samples = _samples(prompt.states[state], "ttft_ms")
            figures.append(of_median("ttft", f"{name}, {words}", samples, "ms"))
            if state is not State.COLD:
                saved = prompt.reduction[state] * 100
                reduction = Figure(
                    part="ttft", name="  reduction", value=saved, unit="%", aim=aim, at_least=True
                )
                figures.append(reduction)
    return figures


def measure_share(bench: Bench) -> list[Figure]:
    """The same requests through the socket and on a bare engine: the difference is the daemon's."""
    figures: list[Figure] = []
    for make, what in ((memory, "memory engine"), (llama, "llama.cpp")):
        measured = _measured(bench, make, bench.runs * PAIRS_PER_RUN, "--direct")
        if measured.direct:
            raise BenchError(f"the engine was not measured alone: {measured.direct}")
        for prompt in measured.prompts:
            for state in (State.MEMORY, State.FILE):
                name = f"{what}, {prompt.prompt}, {_WORDS[state]}"
                figures += _shares(name, prompt.states[state])
    return figures


def _shares(name: str, measured: Measured) -> Iterator[Figure]:
    through = _samples(measured, "ttft_ms")
    direct = _samples(measured, "direct_ttft_ms")
    yield of_median("share", f"{name}: through the socket", through, "ms")
    yield of_median("share", f"{name}: engine alone", direct, "ms")

    yield difference("share", "  difference, median of pairs", through, direct, aim=5)
    # The prefill is the same work in both, and its noise is larger than the daemon's share.
    around = _samples(measured, "daemon_share_ms")
    yield of_median("share", "  without load and prefill", around, "ms", aim=5)
    # A client that wakes up while the engine computes on every core waits for the scheduler's next
    # tick; this figure leaves the client out.
    socket = _samples(measured, "socket_ms")
    yield difference("share", "  accepted to written", around, socket, aim=5)


def measure_sweep(bench: Bench) -> list[Figure]:
    """Against the length of the prompt, up to 4,096 tokens; draws ttft.svg where that is wanted."""
    options = ["--sweep"]
    if bench.pictures is not None:
        options += ["--plot", str(bench.pictures / "ttft.svg")]
    figures = []
    for prompt in _measured(bench, alone, bench.runs, *options).prompts:
        for state, words in _WORDS.items():
            samples = prompt.states[state].samples("ttft_ms")
            if samples:
                name = f"{prompt.tokens:,} tokens, {words}"
                figures.append(of_median("sweep", name, samples, "ms"))
    return figures


def _measured(
    bench: Bench, make: Callable[[Path], Workspace], runs: int, *options: str
) -> results.Results:
    """Run `rkcached bench` on a fresh daemon. Errors: BenchError."""
    workspace = bench.workspace(make)
    kept = workspace.root / "results.json"
    command = [sys.executable, "-m", "rkcached", "bench", "--runs", str(runs), *options]
    command += ["-o", str(kept), "-s", str(workspace.socket)]
    command += ["--manifest", str(workspace.manifest)]
    with Daemon(workspace) as daemon:
        daemon.wait_fresh()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"rkcached bench: {done.stderr.strip()}")
    return results.read(kept)


def _samples(measured: Measured, figure: str) -> list[float]:
    samples = measured.samples(figure)
    if not samples:
        raise BenchError(f"{figure} was not measured: {measured.missing}")
    return samples
