"""One answer through the socket, in a state that is made on purpose and proven by the answer's own figures.

cold     The request says `"cache": false`: the worker forgets its KV state, and loads nothing. Proven by the state
         `cold`, no time for loading, and no cached token.
file     It follows a cold answer, after which nothing that the worker has in memory came from a prompt cache, so it
         must load the file. Proven by the state `hit` and a time for loading. The kernel may have the file in its
         page cache, as it has for a daemon that serves it often.
memory   It follows an answer with the same prompt. Proven by the state `hit` and no time for loading.

Other clients of the daemon may come in between; then the answer is not what it was to be, and is asked for again.
Each question begins with another number, so no answer reuses more than the prompt of the one before it.
"""

from __future__ import annotations

import time
from typing import Any

from rkcached.cli.bench.results import Run, State
from rkcached.cli.client import Client

ANSWER_TOKENS = 16
"""Enough that the speed of decoding can be told."""
QUESTION = "In one sentence, what is your most important rule?"
TRIES = 3


class NotMade(Exception):
    """A state could not be made; the message says why."""


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
            run, report, question = self._once(state)
            why = _why_not(state, report)
            if not why:
                return run, question
        raise NotMade(why)

    def _once(
        self, state: State, *, answer_tokens: int = ANSWER_TOKENS
    ) -> tuple[Run, dict[str, Any], str]:
        self._count += 1
        question = f"{self._count % 1000:03d}: {QUESTION}"
        body: dict[str, Any] = {
            "model": self._name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": answer_tokens,
            "stream_options": {"include_usage": True},
        }
        if state is State.COLD:
            body["cache"] = False
        first = 0.0
        report: dict[str, Any] = {}
        usage: dict[str, Any] = {}
        started = time.perf_counter()
        for chunk in self._client.stream(body):
            if not first and any(_has_text(choice["delta"]) for choice in chunk["choices"]):
                first = time.perf_counter()
            report = chunk.get("rkcached", report)
            usage = chunk.get("usage") or usage
        self.answers += 1
        if not first:  # a model may end at once: the daemon then reports the whole answer's time
            first = time.perf_counter()
        return _run((first - started) * 1000, report, usage), report, question


def _has_text(delta: dict[str, Any]) -> bool:
    return bool(delta.get("content") or delta.get("reasoning_content"))


def _run(ttft_ms: float, report: dict[str, Any], usage: dict[str, Any]) -> Run:
    inside: float = report["ttft_ms"]
    first_decode_ms = max(
        0.0, inside - report["queue_ms"] - report["load_ms"] - report["prefill_ms"]
    )
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
    )


def _why_not(state: State, report: dict[str, Any]) -> str:
    """Why an answer is not in the state it was to be in; empty if it is."""
    found, reason = report["state"], report["reason"]
    if state is State.COLD:
        if found != "cold" or report["load_ms"] or report["cached_tokens"]:
            return f"an answer without cache took {report['cached_tokens']} tokens from one (state {found})"
        return ""
    if found not in ("hit", "loaded"):
        said = f"the answer's state was {found}" + (f": {reason}" if reason else "")
        return said + (f"; {report['cached_tokens']} tokens were reused" if found == "miss" else "")
    if state is State.FILE and not report["load_ms"]:
        return "the file was not loaded: other clients asked the same prompt in between"
    if state is State.MEMORY and report["load_ms"]:
        return "the file was loaded again: this runtime keeps nothing between answers, or other clients asked meanwhile"
    return ""
