"""What a client feels: time to first token, cold and warm, and how much of it is the daemon's own.

Every answer is checked to be what it is counted as; a hit that was none, or a file that was not
loaded, ends the part.
"""

from __future__ import annotations

import time
from typing import Any

from _daemon import Answer, BenchError, Daemon, Workspace
from _results import Figure, Target, of_median
from _workspaces import PROMPTS, Bench, llama, memory

from rkcached.cli.bench.direct import Ask, DirectEngine, Told
from rkcached.cli.bench.samples import median, spread
from rkcached.cli.demo.runner import MODEL
from rkcached.engines.base import Sampling
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.observer import Observation, Observer
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.records import Key
from rkcached.store.store import Store
from rkcached.worker.operations import BOUNDARY_TOKENS

ANSWER_TOKENS = 8
"""Decoding goes on while the first token travels, as in real use."""

PAIRS_PER_RUN = 6
PAUSE_S = 0.02
"""Between two turns of a pair: threads of an engine may spin for a moment after their work."""


# Time to first token


def measure_ttft(bench: Bench) -> list[Figure]:
    """Cold; warm with the file loaded, the other prompt being in memory; warm with the prefix in memory."""
    cold: dict[str, list[Answer]] = {prompt: [] for prompt in PROMPTS}
    loaded: dict[str, list[Answer]] = {prompt: [] for prompt in PROMPTS}
    resident: dict[str, list[Answer]] = {prompt: [] for prompt in PROMPTS}
    with Daemon(bench.workspace(llama)) as daemon:
        daemon.wait_fresh()
        ask = _Asker(daemon)
        ask.warm(PROMPTS[0])
        for _ in range(bench.runs):
            for prompt in PROMPTS:
                cold[prompt].append(ask.cold(prompt))
            ask.warm(PROMPTS[0])
            for prompt in reversed(PROMPTS):
                loaded[prompt].append(ask.warm(prompt, loads=True))
                resident[prompt].append(ask.warm(prompt, loads=False))
    figures = []
    for prompt, percent in zip(PROMPTS, (80, 90), strict=True):
        tokens, cached = cold[prompt][0].prompt_tokens, loaded[prompt][0].report["cached_tokens"]
        name = f"{tokens:,} tokens"
        base = _ttfts(cold[prompt])
        figures.append(of_median("ttft", f"{name}, cold", base, "ms"))
        for how, answers in (("file loaded", loaded[prompt]), ("in memory", resident[prompt])):
            warm = _ttfts(answers)
            figures.append(
                of_median("ttft", f"{name}, warm, {how}", warm, "ms", note=f"{cached:,} cached")
            )
            saved = (1 - median(warm) / median(base)) * 100
            target = Target(limit=percent, at_least=True)
            figures.append(
                Figure(part="ttft", name="  reduction", value=saved, unit="%", target=target)
            )
    return figures


class _Asker:
    """Asks a question that no earlier one begins with, so that only the prompt's prefix can be reused."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._count = 0

    def question(self) -> str:
        """Always the same number of tokens."""
        self._count += 1
        return f"{self._count % 1000:03d}: In one sentence, what is your most important rule?"

    def cold(self, prompt: str) -> Answer:
        answer = self._daemon.ask(
            f"{MODEL}/{prompt}", self.question(), max_tokens=ANSWER_TOKENS, cold=True
        )
        if answer.report["state"] != "cold" or answer.report["cached_tokens"]:
            raise BenchError(f"a cold answer was not cold: {answer.report}")
        return answer

    def warm(self, prompt: str, *, loads: bool | None = None, question: str = "") -> Answer:
        answer = self._daemon.ask(
            f"{MODEL}/{prompt}", question or self.question(), max_tokens=ANSWER_TOKENS
        )
        if answer.report["state"] != "hit" or answer.report["cache"] != prompt:
            raise BenchError(f"a warm answer was no hit: {answer.report}")
        if loads is not None and loads != (answer.report["load_ms"] > 0):
            raise BenchError(f"the file was {'not ' if loads else ''}loaded: {answer.report}")
        return answer


def _ttfts(answers: list[Answer]) -> list[float]:
    return [answer.ttft_ms for answer in answers]


# The daemon's own share


def measure_share(bench: Bench) -> list[Figure]:
    """The same request through the socket and on a bare engine, in turns: the difference is the daemon's own."""
    figures = []
    for make, what in ((memory, "memory engine"), (llama, "llama.cpp")):
        with Daemon(bench.workspace(make)) as daemon:
            daemon.wait_fresh()
            look = look_at(bench.workspace(make))
            model = look.desired.models[MODEL]
            if not isinstance(model, DesiredModel):
                raise BenchError(f"the model cannot be used: {model}")
            with DirectEngine(look.manifest.engine, model) as engine:
                pairs = _Pairs(_Asker(daemon), engine, look, model)
                for loads in (False, True):
                    figures += pairs.measure(bench.runs * PAIRS_PER_RUN, what, loads=loads)
    return figures


class _Pairs:
    """Runs a request in both ways, the order changing from pair to pair; each engine sees the same sequence."""

    def __init__(
        self, ask: _Asker, engine: DirectEngine, look: Observation, model: DesiredModel
    ) -> None:
        self._ask = ask
        self._engine = engine
        self._look = look
        self._model = model

    def measure(self, count: int, what: str, *, loads: bool) -> list[Figure]:
        """With `loads` the prompts take turns, so that each request loads its file; else one stays in memory."""
        name = f"{what}, {'file loaded' if loads else 'in memory'}"
        for prompt in (
            *reversed(PROMPTS),
            PROMPTS[0],
        ):  # load both, and end with the first one in memory
            self._pair(prompt, loads=True, socket_first=True, check=False)
        pairs = []
        for number in range(count):
            prompt = PROMPTS[(number + 1) % len(PROMPTS)] if loads else PROMPTS[0]
            pairs.append(self._pair(prompt, loads=loads, socket_first=number % 2 == 0))
        return [
            of_median("share", f"{name}: through the socket", [a.ttft_ms for a, _ in pairs], "ms"),
            of_median("share", f"{name}: engine alone", [b.ttft_ms for _, b in pairs], "ms"),
            _difference("  difference, median of pairs", [a.ttft_ms - b.ttft_ms for a, b in pairs]),
            # The prefill is the same work in both, and its noise is larger than what is looked for.
            _difference(
                "  without load and prefill",
                [a.ttft_ms - a.work_ms - b.around_ms for a, b in pairs],
            ),
            # A client that wakes up while the engine computes on every core waits for the
            # scheduler's next tick.
            _difference(
                "  accepted to written", [a.inside_ms - a.work_ms - b.around_ms for a, b in pairs]
            ),
        ]

    def _pair(
        self, prompt: str, *, loads: bool, socket_first: bool, check: bool = True
    ) -> tuple[Answer, Told]:
        question = self._ask.question()
        expected = loads if check else None
        if socket_first:
            answer = self._through_socket(prompt, question, loads=expected)
            return answer, self._on_engine(prompt, question, loads=loads)
        told = self._on_engine(prompt, question, loads=loads)
        return self._through_socket(prompt, question, loads=expected), told

    def _through_socket(self, prompt: str, question: str, *, loads: bool | None) -> Answer:
        answer = self._ask.warm(prompt, loads=loads, question=question)
        time.sleep(PAUSE_S)
        return answer

    def _on_engine(self, prompt: str, question: str, *, loads: bool) -> Told:
        key = Key(MODEL, prompt)
        artifact = self._look.inventory.artifacts[key]
        rendered = self._model.template.render(
            [
                {"role": "system", "content": self._look.desired.texts[key]},
                {"role": "user", "content": question},
            ]
        )
        values: dict[str, Any] = {
            **self._model.config.sampling(prompt),
            "max_new_tokens": ANSWER_TOKENS,
        }
        told = self._engine.ask(
            Ask(load=artifact.path if loads else None, prompt=rendered, sampling=Sampling(**values))
        )
        if told.stats.cached_tokens < artifact.sidecar.tokens - BOUNDARY_TOKENS:
            raise BenchError(f"the bare engine did not reuse the prefix: {told.stats}")
        time.sleep(PAUSE_S)
        return told


def _difference(name: str, samples: list[float]) -> Figure:
    return Figure(
        part="share",
        name=name,
        value=median(samples),
        unit="ms",
        target=Target(limit=5),
        note=spread(samples),
        samples=tuple(samples),
    )


def look_at(workspace: Workspace) -> Observation:
    return Observer(Store(workspace.store)).observe(read_manifest(workspace.manifest))
