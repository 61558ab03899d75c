"""What every engine promises, as one suite that all of them pass.

The cases are a text file for the memory engine, a small real model for llama.cpp, and for RKLLM a
stand-in of its closed library, compiled for each ABI group, which is not the vendor's. Engines are
loaded once and shared: every test puts the KV state that it needs in place itself, by `load` or
`clear`. Where engines may differ, `EngineInfo` says how.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import psutil
import pytest

from rkcached.cli.launcher import small_model
from rkcached.engines.base import (
    SAMPLING_FIELDS,
    Engine,
    FinishReason,
    ModelSpec,
    RunStats,
    Sampling,
    Token,
)
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.engines.memory import MemoryEngine, MemoryModel
from rkcached.engines.rkllm.engine import RkllmEngine
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    ModelLoadError,
    SamplingFixed,
)
from tests.rkllm_standin import standin
from tests.rkllm_standin.tokens import byte_tokenizer

HOME = (
    "You are the assistant of a small house. Answer in one short sentence. Never invent a lamp or "
    "a room. " * 4
)
CHESS = (
    "You are a strict teacher of chess. Count slowly: 1, 2, 3, 4, 5. Every answer names one "
    "square only. " * 4
)
QUESTION = "Question: which lamp is on? Answer:"
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine under test: how to load it, and texts that suit its tokens."""

    open: Callable[[ModelSpec], Engine]
    model: Path
    context_tokens: int
    unit: str
    """Occupies exactly one token, however often it is repeated."""
    directory: Path
    base: ModelSpec = field(default_factory=lambda: ModelSpec(path="", context_tokens=0))
    """What else the engine needs to be loaded."""
    added: int = 0
    """Tokens that the engine adds to a prompt: BOS."""
    counts: bool = True
    """It can count a prompt's tokens before it runs."""
    shows_progress: bool = True
    loaded: list[Engine] = field(default_factory=list)

    def spec(self, *, model: Path | None = None) -> ModelSpec:
        scratch = self.directory / f"scratch{len(list(self.directory.iterdir()))}"
        scratch.mkdir(mode=0o700)
        return msgspec.structs.replace(
            self.base,
            path=str(model or self.model),
            context_tokens=self.context_tokens,
            threads=2,
            scratch_dir=str(scratch),
        )

    def load(self) -> Engine:
        engine = self.open(self.spec())
        self.loaded.append(engine)
        return engine


@dataclass(frozen=True, kw_only=True)
class Answer:
    text: str
    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stats: RunStats


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A prompt cache that the engine under test has built."""

    prompt: str
    path: Path
    stats: RunStats
    progress: tuple[tuple[int, int], ...]


def memory_case(directory: Path, *, rewinds: bool = True) -> Case:
    model = directory / "model.json"
    slow = MemoryModel(
        context_tokens=2048, prefill_us_per_token=20, decode_us_per_token=300, rewinds=rewinds
    )
    model.write_bytes(msgspec.json.encode(slow))
    return Case(open=MemoryEngine, model=model, context_tokens=2048, unit="a", directory=directory)


def rkllm_case(directory: Path, group: str, **keys: object) -> Case:
    """RKLLM's binding on the stand-in.

    `group` may end in "-tokens": prompts then go through a tokenizer.json.
    """
    group, _, tokens = group.partition("-")
    base = ModelSpec(
        path="",
        context_tokens=0,
        library=str(standin.build(group, directory)),
        abi="1.1.0" if group == "B" else "",  # that library says no version
        sampling=Sampling(max_new_tokens=320, temperature=0.0),
        tokenizer=str(byte_tokenizer(directory / "tokenizer.json")) if tokens else "",
    )
    keys = {"prefill_tps": 50_000, "decode_tps": 3000, **keys}
    return Case(
        open=RkllmEngine,
        model=standin.write_model(directory / "model.rkllm", **keys),
        context_tokens=2048,
        unit="a",
        directory=directory,
        base=base,
        added=0 if tokens else 1,
        counts=bool(tokens),
        shows_progress=False,
    )


def llamacpp_case(directory: Path) -> Case:
    return Case(
        open=LlamaCppEngine,
        model=small_model(),
        context_tokens=512,
        unit=" a",
        directory=directory,
    )


RKLLM_CASES = ["B", "C", "C1", "D", "E", "D-tokens", "E-tokens", "B-tokens"]


@pytest.fixture(
    scope="module",
    params=[
        "memory",
        "memory-onward",
        pytest.param("llamacpp", marks=pytest.mark.model),
        *(f"rkllm-{name}" for name in RKLLM_CASES),
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param.startswith("memory"):
        case = memory_case(directory, rewinds=request.param == "memory")
    elif request.param == "llamacpp":
        case = llamacpp_case(directory)
    else:
        case = rkllm_case(directory, request.param.removeprefix("rkllm-"))
    yield case
    for engine in case.loaded:
        engine.close()


@pytest.fixture(scope="module")
def engine(case: Case) -> Engine:
    return case.load()


@pytest.fixture(scope="module")
def other(case: Case) -> Engine:
    """A second engine on the same model, as after a restart."""
    return case.load()


def build(engine: Engine, prompt: str, path: Path) -> Saved:
    progress: list[tuple[int, int]] = []
    stats = engine.prefill(
        prompt, save_to=path, on_progress=lambda done, total: progress.append((done, total))
    )
    return Saved(prompt=prompt, path=path, stats=stats, progress=tuple(progress))


@pytest.fixture(scope="module")
def home(case: Case, engine: Engine) -> Saved:
    return build(engine, HOME, case.directory / "home.bin")


@pytest.fixture(scope="module")
def chess(case: Case, engine: Engine) -> Saved:
    return build(engine, CHESS, case.directory / "chess.bin")


def ask(engine: Engine, prompt: str, sampling: Sampling = GREEDY) -> Answer:
    tokens: list[Token] = []

    def collect(token: Token) -> bool:
        tokens.append(token)
        return False

    stats = engine.generate(prompt, sampling, collect, trace=True)
    return Answer(
        text="".join(token.text for token in tokens),
        pieces=tuple(token.text for token in tokens),
        ids=tuple(one for token in tokens for one in token.ids),
        logprobs=tuple(one for token in tokens for one in token.logprobs),
        stats=stats,
    )


def ask_loaded(engine: Engine, saved: Saved, sampling: Sampling = GREEDY) -> Answer:
    engine.load(saved.path)
    return ask(engine, saved.prompt + QUESTION, sampling)


class Aborter:
    """Aborts the engine's run from another thread, once the run has shown that it is under way."""

    def __init__(self, engine: Engine) -> None:
        self._under_way = threading.Event()
        self._thread = threading.Thread(target=self._wait, args=(engine,))

    def _wait(self, engine: Engine) -> None:
        if self._under_way.wait(30):
            engine.abort()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way.set()
        self._thread.join(30)

    def on_progress(self, _done: int, _total: int) -> None:
        self._under_way.set()

    def on_token(self, _token: Token) -> bool:
        self._under_way.set()
        return False


def test_a_run_tells_how_far_it_has_read(case: Case, home: Saved) -> None:
    """Where the library does; the last time when all is read, also if nearly all was there."""
    engine = case.load()
    told: list[tuple[int, int]] = []
    for _ in range(2):
        told.clear()
        engine.load(home.path)
        stats = engine.generate(
            home.prompt + QUESTION,
            Sampling(max_new_tokens=1),
            lambda _: False,
            on_progress=lambda done, total: told.append((done, total)),
        )
        whole = (stats.prompt_tokens, stats.prompt_tokens)
        assert told[-1:] == ([whole] if engine.info.aborts_prefill else [])
        assert sorted(told) == told


def test_info_states_the_context_and_what_the_engine_can_do(case: Case, engine: Engine) -> None:
    """The context is the one that was asked for; every engine can be made to repeat itself."""
    info = engine.info
    assert (case.context_tokens, True) == (info.context_tokens, info.greedy)
    assert info.runtime_version
    assert set(info.run_sampling) <= set(SAMPLING_FIELDS)


def test_prefill_reads_and_saves_every_token_of_the_prompt(
    case: Case, engine: Engine, home: Saved
) -> None:
    """Nothing comes from the state and nothing is decoded; the file is there."""
    stats = home.stats
    count = len(engine.tokenize(HOME)) if case.counts else len(HOME.encode()) + case.added
    assert (count, 0, 0) == (stats.prompt_tokens, stats.cached_tokens, stats.decode_tokens)
    assert stats.prefill_ms > 0
    assert home.path.stat().st_size > 0


def test_prefill_reports_progress_from_none_to_all(case: Case, home: Saved) -> None:
    """Progress starts at 0, never falls, keeps its total and ends complete; RKLLM tells nothing."""
    if not case.shows_progress:
        assert home.progress == ()
        return
    total = home.stats.prompt_tokens
    done = [done for done, _ in home.progress]
    assert [0, total] == [done[0], done[-1]]
    assert sorted(done) == done
    assert {total} == {total for _, total in home.progress}


def test_prefill_leaves_the_prompt_in_memory(case: Case, engine: Engine) -> None:
    """The run after a prefill reuses all of it without a load.

    Where a state ends with its run, nothing of it.
    """
    prompt = "A short prompt that stays. "
    count = build(engine, prompt, case.directory / "short.bin").stats.prompt_tokens
    cached = ask(engine, prompt + QUESTION).stats.cached_tokens
    if not engine.info.keeps_state:
        assert cached == 0
    else:
        assert cached in (
            (count, count - 1) if engine.info.measures_prefill else (None,)
        )  # the last may join the next


def test_a_loaded_cache_answers_like_the_same_prefix_in_memory(
    case: Case, engine: Engine, other: Engine
) -> None:
    """After a restart, load gives the same counts, tokens, log-probabilities and text."""
    saved = build(engine, HOME, case.directory / "again.bin")
    in_memory = ask(engine, HOME + QUESTION)
    other.clear()
    assert saved.stats.prompt_tokens == other.load(saved.path)
    loaded = ask(other, HOME + QUESTION)
    if engine.info.measures_prefill:
        assert in_memory.stats.cached_tokens == loaded.stats.cached_tokens > 0
    else:
        assert loaded.stats.cached_tokens is None
    assert (in_memory.ids, in_memory.text) == (loaded.ids, loaded.text)
    assert in_memory.logprobs == loaded.logprobs
    assert loaded.ids


def test_the_state_begins_with_the_prompt_after_a_run(engine: Engine, home: Saved) -> None:
    """The same prompt again is in the state but for the one token that is always prefilled.

    Nobody guesses, though, and a state that cannot be taken back is of no use.
    """
    first = ask_loaded(engine, home).stats
    again = ask(engine, HOME + QUESTION).stats
    if not engine.info.rewinds:
        assert (first.cached_tokens, again.cached_tokens) == (home.stats.prompt_tokens, 0)
        return
    if not engine.info.measures_prefill:
        assert (first.cached_tokens, again.cached_tokens) == (
            None,
            None if engine.info.keeps_state else 0,
        )
        return
    assert (first.prompt_tokens, first.prompt_tokens - 1) == (
        again.prompt_tokens,
        again.cached_tokens,
    )


def test_a_prompt_that_parts_from_the_state_reuses_the_common_beginning(
    case: Case, engine: Engine, home: Saved
) -> None:
    """Half of the cached prompt with another ending takes about that half.

    Or nothing, where a state cannot be taken back. It answers as it does cold.
    """
    half = HOME[: len(HOME) // 2]
    engine.clear()
    cold = ask(engine, half + "#### Something else.")
    engine.load(home.path)
    warm = ask(engine, half + "#### Something else.")
    assert cold.text == warm.text
    cached = warm.stats.cached_tokens
    if not engine.info.measures_prefill:
        assert cached is None
        return
    if not engine.info.rewinds:
        assert cached == 0
        return
    count = len(engine.tokenize(half)) if case.counts else len(half) + case.added
    assert count - 2 <= cached <= count


def test_a_foreign_state_does_not_change_what_is_prefilled(
    case: Case, engine: Engine, home: Saved
) -> None:
    """A prompt with another beginning takes nothing.

    Or the BOS token that the engine puts before every prompt.
    """
    engine.load(home.path)
    expected = case.added if engine.info.measures_prefill else None
    assert ask(engine, "1, 2, 3, 4,").stats.cached_tokens == expected


def test_clear_makes_the_next_run_cold(engine: Engine, home: Saved) -> None:
    """Nothing is left of a loaded cache."""
    engine.load(home.path)
    engine.clear()
    assert ask(engine, "You are the assistant").stats.cached_tokens == 0


def test_switching_between_caches_does_not_mix_them(
    engine: Engine, home: Saved, chess: Saved
) -> None:
    """Each answer stays the same, whichever cache was in the state before."""
    answers = [ask_loaded(engine, saved) for saved in (home, chess, home, chess, chess, home)]
    assert [answer.text for answer in answers[:2]] * 2 == [answer.text for answer in answers[:4]]
    assert [answers[1].ids, answers[0].ids] == [answer.ids for answer in answers[4:]]
    assert answers[0].text != answers[1].text


def test_abort_stops_a_prefill_and_the_engine_goes_on(
    case: Case, engine: Engine, home: Saved
) -> None:
    """Called from another thread, it raises Aborted; the next run answers as ever.

    Or it is left to end.
    """
    expected = ask_loaded(engine, home)
    long = case.unit * (case.context_tokens - 8)
    if engine.info.aborts_prefill:
        with Aborter(engine) as aborter, pytest.raises(Aborted):
            engine.prefill(
                long, save_to=case.directory / "aborted.bin", on_progress=aborter.on_progress
            )
    else:
        timer = threading.Timer(0.01, engine.abort)
        timer.start()
        engine.prefill(long, save_to=case.directory / "finished.bin")
        timer.join()
        assert engine.load(case.directory / "finished.bin") == case.context_tokens - 8 + case.added
    answer = ask_loaded(engine, home)
    assert (expected.ids, expected.text) == (answer.ids, answer.text)


MORE = "The lamp of the kitchen is broken. "


def test_a_prefill_that_keeps_the_state_reads_only_the_rest(
    case: Case, engine: Engine, other: Engine, home: Saved
) -> None:
    """Its file answers like the state in memory, after a restart, and nothing of it is read again.

    An engine that does not count what it reuses may refuse.
    """
    path = case.directory / "longer.bin"
    engine.load(home.path)
    try:
        stats = engine.prefill(HOME + MORE, save_to=path, keep_state=True)
    except EngineError:
        assert not engine.info.measures_prefill
        return
    whole = build(other, HOME + MORE, case.directory / "whole.bin").stats
    assert stats.prompt_tokens == whole.prompt_tokens == other.load(path)
    assert stats.cached_tokens is not None
    assert home.stats.prompt_tokens - 2 <= stats.cached_tokens <= home.stats.prompt_tokens
    in_memory = ask(engine, HOME + MORE + QUESTION)
    loaded = ask(other, HOME + MORE + QUESTION)
    assert in_memory.stats.cached_tokens == loaded.stats.cached_tokens
    assert stats.prompt_tokens - 1 <= (loaded.stats.cached_tokens or 0) <= stats.prompt_tokens
    assert (in_memory.ids, in_memory.logprobs) == (loaded.ids, loaded.logprobs)


def test_a_prefill_that_keeps_the_state_may_go_back(
    case: Case, engine: Engine, other: Engine, home: Saved
) -> None:
    """A text that parts from the state takes the common beginning; nothing stays of the rest."""
    if not engine.info.measures_prefill:
        return
    text = HOME[: len(HOME) // 2] + "#### Something else altogether."
    path = case.directory / "parted.bin"
    engine.load(home.path)
    stats = engine.prefill(text, save_to=path, keep_state=True)
    assert 0 <= (stats.cached_tokens or 0) < home.stats.prompt_tokens
    assert bool(stats.cached_tokens) is engine.info.rewinds
    assert stats.prompt_tokens == other.load(path)
    assert ask(engine, text + QUESTION).ids == ask(other, text + QUESTION).ids


def test_what_an_aborted_prefill_has_read_can_be_saved(
    case: Case, engine: Engine, other: Engine
) -> None:
    """And continued, by another process too: its answer is that of a prefill without a break."""
    path = case.directory / "aborted-part.bin"
    text = case.unit * (case.context_tokens - 100)
    if not engine.info.aborts_prefill:
        with pytest.raises(EngineError):
            engine.save(path)
        return

    def abort(done: int, _total: int) -> None:
        if done:
            engine.abort()

    with pytest.raises(Aborted):
        engine.prefill(text, save_to=case.directory / "aborted.bin", on_progress=abort)
    saved = engine.save(path)
    assert 0 < saved < case.context_tokens - 100
    assert other.load(path) == saved
    done: list[int] = []
    stats = other.prefill(
        text,
        save_to=case.directory / "continued.bin",
        on_progress=lambda now, _total: done.append(now),
        keep_state=True,
    )
    assert (stats.cached_tokens, done[0], done[-1]) == (saved, saved, stats.prompt_tokens)
    continued = ask(other, text + QUESTION)
    whole = build(engine, text, case.directory / "unbroken.bin")
    assert whole.stats.prompt_tokens == stats.prompt_tokens
    assert ask(engine, text + QUESTION).text == continued.text


def test_abort_ends_a_run_that_still_reads_its_prompt(case: Case, engine: Engine) -> None:
    """A run, unlike a prefill, returns what it did: nothing decoded, no text."""
    engine.clear()
    ended = threading.Event()

    def abort_until_ended() -> None:
        while not ended.wait(0.005):
            engine.abort()

    aborter = threading.Thread(target=abort_until_ended)
    aborter.start()
    try:
        answer = ask(engine, case.unit * (case.context_tokens - 8))
    finally:
        ended.set()
        aborter.join(30)
    assert answer.stats.finish is FinishReason.ABORT
    assert not answer.text
    assert answer.stats.decode_tokens == 0


def test_abort_stops_a_decode_and_the_engine_goes_on(engine: Engine, home: Saved) -> None:
    """Called from another thread, it ends the run early; the next run answers as ever."""
    expected = ask_loaded(engine, home)
    with Aborter(engine) as aborter:
        stats = engine.generate(
            "1, 2, 3, 4,", Sampling(max_new_tokens=300, temperature=0.0), aborter.on_token
        )
    answer = ask_loaded(engine, home)
    assert stats.finish is FinishReason.ABORT
    assert 0 < stats.decode_tokens < 300
    assert (expected.ids, expected.text) == (answer.ids, answer.text)


def test_abort_without_a_run_does_nothing(engine: Engine, home: Saved) -> None:
    """The run after it is complete."""
    engine.abort()
    assert ask_loaded(engine, home).stats.finish is not FinishReason.ABORT


def test_the_receiver_can_end_the_run(case: Case, engine: Engine) -> None:
    """A true answer to a piece of text makes it the last."""
    pieces: list[str] = []

    def take_three(token: Token) -> bool:
        pieces.append(token.text)
        return len(pieces) == 3

    stats = engine.generate("1, 2, 3, 4,", Sampling(max_new_tokens=40, temperature=0.0), take_three)
    assert stats.finish is FinishReason.ABORT
    assert len(pieces) == 3
    if case.counts or engine.info.measures_prefill:
        assert stats.prompt_tokens == (len(engine.tokenize("1, 2, 3, 4,") or ()) or 11 + case.added)


def test_an_error_of_the_receiver_comes_through(engine: Engine, home: Saved) -> None:
    """It ends the run, is raised from generate, and the engine goes on."""

    def fail(_token: Token) -> bool:
        raise LookupError("of the receiver")

    with pytest.raises(LookupError, match="of the receiver"):
        engine.generate("1, 2, 3, 4,", GREEDY, fail)
    assert ask_loaded(engine, home).text


def test_a_stop_string_ends_the_text_before_itself(engine: Engine, home: Saved) -> None:
    """The text is the one without a stop string, cut at its first occurrence."""
    whole = ask_loaded(engine, home, Sampling(max_new_tokens=24, temperature=0.0)).text
    stop = whole[5:8]
    answer = ask_loaded(
        engine, home, Sampling(max_new_tokens=24, temperature=0.0, stop=("never occurs", stop))
    )
    assert (whole[: whole.index(stop)], FinishReason.STOP) == (answer.text, answer.stats.finish)


def test_max_new_tokens_limits_the_answer(engine: Engine) -> None:
    """Exactly that many tokens are decoded, and the reason says so."""
    stats = ask(engine, "1, 2, 3, 4,", Sampling(max_new_tokens=5, temperature=0.0)).stats
    assert stats.finish is FinishReason.LENGTH
    assert stats.decode_tokens == 5
    assert stats.decode_ms > 0


def test_no_new_tokens_means_no_text(engine: Engine) -> None:
    """The prompt is read, nothing is decoded."""
    answer = ask(engine, "1, 2, 3, 4,", Sampling(max_new_tokens=0))
    assert answer.stats.finish is FinishReason.LENGTH
    assert not answer.text
    assert answer.stats.decode_tokens == 0


def test_tokens_carry_ids_only_when_traced(engine: Engine) -> None:
    """A plain run delivers text alone."""
    tokens: list[Token] = []

    def collect(token: Token) -> bool:
        tokens.append(token)
        return False

    engine.generate("1, 2, 3, 4,", GREEDY, collect)
    assert {()} == {token.ids for token in tokens} == {token.logprobs for token in tokens}


def test_greedy_answers_are_repeatable(engine: Engine, home: Saved) -> None:
    """From the same state, temperature 0 gives the same tokens."""
    assert ask_loaded(engine, home).ids == ask_loaded(engine, home).ids


def test_a_seed_decides_the_answer(engine: Engine, home: Saved) -> None:
    """At temperature 1 the same seed repeats itself, and of several seeds some differ.

    Or there is none.
    """
    if "seed" not in engine.info.run_sampling:
        with pytest.raises(SamplingFixed, match="seed"):
            ask(engine, QUESTION, Sampling(max_new_tokens=8, seed=1))
        return
    samplings = [
        Sampling(max_new_tokens=8, temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        for seed in range(4)
    ]
    first = [ask_loaded(engine, home, sampling).ids for sampling in samplings]
    again = [ask_loaded(engine, home, sampling).ids for sampling in samplings]
    assert first == again
    assert len(set(first)) > 1


def test_min_p_leaves_out_what_is_unlikely(case: Case, engine: Engine, home: Saved) -> None:
    """With 1, only the likeliest token is left, however high the temperature; 0 is off anywhere."""
    hot = Sampling(max_new_tokens=8, temperature=2.0, top_k=0, top_p=1.0, repeat_penalty=1.0)
    if "min_p" not in engine.info.run_sampling:
        ask_loaded(engine, home, Sampling(max_new_tokens=2, min_p=0.0))
        return
    if case.open is not LlamaCppEngine:
        return  # it only imitates a choice

    answers = [
        ask_loaded(engine, home, msgspec.structs.replace(hot, min_p=1.0, seed=seed)).ids
        for seed in range(3)
    ]
    greedy = msgspec.structs.replace(hot, temperature=0.0)
    assert answers == [ask_loaded(engine, home, greedy).ids] * 3


def test_penalties_and_large_seeds_are_accepted(engine: Engine, home: Saved) -> None:
    """Every field of Sampling that a run may set has a place; a seed may have 64 bits.

    Others are refused by name.
    """
    values: dict[str, float | int] = {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "repeat_penalty": 1.2,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.1,
        "min_p": 0.1,
        "seed": 2**63,
    }
    taken = {name: value for name, value in values.items() if name in engine.info.run_sampling}
    sampling = msgspec.convert({"max_new_tokens": 4, "stop": ("\n\n",), **taken}, Sampling)
    first, again = ask_loaded(engine, home, sampling), ask_loaded(engine, home, sampling)
    assert first.stats.decode_tokens == again.stats.decode_tokens > 0
    if "seed" in taken:
        assert first.ids == again.ids
    for name in values.keys() - taken.keys():
        with pytest.raises(SamplingFixed, match=name):
            ask(engine, QUESTION, msgspec.convert({name: values[name]}, Sampling))


def test_pieces_are_whole_characters(engine: Engine) -> None:
    """Also where one character takes several tokens, and the last one is cut off."""
    answer = ask(engine, "Emoji list: 🎉 🚀 😀 😃 😄", Sampling(max_new_tokens=40, temperature=0.0))
    assert answer.text
    assert "\N{REPLACEMENT CHARACTER}" not in answer.text
    assert answer.text.encode().decode() == "".join(answer.pieces)
    assert len(answer.pieces) < answer.stats.decode_tokens
    assert not answer.text.isascii()


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(
    case: Case, engine: Engine
) -> None:
    """The limit leaves room for one new token, in generate and in prefill.

    Or the library refuses it.
    """
    prompt = case.unit * case.context_tokens
    if not case.counts:
        with pytest.raises(EngineError, match="refused"):
            ask(engine, prompt)
        return
    with pytest.raises(ContextExceeded) as generating:
        ask(engine, prompt)
    with pytest.raises(ContextExceeded) as prefilling:
        engine.prefill(prompt, save_to=case.directory / "long.bin")
    expected = (case.context_tokens, case.context_tokens)
    assert expected == (generating.value.tokens, generating.value.limit)
    assert expected == (prefilling.value.tokens, prefilling.value.limit)


def test_decoding_ends_where_the_context_is_full(case: Case, engine: Engine) -> None:
    """A prompt that leaves room for one token gets one."""
    answer = ask(engine, case.unit * (case.context_tokens - 1 - case.added))
    assert answer.stats.decode_tokens == 1
    if case.counts or engine.info.measures_prefill:
        assert (case.context_tokens - 1, FinishReason.LENGTH) == (
            answer.stats.prompt_tokens,
            answer.stats.finish,
        )


def test_an_empty_prompt_is_refused(case: Case, engine: Engine) -> None:
    """There is nothing to decode from."""
    with pytest.raises(EngineError, match="empty"):
        ask(engine, "")
    with pytest.raises(EngineError, match="empty"):
        engine.prefill("", save_to=case.directory / "empty.bin")


def test_text_that_is_not_unicode_is_refused(engine: Engine, home: Saved) -> None:
    """Half a surrogate pair, as JSON may carry it, is an EngineError and harms nothing."""
    with pytest.raises(EngineError):
        ask(engine, "\ud800 and on")
    assert ask_loaded(engine, home).text


def test_sampling_that_makes_no_sense_is_refused(engine: Engine) -> None:
    """A negative number of new tokens would mean endless to some libraries."""
    with pytest.raises(EngineError, match="max_new_tokens"):
        ask(engine, "1, 2, 3,", Sampling(max_new_tokens=-1))


@pytest.mark.parametrize(
    "content", [None, b"", b"this is no prompt cache. " * 40], ids=["missing", "empty", "foreign"]
)
def test_a_file_that_is_no_cache_is_refused_and_clears_the_state(
    case: Case, engine: Engine, home: Saved, content: bytes | None
) -> None:
    """The next run is cold, and a good cache loads again."""
    path = case.directory / "bad.bin"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    engine.load(home.path)
    with pytest.raises(ArtifactLoadError, match="bad"):
        engine.load(path)
    assert (
        ask(engine, "You are the assistant").stats.cached_tokens == 0
    )  # known without measuring: it was cleared
    assert home.stats.prompt_tokens == engine.load(home.path)


def test_a_cache_that_cannot_be_written_is_an_error(
    case: Case, engine: Engine, home: Saved
) -> None:
    """A missing directory is reported with its path, and the engine goes on."""
    path = case.directory / "nowhere" / "cache.bin"
    with pytest.raises(EngineError, match="nowhere"):
        engine.prefill("A short prompt.", save_to=path)
    assert ask_loaded(engine, home).text


def test_a_missing_model_is_an_error_with_a_hint(case: Case) -> None:
    """The message names the path."""
    with pytest.raises(ModelLoadError, match="absent") as caught:
        case.open(case.spec(model=case.directory / "absent.model"))
    assert caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG no model at all", None], ids=["empty", "foreign", "truncated"]
)
def test_a_file_that_is_no_model_is_an_error_with_a_hint(case: Case, content: bytes | None) -> None:
    """Also when only the beginning of a good model is there."""
    path = case.directory / "bad.model"
    if content is None:
        size = min(case.model.stat().st_size * 3 // 4, 1 << 20)
        with case.model.open("rb") as model:
            content = model.read(size)
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"bad\.model") as caught:
        case.open(case.spec(model=path))
    assert caught.value.hint


@pytest.fixture(scope="module")
def embedder(case: Case) -> Engine:
    """The same model, loaded for embeddings."""
    engine = case.open(msgspec.structs.replace(case.spec(), pooling="mean"))
    case.loaded.append(engine)
    return engine


def test_an_embedding_depends_on_the_text_alone(embedder: Engine) -> None:
    """The same vector for the same text, whatever came between.

    Another one for another text, of the same length.
    """
    first = embedder.embed(HOME)
    other = embedder.embed(CHESS)
    assert embedder.embed(HOME).vector == pytest.approx(first.vector, abs=1e-5)
    assert other.vector != pytest.approx(first.vector, abs=1e-3)
    assert first.vector.dtype == "float32"
    assert len(other.vector) == len(first.vector) > 4
    tokens = embedder.embed((1, 2, 3))
    assert (len(tokens.vector), tokens.tokens) == (len(first.vector), 3)


def test_a_text_too_long_to_embed_is_refused(case: Case, embedder: Engine) -> None:
    """And the next one is embedded."""
    with pytest.raises(EngineError):
        embedder.embed(case.unit * (case.context_tokens + 10))
    assert embedder.embed(QUESTION).vector.any()


def test_a_model_that_answers_makes_no_embeddings(engine: Engine) -> None:
    """It was not loaded for them."""
    with pytest.raises(EngineError):
        engine.embed(QUESTION)


def test_details_of_tokens_come_only_where_they_are_asked_for_and_known(
    engine: Engine, home: Saved
) -> None:
    """With the likeliest ones beside each, of which greedy decoding took the first."""
    tokens: list[Token] = []
    engine.load(home.path)
    sampling = msgspec.structs.replace(GREEDY, logprobs=2 if engine.info.gives_logprobs else None)
    engine.generate(HOME + QUESTION, sampling, lambda token: bool(tokens.append(token)))
    details = [one for token in tokens for one in token.details]
    if not engine.info.gives_logprobs:
        assert details == []
        return
    assert "".join(one.text for one in details) == "".join(token.text for token in tokens)
    for one in details:
        assert [one.logprob] == [likely.logprob for likely in one.likeliest[:1]]
        assert len(one.likeliest) == 2


def test_json_is_all_that_a_bound_engine_writes(engine: Engine) -> None:
    """Where an engine can be held to a schema.

    Where not, its info says so and the session checks.
    """
    if not engine.info.constrains_json:
        return
    tokens: list[Token] = []
    schema = (
        '{"type": "object", "properties": {"n": {"type": "integer"}}, '
        '"required": ["n"], "additionalProperties": false}'
    )
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=40, json_schema=schema)
    engine.generate(QUESTION, sampling, lambda token: bool(tokens.append(token)))
    assert list(json.loads("".join(token.text for token in tokens))) == ["n"]


def test_control_tokens_are_named_without_harm(engine: Engine) -> None:
    """An engine that cannot print them ignores their names, and any name that is no token."""
    sampling = msgspec.structs.replace(GREEDY, shown_tokens=("<|im_start|>", "no token at all"))
    assert ask(engine, QUESTION, sampling).text == ask(engine, QUESTION, GREEDY).text


@pytest.mark.model
def test_llamacpp_prints_the_control_tokens_that_are_named(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """It leaves them out of the text otherwise, and with them the marks of a call."""
    case = llamacpp_case(tmp_path_factory.mktemp("t"))  # the path of a socket is short
    engine = case.load()
    lines = "<|im_start|>a\n" * 20
    hidden = ask(engine, lines, msgspec.structs.replace(GREEDY, max_new_tokens=6)).text
    shown = msgspec.structs.replace(GREEDY, max_new_tokens=6, shown_tokens=("<|im_start|>",))
    assert ask(engine, lines, shown).text == "<|im_start|>a\n" * 2
    assert hidden == "a\n" * 2
    engine.close()


def test_close_is_idempotent_and_final(case: Case) -> None:
    """A closed engine refuses work instead of crashing."""
    engine = case.open(case.spec())
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        ask(engine, "1, 2, 3,")


def test_no_engine_opens_a_tcp_port(engine: Engine, other: Engine) -> None:
    """A port would be open to every local user."""
    assert engine is not other
    connections = psutil.Process().net_connections(kind="inet")
    assert not [one for one in connections if one.status == psutil.CONN_LISTEN]


@pytest.mark.model
def test_llamacpp_refuses_a_socket_path_that_the_kernel_cannot_hold(tmp_path: Path) -> None:
    """The error says so, before anything is loaded."""
    spec = ModelSpec(
        path=str(small_model()), context_tokens=256, scratch_dir=str(tmp_path / ("long" * 30))
    )
    with pytest.raises(EngineError, match="longer than 107 bytes"):
        LlamaCppEngine(spec)
