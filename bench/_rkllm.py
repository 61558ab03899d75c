"""Measures the RKLLM binding: a token's way, a worker's start, memory over many caches.

The vendor's library is closed and needs an NPU, so all of it runs on the tests' stand-in, which is
compiled here and is told to wait for nothing: what is left is the binding, the worker and the
socket. Decoding, prefill and the time that the real library takes to load are not in these figures,
and the CPU is not a board's.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import multiprocessing
import os
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import psutil
from _daemon import BenchError, busy_ns
from _results import Figure, Target, of_median
from _workspaces import Bench
from structlog.testing import capture_logs

from rkcached.cli.bench.samples import median
from rkcached.engines.base import FinishReason, ModelSpec, OnToken, RunStats, Sampling, Token
from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES
from rkcached.engines.rkllm.abi import Handle, InputType
from rkcached.engines.rkllm.engine import RkllmEngine
from rkcached.engines.rkllm.library import Library
from rkcached.engines.rkllm.params import model_param
from rkcached.worker import protocol
from rkcached.worker.model import Backoff, Deadlines, WorkerModel
from rkcached.worker.operations import BOUNDARY_TOKENS
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
_SAID = "stand-in"
_STAMP = struct.Struct("d")


def measure_rkllm(bench: Bench) -> list[Figure]:
    """All of it, for both ABI groups that measure and keep their state."""
    figures = []
    for group, version in GROUPS.items():
        site = _Site.of(group, bench.root / f"rkllm-{group}")
        name = f"RKLLM {version}"
        bare = _in_child(_bare_costs, site.spec(site.quick, ANSWER_TOKENS), bench.runs)
        with capture_logs() as logged:
            figures += asyncio.run(_measure_tokens(site, name, bench.runs, bare))
            figures.append(asyncio.run(_measure_start(site, name, bench.runs, logged)))
        figures.append(_measure_memory(site, name))
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class _Site:
    """A compiled library and its models: one that never waits, one that decodes slowly."""

    root: Path
    library: Path
    quick: Path
    slow: Path

    @classmethod
    def of(cls, group: str, root: Path) -> _Site:
        if shutil.which("cc") is None:
            raise BenchError("the stand-in needs a C compiler")
        root.mkdir(exist_ok=True)
        standin = _standin()
        try:
            library = standin.build(group, root)
        except (OSError, RuntimeError) as error:
            raise BenchError(f"the stand-in cannot be compiled: {error}") from error
        quiet = {"noisy": "no"}
        return cls(
            root=root,
            library=library,
            quick=standin.write_model(root / "quick.rkllm", **quiet),
            slow=standin.write_model(root / "slow.rkllm", decode_tps=RESTING_RATE, **quiet),
        )

    def spec(self, model: Path, max_new_tokens: int) -> ModelSpec:
        return ModelSpec(
            path=str(model),
            context_tokens=4096,
            library=str(self.library),
            sampling=Sampling(max_new_tokens=max_new_tokens, temperature=0.0),
        )


def _standin() -> Any:
    """The module that compiles it; the tests are no package that the benchmark could import."""
    spec = importlib.util.spec_from_file_location("rkllm_standin", _STANDIN)
    if spec is None or spec.loader is None or not _STANDIN.is_file():
        raise BenchError(f"the stand-in is not there: {_STANDIN}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A token's way


async def _measure_tokens(site: _Site, name: str, runs: int, bare: _Bare) -> list[Figure]:
    """Measure a token's way: the interval at full speed, the CPU time, the way at rest.

    At full speed both sides work at once, so the interval is that of the slower one; the CPU time
    is the sum. At rest nothing overlaps, and each token has to wake a sleeping process.
    """
    intervals, working = [], []
    async with _worker(site.spec(site.quick, ANSWER_TOKENS)) as worker:
        await _answer(worker, ANSWER_TOKENS)
        for _ in range(runs):
            before = _busy_ns(worker)
            arrivals = await _answer(worker, ANSWER_TOKENS)
            working.append((_busy_ns(worker) - before) / len(arrivals) / 1000)
            intervals.append((arrivals[-1].moment - arrivals[0].moment) / (len(arrivals) - 1) * 1e6)
    ways: list[float] = []
    with _environment(PYTHONPATH=str(Path(__file__).parent)):
        stamping = f"{__name__}:{StampingEngine.__name__}"
        async with _worker(site.spec(site.slow, RESTING_TOKENS), stamping) as worker:
            await _answer(worker, RESTING_TOKENS)
            for _ in range(runs):
                ways += [
                    (at.moment - float(at.text)) * 1e6
                    for at in await _answer(worker, RESTING_TOKENS)
                ]
    floor = await _bare_way_us(runs * RESTING_TOKENS)
    note = (
        f"answers of {ANSWER_TOKENS:,} tokens at full speed, per piece of text; {_SAID}: "
        f"{bare.library_us:.2f} us a token, ctypes {bare.ctypes_us:.2f} more"
    )
    both = f"{_SAID} included; worker's and daemon's side, at full speed, per piece of text"
    resting = (
        f"{_SAID} at {RESTING_RATE} a second; from the first line of the Python callback; "
        f"bare bytes through asyncio: {floor:.0f}"
    )
    target = Target(limit=100)
    return [
        of_median("rkllm", f"{name}, token to token", intervals, "us", target=target, note=note),
        of_median("rkllm", "  CPU of both processes", working, "us", target=target, note=both),
        of_median("rkllm", "  one token at rest", ways, "us", note=resting),
    ]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A piece of text on the daemon's side of the socket."""

    moment: float
    text: str


async def _answer(worker: Worker, tokens: int) -> list[_Arrival]:
    """Ask for an answer of so many tokens.

    A piece may have several: a character's first bytes come without text.
    """
    arrivals: list[_Arrival] = []

    def on_event(event: protocol.FromWorker) -> None:
        if isinstance(event, protocol.Piece):
            arrivals.append(_Arrival(time.perf_counter(), event.text))

    sampling = Sampling(max_new_tokens=tokens)
    answer = await worker.run(protocol.Generate(prompt=PROMPT, sampling=sampling), on_event)
    if (
        not isinstance(answer, protocol.Done)
        or not _complete(answer.stats, tokens)
        or len(arrivals) < tokens / 2
    ):
        raise BenchError(f"not an answer of {tokens} tokens: {len(arrivals)} pieces, {answer}")
    return arrivals


def _complete(stats: RunStats, tokens: int) -> bool:
    return (stats.decode_tokens, stats.finish) == (tokens, FinishReason.LENGTH)


class StampingEngine(RkllmEngine):
    """Replaces each text by the moment of its callback, by a clock that all processes share."""

    def generate(
        self, prompt: str, sampling: Sampling, on_token: OnToken, *, trace: bool = False
    ) -> RunStats:
        def stamp(_token: Token) -> bool:
            run = self._current.run
            return on_token(Token(text=repr(run._last if run else 0.0)))  # noqa: SLF001 - the binding's own stamp

        return super().generate(prompt, sampling, stamp, trace=trace)


@asynccontextmanager
async def _worker(
    spec: ModelSpec, implementation: str = ENGINES[EngineKind.RKLLM].implementation
) -> AsyncIterator[Worker]:
    """The daemon's own supervisor of a real worker process."""
    model = WorkerModel(
        name="standin", identity="", implementation=implementation, spec=spec, idle_unload_s=None
    )
    worker = Worker(model, deadlines=Deadlines(start_s=30, silence_s=30), backoff=Backoff())
    try:
        yield worker
    finally:
        await worker.stop()


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """For workers that are started meanwhile.

    Empty is as good as unset for Python's own variables.
    """
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _busy_ns(worker: Worker) -> int:
    """Of the worker and of this process, which stands for the daemon."""
    if worker.pid is None:
        raise BenchError("the worker is gone")
    return busy_ns(os.getpid()) + busy_ns(worker.pid)


async def _bare_way_us(count: int) -> float:
    """Measure the least that a token could take: bytes to another process's asyncio stream."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(
        target=_send_stamps, args=(theirs, count), daemon=True
    )
    process.start()
    theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours)
    ways: list[float] = []
    while data := await reader.read(_STAMP.size):
        (sent,) = _STAMP.unpack(data)
        ways.append((time.perf_counter() - sent) * 1e6)
    writer.close()
    process.join()
    if len(ways) != count:
        raise BenchError(f"{len(ways)} of {count} stamps came")
    return median(ways)


def _send_stamps(sock: socket.socket, count: int) -> None:
    """The child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(count):
        time.sleep(1 / RESTING_RATE)
        sock.sendall(_STAMP.pack(time.perf_counter()))


# Below the binding


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bare:
    """Microseconds per token, without the binding."""

    library_us: float
    """The stand-in's own, calling back into C."""
    ctypes_us: float
    """More, when it calls a Python function that does nothing."""


def _bare_costs(spec: ModelSpec, runs: int) -> _Bare:
    """The child: the same answers with other callbacks."""
    library = Library(Path(spec.library))
    # abs() takes any word for an int and answers 1, which would pause the run, for no pointer to a
    # structure.
    in_c = library.abi.callback(("abs", ctypes.CDLL(None)))
    library_us = _bare_us(library, spec, in_c, runs)
    both_us = _bare_us(
        library, spec, library.abi.callback(lambda _result, _userdata, _state: 0), runs
    )
    return _Bare(library_us=library_us, ctypes_us=both_us - library_us)


def _bare_us(library: Library, spec: ModelSpec, callback: Any, runs: int) -> float:
    abi = library.abi
    given = (
        callback if abi.callbacks is None else ctypes.byref(abi.callbacks(result_callback=callback))
    )
    param, handle = model_param(library, spec, spec.sampling or Sampling()), Handle()
    library.call("rkllm_init", ctypes.byref(handle), ctypes.byref(param), given)
    run_input, infer = abi.input(), abi.infer_param()
    run_input.input_type, run_input.prompt_input = InputType.PROMPT, PROMPT.encode()
    taken = []
    for _ in range(runs + 1):  # the first one prefills
        started = time.perf_counter()
        library.call("rkllm_run", handle, ctypes.byref(run_input), ctypes.byref(infer), None)
        taken.append((time.perf_counter() - started) / ANSWER_TOKENS * 1e6)
    library.call("rkllm_destroy", handle)
    return median(taken[1:])


# A worker's start


async def _measure_start(
    site: _Site, name: str, runs: int, logged: list[MutableMapping[str, Any]]
) -> Figure:
    """From before the process is spawned until the daemon has read Ready.

    The stand-in takes no time to load.
    """
    starts = []
    # An installed rkcached has its bytecode, whatever this shell says about writing it.
    with _environment(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(site.root / "bytecode")):
        async with _worker(site.spec(site.quick, ANSWER_TOKENS)) as worker:
            for _ in range(
                runs + 1
            ):  # the first one compiles, and reads files that later ones find in memory
                started = time.perf_counter()
                await worker.ensure()
                starts.append((time.perf_counter() - started) * 1000)
                await worker.stop()
    loads = [entry["load_ms"] for entry in logged if entry["event"] == "model loaded"][-runs:]
    note = f"{_SAID} loads at once; {median(loads):.0f} of it are importing and loading the engine"
    return of_median(
        "rkllm",
        f"{name}, worker start to ready",
        starts[1:],
        "ms",
        target=Target(limit=150),
        note=note,
    )


# Memory


def _measure_memory(site: _Site, name: str) -> Figure:
    spec = site.spec(site.quick, CYCLE_TOKENS)
    cycled: _Cycled = _in_child(_cycle, spec, site.root / "cycles.rkcache")
    return Figure(
        part="rkllm",
        name=f"{name}, memory of {CYCLES:,} cycles",
        value=cycled.growth_mb[-1],
        unit="MB",
        target=Target(limit=2),
        note=(
            f"{_SAID}; load, run, release in one process of {cycled.resident_mb:.0f} MB, after "
            f"{WARM_CYCLES:,} to warm "
            f"up; {cycled.cycle_us:.0f} us each; open files {cycled.more_files:+d}, threads "
            f"{cycled.more_threads:+d}"
        ),
        samples=cycled.growth_mb,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cycled:
    resident_mb: float
    """After warming up."""
    growth_mb: tuple[float, ...]
    """Since then, every SAMPLE_CYCLES cycles."""
    cycle_us: float
    more_files: int
    more_threads: int


def _cycle(spec: ModelSpec, cache: Path) -> _Cycled:
    """The child: one engine, one prompt cache, loaded and released again and again."""
    with tempfile.TemporaryDirectory(prefix="rkcached-") as scratch:
        engine = RkllmEngine(msgspec.structs.replace(spec, scratch_dir=scratch))
        saved = engine.prefill(PROMPT, save_to=cache).prompt_tokens
        sampling = Sampling(max_new_tokens=CYCLE_TOKENS)

        def cycles(count: int) -> None:
            for number in range(count):
                engine.load(cache)
                stats = engine.generate(
                    f"{PROMPT}Question {number}:", sampling, lambda _token: False
                )
                engine.clear()
                if (
                    not _complete(stats, CYCLE_TOKENS)
                    or (stats.cached_tokens or 0) < saved - BOUNDARY_TOKENS
                ):
                    raise BenchError(f"a cycle that was none: {stats}")

        process = psutil.Process()
        cycles(WARM_CYCLES)
        base, files, threads = _resident_mb(process), process.num_fds(), process.num_threads()
        growth, working_s = [], 0.0
        for _ in range(CYCLES // SAMPLE_CYCLES):
            started = time.perf_counter()
            cycles(SAMPLE_CYCLES)
            working_s += time.perf_counter() - started
            growth.append(_resident_mb(process) - base)
        cycled = _Cycled(
            resident_mb=base,
            growth_mb=tuple(growth),
            cycle_us=working_s / CYCLES * 1e6,
            more_files=process.num_fds() - files,
            more_threads=process.num_threads() - threads,
        )
        engine.close()
    return cycled


def _resident_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss / 1e6)


# Children


def _in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run `work` in a fresh process and return its result: native code is not for this one.

    Errors: BenchError.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(theirs, work, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise BenchError(f"the child of {work.__name__} ended early") from error
    finally:
        process.kill()  # it has told all that it had to, or Ctrl-C was pressed
        process.join()
        ours.close()


def _tell(pipe: Connection, work: Callable[..., Any], *arguments: Any) -> None:
    """The child."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, which ends this process
    pipe.send(work(*arguments))
