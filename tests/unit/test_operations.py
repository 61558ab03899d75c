"""What a worker does with its engine.

A build must prove itself, and an answer is right with or without its cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from rkcached.engines.base import (
    EngineInfo,
    FinishReason,
    ModelSpec,
    OnProgress,
    OnToken,
    RunStats,
    Sampling,
)
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.memory import MemoryEngine, MemoryModel, expected_text
from rkcached.engines.prefix import common_bytes
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    PromptTooShort,
    Uncacheable,
    VerifyFailed,
)
from rkcached.host.digests import signature_of
from rkcached.worker import protocol
from rkcached.worker.held import NOBODY
from rkcached.worker.operations import Session

PREFIX = "You keep a café in Zürich. "
PROBE = PREFIX + "What are you for?"
REQUEST = PREFIX + "Was gibt es heute?"
TOKENS = len(PREFIX.encode())
REQUEST_TOKENS = len(REQUEST.encode())
SAMPLING = Sampling(max_new_tokens=40, temperature=0.0)

EngineType = TypeVar("EngineType", bound=MemoryEngine)


class Counting(MemoryEngine):
    """Counts how often a prompt cache is loaded."""

    loads = 0

    def load(self, path: Path) -> int:
        self.loads += 1
        return super().load(path)


class Onward(Counting):
    """Cannot take its state back on a model with `rewinds: false`, and does not say so."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, rewinds=True)


class Forgetful(MemoryEngine):
    """Reports a successful prefill and writes no file.

    As a runtime does for a model that cannot save.
    """

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        stats = super().prefill(
            prompt, save_to=save_to, on_progress=on_progress, keep_state=keep_state
        )
        save_to.unlink()
        return stats


class Empty(MemoryEngine):
    """Writes an empty file."""

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        stats = super().prefill(
            prompt, save_to=save_to, on_progress=on_progress, keep_state=keep_state
        )
        save_to.write_bytes(b"")
        return stats


class Wrong(MemoryEngine):
    """Saves the right tokens with a wrong state, which only the answer shows."""

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        stats = super().prefill(
            prompt, save_to=save_to, on_progress=on_progress, keep_state=keep_state
        )
        data = bytearray(save_to.read_bytes())
        data[-1] ^= 1
        save_to.write_bytes(data)
        return stats


class Useless(MemoryEngine):
    """Loads without complaint and then has nothing."""

    def load(self, path: Path) -> int:
        tokens = super().load(path)
        self.clear()
        return tokens


class Bench:
    """A session over a memory engine, what it emitted, and a way to stop it."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path / "staged"
        self.model = tmp_path / "model.json"
        self.events: list[protocol.FromWorker] = []
        self.stop = False
        self.next_id = 0
        self.prefixes: dict[str, str] = {}

    def session(
        self, cls: type[EngineType], model: MemoryModel | None = None
    ) -> tuple[Session, EngineType]:
        self.model.write_bytes(msgspec.json.encode(model or MemoryModel()))
        engine = cls(
            ModelSpec(path=str(self.model), context_tokens=0, scratch_dir=str(self.model.parent))
        )
        return Session(engine), engine

    def emit(self, event: protocol.FromWorker) -> None:
        self.events.append(event)

    def build(
        self,
        session: Session,
        *,
        verify: VerifyMode = VerifyMode.EXACT,
        prefix: str = PREFIX,
        min_tokens: int = 0,
    ) -> protocol.Built:
        self.next_id += 1
        operation = protocol.Build(
            id=self.next_id,
            prefix=prefix,
            probe=PROBE,
            path=str(self.path),
            verify=verify,
            min_tokens=min_tokens,
        )
        return session.build(operation, self.emit, lambda: self.stop)

    def built_cache(self, name: str = "a", prefix: str = PREFIX) -> protocol.CacheFile:
        """A good prompt cache from another session."""
        self.prefixes[name] = prefix
        path = self.model.parent / f"{name}.cache"
        _, engine = self.session(MemoryEngine)
        engine.prefill(prefix, save_to=path)
        return protocol.CacheFile(
            path=str(path), signature=signature_of(path.stat()), fingerprint=name
        )

    def generate(
        self,
        session: Session,
        cache: protocol.CacheFile | None = None,
        *,
        prompt: str = REQUEST,
        cold: bool = False,
        owner: int = 1000,
        load_bytes: float = 0.0,
        goes_on: bool = False,
        keep_at: Sequence[Path] = (),
    ) -> tuple[str, RunStats]:
        self.next_id += 1
        self.events.clear()
        text = "" if cache is None else self.prefixes.get(cache.fingerprint, PREFIX)
        operation = protocol.Generate(
            id=self.next_id,
            prompt=prompt,
            sampling=SAMPLING,
            cache=cache,
            common_bytes=common_bytes(text.encode(), prompt.encode()),
            is_whole=prompt.startswith(text),
            load_bytes=load_bytes,
            owner=owner,
            cold=cold,
            goes_on=goes_on,
            keep_at=tuple(map(str, keep_at)),
        )
        done = session.generate(operation, self.emit, lambda: self.stop)
        assert done.id == self.next_id
        assert {event.id for event in self.events if not isinstance(event, protocol.Ready)} <= {
            self.next_id
        }
        return "".join(
            event.text for event in self.events if isinstance(event, protocol.Piece)
        ), done.stats

    @property
    def loaded(self) -> list[protocol.Loaded]:
        return [event for event in self.events if isinstance(event, protocol.Loaded)]

    def right_answer(self, prompt: str = REQUEST) -> str:
        return expected_text(self.model.read_bytes(), prompt, SAMPLING)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- build ---


@pytest.mark.parametrize("verify", VerifyMode)
def test_a_build_leaves_a_file_that_helps_and_reports_what_it_cost(
    bench: Bench, verify: VerifyMode
) -> None:
    """Its figures are those of the proof that was asked for; progress ends with all tokens."""
    session, engine = bench.session(Counting, MemoryModel(prefill_us_per_token=20))
    built = bench.build(session, verify=verify)
    assert (built.tokens, built.verified) == (TOKENS, verify)
    assert built.prefill_ms > 0
    measured = [built.load_ms > 0, built.cold_ttft_ms > built.prefill_ms, built.warm_ttft_ms > 0]
    assert measured == [verify is not VerifyMode.OFF] * 3
    assert engine.loads == (verify is not VerifyMode.OFF)
    assert bench.events[-1] == protocol.Progress(id=1, done_tokens=TOKENS, total_tokens=TOKENS)
    assert MemoryEngine.load(engine, bench.path) == TOKENS


def test_a_wrong_state_is_not_published(bench: Bench) -> None:
    """Its tokens match and it is a hit; the probe's answer gives it away."""
    session, _ = bench.session(Wrong)
    with pytest.raises(VerifyFailed, match="differs"):
        bench.build(session)
    assert bench.build(session, verify=VerifyMode.HIT).tokens == TOKENS


@pytest.mark.parametrize("verify", [VerifyMode.HIT, VerifyMode.EXACT])
def test_a_file_that_loads_and_does_not_help_is_not_published(
    bench: Bench, verify: VerifyMode
) -> None:
    """No success code is believed."""
    session, _ = bench.session(Useless)
    with pytest.raises(VerifyFailed, match=f"0 of {TOKENS} tokens"):
        bench.build(session, verify=verify)


@pytest.mark.parametrize("cls", [Forgetful, Empty])
def test_success_without_a_file_is_uncacheable(bench: Bench, cls: type[MemoryEngine]) -> None:
    """Also when the file is empty, and even without verification."""
    session, _ = bench.session(cls)
    with pytest.raises(Uncacheable):
        bench.build(session, verify=VerifyMode.OFF)


def test_a_prompt_below_min_tokens_is_not_prefilled(bench: Bench) -> None:
    """Both numbers are told; at the limit it is built."""
    session, _ = bench.session(MemoryEngine)
    with pytest.raises(PromptTooShort) as caught:
        bench.build(session, min_tokens=TOKENS + 1)
    assert (caught.value.tokens, caught.value.limit) == (TOKENS, TOKENS + 1)
    assert not bench.path.exists()
    assert bench.build(session, min_tokens=TOKENS).tokens == TOKENS


@pytest.mark.parametrize("context_tokens", [TOKENS - 1, TOKENS])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_too_long(
    bench: Bench, context_tokens: int
) -> None:
    """Both numbers are told."""
    session, _ = bench.session(MemoryEngine, MemoryModel(context_tokens=context_tokens))
    with pytest.raises(ContextExceeded) as caught:
        bench.build(session)
    assert (caught.value.tokens, caught.value.limit) == (TOKENS, context_tokens)


def test_a_build_that_is_stopped_is_aborted(bench: Bench) -> None:
    """Before its probe at the latest."""
    session, _ = bench.session(MemoryEngine)
    bench.stop = True
    with pytest.raises(Aborted):
        bench.build(session)
    bench.stop = False
    assert bench.build(session).tokens == TOKENS


def test_a_model_that_cannot_save_is_uncacheable(bench: Bench) -> None:
    """The engine says so itself."""
    session, _ = bench.session(MemoryEngine, MemoryModel(can_save=False))
    with pytest.raises(Uncacheable):
        bench.build(session)


# --- generate ---


def test_an_answer_from_a_cache_prefills_only_the_question(bench: Bench) -> None:
    """And it is the right one."""
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    text, stats = bench.generate(session, cache)
    assert text == bench.right_answer()
    assert (stats.cached_tokens, stats.prefill_tokens) == (TOKENS, REQUEST_TOKENS - TOKENS)
    assert [(loaded.tokens, loaded.error) for loaded in bench.loaded] == [(TOKENS, "")]


def test_a_cache_that_is_in_memory_is_not_loaded_again(bench: Bench) -> None:
    """The second request finds it, also when its question is another; a change of cache loads."""
    cache, other = bench.built_cache(), bench.built_cache("b", "You are ")
    session, engine = bench.session(Counting)
    bench.generate(session, cache)
    text, stats = bench.generate(session, cache, prompt=PREFIX + "And tomorrow?")
    assert text == bench.right_answer(PREFIX + "And tomorrow?")
    assert (engine.loads, bench.loaded, stats.cached_tokens >= TOKENS) == (1, [], True)
    bench.generate(session, other, prompt="You are kind.")
    bench.generate(session, cache)
    assert engine.loads == 3


@pytest.mark.parametrize("between", ["build", "no-cache", "check"])
def test_whatever_replaces_the_state_makes_the_next_request_load(
    bench: Bench, between: str
) -> None:
    """A build, a request without a cache or a check leave another state in memory."""
    cache = bench.built_cache()
    session, engine = bench.session(Counting)
    bench.generate(session, cache)
    match between:
        case "build":
            bench.build(session, verify=VerifyMode.OFF)
        case "no-cache":
            bench.generate(session, None, prompt="Another talk altogether")
        case "check":
            session.check(
                protocol.Check(id=9, cache=bench.built_cache("b", "You are ")), bench.emit
            )
    loads = engine.loads
    text, stats = bench.generate(session, cache)
    assert (text, engine.loads) == (bench.right_answer(), loads + 1)
    assert stats.cached_tokens == TOKENS


def test_a_load_is_announced_before_the_library_begins(bench: Bench) -> None:
    """Only a death between the two events is the file's fault.

    A state that is in memory already is not loaded.
    """
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    bench.generate(session, cache)
    assert [type(event) for event in bench.events[:2]] == [protocol.Loading, protocol.Loaded]
    bench.generate(session, cache)
    assert not [
        event for event in bench.events if isinstance(event, protocol.Loading | protocol.Loaded)
    ]


def test_without_a_cache_the_answer_is_right(bench: Bench) -> None:
    """Nothing is loaded; what memory happens to share is used."""
    session, _ = bench.session(MemoryEngine)
    text, stats = bench.generate(session)
    assert (text, stats.cached_tokens, bench.loaded) == (bench.right_answer(), 0, [])


def test_a_cold_request_prefills_everything(bench: Bench) -> None:
    """Though the state in memory begins with the very same prompt."""
    session, _ = bench.session(MemoryEngine)
    bench.generate(session)
    assert bench.generate(session)[1].cached_tokens > 0
    text, stats = bench.generate(session, cold=True)
    assert (text, stats.prefill_tokens) == (bench.right_answer(), REQUEST_TOKENS)


def test_a_replaced_file_is_not_loaded(bench: Bench) -> None:
    """It is not the one that was verified.

    The answer is cold and right, and the file is not blamed.
    """
    cache = bench.built_cache()
    session, engine = bench.session(Counting)
    os.utime(cache.path, ns=(1, 1))
    text, stats = bench.generate(session, cache)
    assert [(loaded.replaced, bool(loaded.error)) for loaded in bench.loaded] == [(True, True)]
    assert (text, stats.cached_tokens, engine.loads) == (bench.right_answer(), 0, 0)


def test_a_file_that_is_gone_counts_as_replaced(bench: Bench) -> None:
    """It was evicted between the decision and the load."""
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    Path(cache.path).unlink()
    text, _ = bench.generate(session, cache)
    assert (text, bench.loaded[0].replaced) == (bench.right_answer(), True)


def test_a_file_replaced_while_it_is_loaded_is_forgotten_again(bench: Bench) -> None:
    """What was read may be of both files."""
    cache = bench.built_cache()

    class Raced(MemoryEngine):
        def load(self, path: Path) -> int:
            tokens = super().load(path)
            os.utime(path, ns=(1, 1))
            return tokens

    session, _ = bench.session(Raced)
    text, stats = bench.generate(session, cache)
    assert (text, stats.cached_tokens, bench.loaded[0].replaced) == (bench.right_answer(), 0, True)


def test_a_damaged_file_is_reported_and_the_answer_is_cold_and_right(bench: Bench) -> None:
    """The next request tries again: the daemon decides what becomes of the file."""
    cache = bench.built_cache()
    path = Path(cache.path)
    path.write_bytes(path.read_bytes()[:-1])
    damaged = msgspec.structs.replace(cache, signature=signature_of(path.stat()))
    session, engine = bench.session(Counting)
    for attempt in (1, 2):
        text, stats = bench.generate(session, damaged, cold=True)
        assert (text, stats.cached_tokens) == (bench.right_answer(), 0)
        assert "damaged" in bench.loaded[0].error
        assert not bench.loaded[0].replaced
        assert engine.loads == attempt


def test_a_request_that_is_stopped_ends_with_an_abort(bench: Bench) -> None:
    """After its first piece, with the figures so far."""
    session, _ = bench.session(MemoryEngine)
    bench.stop = True
    text, stats = bench.generate(session)
    assert stats.finish is FinishReason.ABORT
    assert text
    assert bench.right_answer().startswith(text)


# --- check ---


def test_a_check_tells_the_tokens_of_a_good_file(bench: Bench) -> None:
    """It loads it for real."""
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    assert protocol.Checked(id=4, tokens=TOKENS) == session.check(
        protocol.Check(id=4, cache=cache), bench.emit
    )


def test_a_check_refuses_a_damaged_or_replaced_file(bench: Bench) -> None:
    """With the reason."""
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    Path(cache.path).write_bytes(b"x")
    with pytest.raises(ArtifactLoadError, match="replaced"):
        session.check(protocol.Check(id=4, cache=cache), bench.emit)
    damaged = msgspec.structs.replace(cache, signature=signature_of(Path(cache.path).stat()))
    with pytest.raises(ArtifactLoadError, match="not a prompt cache"):
        session.check(protocol.Check(id=4, cache=damaged), bench.emit)


# --- conversations ---

TALK = REQUEST + " Fish.</s> And for supper, if you please, what would you cook then?"
OTHER = "Somebody else asks about the weather on the other side of the sea today. " * 2


def saved(bench: Bench) -> list[protocol.Saved]:
    return [event for event in bench.events if isinstance(event, protocol.Saved)]


def test_a_conversation_is_saved_before_another_takes_its_place(
    bench: Bench, tmp_path: Path
) -> None:
    """What is saved is all of it, and it comes back; going on with it saves nothing."""
    session, engine = bench.session(MemoryEngine)
    file = tmp_path / "talk.state"
    said, _ = bench.generate(session, prompt=TALK, goes_on=True, keep_at=[file])
    bench.generate(session, prompt=TALK + said + " More!", goes_on=True, keep_at=[file])
    assert saved(bench) == []

    bench.generate(session, prompt=OTHER, keep_at=[file])
    (event,) = saved(bench)
    assert event.text.startswith(TALK + said + " More!")
    assert (event.path, event.owner) == (str(file), 1000)
    assert engine.load(file) == event.tokens >= len(TALK + said + " More!")


@pytest.mark.parametrize(
    ("goes_on", "prompt"), [(False, TALK), (True, REQUEST[:20])], ids=["first question", "short"]
)
def test_what_is_soon_read_again_is_not_saved(
    bench: Bench, tmp_path: Path, *, goes_on: bool, prompt: str
) -> None:
    session, _ = bench.session(MemoryEngine)
    bench.generate(session, prompt=prompt, goes_on=goes_on)
    bench.generate(session, prompt=OTHER, keep_at=[tmp_path / "talk.state"])
    assert saved(bench) == []
    assert not (tmp_path / "talk.state").exists()


def test_a_conversation_is_saved_once(bench: Bench, tmp_path: Path) -> None:
    session, _ = bench.session(MemoryEngine)
    bench.generate(session, prompt=TALK, goes_on=True)
    for name in ("one", "two"):
        operation = protocol.Keep(id=90, keep_at=(str(tmp_path / name),))
        session.keep(operation, bench.emit)
    assert [event.path for event in saved(bench)] == [str(tmp_path / "one")]


def test_a_conversation_that_cannot_be_saved_costs_no_answer(bench: Bench, tmp_path: Path) -> None:
    """Somebody put a file in the place of the folder, so there is nothing to clear away, either."""
    (tmp_path / "m").write_text("mine")
    session, _ = bench.session(MemoryEngine)
    bench.generate(session, prompt=TALK, goes_on=True)
    said, _ = bench.generate(session, prompt=OTHER, keep_at=[tmp_path / "m/talk.state"])
    assert said
    assert saved(bench) == []


@pytest.mark.parametrize("next_owner", [NOBODY, 1000])
def test_a_client_whose_user_is_not_known_leaves_nothing_to_others(
    bench: Bench, tmp_path: Path, next_owner: int
) -> None:
    """Over TCP, which socket activation may bring, the kernel tells no user: all are -1."""
    session, _ = bench.session(MemoryEngine)
    bench.generate(session, prompt=TALK, goes_on=True, owner=NOBODY)
    file = tmp_path / "talk.state"
    _, stats = bench.generate(session, prompt=TALK, owner=next_owner, keep_at=[file])
    assert stats.cached_tokens == 0
    assert saved(bench) == []


def test_two_conversations_stay_in_two_states(bench: Bench, tmp_path: Path) -> None:
    """Neither is saved nor read again, and a build takes the place of the older one only."""
    session, _ = bench.session(MemoryEngine, MemoryModel(states=2))
    other = TALK.replace("You", "We")
    for prompt in (TALK, other):
        bench.generate(session, prompt=prompt, goes_on=True, keep_at=[tmp_path / "a.state"])
        assert saved(bench) == []
    for prompt in (TALK, other):
        text, stats = bench.generate(session, prompt=prompt, keep_at=[tmp_path / "a.state"])
        assert stats.cached_tokens == stats.prompt_tokens - 1
        assert text == bench.right_answer(prompt)
        assert saved(bench) == []

    bench.build(session)
    _, stats = bench.generate(session, prompt=other)
    assert stats.cached_tokens == stats.prompt_tokens - 1
    _, stats = bench.generate(session, prompt=REQUEST)
    assert stats.cached_tokens is not None
    assert stats.cached_tokens >= TOKENS


def test_a_second_state_is_nobody_else_s(bench: Bench) -> None:
    """Whichever state his conversation is in, another user gets nothing of it."""
    session, _ = bench.session(MemoryEngine, MemoryModel(states=2))
    for owner, prompt in ((1000, TALK), (1001, OTHER), (1001, TALK), (1000, OTHER)):
        text, stats = bench.generate(session, prompt=prompt, owner=owner, goes_on=True)
        assert stats.cached_tokens == 0, (owner, prompt)
        assert text == bench.right_answer(prompt)


def test_both_states_are_saved_at_the_end(bench: Bench, tmp_path: Path) -> None:
    session, _ = bench.session(MemoryEngine, MemoryModel(states=2))
    bench.generate(session, prompt=TALK, goes_on=True)
    bench.generate(session, prompt=TALK.replace("You", "We"), goes_on=True)
    bench.events.clear()
    for age in range(2):
        file = tmp_path / f"{age}.state"
        session.keep(protocol.Keep(keep_at=(str(file),), age=age), bench.emit)
    assert [event.path for event in saved(bench)] == [
        str(tmp_path / f"{n}.state") for n in range(2)
    ]


def roomy(texts: int, *, rest: int = 60) -> MemoryModel:
    """A model with four states, whose context has room for so many of TALK with an answer."""
    return MemoryModel(states=4, context_tokens=texts * (len(TALK) + 1 + 32) + rest)


def test_what_has_no_room_beside_a_run_is_saved_before(bench: Bench, tmp_path: Path) -> None:
    """The engine would clear what it likes. The one that was used longest ago gives way."""
    session, engine = bench.session(MemoryEngine, roomy(3))
    talks = [TALK.replace("You", name) for name in ("We", "He", "She", "It")]
    for talk in talks[:3]:
        bench.generate(session, prompt=talk, goes_on=True)
    assert sum(engine.state_tokens(state) > 0 for state in range(4)) == 3

    bench.generate(session, prompt=talks[3], owner=1001, keep_at=[tmp_path / "a", tmp_path / "b"])
    (event,) = saved(bench)
    assert event.text.startswith(talks[0])
    assert (event.path, event.owner) == (str(tmp_path / "a"), 1000)
    for talk in talks[1:3]:
        _, stats = bench.generate(session, prompt=talk)
        assert stats.cached_tokens == stats.prompt_tokens - 1
    _, stats = bench.generate(session, prompt=talks[0])
    assert stats.cached_tokens == 0


def test_a_build_saves_what_has_no_room_beside_it(bench: Bench, tmp_path: Path) -> None:
    """As many as it takes."""
    session, _ = bench.session(MemoryEngine, roomy(2, rest=len(PROBE)))
    for name in ("We", "He"):
        bench.generate(session, prompt=TALK.replace("You", name), goes_on=True)
    bench.events.clear()
    operation = protocol.Build(
        id=80,
        prefix=TALK * 2,
        probe=TALK * 2 + "!",
        path=str(bench.path),
        verify=VerifyMode.EXACT,
        min_tokens=0,
        keep_at=(str(tmp_path / "a"), str(tmp_path / "b")),
    )
    session.build(operation, bench.emit, lambda: False)
    assert [event.path for event in saved(bench)] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_a_state_that_gave_way_is_not_saved_as_if_it_were_there(
    bench: Bench, tmp_path: Path
) -> None:
    """Its good file would be taken for an earlier one of it."""
    session, engine = bench.session(MemoryEngine, roomy(2))
    for name in ("We", "He"):
        bench.generate(session, prompt=TALK.replace("You", name), goes_on=True)
    for state in range(4):
        engine.choose(state)
        engine.clear()
    bench.events.clear()
    for age in range(4):
        operation = protocol.Keep(keep_at=(str(tmp_path / f"{age}"),), age=age)
        session.keep(operation, bench.emit)
    assert saved(bench) == []
    assert [path for path in tmp_path.iterdir() if path.name.isdigit()] == []


@pytest.mark.parametrize("states", [1, 4])
def test_a_build_that_is_refused_opens_nobody_s_state(bench: Bench, states: int) -> None:
    """It is refused before the engine has read anything, so the state is still his."""
    session, _ = bench.session(MemoryEngine, MemoryModel(states=states))
    for number in range(states):
        bench.generate(session, prompt=f"{number}{TALK}", goes_on=True)
    with pytest.raises(PromptTooShort):
        bench.build(session, min_tokens=10_000)
    for number in range(states):
        _, stats = bench.generate(session, prompt=f"{number}{TALK}", owner=1001)
        assert stats.cached_tokens == 0


def test_what_no_run_can_go_on_from_is_cleared(bench: Bench) -> None:
    """Each token of every later answer would attend to it.

    A build, a build that failed and a cold answer leave such states; a conversation is none.
    """
    session, engine = bench.session(MemoryEngine, MemoryModel(states=4))
    bench.generate(session, prompt=TALK, goes_on=True)
    bench.build(session)
    with pytest.raises(PromptTooShort):
        bench.build(session, min_tokens=10_000)
    bench.generate(session, cold=True)
    assert sum(engine.state_tokens(state) > 0 for state in range(4)) == 3

    session.tidy()
    assert sum(engine.state_tokens(state) > 0 for state in range(4)) == 1
    _, stats = bench.generate(session, prompt=TALK)
    assert stats.cached_tokens == stats.prompt_tokens - 1


def test_a_failure_to_clear_such_a_state_costs_no_answer(bench: Bench) -> None:
    """And what comes next acts on the state that it chose."""
    session, engine = bench.session(Unloadable, MemoryModel(states=4))
    bench.build(session)
    bench.generate(session, prompt=TALK, goes_on=True)
    engine.broken = True
    session.tidy()
    engine.broken = False
    _, stats = bench.generate(session, prompt=TALK)
    assert stats.cached_tokens == stats.prompt_tokens - 1


class Uncounted(MemoryEngine):
    """Does not count tokens, which takes an engine longer than a question of some words."""

    def tokenize(self, text: str) -> Sequence[int]:
        raise AssertionError(text)


def test_tokens_are_not_counted_where_they_are_known(bench: Bench) -> None:
    """Those of a prompt cache are; a byte beyond it is a token at most.

    This engine's tokens are bytes, so the cache says here that it has fewer.
    """
    cache = msgspec.structs.replace(bench.built_cache(), tokens=2)
    session, _ = bench.session(Uncounted, MemoryModel(states=4, context_tokens=240))
    bench.generate(session, prompt="x" * 120, goes_on=True)
    with pytest.raises(AssertionError):
        bench.generate(session, owner=1001)
    bench.generate(session, cache, owner=1001)


class Unloadable(MemoryEngine):
    """Neither loads nor clears anything, for a reason that is not the file's."""

    broken = False

    def load(self, path: Path) -> int:
        if self.broken:
            raise EngineError("the folder is full")
        return super().load(path)

    def clear(self) -> None:
        if self.broken:
            raise EngineError("no answer")
        super().clear()


@pytest.mark.parametrize("cold", [True, False])
def test_a_state_that_could_not_be_replaced_is_nobody_s(bench: Bench, *, cold: bool) -> None:
    session, engine = bench.session(Unloadable)
    bench.generate(session, prompt=TALK, goes_on=True)
    cache = None if cold else bench.built_cache()
    engine.broken = True
    with pytest.raises(EngineError):
        bench.generate(session, cache, prompt=REQUEST, owner=1001, cold=cold)
    engine.broken = False
    _, stats = bench.generate(session, prompt=TALK, owner=1001)
    assert stats.cached_tokens == 0


class Aborted50ms(MemoryEngine):
    """Each run is aborted a moment after it began."""

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        timer = threading.Timer(0.05, self.abort)
        timer.start()
        try:
            return super().generate(
                prompt, sampling, on_token, trace=trace, on_progress=on_progress
            )
        finally:
            timer.join()


def test_a_run_that_was_stopped_before_its_answer_is_no_conversation(
    bench: Bench, tmp_path: Path
) -> None:
    """The state has a part of its prompt only; a file of it would be loaded for the whole."""
    session, _ = bench.session(Aborted50ms, MemoryModel(prefill_us_per_token=2000))
    _, stats = bench.generate(session, prompt=TALK, goes_on=True)
    assert stats.finish is FinishReason.ABORT
    assert [event for event in bench.events if isinstance(event, protocol.Piece)] == []
    bench.generate(session, prompt=OTHER, keep_at=[tmp_path / "talk.state"])
    assert saved(bench) == []


@pytest.mark.parametrize("states", [1, 2])
def test_a_preloaded_prompt_is_there_for_everybody(bench: Bench, states: int) -> None:
    """The state of one user is none of the others', where there is another place for it."""
    session, _ = bench.session(MemoryEngine, MemoryModel(states=states))
    cache = bench.built_cache()
    operation = protocol.Check(id=70, cache=cache, text=PREFIX)
    session.check(operation, bench.emit)
    bench.generate(session, cache, prompt=PREFIX + "Mine!")
    bench.events.clear()
    session.check(operation, bench.emit)
    assert bool(bench.loaded) is (states == 2)
    _, stats = bench.generate(session, cache, prompt=PREFIX + "And mine!", owner=1001)
    assert stats.cached_tokens is not None
    assert stats.cached_tokens >= len(PREFIX)
    assert bool(bench.loaded) is (states == 1)


class Continuing(MemoryEngine):
    """Saves its state in a run only, and nobody says whether it does so right."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, aborts_prefill=False, saves_continued=False)


class Spoiling(Continuing, Wrong):
    """It writes another state than the one in memory."""


@pytest.mark.parametrize(("cls", "is_saved"), [(Continuing, True), (Spoiling, False)])
def test_a_save_that_takes_a_run_is_proven(
    bench: Bench, tmp_path: Path, cls: type[MemoryEngine], *, is_saved: bool
) -> None:
    """It never delays a request; a state that answers otherwise is dropped."""
    session, _ = bench.session(cls)
    file = tmp_path / "talk.state"
    bench.generate(session, prompt=TALK, goes_on=True)
    bench.generate(session, prompt=OTHER, keep_at=[file])
    assert saved(bench) == []

    bench.generate(session, prompt=TALK, goes_on=True)
    session.keep(protocol.Keep(id=91, keep_at=(str(file),)), bench.emit)
    assert bool(saved(bench)) is is_saved
    assert file.exists() is is_saved
    text, _ = bench.generate(session, prompt=TALK)
    assert text == bench.right_answer(TALK)


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_session_learns_whether_a_state_can_be_taken_back(bench: Bench, rewinds: bool) -> None:
    """One answer shows that it cannot; from then on the prompt cache is loaded for each request.

    But for one that goes on from the last.
    """
    prefix = PREFIX * 6
    session, engine = bench.session(Onward, MemoryModel(rewinds=rewinds))
    engine.prefill(prefix, save_to=bench.path)
    engine.clear()
    bench.prefixes["a"] = prefix
    cache = protocol.CacheFile(
        path=str(bench.path), signature=signature_of(bench.path.stat()), fingerprint="a"
    )

    reused = []
    for question in ("Was gibt es heute?", "Hot tea?", "And tomorrow?"):
        text, stats = bench.generate(session, cache, prompt=prefix + question)
        assert text == bench.right_answer(prefix + question)
        reused.append(stats.cached_tokens)
    told = prefix + "And tomorrow?" + text
    assert len(text.encode()) == SAMPLING.max_new_tokens  # no character was cut
    _, last = bench.generate(session, cache, prompt=told + " Und dann?")

    tokens = len(prefix.encode())
    assert reused == ([tokens] * 3 if rewinds else [tokens, 0, tokens])
    assert engine.loads == (1 if rewinds else 2)
    assert last.cached_tokens == len(told.encode())


def test_a_check_with_its_text_leaves_the_state_for_the_next_request(bench: Bench) -> None:
    """That request loads nothing; a second check finds the state there, and after another not."""
    cache = bench.built_cache()
    session, engine = bench.session(Counting)
    check = protocol.Check(id=4, cache=cache, text=PREFIX)
    assert session.check(check, bench.emit).tokens == TOKENS
    text, stats = bench.generate(session, cache)
    assert (text, stats.cached_tokens) == (bench.right_answer(), TOKENS)
    assert session.check(check, bench.emit).tokens == 0
    assert engine.loads == 1

    session.generate(
        protocol.Generate(id=5, prompt="Another café.", sampling=SAMPLING),
        bench.emit,
        lambda: False,
    )
    assert session.check(check, bench.emit).tokens == TOKENS
    assert engine.loads == 2


def test_a_check_that_fails_leaves_nothing(bench: Bench) -> None:
    """The next request is answered cold, and the daemon hears whose fault it was."""
    cache = bench.built_cache()
    session, _ = bench.session(MemoryEngine)
    Path(cache.path).write_bytes(b"x")
    with pytest.raises(ArtifactLoadError):
        session.check(protocol.Check(id=4, cache=cache, text=PREFIX), bench.emit)
    text, stats = bench.generate(session)
    assert (text, stats.cached_tokens) == (bench.right_answer(), 0)
