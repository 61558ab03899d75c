"""Compares how much of real programs' requests is reused, and how soon the first token comes.

The daemon and llama.cpp's own server, which has its slots and its prompt cache in RAM, get the same
requests in turns; `_programs` has them. Before each one another program asks both. Each launch of
the two begins with what they make of a program that asked before they were stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
from _daemon import BenchError, Daemon
from _figures import Figure, difference, of_median
from _peer import SLOTS, Peer, Settings
from _programs import HOUSE, OTHER, SHAPES, Conversation, Message, Shape, Tool, Turn, question
from _workspaces import SHAPES_CONTEXT, Bench, declare_shapes, shapes

from rkcached.cli.bench.alone import look_at
from rkcached.cli.bench.asking import Answer
from rkcached.cli.bench.samples import median
from rkcached.cli.launcher import Workspace
from rkcached.plan.desired import DesiredModel
from rkcached.sources.records import Key
from rkcached.store.marks import CONVERSATIONS

MODEL = "small"
OURS, THEIRS = "rkcached", "llama.cpp's server"
AFTER_OTHERS, AFTER_RESTART = "after another program asked", "directly after a restart"

ANSWER_TOKENS = 32
OTHER_TOKENS = 2
RUNS_PER_LAUNCH = 2
"""Of each program, between two restarts."""

LEAST_TOKENS = 8
"""The speed of shorter answers is not counted."""

PAUSE_S = 0.05
"""Between two answers: an engine's threads may spin for a moment after their work."""

SHARE, FLOOR_MS = 0.05, 2.0
"""The daemon may be this much slower than the server, whichever is larger."""

PER_TOKEN_MS = 0.1
"""A token after the first may cost this much more."""

BUILD_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer of one side, its request, and the tokens of that."""

    answer: Answer
    messages: list[Message]
    sent: int
    reused: int


Samples = dict[tuple[str, str, str], list[Sample]]
"""By table, row and side."""

Footprints = dict[tuple[str, str], list[float]]
"""Megabytes, by shape and column."""


class Side(Protocol):
    """One of the two programs that are compared."""

    name: str

    def ask(self, messages: list[Message], tools: tuple[Tool, ...]) -> Sample: ...

    def ask_other(self, number: int) -> None:
        """Ask as another program does. Errors: BenchError."""


def measure_shapes(bench: Bench) -> list[Figure]:
    """A table of each state, then what a token more costs, then memory and disk."""
    workspace = bench.workspace(shapes)
    samples: Samples = defaultdict(list)
    footprints: Footprints = defaultdict(list)
    for shape in SHAPES:
        bench.say(shape.name)
        _measure_shape(bench.runs, workspace, shape, samples, footprints)

    return [
        *_times(samples, AFTER_OTHERS),
        *_times(samples, AFTER_RESTART),
        *_rates(samples),
        *_of_footprints(footprints),
    ]


def _measure_shape(
    launches: int, workspace: Workspace, shape: Shape, samples: Samples, footprints: Footprints
) -> None:
    """Launch both once more than `launches`: what comes after a restart needs something before."""
    declare_shapes(workspace, shape.declared_tools)
    shutil.rmtree(workspace.store / CONVERSATIONS, ignore_errors=True)
    with Daemon(workspace) as daemon:
        daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)

    texts = _Texts(workspace)
    number = 0
    begun: _Run | None = None
    for launch in range(launches + 1):
        with (
            Daemon(workspace) as daemon,
            Peer(
                workspace.root / "model.gguf", SHAPES_CONTEXT, workspace.root, Settings.CACHING
            ) as peer,
        ):
            daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)
            daemon.wait_preloaded()
            if peer.slots() != SLOTS:
                raise BenchError(f"llama.cpp's server has {peer.slots()} slots")
            sides = _Ours(daemon), _Theirs(peer, texts)

            if begun is None:
                begun = _Run(shape, texts, number)  # so that both have seen such a program
                begun.ask_before(sides)
                begun.ask_measured(sides)
            else:
                _keep(samples, AFTER_RESTART, begun.ask_measured(sides, restarted=True))

            if launch < launches:
                for _ in range(RUNS_PER_LAUNCH):
                    number += 1
                    run = _Run(shape, texts, number)
                    run.ask_before(sides)
                    _keep(samples, AFTER_OTHERS, run.ask_measured(sides))
                number += 1
                begun = _Run(shape, texts, number)
                begun.ask_before(sides)

            for side, pid in ((OURS, daemon.pid), (THEIRS, peer.pid)):
                footprints[shape.name, f"memory: {side}"].append(_pss_mb(pid))

        conversations = _size_mb(workspace.store / CONVERSATIONS)
        caches = _size_mb(workspace.store) - conversations
        footprints[shape.name, "disk: prompt caches"].append(caches)
        footprints[shape.name, "disk: conversations"].append(conversations)


def _keep(samples: Samples, table: str, taken: list[tuple[str, str, Sample]]) -> None:
    for row, side, sample in taken:
        samples[table, row, side].append(sample)


class _Texts:
    """The rendered requests, from the same function that the daemon renders with."""

    def __init__(self, workspace: Workspace) -> None:
        look = look_at(workspace.manifest, workspace.store, workspace.root / "state")
        model = look.desired.models[MODEL]
        if not isinstance(model, DesiredModel):
            raise BenchError(f"the model cannot be used: {model}")

        self._template = model.template
        self.systems = {name: look.desired.texts[Key(MODEL, name)] for name in (HOUSE, OTHER)}

    def request(self, messages: list[Message], tools: tuple[Tool, ...]) -> str:
        plain: list[Any] = [_with_objects(message) for message in messages]
        is_begun = messages[-1]["role"] == "assistant"
        return self._template.render(plain, tools, continue_final=is_begun)


def _with_objects(message: Message) -> Message:
    """The message as templates get it: with the arguments of calls as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message

    plain = []
    for call in calls:
        function = call["function"] | {"arguments": json.loads(call["function"]["arguments"])}
        plain.append(call | {"function": function})
    return message | {"tool_calls": plain}


# Asking


class _Run:
    """A program's requests to both sides, each of which gets its own answers back."""

    def __init__(self, shape: Shape, texts: _Texts, number: int) -> None:
        self._shape = shape
        self._texts = texts
        self._number = number
        self._asked = 0
        self._conversations: dict[tuple[str, str], Conversation] = {}

        turns = shape.turns(number)
        at = [bool(turn.row) for turn in turns].index(True)
        self._before, self._measured = turns[:at], turns[at:]

    def ask_before(self, sides: tuple[Side, Side]) -> None:
        """Ask what comes before the first request that is measured."""
        for turn in self._before:
            self._ask(turn, sides, others=True)

    def ask_measured(
        self, sides: tuple[Side, Side], *, restarted: bool = False
    ) -> list[tuple[str, str, Sample]]:
        """Ask the others; returns their rows, sides and samples.

        `restarted`: both were, just now, so no other program asks before. Errors: BenchError.
        """
        taken = []
        for place, turn in enumerate(self._measured):
            samples = self._ask(turn, sides, others=not restarted)
            self._check(samples[OURS], samples[THEIRS], restarted=restarted, first=place == 0)
            if not was_held_back(samples[OURS].answer):
                taken += [(turn.row, side, sample) for side, sample in samples.items()]
        return taken

    def _ask(self, turn: Turn, sides: tuple[Side, Side], *, others: bool) -> dict[str, Sample]:
        self._asked += 1
        in_order = sides if (self._number + self._asked) % 2 else sides[::-1]
        samples = {}
        for side in in_order:
            if others:
                side.ask_other(self._number * 10 + self._asked)
                time.sleep(PAUSE_S)

            conversation = self._conversation(side, turn)
            sample = side.ask(conversation.ask(turn), self._shape.tools)
            samples[side.name] = sample
            if self._shape.keeps_answers:
                conversation.answered(text_of(sample.answer))
            time.sleep(PAUSE_S)
        return samples

    def _conversation(self, side: Side, turn: Turn) -> Conversation:
        key = side.name, turn.conversation
        if key not in self._conversations:
            system = self._texts.systems[HOUSE] + self._shape.adds_to_system(self._number)
            self._conversations[key] = Conversation([{"role": "system", "content": system}])
        return self._conversations[key]

    def _check(self, ours: Sample, theirs: Sample, *, restarted: bool, first: bool) -> None:
        """Errors: BenchError if something else was measured than the tables say."""
        report = ours.answer.report
        if ours.messages == theirs.messages and ours.sent != theirs.sent:
            raise BenchError(f"{self._shape.name}: {ours.sent} tokens sent, or {theirs.sent}")
        if self._shape.is_hit and report["state"] != "hit":
            raise BenchError(f"{self._shape.name}: {report}")
        if restarted and first and theirs.reused:
            raise BenchError(f"llama.cpp's server reused {theirs.reused} tokens after a restart")


class _Ours:
    """The daemon, asked as its clients do: they send the text themselves and name the model."""

    name = OURS

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def ask(self, messages: list[Message], tools: tuple[Tool, ...]) -> Sample:
        body: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": ANSWER_TOKENS}
        answer = self._daemon.ask(body | {"tools": tools} if tools else body, may_call=True)
        sent = answer.usage["prompt_tokens"]
        reused = answer.report["cached_tokens"]
        return Sample(answer=answer, messages=messages, sent=sent, reused=reused)

    def ask_other(self, number: int) -> None:
        body = {"model": f"{MODEL}/{OTHER}", "messages": [question(number)]}
        report = self._daemon.ask(body | {"max_tokens": OTHER_TOKENS}).report
        if (report["state"], report["cache"]) != ("hit", OTHER):
            raise BenchError(f"the other program: {report}")


class _Theirs:
    """The server, which gets the rendered text."""

    name = THEIRS

    def __init__(self, peer: Peer, texts: _Texts) -> None:
        self._peer = peer
        self._texts = texts

    def ask(self, messages: list[Message], tools: tuple[Tool, ...]) -> Sample:
        answer = self._peer.ask(self._texts.request(messages, tools), ANSWER_TOKENS)
        timings = answer.last("timings")
        reused = int(timings["cache_n"])
        sent = reused + int(timings["prompt_n"])
        return Sample(answer=answer, messages=messages, sent=sent, reused=reused)

    def ask_other(self, number: int) -> None:
        system = {"role": "system", "content": self._texts.systems[OTHER]}
        self._peer.ask(self._texts.request([system, question(number)], ()), OTHER_TOKENS)


def text_of(answer: Answer) -> str:
    """What the model answered, whichever API streamed it."""
    pieces = []
    for chunk in answer.chunks:
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            pieces.append(choice.get("text") or delta.get("content") or "")
    return "".join(pieces)


def tokens_of(answer: Answer) -> int:
    """The tokens of its text: without the one that ended it."""
    tokens: int = answer.usage["completion_tokens"]
    return tokens - 1 if _was_ended_by_model(answer) else tokens


def per_token_ms(answer: Answer) -> float:
    """From its first text to its last, by its tokens: a chunk may have several."""
    moments = answer.text_moments
    return (moments[-1] - moments[0]) / (tokens_of(answer) - 1) * 1000


def was_held_back(answer: Answer) -> bool:
    """Whether nothing was streamed before the end, as with a call: its first token has no time."""
    return len(answer.text_moments) < 2 <= tokens_of(answer)


def _was_ended_by_model(answer: Answer) -> bool:
    for chunk in answer.chunks:
        for choice in chunk.get("choices", ()):
            if choice.get("finish_reason") == "stop":
                return True
    return False


# Figures


def _times(samples: Samples, table: str) -> Iterator[Figure]:
    for row in _rows(samples, table):
        ours, theirs = samples[table, row, OURS], samples[table, row, THEIRS]

        for side, taken in ((OURS, ours), (THEIRS, theirs)):
            yield _tokens(table, row, f"sent: {side}", [sample.sent for sample in taken])
            yield _tokens(table, row, f"reused: {side}", [sample.reused for sample in taken])

        ttft = {}
        for side in (OURS, THEIRS):
            ttft[side] = [sample.answer.ttft_ms for sample in samples[table, row, side]]
            column = f"first token: {side}"
            yield of_median("shapes", row, ttft[side], "ms", table=table, column=column)

        aim = 0.0
        if table == AFTER_OTHERS:
            aim = round(max(FLOOR_MS, SHARE * median(ttft[THEIRS])), 1)
        column = "rkcached less the server, by pairs"
        yield difference(
            "shapes", row, ttft[OURS], ttft[THEIRS], table=table, column=column, aim=aim
        )
        if table == AFTER_RESTART:
            loads = [sample.answer.report["model_load_ms"] for sample in ours]
            column = "rkcached: of it loading the model"
            yield of_median("shapes", row, loads, "ms", table=table, column=column)


def _tokens(table: str, row: str, column: str, counts: list[int]) -> Figure:
    """A count; as a number without a unit it is printed without its note."""
    return Figure(
        part="shapes",
        table=table,
        name=row,
        column=column,
        value=median(counts),
        unit="",
        samples=tuple(counts),
    )


def _rates(samples: Samples) -> Iterator[Figure]:
    """Of pairs in which both answers are long enough."""
    table = "a token more"
    for row in _rows(samples, AFTER_OTHERS):
        answers = [
            (ours.answer, theirs.answer)
            for ours, theirs in zip(
                samples[AFTER_OTHERS, row, OURS], samples[AFTER_OTHERS, row, THEIRS], strict=True
            )
        ]
        pairs = [pair for pair in answers if min(map(tokens_of, pair)) >= LEAST_TOKENS]
        if not pairs:
            continue

        each = {side: [per_token_ms(pair[at]) for pair in pairs] for at, side in _SIDES}
        for side, times in each.items():
            rates = [1000 / milliseconds for milliseconds in times]
            yield of_median("shapes", row, rates, "tokens/s", table=table, column=side)
        column = "rkcached less the server, a token, by pairs"
        yield difference(
            "shapes", row, each[OURS], each[THEIRS], table=table, column=column, aim=PER_TOKEN_MS
        )


_SIDES = ((0, OURS), (1, THEIRS))


def _of_footprints(footprints: Footprints) -> Iterator[Figure]:
    for (name, column), megabytes in footprints.items():
        yield of_median("shapes", name, megabytes, "MB", table="memory and disk", column=column)


def _rows(samples: Samples, table: str) -> list[str]:
    return list(dict.fromkeys(row for of, row, _ in samples if of == table))


def _pss_mb(pid: int) -> float:
    """Proportional memory of a process and its children, in megabytes."""
    process = psutil.Process(pid)
    total = 0
    for each in (process, *process.children(recursive=True)):
        total += each.memory_full_info().pss
    return total / 1e6


def _size_mb(folder: Path) -> float:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(sizes) / 1e6
