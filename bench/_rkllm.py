"""Measures the RKLLM binding: a token's way, a worker's start, memory over many caches.

The vendor's library is closed and needs an NPU, so all of it runs on the tests' stand-in, which is
compiled here and is told to wait for nothing: what is left is the binding, the worker and the
socket. Decoding, prefill and the time that the real library takes to load are not in these figures,
and the CPU is not a board's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import runpy
import tempfile
import time
import unittest
from collections.abc import AsyncIterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import psutil
from _daemon import BenchError
from _figures import Figure, of_median
from _workspaces import Bench

from rkcached.engines.base import FinishReason, ModelSpec, RunStats, Sampling
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.engines.rkllm.engine import RkllmEngine
from rkcached.worker import protocol
from rkcached.worker.building import BOUNDARY_TOKENS
from rkcached.worker.model import Backoff, Deadlines, WorkerModel
from rkcached.worker.supervisor import Worker

GROUPS = {"D": "1.2", "E": "1.3"}
"""ABI groups, and the runtime's versions as the figures name them."""

PROMPT = "You are the assistant of a small house. Answer in one short sentence. " * 4
ANSWER_TOKENS = 2000
RESTING_TOKENS = 100
RESTING_RATE = 200
"""Tokens a second at which each one finds worker and daemon asleep: ten times what a board decodes.
"""

WARM_CYCLES, CYCLES = 1_000, 10_000
SAMPLE_CYCLES = 1_000
CYCLE_TOKENS = 8

_STANDIN = Path(__file__).parents[1] / "tests" / "rkllm_standin" / "standin.py"


def measure_rkllm(bench: Bench) -> list[Figure]:
    """All of it, for both ABI groups that measure and keep their state."""
    standin = runpy.run_path(str(_STANDIN))
    figures = []
    for group, version in GROUPS.items():
        root = bench.root / f"rkllm-{group}"
        root.mkdir()
        try:
            library = standin["build"](group, root)
        except unittest.SkipTest as error:
            raise BenchError(str(error)) from error
        write_model = partial(standin["write_model"], noisy="no")
        quick = _spec(library, write_model(root / "quick.rkllm"))
        slow = write_model(root / "slow.rkllm", decode_tps=RESTING_RATE, stamps="yes")

        name = f"RKLLM {version}"
        figures += [
            asyncio.run(_at_full_speed(quick, name, bench.runs)),
            asyncio.run(_at_rest(_spec(library, slow), bench.runs)),
            asyncio.run(_start(quick, name, bench.runs)),
        ]
        figures.append(_memory(quick, name, root / "cycles.rkcache"))
    return figures


def _spec(library: Path, model: Path) -> ModelSpec:
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    return ModelSpec(path=str(model), context_tokens=4096, library=str(library), sampling=sampling)


@asynccontextmanager
async def _worker(spec: ModelSpec) -> AsyncIterator[Worker]:
    """The daemon's own supervisor of a real worker process."""
    implementation = ENGINES[EngineKind.RKLLM].implementation
    model = WorkerModel(
        name="standin", identity="", implementation=implementation, spec=spec, idle_unload_s=None
    )
    worker = Worker(model, deadlines=Deadlines(start_s=30, silence_s=30), backoff=Backoff())
    try:
        yield worker
    finally:
        await worker.stop()


# A token's way


async def _at_full_speed(spec: ModelSpec, name: str, runs: int) -> Figure:
    """Both sides work at once, so the interval is that of the slower one."""
    intervals = []
    async with _worker(spec) as worker:
        await _answer(worker, ANSWER_TOKENS)
        for _ in range(runs):
            moments = list(await _answer(worker, ANSWER_TOKENS))
            intervals.append((moments[-1] - moments[0]) / (len(moments) - 1) * 1e6)
    note = f"answers of {ANSWER_TOKENS:,} tokens at full speed, per piece of text"
    return of_median("rkllm", f"{name}, token to token", intervals, "us", aim=100, note=note)


async def _at_rest(spec: ModelSpec, runs: int) -> Figure:
    """Nothing overlaps, and each token has to wake a sleeping process."""
    ways: list[float] = []
    async with _worker(spec) as worker:
        await _answer(worker, RESTING_TOKENS)
        for _ in range(runs):
            arrivals = await _answer(worker, RESTING_TOKENS)
            ways += [moment * 1e6 - int(text) for moment, text in arrivals.items()]
    note = f"at {RESTING_RATE} a second, from the library's callback"
    return of_median("rkllm", "  one token at rest", ways, "us", note=note)


async def _answer(worker: Worker, tokens: int) -> dict[float, str]:
    """Ask for an answer of so many tokens; the pieces of text by the moment of their arrival.

    A piece may have several tokens: a character's first bytes come without text.
    """
    arrivals: dict[float, str] = {}

    def on_event(event: protocol.FromWorker) -> None:
        if isinstance(event, protocol.Piece):
            arrivals[time.perf_counter()] = event.text

    sampling = Sampling(max_new_tokens=tokens)
    answer = await worker.run(protocol.Generate(prompt=PROMPT, sampling=sampling), on_event)
    is_whole = isinstance(answer, protocol.Done) and _is_complete(answer.stats, tokens)
    if not is_whole or len(arrivals) < tokens / 2:
        raise BenchError(f"not an answer of {tokens} tokens: {len(arrivals)} pieces, {answer}")
    return arrivals


def _is_complete(stats: RunStats, tokens: int) -> bool:
    return (stats.decode_tokens, stats.finish) == (tokens, FinishReason.LENGTH)


# A worker's start


async def _start(spec: ModelSpec, name: str, runs: int) -> Figure:
    """From before the process is spawned until the daemon has read Ready.

    The stand-in takes no time to load.
    """
    starts = []
    async with _worker(spec) as worker:
        # The first one compiles, and reads files that later ones find in memory.
        for _ in range(runs + 1):
            started = time.perf_counter()
            await worker.ensure()
            starts.append((time.perf_counter() - started) * 1000)
            await worker.stop()
    return of_median("rkllm", f"{name}, worker start to ready", starts[1:], "ms", aim=150)


# Memory


def _memory(spec: ModelSpec, name: str, cache: Path) -> Figure:
    # Native code is not for this process.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        growth_mb = child.submit(_cycle, spec, cache).result()
    return Figure(
        part="rkllm",
        name=f"{name}, memory of {CYCLES:,} cycles",
        value=growth_mb[-1],
        unit="MB",
        aim=2,
        note=f"load, run, release in one process, after {WARM_CYCLES:,} to warm up",
        samples=growth_mb,
    )


def _cycle(spec: ModelSpec, cache: Path) -> tuple[float, ...]:
    """The child: one engine, one prompt cache, loaded and released again and again.

    Returns by how many MB the process grew, every SAMPLE_CYCLES cycles.
    """
    process = psutil.Process()
    sampling = Sampling(max_new_tokens=CYCLE_TOKENS)
    with tempfile.TemporaryDirectory(prefix="rkcached-") as scratch:
        engine = RkllmEngine(msgspec.structs.replace(spec, scratch_dir=scratch))
        saved = engine.prefill(PROMPT, save_to=cache).prompt_tokens

        def resident_mb_after(cycles: int) -> float:
            for number in range(cycles):
                engine.load(cache)
                prompt = f"{PROMPT}Question {number}:"
                stats = engine.generate(prompt, sampling, lambda _token: False)
                engine.clear()
                is_cached = (stats.cached_tokens or 0) >= saved - BOUNDARY_TOKENS
                if not is_cached or not _is_complete(stats, CYCLE_TOKENS):
                    raise BenchError(f"a cycle that was none: {stats}")
            return float(process.memory_info().rss / 1e6)

        base = resident_mb_after(WARM_CYCLES)
        samples = CYCLES // SAMPLE_CYCLES
        growth_mb = tuple(resident_mb_after(SAMPLE_CYCLES) - base for _ in range(samples))
        engine.close()
    return growth_mb
