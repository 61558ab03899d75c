"""One daemon under a soak: clients that ask and check, and a hand that edits, reloads and kills.

An answer is right if it is one that a correct engine gives to a text that the prompt had when it
was asked for, or up to STALE_S before, which is how long an edit may go unnoticed. For the memory
engine that answer is computed here, from a rendering of our own; for a real model it is what the
daemon answered cold and greedily before anything was disturbed. A prefill in other batches gives a
real model slightly other numbers, so its answers are compared token by token, with the
log-probabilities of the five likeliest: these move by less than SHIFT, and only near ones may
change places.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _daemon import Daemon

from rkcached.engines.base import Sampling
from rkcached.engines.memory import expected_text
from rkcached.errors import DaemonUnreachable, RequestError
from rkcached.host.unix_http import UnixConnection

LOOKS, LOOK_S = 20, 0.05
STALE_S = 10.0
"""An edit settles for 5 s at most, and a look on a busy machine takes its time."""

PAUSE_S = 0.1
"""Of a client that was refused: one that asks at once would only count refusals."""

SHIFT = 1.0
"""Natural log-probability. SmolLM2-135M Q4_1, states read in different batches, 112 pairs of runs:
those of the five likeliest tokens moved by up to 0.58, and two tokens that were 0.67 apart
changed places."""

KEPT_REFERENCES = 500

TOKENS = 12
GREEDY: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1.0, "max_tokens": TOKENS}
QUESTIONS = ("Who are you?", "Who are you? Repeat your first sentence.")
PROMPTS = ("first", "second")
KINDS = ("chat", "chat", "chat", "tools", "completion")

# A request may end with these errors when its worker was killed.
_CLEAN = {"worker_died", "worker_unavailable", "worker_timeout", "model_unavailable", "queue_full"}

_TOOL = {
    "type": "function",
    "function": {
        "name": "open_roof",
        "description": "Open the roof.",
        "parameters": {"type": "object", "properties": {"percent": {"type": "integer"}}},
    },
}


class WrongAnswerError(Exception):
    """An answer that no text of its prompt gives, or a failure that says nothing."""


Tokens = tuple[tuple[str, dict[str, float]], ...]
"""Each token with the likeliest ones at its place."""


@dataclass(slots=True, kw_only=True)
class Reply:
    """The answer that a client got, whole or up to the failure."""

    text: str
    tokens: Tokens = ()
    """Of a real model."""
    report: dict[str, Any] = field(default_factory=dict)
    """The daemon's report; empty after a failure."""
    failure: str = ""

    def is_right(self, right: Reply) -> bool:
        """Whether it is what `right`, which is whole, is."""
        if not right.tokens:
            return self.text == right.text if not self.failure else right.text.startswith(self.text)
        for (token, top), (right_token, right_top) in zip(self.tokens, right.tokens, strict=False):
            if any(
                abs(right_top[known] - top[known]) > SHIFT
                for known in top.keys() & right_top.keys()
            ):
                return False
            if token != right_token:
                return right_top[right_token] - right_top.get(token, -math.inf) <= SHIFT
        return bool(self.tokens) or bool(self.failure)


@dataclass(slots=True, kw_only=True)
class Site:
    """A daemon, the texts that its prompts had, and what was counted."""

    name: str
    daemon: Daemon
    write_manifest: Callable[[int], str]
    """The manifest's text; its number makes variants that differ in what they cost."""
    text: Callable[[str, int], str]
    """A prompt's text by the number of the edit."""
    pause_s: float
    """The longest pause of a client between two requests: builds step aside for those that never
    pause."""
    memory_model: bytes = b""
    """The model file, if this is the memory engine."""
    counts: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _texts: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    _references: dict[tuple[str, str, str], Reply] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _edits: int = 0

    # What changes

    def restore(self, timeout_s: float) -> None:
        """Give every prompt another text, and wait until all is fresh. Errors: as `settle`."""
        for prompt in PROMPTS:
            self.edit(prompt)
        self.declare(1)
        self.settle(timeout_s)

    def edit(self, prompt: str) -> None:
        """Give a prompt another text, as editors do: write beside, rename over."""
        self._edits += 1
        text = self.text(prompt, self._edits)
        with self._lock:
            self._texts.setdefault(prompt, []).append((time.monotonic(), text))
        replace(self.daemon.workspace.root / f"{prompt}.md", f"{text}\n".encode())
        self.counts["edits"] += 1

    def declare(self, variant: int) -> None:
        replace(self.daemon.workspace.manifest, self.write_manifest(variant).encode())
        self.counts["reloads"] += 1

    def disturb(self, chance: random.Random) -> None:
        """One thing goes wrong, or changes."""
        match chance.choices(
            ("kill", "edit", "touch", "declare", "break", "hang up"), (6, 4, 1, 2, 1, 1)
        )[0]:
            case "kill":
                self._kill(chance)
            case "edit":
                self.edit(chance.choice(PROMPTS))
            case "touch":
                (self.daemon.workspace.root / f"{chance.choice(PROMPTS)}.md").touch()
            case "declare":
                self.declare(chance.randrange(1000))
            case "break":
                broken = b"version: 1\nmodels: {m: {path: [}}\n"
                replace(self.daemon.workspace.manifest, broken)
            case _:
                self.daemon.hang_up()

    def _kill(self, chance: random.Random) -> None:
        workers = self.workers()
        if workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()
                self.counts["kills"] += 1

    # What asks

    def visit(self, chance: random.Random) -> None:
        """Ask and pause, as a client does again and again."""
        self.ask(chance)
        time.sleep(chance.random() * self.pause_s)

    def ask(self, chance: random.Random) -> None:
        """One request of some kind, and the check of its answer."""
        kind = chance.choice(KINDS)
        prompt = chance.choice(PROMPTS)
        question = chance.choice(QUESTIONS)
        stream = chance.random() < 0.6
        cold = chance.random() < 0.1
        asked = time.monotonic()
        text = self._possible(prompt, asked)[-1] if kind == "completion" else None
        request = self._request(kind, prompt, question, text, stream=stream, cold=cold)
        if chance.random() < 0.08:
            self._leave(*request, chance)
            return
        reply = self._send(*request)
        texts = [text] if text is not None else self._possible(prompt, asked)
        self.counts["requests"] += 1
        self.counts["clean failures" if reply.failure else reply.report["state"]] += 1
        if reply.failure:
            self.failures[reply.failure] += 1
            time.sleep(PAUSE_S)
        known = [self.reference(kind, candidate, question) for candidate in reversed(texts)]
        if not any(reply.is_right(right) for right in known):
            how = reply.failure or {
                key: reply.report[key] for key in ("cache", "state", "reason", "cached_tokens")
            }
            where = f"{kind} {prompt}, {question!r}, stream {stream}, cold {cold}, {how}"
            raise WrongAnswerError(
                f"{where}: {reply.text!r} is none of {[right.text for right in known]!r}"
            )

    def reference(self, kind: str, text: str, question: str) -> Reply:
        """The right answer."""
        if self.memory_model and kind != "tools":
            return Reply(text=expected_text(self.memory_model, rendered(text, question), _SAMPLING))
        key = (kind, text, question)
        while key not in self._references:
            request = self._request(kind, "", question, text, stream=False, cold=True)
            reply = self._send(*request)
            if not reply.failure:
                self._references[key] = reply
            if len(self._references) > KEPT_REFERENCES:  # the memory engine's texts never end
                self._references.pop(next(iter(self._references)))
        return self._references[key]

    def power(self) -> float:
        """The share of wrong answers that would be noticed, by swapping the right ones."""
        known = list(self._references.items())
        noticed = [
            not other.is_right(right)
            for (kind, text, question), right in known
            for (other_kind, other_text, other_question), other in known
            if kind == other_kind and question == other_question and text != other_text
        ]
        return sum(noticed) / len(noticed)

    def _possible(self, prompt: str, asked: float) -> list[str]:
        """The texts that a request of this moment may be answered from, the newest last."""
        with self._lock:
            known = self._texts[prompt]
            ended = [until for until, _ in known[1:]] + [float("inf")]
            kept = [entry for entry, end in zip(known, ended, strict=True) if end > asked - STALE_S]
            if time.monotonic() - asked < STALE_S:
                self._texts[prompt] = [
                    e for e, end in zip(known, ended, strict=True) if end > asked - 30 * STALE_S
                ]
            return [text for _, text in kept]

    def _request(
        self, kind: str, prompt: str, question: str, text: str | None, *, stream: bool, cold: bool
    ) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {**GREEDY, "stream": stream}
        if cold:
            body["cache"] = False
        if not self.memory_model:
            body |= (
                {"logprobs": 5} if kind == "completion" else {"logprobs": True, "top_logprobs": 5}
            )
        if kind == "completion":
            assert text is not None
            return "/v1/completions", {
                **body,
                "model": "m",
                "prompt": rendered(text, question),
            }
        messages = [{"role": "user", "content": question}]
        if text is None:
            body["model"] = f"m/{prompt}"
        else:
            body["model"] = "m"
            messages.insert(0, {"role": "system", "content": text})
        if kind == "tools":
            body["tools"] = [_TOOL]
        return "/v1/chat/completions", {**body, "messages": messages}

    def _send(self, target: str, body: dict[str, Any]) -> Reply:
        """Errors: WrongAnswerError for an end that is neither an answer nor an error of ours."""
        chunks: list[dict[str, Any]] = []
        failure = ""
        with self.daemon.client() as client:
            try:
                if not body["stream"]:
                    return _read_whole(client.request("POST", target, body))
                for data in client.stream_data(target, body):
                    chunks.append(json.loads(data))  # noqa: PERF401 - kept when an error follows
            except RequestError as error:
                if error.code not in _CLEAN:
                    raise WrongAnswerError(f"HTTP {error.status}: {error}") from error
                failure = error.code
            except DaemonUnreachable as error:
                raise WrongAnswerError(f"the connection ended: {error}") from error
        return _read_chunks(chunks, failure)

    def _leave(self, target: str, body: dict[str, Any], chance: random.Random) -> None:
        """A client that goes away, before or in the middle of its answer."""
        connection = UnixConnection(self.daemon.workspace.socket)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("POST", target, json.dumps(body | {"max_tokens": 200}))
            if body["stream"]:
                connection.getresponse().read(chance.randrange(1, 400))
            else:
                time.sleep(chance.random() / 2)
        connection.close()
        self.counts["clients that left"] += 1

    # What is looked at

    def workers(self) -> list[psutil.Process]:
        workers = []
        for child in psutil.Process(self.daemon.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "rkcached.worker.child" in " ".join(child.cmdline()):
                    workers.append(child)
        return workers

    def held(self) -> dict[str, float]:
        """Memory, descriptors and children of the daemon's process."""
        process = psutil.Process(self.daemon.pid)
        children = process.children(recursive=True)
        return {
            "memory": process.memory_info().rss / 1e6,
            "descriptors": min(self._descriptors(process) for _ in range(LOOKS)),
            "children": len(children),
            "zombies": sum(child.status() == psutil.STATUS_ZOMBIE for child in children),
        }

    @staticmethod
    def _descriptors(process: psutil.Process) -> int:
        """Count them now; a connection that was just closed is there for some milliseconds more."""
        time.sleep(LOOK_S)
        return process.num_fds()

    def settle(self, timeout_s: float) -> None:
        """Wait until all is fresh again, with no more than the daemon does on its own.

        Errors: DaemonUnreachable, StillWaiting.
        """
        for status in self.daemon.statuses(timeout_s=timeout_s):
            states = {prompt["state"] for prompt in status["prompts"]}
            if status["manifest"]["ok"] and states == {"fresh"} and not status["running"]:
                return

    def note_status(self) -> None:
        status = self.daemon.status()
        self.counts["builds"] = status["reconcile"]["builds"]
        log = self.daemon.workspace.log.read_text(errors="replace")
        self.counts["restarts"] = log.count(" worker died ")


def rendered(text: str, question: str) -> str:
    """ChatML, as its authors describe it."""
    turns = (("system", text), ("user", question))
    return (
        "".join(f"<|im_start|>{role}\n{text_of}<|im_end|>\n" for role, text_of in turns)
        + "<|im_start|>assistant\n"
    )


_SAMPLING = Sampling(
    max_new_tokens=TOKENS,
    temperature=0.0,
    repeat_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)


def _read_whole(answer: dict[str, Any]) -> Reply:
    choice = answer["choices"][0]
    text = choice["text"] if "text" in choice else _message(choice["message"])
    return Reply(text=text, report=answer["rkcached"], tokens=_tokens(choice.get("logprobs") or {}))


def _tokens(logprobs: dict[str, Any]) -> Tokens:
    """Chat and completions say them differently."""
    if "content" in logprobs:
        return tuple(
            (t["token"], {o["token"]: o["logprob"] for o in t["top_logprobs"]})
            for t in logprobs["content"]
        )
    return tuple(zip(logprobs.get("tokens", ()), logprobs.get("top_logprobs", ()), strict=True))


def _message(message: dict[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (message.get("content") or "") + "".join(f"{c['name']}({c['arguments']})" for c in calls)


def _read_chunks(chunks: list[dict[str, Any]], failure: str) -> Reply:
    """The reply of a stream; `failure` is the code of the error that ended it."""
    parts: list[str] = []
    tokens: Tokens = ()
    report: dict[str, Any] = {}
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        report = chunk.get("rkcached", report)
        for choice in chunk.get("choices", ()):
            tokens += _tokens(choice.get("logprobs") or {})
            delta = choice.get("delta", {})
            parts.append(choice["text"] if "text" in choice else delta.get("content") or "")
            for call in delta.get("tool_calls") or ():
                name, arguments = calls.setdefault(call["index"], ["", ""])
                function = call["function"]
                name += function.get("name") or ""
                arguments += function.get("arguments") or ""
                calls[call["index"]] = [name, arguments]
    text = "".join(parts) + "".join(f"{name}({arguments})" for name, arguments in calls.values())
    return Reply(text=text, tokens=tokens, report=report, failure=failure)


def replace(path: Path, data: bytes) -> None:
    """As editors do; a folder that is not there is made."""
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(data)
    beside.replace(path)
