"""A deterministic engine without native code, for tests and for trying the program.

Its model is a small JSON file that also orders delays and faults. Tokens are the UTF-8 bytes of the
text. Beside each token the KV state keeps a 64-bit number made from the one before it and the
token, beginning with a hash of the model file. The answer is a pure function of the last number and
the sampling; a loaded state is taken as it is, never recomputed. So a foreign, swapped or stale
cache shows in the text, and `expected_text` returns the right answer.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from rkcached.engines.base import (
    Embedding,
    EngineInfo,
    FinishReason,
    ModelSpec,
    OnProgress,
    OnToken,
    Relevance,
    RunStats,
    Sampling,
    Token,
)
from rkcached.engines.cache_headers import MEMORY, MEMORY_MAGIC
from rkcached.engines.kinds import RANK
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    InputInvalid,
    ModelLoadError,
    Uncacheable,
)

MODEL_MAGIC = b'{"rkcached_memory_model":'
_MODEL_MAX_BYTES = 1 << 20

# Magic, version, number of tokens; then the tokens and the number of each position (8 bytes, native
# order).
_STATE_VERSION = 1

_MASK = (1 << 64) - 1
_PRIME = 0x100000001B3  # FNV-1a's: states differ, for one multiplication per byte
_BATCH_TOKENS = 256
_SLICE_US = 20_000  # a slow prefill reports its progress about this often

# More than one byte per character in about half of them: pieces of text must not split a character.
_TEXT = (
    "amber café river über cloud 🎉 stone naïve lamp Zürich green ½ paper "
    "señor window → quiet jalapeño metal straße orange 温度 garden smörgås 🚀"
)
_WORDS = tuple(word + b" " for word in _TEXT.encode().split())


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A fault at the `at`-th call of `op` in this process.

    With "generate", at the `at`-th new token.
    """

    op: Literal["init", "prefill", "save", "load", "generate", "close"]
    kind: Literal["segfault", "abort", "exit", "hang", "error", "garbage_stdout"]
    at: int = 1


class MemoryModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model file. `msgspec.json.encode` of it makes a valid one."""

    rkcached_memory_model: Literal[1] = 1
    context_tokens: int = 4096
    prefill_us_per_token: int = 0
    decode_us_per_token: int = 0
    load_ms: int = 0
    can_save: bool = True
    rewinds: bool = True
    """See `EngineInfo.rewinds`."""
    states: int = 1
    """See `EngineInfo.states`."""
    seed: str = ""
    """Any text: models with different seeds give different answers."""
    script: dict[str, str] = {}
    """Text in a prompt to the answer that it gets; of several, the last one that the prompt has
    decides."""
    faults: tuple[Fault, ...] = ()


class MemoryEngine:
    """See `Engine` for what each method promises."""

    def __init__(self, spec: ModelSpec) -> None:
        self._model, self._origin = _read_model(spec.path)
        self._pools = spec.pooling
        context = min(spec.context_tokens or self._model.context_tokens, self._model.context_tokens)
        self._info = EngineInfo(
            runtime_version="1",
            context_tokens=context,
            measures_prefill=True,
            aborts_prefill=True,
            rewinds=self._model.rewinds,
            states=self._model.states,
        )
        # The tokens of each KV state, and the number of each position.
        self._kept = [(bytearray(), array("Q")) for _ in range(self._model.states)]
        self._tokens, self._states = self._kept[0]
        self._abort = threading.Event()
        self._calls: Counter[str] = Counter()
        self._closed = False
        if self._model.load_ms:
            time.sleep(self._model.load_ms / 1000)
        self._enter("init")

    @property
    def info(self) -> EngineInfo:
        return self._info

    def choose(self, state: int, /) -> None:
        self._tokens, self._states = self._kept[state]

    def state_tokens(self, state: int, /) -> int:
        return len(self._kept[state][0])

    def tokenize(self, text: str) -> Sequence[int]:
        return _encode(text)

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        self._abort.clear()
        self._enter("prefill")
        if not self._model.can_save:
            raise Uncacheable(
                "this model cannot save its KV state",
                hint="set can_save in the model file, or serve it without caches",
            )

        tokens = self._check_prompt(prompt)
        if not keep_state:
            self.clear()
        cached = self._rewind(tokens)
        started = time.monotonic()
        if not self._read(tokens, on_progress):
            raise Aborted("the prefill was stopped on request")

        prefill_ms = _ms_since(started)
        self.save(save_to)
        return RunStats(
            finish=FinishReason.LENGTH,
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            prefill_ms=prefill_ms,
            decode_tokens=0,
            decode_ms=0.0,
        )

    def save(self, path: Path) -> int:
        self._enter("save")
        header = MEMORY.pack(MEMORY_MAGIC, _STATE_VERSION, len(self._tokens))
        try:
            path.write_bytes(header + self._tokens + self._states.tobytes())
        except OSError as error:
            raise EngineError(f"cannot write the prompt cache {path}: {error.strerror}") from error
        return len(self._tokens)

    def load(self, path: Path) -> int:
        self.clear()
        self._enter("load")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtifactLoadError(
                f"cannot read the prompt cache {path}: {error.strerror}"
            ) from error

        if len(data) < MEMORY.size or not data.startswith(MEMORY_MAGIC):
            raise ArtifactLoadError(f"{path} is not a prompt cache of this engine")

        _, version, count = MEMORY.unpack_from(data)
        if version != _STATE_VERSION:
            raise ArtifactLoadError(
                f"{path} has version {version}, this engine reads {_STATE_VERSION}"
            )
        if len(data) != MEMORY.size + count * 9:
            raise ArtifactLoadError(
                f"{path} is damaged: {len(data)} bytes do not hold {count} tokens"
            )
        if count > self._info.context_tokens:
            raise ArtifactLoadError(
                f"{path} has {count} tokens, the context holds {self._info.context_tokens}"
            )

        split = MEMORY.size + count
        self._tokens += data[MEMORY.size : split]
        self._states.frombytes(data[split:])
        self._share_context()
        return int(count)

    def rest(self) -> None:
        """Nothing would have to be done."""

    def clear(self) -> None:
        self._truncate(0)

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        self._abort.clear()
        self._check_open()
        if sampling.max_new_tokens < 0:
            raise EngineError(f"max_new_tokens is {sampling.max_new_tokens}, which is below 0")

        tokens = self._check_prompt(prompt)
        cached = self._rewind(tokens)

        started = time.monotonic()
        complete = self._read(tokens, on_progress)
        prefill_ms = _ms_since(started)

        started = time.monotonic()
        finish = FinishReason.ABORT
        decoded = 0
        if complete:
            scripted = [text for marker, text in self._model.script.items() if marker in prompt]
            finish, decoded = self._decode(sampling, on_token, trace=trace, scripted=scripted[-1:])

        return RunStats(
            finish=finish,
            prompt_tokens=len(tokens),
            cached_tokens=cached,
            prefill_ms=prefill_ms,
            decode_tokens=decoded,
            decode_ms=_ms_since(started),
        )

    def embed(self, content: str | tuple[int, ...]) -> Embedding:
        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        if self._pools in ("", RANK):
            raise EngineError(
                "the model was not loaded for embeddings",
                hint="set embedding: true in the manifest",
            )
        if not isinstance(content, str) and any(token not in range(256) for token in content):
            raise InputInvalid("a token is not in the vocabulary: tokens are bytes")

        if isinstance(content, str):
            tokens = self._check_prompt(content)
        else:
            tokens = self._check_tokens(bytes(content))

        last = _positions(self._origin, tokens)[-1]
        numbers = np.frombuffer(last.to_bytes(8, "little"), np.uint8)
        vector = numbers.astype(np.float32) - np.float32(127.5)
        return Embedding(vector=vector, tokens=len(tokens))

    def rank(self, query: str, document: str) -> Relevance:
        """The part of the query's words that the document has, from 0 to 1."""
        if self._pools != RANK:
            raise EngineError(
                "the model was not loaded to rank", hint="set rerank: true in the manifest"
            )
        tokens = self._check_prompt(f"{query}\n{document}")
        words = _words(query)
        score = len(words & _words(document)) / max(len(words), 1)
        return Relevance(score=score, tokens=len(tokens))

    def abort(self) -> None:
        self._abort.set()  # every run clears it first, so an abort without a run does nothing

    def close(self) -> None:
        if not self._closed:
            self._enter("close")
            for tokens, states in self._kept:
                del tokens[:]
                del states[:]
            self._closed = True

    def _rewind(self, tokens: bytes) -> int:
        """Keep what the state has of the beginning of `tokens`; at least one is read anew."""
        common = os.path.commonprefix((bytes(self._tokens), tokens))  # noqa: RUF071 - of bytes
        cached = min(len(common), len(tokens) - 1)
        if cached < len(self._tokens) and not self._model.rewinds:
            cached = 0
        self._truncate(cached)
        return cached

    def _read(self, tokens: bytes, on_progress: OnProgress | None = None) -> bool:
        """Extend the state to all of `tokens`, which begin with it. False if it was stopped."""
        us = self._model.prefill_us_per_token
        step = _BATCH_TOKENS
        if us:
            step = max(1, min(_BATCH_TOKENS, _SLICE_US // us))

        if on_progress:
            on_progress(len(self._tokens), len(tokens))

        while len(self._tokens) < len(tokens):
            batch = tokens[len(self._tokens) : len(self._tokens) + step]
            if self._wait(us * len(batch)):
                return False

            self._extend(batch)
            if on_progress:
                on_progress(len(self._tokens), len(tokens))

        return True

    def _decode(
        self, sampling: Sampling, on_token: OnToken, *, trace: bool, scripted: list[str]
    ) -> tuple[FinishReason, int]:
        room = self._info.context_tokens - len(self._tokens)
        if scripted:
            whole = _encode(scripted[0])
            answer = whole[: min(sampling.max_new_tokens, room)]
            shown = len(answer)
            finish = FinishReason.STOP
            if shown < len(whole):
                finish = FinishReason.LENGTH
        else:
            answer, shown, finish = _answer(self._states[-1], sampling, room)

        begin = 0  # of the character that is not whole yet
        for end in range(1, len(answer) + 1):
            if self._wait(self._model.decode_us_per_token):
                return FinishReason.ABORT, end - 1

            self._enter("generate")
            self._extend(answer[end - 1 : end])
            if end > shown or not _at_character(answer, end):
                continue

            piece = answer[begin:end]
            begin = end
            ids = tuple(piece) if trace else ()
            if on_token(Token(text=piece.decode(), ids=ids)):
                return FinishReason.ABORT, end

        return finish, len(answer)

    def _wait(self, us: int) -> bool:
        """Let the time of some work pass. True if the run was stopped."""
        if us:
            return self._abort.wait(us / 1e6)
        return self._abort.is_set()

    def _extend(self, tokens: bytes) -> None:
        state = self._states[-1] if self._states else self._origin
        self._tokens += tokens
        self._states.extend(_positions(state, tokens))
        self._share_context()

    def _share_context(self) -> None:
        """Drop the other states if the context does not hold all."""
        if sum(len(tokens) for tokens, _ in self._kept) <= self._info.context_tokens:
            return
        for tokens, states in self._kept:
            if tokens is not self._tokens:
                del tokens[:]
                del states[:]

    def _truncate(self, count: int) -> None:
        del self._tokens[count:]
        del self._states[count:]

    def _check_prompt(self, prompt: str) -> bytes:
        return self._check_tokens(_encode(prompt))

    def _check_tokens(self, tokens: bytes) -> bytes:
        if not tokens:
            raise EngineError("the prompt is empty")
        if len(tokens) + 1 > self._info.context_tokens:
            raise ContextExceeded(len(tokens), self._info.context_tokens)
        return tokens

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    def _enter(self, op: str) -> None:
        """Count a call of `op`, and let the fault happen that the model file orders for it."""
        self._check_open()
        self._calls[op] += 1
        for fault in self._model.faults:
            if fault.op == op and fault.at == self._calls[op]:
                _fail(fault)


def expected_text(model_bytes: bytes, prompt: str, sampling: Sampling) -> str:
    """The whole answer of a `MemoryEngine` to `prompt`, from a correct state."""
    tokens = _encode(prompt)
    *_, last = _positions(_origin(model_bytes), tokens)
    room = msgspec.json.decode(model_bytes, type=MemoryModel).context_tokens - len(tokens)
    answer, shown, _ = _answer(last, sampling, room)
    return answer[:shown].decode(errors="ignore")


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _read_model(path: str) -> tuple[MemoryModel, int]:
    hint = "a memory model is a JSON file that begins with " + MODEL_MAGIC.decode() + " 1"
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MODEL_MAX_BYTES)
    except OSError as error:
        raise ModelLoadError(
            f"cannot read the model {path}: {error.strerror}", hint="check the path"
        ) from error

    if not data.startswith(MODEL_MAGIC):
        raise ModelLoadError(f"{path} is not a memory model", hint=hint)

    try:
        return msgspec.json.decode(data, type=MemoryModel), _origin(data)
    except msgspec.DecodeError as error:
        raise ModelLoadError(f"{path} is not a valid memory model: {error}", hint=hint) from error


def _origin(model_bytes: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(model_bytes, digest_size=8).digest(), "little")


def _positions(state: int, tokens: Iterable[int]) -> list[int]:
    states = []
    for token in tokens:
        state = ((state ^ token) * _PRIME) & _MASK
        states.append(state)
    return states


def _answer(state: int, sampling: Sampling, room: int) -> tuple[bytes, int, FinishReason]:
    """The answer's tokens, how many come before a stop string, and why it ends there."""
    chosen: list[object] = [
        state,
        sampling.repeat_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    ]

    if sampling.temperature is not None and sampling.temperature > 0:
        chosen += [sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed]
        if sampling.min_p:
            chosen.append(sampling.min_p)
    key = _origin(msgspec.json.encode(chosen))
    count = min(sampling.max_new_tokens, room)
    stream = bytearray()

    while len(stream) < count:
        # Knuth's MMIX generator: its high bits are good.
        key = (key * 6364136223846793005 + 1442695040888963407) & _MASK
        stream += _WORDS[(key >> 32) % len(_WORDS)]

    # The stop string that is complete first ends the answer, as with any engine that streams.
    answer = bytes(stream[:count])
    stops = [
        (at + len(stop), at)
        for stop in map(_encode, sampling.stop)
        if stop and (at := answer.find(stop)) >= 0
    ]
    if not stops:
        return answer, len(answer), FinishReason.LENGTH

    end, begin = min(stops)
    return answer[:end], begin, FinishReason.STOP


def _at_character(data: bytes, end: int) -> bool:
    """Whether a character is complete before `end`, by its first byte, which has its length."""
    begin = end - 1
    while data[begin] & 0xC0 == 0x80:
        begin -= 1

    length = 1
    for least in (0x80, 0xE0, 0xF0):
        if data[begin] >= least:
            length += 1
    return end - begin == length


def _encode(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise EngineError(
            f"the text is not valid Unicode: {error.reason} at {error.start}"
        ) from error


def _ms_since(started: float) -> float:
    return (time.monotonic() - started) * 1000


def _fail(fault: Fault) -> None:
    match fault.kind:
        case "error":
            raise EngineError(f"fault at {fault.op} {fault.at}, as the model file orders")
        case "garbage_stdout":
            os.write(1, b"rknn: \xff\x00 native chatter that is no message\n")
            return
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "abort":
            os.abort()
        case "exit":
            os._exit(3)
        case "hang":
            pass

    while True:  # hang; after a signal, wait for it to arrive
        time.sleep(60)
