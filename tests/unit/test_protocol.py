"""The wire between daemon and worker: every message survives it, and nothing else gets through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached import errors
from rkcached.engines.base import (
    EngineInfo,
    FinishReason,
    ModelSpec,
    RunStats,
    Sampling,
    TokenLogprob,
)
from rkcached.engines.kinds import VerifyMode
from rkcached.worker import protocol
from rkcached.worker.protocol import (
    FrameReader,
    FromWorker,
    ProtocolError,
    ToWorker,
    frame,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
COUNT = st.integers(0, 2**40)
MS = st.floats(0, 1e9)
ID = st.integers(0, 2**31)
SIGNATURES = st.binary(min_size=40, max_size=40)
CACHES = st.builds(protocol.CacheFile, path=TEXT, signature=SIGNATURES, fingerprint=TEXT)
SAMPLINGS = st.builds(
    Sampling,
    max_new_tokens=COUNT,
    temperature=st.none() | MS,
    top_k=st.none() | COUNT,
    seed=st.none() | COUNT,
    stop=st.lists(TEXT, max_size=3).map(tuple),
    json_schema=TEXT,
    logprobs=st.none() | COUNT,
)
LOGPROBS = st.lists(
    st.builds(
        TokenLogprob,
        text=TEXT,
        logprob=MS,
        data=st.lists(st.integers(0, 255), max_size=3).map(tuple),
    ),
    max_size=2,
).map(tuple)
STATS = st.builds(
    RunStats,
    finish=st.sampled_from(FinishReason),
    prompt_tokens=COUNT,
    cached_tokens=COUNT,
    prefill_ms=MS,
    decode_tokens=COUNT,
    decode_ms=MS,
)
MODES = st.sampled_from(VerifyMode)
SPECS = st.builds(
    ModelSpec,
    path=TEXT,
    context_tokens=COUNT,
    threads=st.integers(0, 256),
    library=TEXT,
    scratch_dir=TEXT,
)
INFOS = st.builds(
    EngineInfo,
    runtime_version=TEXT,
    context_tokens=COUNT,
    measures_prefill=st.booleans(),
    aborts_prefill=st.booleans(),
)

BASES = st.builds(
    protocol.Base,
    cache=CACHES,
    tokens=COUNT,
    prefill_ms=MS,
    is_beginning=st.booleans(),
    probe=TEXT,
    answer=TEXT,
)

TO_WORKER: dict[type, st.SearchStrategy[ToWorker]] = {
    protocol.Start: st.builds(protocol.Start, implementation=TEXT, spec=SPECS),
    protocol.Build: st.builds(
        protocol.Build,
        id=ID,
        prefix=TEXT,
        probe=TEXT,
        path=TEXT,
        verify=MODES,
        min_tokens=COUNT,
        base=st.none() | BASES,
        partial=TEXT,
    ),
    protocol.Generate: st.builds(
        protocol.Generate,
        id=ID,
        prompt=TEXT,
        sampling=SAMPLINGS,
        cache=st.none() | CACHES,
        cold=st.booleans(),
    ),
    protocol.Check: st.builds(protocol.Check, id=ID, cache=CACHES, text=TEXT),
    protocol.Embed: st.builds(
        protocol.Embed, id=ID, text=TEXT, tokens=st.lists(COUNT, max_size=4).map(tuple)
    ),
    protocol.Rank: st.builds(protocol.Rank, id=ID, query=TEXT, document=TEXT),
    protocol.Tokenize: st.builds(protocol.Tokenize, id=ID, text=TEXT),
    protocol.Abort: st.builds(protocol.Abort, id=ID),
}
TO_WORKER[protocol.Keep] = st.builds(protocol.Keep, id=ID, keep_at=st.tuples(TEXT))

FROM_WORKER: dict[type, st.SearchStrategy[FromWorker]] = {
    protocol.Ready: st.builds(protocol.Ready, info=INFOS, load_ms=MS),
    protocol.Progress: st.builds(protocol.Progress, id=ID, done_tokens=COUNT, total_tokens=COUNT),
    protocol.Kept: st.builds(protocol.Kept, id=ID, tokens=COUNT, prefill_ms=MS),
    protocol.Loading: st.builds(protocol.Loading, id=ID),
    protocol.Loaded: st.builds(
        protocol.Loaded, id=ID, tokens=COUNT, load_ms=MS, error=TEXT, replaced=st.booleans()
    ),
    protocol.Saved: st.builds(
        protocol.Saved,
        id=ID,
        path=TEXT,
        text=TEXT,
        asked_bytes=COUNT,
        owner=COUNT,
        tokens=COUNT,
        save_ms=MS,
    ),
    protocol.Piece: st.builds(protocol.Piece, id=ID, text=TEXT, logprobs=LOGPROBS),
    protocol.Done: st.builds(protocol.Done, id=ID, stats=STATS),
    protocol.Built: st.builds(
        protocol.Built,
        id=ID,
        tokens=COUNT,
        prefill_ms=MS,
        load_ms=MS,
        cold_ttft_ms=MS,
        warm_ttft_ms=MS,
        verified=MODES,
        reused_tokens=COUNT,
        base_error=TEXT,
        answer=TEXT,
        proof_ms=MS,
    ),
    protocol.Checked: st.builds(protocol.Checked, id=ID, tokens=COUNT),
    protocol.Embedded: st.builds(
        protocol.Embedded, id=ID, vector=st.binary(max_size=64), tokens=COUNT
    ),
    protocol.Ranked: st.builds(protocol.Ranked, id=ID, score=st.floats(0, 1), tokens=COUNT),
    protocol.Tokenized: st.builds(
        protocol.Tokenized, id=ID, tokens=st.none() | st.lists(COUNT, max_size=4).map(tuple)
    ),
    protocol.Failed: st.builds(
        protocol.Failed,
        id=ID,
        error=TEXT,
        message=TEXT,
        hint=TEXT,
        tokens=COUNT,
        limit=COUNT,
        param=TEXT,
        text=TEXT,
    ),
}


def chunks(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    yield from (data[begin:end] for begin, end in pairwise(places))


def read(data: bytes, cuts: list[int]) -> list[bytes]:
    reader = FrameReader()
    return [body for chunk in chunks(data, cuts) for body in reader.feed(chunk)]


def test_every_message_is_tested() -> None:
    """A new message must be added to the tables above."""
    assert set(ToWorker.__args__) == set(TO_WORKER)
    assert set(FromWorker.__args__) == set(FROM_WORKER)


@given(
    st.lists(st.one_of(*TO_WORKER.values()), max_size=5),
    st.lists(st.integers(0, 9999), max_size=12),
)
def test_operations_survive_any_chunking(messages: list[ToWorker], cuts: list[int]) -> None:
    """What arrives is what was sent, in order, however the stream is cut."""
    bodies = read(b"".join(map(frame, messages)), cuts)
    assert messages == [protocol.decode_to_worker(body) for body in bodies]


@given(
    st.lists(st.one_of(*FROM_WORKER.values()), max_size=5),
    st.lists(st.integers(0, 9999), max_size=12),
)
def test_events_survive_any_chunking(messages: list[FromWorker], cuts: list[int]) -> None:
    """Byte by byte as well as all at once."""
    data = b"".join(map(frame, messages))
    assert messages == [protocol.decode_from_worker(body) for body in read(data, cuts)]
    assert messages == [
        protocol.decode_from_worker(body) for body in read(data, list(range(len(data))))
    ]


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error_and_nothing_else(body: bytes) -> None:
    """Neither end falls over what the other one.

    Or a library that got hold of the descriptor, writes.
    """
    for decode in (protocol.decode_to_worker, protocol.decode_from_worker):
        with pytest.raises(ProtocolError):
            decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b'{"type":"nonsense"}',
        b'{"type":"done"}',
        b'{"type":"piece","id":1,"text":3}',
        b'{"type":"piece","id":1,"text":"\xff"}',
        b'{"type":"piece","id":' + b"9" * 5000 + b"}",
        b'{"type":"progress","id":1,"done_tokens":1,"total_tokens":1' + b"0" * 400 + b"}",
        b'{"type":"piece","id":1,"text":"","more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=[
        "empty",
        "no-tag",
        "null",
        "list",
        "unknown",
        "incomplete",
        "wrong-type",
        "not-utf8",
        "huge-int",
        "no-float",
        "deep",
    ],
)
def test_a_body_that_is_no_message_is_a_protocol_error(body: bytes) -> None:
    """Valid JSON is not enough."""
    with pytest.raises(ProtocolError):
        protocol.decode_from_worker(body)
    with pytest.raises(ProtocolError):
        protocol.decode_to_worker(body)


@given(st.binary(max_size=200), st.lists(st.integers(0, 300), max_size=8))
def test_any_stream_gives_frames_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    """Nothing else is ever raised."""
    with contextlib.suppress(ProtocolError):
        read(data, cuts)


def test_a_length_beyond_the_limit_is_refused_before_its_body() -> None:
    """Four bytes of garbage must not make the daemon wait for gigabytes."""
    largest = protocol.MAX_FRAME_BYTES.to_bytes(4, "little")
    assert list(FrameReader().feed(largest)) == []
    too_large = (protocol.MAX_FRAME_BYTES + 1).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="16,777,217 bytes"):
        list(FrameReader().feed(too_large))


def test_frames_before_a_bad_length_are_delivered() -> None:
    """A worker's last words count even when it ends in garbage."""
    reader = FrameReader()
    frames = reader.feed(frame(protocol.Abort(id=7)) + b"\xff\xff\xff\xff")
    assert protocol.Abort(id=7) == protocol.decode_to_worker(next(frames))
    with pytest.raises(ProtocolError):
        next(frames)


def family(cls: type[errors.EngineError]) -> Iterator[type[errors.EngineError]]:
    """Of the tree in `errors`; engines that other tests import have subclasses of their own."""
    if cls.__module__ == errors.__name__:
        yield cls
    for child in cls.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize("cls", list(family(errors.EngineError)))
def test_every_engine_error_crosses_the_wire(cls: type[errors.EngineError]) -> None:
    """Class, message, hint and numbers are those that the engine raised."""
    numbered = issubclass(cls, errors.ContextExceeded | errors.PromptTooShort)
    error = cls(12, 7) if numbered else cls("what happened", hint="what to do")  # type: ignore[arg-type,call-arg]
    (body,) = read(frame(protocol.failed(3, error)), [])
    message = protocol.decode_from_worker(body)
    assert isinstance(message, protocol.Failed)
    assert message.id == 3
    arrived = protocol.engine_error(message)
    assert cls is type(arrived)
    assert vars(error) == vars(arrived)
    assert str(error) == str(arrived)


@pytest.mark.parametrize(
    ("tokens", "limit", "trained", "hint"),
    [
        (2000, 1024, None, "shorten the prompt, or raise params.max_context_len of the model"),
        (
            2000,
            1024,
            8192,
            "shorten the prompt, or raise params.max_context_len of the model up to 8192",
        ),
        (8192, 1024, 8192, "shorten the prompt: the model's own context is 8192 tokens"),
        (9001, 8192, 8192, "shorten the prompt: the model's own context is 8192 tokens"),
    ],
)
def test_what_helps_a_prompt_that_is_too_long(
    tokens: int, limit: int, trained: int | None, hint: str
) -> None:
    """The daemon knows the model's own context; nobody is told to raise a number in vain."""
    arrived = protocol.engine_error(
        protocol.failed(1, errors.ContextExceeded(tokens, limit)), trained
    )
    assert arrived.message == f"the prompt has {tokens} tokens, the context holds {limit}"
    assert arrived.hint == hint


def test_an_engines_own_error_arrives_as_what_it_is_a_kind_of() -> None:
    """The daemon knows the errors of the tree only."""

    class OwnError(errors.ModelLoadError):
        pass

    arrived = protocol.engine_error(protocol.failed(1, OwnError("no", hint="do")))
    assert (errors.ModelLoadError, "no", "do") == (type(arrived), arrived.message, arrived.hint)


def test_an_engine_error_of_unknown_name_is_a_plain_one() -> None:
    """A worker of another version does not confuse the daemon."""
    arrived = protocol.engine_error(protocol.Failed(id=1, error="NewError", message="m", hint="h"))
    assert (type(arrived), arrived.message, arrived.hint) == (errors.EngineError, "m", "h")
