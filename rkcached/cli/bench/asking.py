"""One answer through the socket, in a state that is made on purpose and proven by the answer.

cold     The request has `"cache": false`: the worker forgets its KV state, and loads nothing.
         Proven by the state `cold`, no time for loading, and no cached token.
file     It follows a cold answer, after which nothing that the worker has in memory came from a
         prompt cache, so it must load the file. Proven by the state `hit` and a time for loading.
         The kernel may have the file in its page cache, as it has for a daemon that serves it
         often.
memory   It follows an answer with the same prompt. Proven by the state `hit` and no time for
         loading.

Other clients of the daemon may come in between; then the answer is not in the wanted state, and the
question is asked again. Each question begins with another number, so no answer reuses more than the
prompt of the one before it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from rkcached.cli.bench.results import Run, State
from rkcached.cli.client import Client

ANSWER_TOKENS = 16
"""Enough to measure the speed of decoding."""
QUESTION = "In one sentence, what is your most important rule?"
TRIES = 3
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A streamed answer as its client saw it: its chunks, and when each of them arrived."""

    moments: tuple[float, ...]
    """Seconds since before the request."""
    chunks: tuple[dict[str, Any], ...]

    @property
    def text_moments(self) -> list[float]:
        """When the chunks with text arrived."""
        pairs = zip(self.moments, self.chunks, strict=True)
        return [moment for moment, chunk in pairs if _has_text(chunk)]

    @property
    def ttft_ms(self) -> float:
        """To the first text; to the end where the model gave none."""
        return (self.text_moments or self.moments[-1:])[0] * 1000

    @property
    def per_token_ms(self) -> float:
        """Between the first chunk with text and the last, by their number."""
        texts = self.text_moments
        return (texts[-1] - texts[0]) / max(1, len(texts) - 1) * 1000

    @property
    def report(self) -> dict[str, Any]:
        """The daemon's own figures."""
        return self.last("rkcached")

    @property
    def usage(self) -> dict[str, Any]:
        return self.last("usage")

    def last(self, field: str) -> dict[str, Any]:
        """The last value of a field that not every chunk has; empty if none has it."""
        values = (chunk[field] for chunk in reversed(self.chunks) if chunk.get(field))
        return next(values, {})


def ask(client: Client, body: dict[str, Any], path: str = CHAT) -> Answer:
    """Stream an answer.

    The chunks are parsed when the answer is whole, so that parsing takes no time of it. Errors:
    RequestError, DaemonUnreachable.
    """
    client.ready()
    moments: list[float] = []
    received: list[bytes] = []
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    started = time.perf_counter()

    for data in client.stream_data(path, body):
        moments.append(time.perf_counter() - started)
        received.append(data)
    return Answer(moments=tuple(moments), chunks=tuple(map(json.loads, received)))


def question(number: int, model: str, *, answer_tokens: int, cold: bool = False) -> dict[str, Any]:
    """The body of a request whose question no other one of these thousand begins with."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": f"{number % 1000:03d}: {QUESTION}"}],
        "max_tokens": answer_tokens,
    }
    if cold:
        return body | {"cache": False}
    return body


class NotMade(Exception):
    """A state could not be made; the message is the reason."""


class Asker:
    """Asks one prompt of the daemon."""

    def __init__(self, client: Client, model: str, prompt: str) -> None:
        self._client = client
        self._name = f"{model}/{prompt}"
        self._count = 0
        self.answers = 0
        """As the daemon counts them: those that came to their end."""

    def ask(self, state: State) -> tuple[Run, str]:
        """The run, and its question. `FILE` must follow `COLD`, and `MEMORY` follow `FILE`.

        Errors: NotMade; RequestError, DaemonUnreachable.
        """
        why = ""
        for attempt in range(TRIES):
            if attempt and state is not State.COLD:
                self._once(State.COLD if state is State.FILE else State.FILE, answer_tokens=1)
            run, report, asked = self._once(state)
            why = _why_not(state, report)
            if not why:
                return run, asked

        raise NotMade(why)

    def _once(
        self, state: State, *, answer_tokens: int = ANSWER_TOKENS
    ) -> tuple[Run, dict[str, Any], str]:
        self._count += 1
        cold = state is State.COLD
        body = question(self._count, self._name, answer_tokens=answer_tokens, cold=cold)
        answer = ask(self._client, body)
        self.answers += 1
        report = answer.report
        return _run(answer.ttft_ms, report, answer.usage), report, body["messages"][0]["content"]


def _has_text(chunk: dict[str, Any]) -> bool:
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content"):
            return True
    return False


def _run(ttft_ms: float, report: dict[str, Any], usage: dict[str, Any]) -> Run:
    inside: float = report["ttft_ms"]
    parts_ms = sum(report[f"{part}_ms"] for part in ("queue", "model_load", "load", "prefill"))
    first_decode_ms = max(0.0, inside - parts_ms)
    return Run(
        ttft_ms=round(ttft_ms, 3),
        queue_ms=report["queue_ms"],
        load_ms=report["load_ms"],
        prefill_ms=report["prefill_ms"],
        first_decode_ms=round(first_decode_ms, 3),
        socket_ms=round(ttft_ms - inside, 3),
        prompt_tokens=usage["prompt_tokens"],
        cached_tokens=report["cached_tokens"],
        decode_tokens_per_s=report["decode_tokens_per_s"],
        model_load_ms=report["model_load_ms"],
    )


def _why_not(state: State, report: dict[str, Any]) -> str:
    """Say why an answer is not in the wanted state; empty if it is."""
    actual = report["state"]
    reason = report["reason"]
    if state is State.COLD:
        if actual != "cold" or report["load_ms"] or report["cached_tokens"]:
            return (
                f"an answer without cache took {report['cached_tokens']} tokens from one (state "
                f"{actual})"
            )
        return ""

    if actual not in ("hit", "loaded"):
        why = f"the answer's state was {actual}"
        if reason:
            why += f": {reason}"
        if actual == "miss":
            why += f"; {report['cached_tokens']} tokens were reused"
        return why

    if state is State.FILE and not report["load_ms"]:
        return "the file was not loaded: other clients asked the same prompt in between"

    if state is State.MEMORY and report["load_ms"]:
        return (
            "the file was loaded again: this runtime keeps nothing between answers, or other "
            "clients asked meanwhile"
        )

    return ""
