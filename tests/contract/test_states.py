"""What llama.cpp's states promise: attention to all, sliding windows, recurrences, mixtures.

The models are tiny ones with random weights, written for the test. Reuse is what llama.cpp counts,
and each answer is compared with the cold one: a state that was taken back to a place whose tokens
it lacks would show in the log-probabilities.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkcached.engines.base import ModelSpec, RunStats, Sampling, Token
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.worker.building import BOUNDARY_TOKENS
from tests import tiny_models

pytestmark = pytest.mark.model

SYSTEM = (
    "<|im_start|>system\n"
    + "You are the keeper of a lighthouse, and then of the boat. " * 4
    + "<|im_end|>\n<|im_start|>user\n"
)
"""More tokens than the window has."""
END = "<|im_end|>\n<|im_start|>assistant\n"
QUESTION = SYSTEM + "Is it on?" + END
OTHER = SYSTEM + "And who was there then, in the fog?" + END
INSIDE_A_TOKEN = SYSTEM + "\n\nIs it on?" + END
"""The last line break of SYSTEM is one token with the next one."""
ELSEWHERE = SYSTEM[:150] + "#### Something else." + END


class Answer:
    """The tokens of an answer, and what was reused for it."""

    def __init__(self, stats: RunStats, tokens: list[Token]) -> None:
        self.cached = stats.cached_tokens or 0
        self.prompt = stats.prompt_tokens
        self.ids = [one for token in tokens for one in token.ids]
        self.logprobs = [one for token in tokens for one in token.logprobs]

    def equals(self, other: Answer) -> bool:
        """The same tokens. Batches of other sizes give slightly other numbers."""
        return self.ids == other.ids and self.logprobs == pytest.approx(other.logprobs, abs=0.004)


class Bench:
    """An engine on a tiny model, and a second one, as after a restart."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.model = tiny_models.KINDS[kind.removeprefix("unstated ")](folder / "m.gguf")
        self.engine = self._load("a")
        self.other = self._load("b")
        self.path = folder / "cache"
        self.saved = self.engine.prefill(SYSTEM, save_to=self.path).prompt_tokens

    def _load(self, scratch: str) -> LlamaCppEngine:
        (self.folder / scratch).mkdir(mode=0o700)
        return LlamaCppEngine(
            ModelSpec(
                path=str(self.model),
                context_tokens=1024,
                threads=1,
                window_tokens=tiny_models.WINDOW_TOKENS * (self.kind == "sliding-window"),
                scratch_dir=str(self.folder / scratch),
            )
        )

    def cold(self, prompt: str) -> Answer:
        self.other.clear()
        return ask(self.other, prompt)

    def loaded(self, prompt: str) -> Answer:
        self.other.clear()
        assert self.other.load(self.path) == self.saved
        return ask(self.other, prompt)


def ask(engine: LlamaCppEngine, prompt: str) -> Answer:
    tokens: list[Token] = []

    def collect(token: Token) -> bool:
        tokens.append(token)
        return False

    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    return Answer(engine.generate(prompt, sampling, collect, trace=True), tokens)


@pytest.fixture(scope="module", params=[*tiny_models.KINDS, "unstated sliding-window"])
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    bench = Bench(request.param, tmp_path_factory.mktemp("s"))  # the path of a socket is short
    yield bench
    bench.engine.close()
    bench.other.close()


def test_the_engine_knows_whether_its_state_can_be_taken_back(bench: Bench) -> None:
    """It was measured when the model was loaded."""
    assert bench.engine.info.rewinds == (bench.kind == "plain")


def test_a_file_continues_exactly_as_memory_does(bench: Bench) -> None:
    """The same tokens with the same numbers, as the proof of a build wants it.

    A window that the daemon does not know of continues at another token, with other rounding.
    """
    bench.engine.prefill(SYSTEM, save_to=bench.folder / "again")
    in_memory = ask(bench.engine, QUESTION)
    loaded = bench.loaded(QUESTION)
    if bench.kind == "unstated sliding-window":
        assert loaded.equals(in_memory)
        return
    assert (loaded.cached, loaded.ids) == (bench.saved, in_memory.ids)
    assert loaded.logprobs == in_memory.logprobs


@pytest.mark.parametrize("prompt", [QUESTION, OTHER, INSIDE_A_TOKEN])
def test_a_loaded_state_spares_the_prompt(bench: Bench, prompt: str) -> None:
    """All of it but the last few tokens, and the answer is the cold one."""
    warm = bench.loaded(prompt)
    assert bench.saved - BOUNDARY_TOKENS <= warm.cached <= bench.saved
    assert warm.equals(bench.cold(prompt))


def test_a_state_in_memory_spares_the_prompt_too(bench: Bench) -> None:
    """Right after it was built."""
    bench.engine.prefill(SYSTEM, save_to=bench.folder / "again")
    warm = ask(bench.engine, QUESTION)
    assert bench.saved - BOUNDARY_TOKENS <= warm.cached <= bench.saved
    assert warm.equals(bench.cold(QUESTION))


@pytest.mark.parametrize("back", [1, 2, 3, 5, 6, 10, 20, 30, 60, 150])
def test_a_state_is_never_taken_back_to_a_place_that_it_lacks(bench: Bench, back: int) -> None:
    """A prompt that leaves the saved one earlier answers as it does cold, whatever was reused."""
    prompt = SYSTEM[:-back] + "#### Something else." + END
    warm = bench.loaded(prompt)
    assert warm.equals(bench.cold(prompt))
    if not bench.engine.info.rewinds and back > 2 * BOUNDARY_TOKENS:
        assert warm.cached == 0


def test_a_conversation_continues_its_state(bench: Bench) -> None:
    """What was read and answered is not read again."""
    first = bench.loaded(QUESTION)
    tokens = len(bench.other.tokenize(QUESTION))
    text: list[str] = []
    bench.other.load(bench.path)
    bench.other.generate(
        QUESTION,
        Sampling(max_new_tokens=8, temperature=0.0),
        lambda token: bool(text.append(token.text)),
    )
    turn = QUESTION + "".join(text) + "<|im_end|>\n<|im_start|>user\nWhy?" + END
    second = ask(bench.other, turn)
    assert second.cached >= tokens - BOUNDARY_TOKENS
    assert second.equals(bench.cold(turn))
    assert first.prompt == tokens


# Several states of one engine


@pytest.fixture
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench("plain", tmp_path_factory.mktemp("p"))
    yield bench
    bench.engine.close()
    bench.other.close()


def test_each_state_goes_on_by_itself(plain: Bench) -> None:
    """Texts in turn: each reads only what is new, and answers as it does alone."""
    engine = plain.engine
    assert engine.info.states == 4
    texts = (SYSTEM, "A tale of the sea. " * 10, "Whales. " * 10, "Boats and oars. " * 10)
    alone = [plain.cold(text + END) for text in texts]
    for state, text in enumerate(texts):
        engine.choose(state)
        engine.clear()
        ask(engine, text)
    for state, text in enumerate(texts):
        engine.choose(state)
        answer = ask(engine, text + END)
        assert answer.cached > answer.prompt - 20
        assert answer.equals(alone[state])
        assert engine.state_tokens(state) > 0


def test_a_file_is_loaded_into_the_chosen_state(plain: Bench) -> None:
    """The other one stays as it is."""
    engine = plain.engine
    other = "A tale of the sea. " * 20
    engine.choose(0)
    before = ask(engine, other)
    engine.choose(1)
    assert engine.load(plain.path) == plain.saved
    assert ask(engine, QUESTION).equals(plain.cold(QUESTION))
    engine.choose(0)
    after = ask(engine, other)
    assert after.cached == after.prompt - 1
    assert after.equals(before)


def test_a_long_run_takes_nothing_from_other_states(plain: Bench) -> None:
    """One is in the context at a time; the others are parked, and come back whole."""
    engine = plain.engine
    texts = [f"{state} " + "sea " * 50 for state in range(3)]
    for state, text in enumerate(texts):
        engine.choose(state)
        ask(engine, text)
    engine.choose(3)
    longest = "ship " * 120
    assert ask(engine, longest).equals(plain.cold(longest))

    for state, text in enumerate(texts):
        engine.choose(state)
        again = ask(engine, text)
        assert again.cached == again.prompt - 1
        assert again.equals(plain.cold(text))


def test_a_file_is_loaded_beside_other_states(plain: Bench) -> None:
    engine = plain.engine
    engine.choose(3)
    engine.clear()
    for state in (2, 0, 1):
        engine.choose(state)
        ask(engine, f"{state} " + "sea " * 70)
        engine.rest()
    engine.choose(3)
    assert engine.load(plain.path) == plain.saved
    assert all(engine.state_tokens(state) > 0 for state in range(4))
    assert ask(engine, QUESTION).equals(plain.cold(QUESTION))


def test_other_states_cost_a_run_nothing(plain: Bench) -> None:
    """Only the cells of the chosen one are in the context; a cleared one leaves no file behind."""
    engine = plain.engine
    for state in range(3):
        engine.choose(state)
        ask(engine, f"{state} " + "sea " * 70)
    slots = engine._endpoints.ask("GET", "/slots")
    assert [bool(slot.get("n_prompt_tokens")) for slot in slots] == [False, False, True, False]
    files = _memory_files()
    engine.choose(0)
    engine.clear()
    assert _memory_files() == files - 1
    assert engine.state_tokens(0) == 0


def test_a_parked_state_that_is_lost_is_empty(plain: Bench) -> None:
    """Its answer is right, and read as a whole."""
    engine = plain.engine
    for state in range(2):
        engine.choose(state)
        ask(engine, f"{state} " + "sea " * 70)
    os.truncate(engine._slots._parked[0], 100)
    engine.choose(0)
    again = ask(engine, "0 " + "sea " * 70)
    assert again.cached == 0
    assert again.equals(plain.cold("0 " + "sea " * 70))


def _memory_files() -> int:
    links = Path("/proc/self/fd").iterdir()
    return sum("memfd:rkcached" in str(link.readlink()) for link in links if link.exists())


def test_models_whose_states_cannot_go_back_have_one(bench: Bench) -> None:
    """What they keep beside the tokens does not lie in the cells that states share."""
    assert bench.engine.info.states == (4 if bench.kind == "plain" else 1)
