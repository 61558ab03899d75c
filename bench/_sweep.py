"""Time to first token against prompt length, as `rkcached bench --sweep` measures and draws it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from _daemon import BenchError, Daemon
from _results import Figure, of_median
from _workspaces import Bench, alone

_STATES = {"cold": "cold", "file": "warm, from file", "memory": "warm, in memory"}


def measure_sweep(bench: Bench) -> list[Figure]:
    """SmolLM2-135M with a context of 4,096 tokens. Draws ttft.svg where pictures are wanted."""
    workspace = bench.workspace(alone)
    kept = bench.root / "sweep.json"
    command = [
        sys.executable,
        "-m",
        "rkcached",
        "bench",
        "small",
        "--sweep",
        "--runs",
        str(bench.runs),
        "-o",
        str(kept),
    ]
    command += ["-s", str(workspace.socket), "--manifest", str(workspace.manifest)]
    if bench.pictures is not None:
        command += ["--plot", str(bench.pictures / "ttft.svg")]
    with Daemon(workspace) as daemon:
        daemon.wait_fresh()
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BenchError(f"rkcached bench: {run.stderr.strip()}")
    return list(_figures(kept))


def _figures(results: Path) -> list[Figure]:
    figures = []
    for prompt in json.loads(results.read_text())["prompts"]:
        for state, label in _STATES.items():
            samples = [run["ttft_ms"] for run in prompt["states"][state]["runs"]]
            if samples:
                figures.append(
                    of_median("sweep", f"{prompt['tokens']:,} tokens, {label}", samples, "ms")
                )
    return figures
