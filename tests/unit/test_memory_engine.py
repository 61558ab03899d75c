"""What only the memory engine promises.

Answers that can be told in advance, visible cache mix-ups, faults on order.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.engines.base import FinishReason, ModelSpec, RunStats, Sampling, Token
from rkcached.engines.memory import MODEL_MAGIC, Fault, MemoryEngine, MemoryModel, expected_text
from rkcached.errors import Aborted, ArtifactLoadError, EngineError, ModelLoadError, Uncacheable

SYSTEM = "You keep a café in Zürich. "
QUESTION = "Was gibt es heute? 🎉"
SAMPLING = Sampling(max_new_tokens=60, temperature=0.0)

CRASH_SCRIPT = """
import sys
from pathlib import Path
from rkcached.engines.base import ModelSpec, Sampling
from rkcached.engines.memory import MemoryEngine
engine = MemoryEngine(ModelSpec(path=sys.argv[1], context_tokens=0, scratch_dir=sys.argv[2]))
print("ready", flush=True)
engine.generate("Hello", Sampling(max_new_tokens=8), lambda token: print(token.text, flush=True))
"""


def write_model(directory: Path, model: MemoryModel, name: str = "model.json") -> Path:
    path = directory / name
    path.write_bytes(msgspec.json.encode(model))
    return path


def spec(model: Path, context_tokens: int = 0) -> ModelSpec:
    return ModelSpec(path=str(model), context_tokens=context_tokens, scratch_dir=str(model.parent))


OpenEngine = Callable[..., MemoryEngine]


@pytest.fixture
def open_engine(tmp_path: Path) -> OpenEngine:
    def open_engine(model: MemoryModel | None = None) -> MemoryEngine:
        return MemoryEngine(spec(write_model(tmp_path, model or MemoryModel())))

    return open_engine


def run(engine: MemoryEngine, prompt: str, sampling: Sampling = SAMPLING) -> tuple[str, RunStats]:
    pieces: list[str] = []

    def collect(token: Token) -> bool:
        pieces.append(token.text)
        return False

    stats = engine.generate(prompt, sampling, collect)
    return "".join(pieces), stats


SAMPLINGS = st.builds(
    Sampling,
    max_new_tokens=st.integers(0, 120),
    temperature=st.none() | st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.none() | st.integers(1, 40),
    seed=st.none() | st.integers(0, 3),
    repeat_penalty=st.none() | st.just(1.1),
    stop=st.lists(st.sampled_from(["e", " ", "é", "🎉", "er c", "xyz", ""]), max_size=2).map(tuple),
)


@given(prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), sampling=SAMPLINGS)
def test_expected_text_tells_every_answer(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, sampling: Sampling
) -> None:
    """For any prompt and sampling, from a cold state.

    Again from whatever the first run left.
    """
    path = write_model(
        tmp_path_factory.getbasetemp(), MemoryModel(context_tokens=256), "expected.json"
    )
    engine = MemoryEngine(spec(path))
    expected = expected_text(path.read_bytes(), prompt, sampling)
    assert [expected, expected] == [
        run(engine, prompt, sampling)[0],
        run(engine, prompt, sampling)[0],
    ]
    assert not any(stop in expected for stop in sampling.stop if stop)


def test_the_answer_depends_on_all_that_should_matter(tmp_path: Path) -> None:
    """Another prompt, model, seed or penalty gives another text.

    A seed without temperature does not.
    """
    model = write_model(tmp_path, MemoryModel()).read_bytes()
    sibling = write_model(tmp_path, MemoryModel(seed="b")).read_bytes()
    warm = msgspec.structs.replace(SAMPLING, temperature=1.0)
    texts = [
        expected_text(model, "a", SAMPLING),
        expected_text(model, "b", SAMPLING),
        expected_text(sibling, "a", SAMPLING),
        expected_text(model, "a", warm),
        expected_text(model, "a", msgspec.structs.replace(warm, seed=7)),
        expected_text(model, "a", msgspec.structs.replace(SAMPLING, repeat_penalty=1.2)),
    ]
    assert len(texts) == len(set(texts))
    assert texts[0] == expected_text(model, "a", msgspec.structs.replace(SAMPLING, seed=7))


def test_the_answer_from_a_loaded_cache_is_the_right_one(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    """Only the question is prefilled, and the text is that of a cold run."""
    open_engine().prefill(SYSTEM, save_to=tmp_path / "a.bin")
    engine = open_engine()
    engine.load(tmp_path / "a.bin")
    text, stats = run(engine, SYSTEM + QUESTION)
    assert (
        expected_text((tmp_path / "model.json").read_bytes(), SYSTEM + QUESTION, SAMPLING) == text
    )
    assert len(QUESTION.encode()) == stats.prefill_tokens


def test_a_cache_of_another_model_shows_in_the_answer(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    """Its tokens match, its positions do not.

    The text is wrong, as it would be with a real KV cache.
    """
    open_engine(MemoryModel(seed="other")).prefill(SYSTEM, save_to=tmp_path / "foreign.bin")
    engine = open_engine(MemoryModel(seed="mine"))
    engine.load(tmp_path / "foreign.bin")
    text, stats = run(engine, SYSTEM + QUESTION)
    assert len(SYSTEM.encode()) == stats.cached_tokens
    assert (
        expected_text((tmp_path / "model.json").read_bytes(), SYSTEM + QUESTION, SAMPLING) != text
    )


def test_a_changed_position_shows_in_the_answer(open_engine: OpenEngine, tmp_path: Path) -> None:
    """States are taken from the file as they are."""
    path = tmp_path / "a.bin"
    engine = open_engine()
    engine.prefill(SYSTEM, save_to=path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    engine.load(path)
    assert (
        expected_text((tmp_path / "model.json").read_bytes(), SYSTEM, SAMPLING)
        != run(engine, SYSTEM + QUESTION)[0]
    )
    assert run(open_engine(), SYSTEM + QUESTION)[0] != run(engine, SYSTEM + QUESTION)[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:10],
        lambda data: data + b"x",
        lambda data: b"X" + data[1:],
    ],
    ids=["truncated", "header-only", "longer", "bad-magic"],
)
def test_a_damaged_file_is_refused_and_clears_the_state(
    open_engine: OpenEngine, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """The next answer is right, from a cold state."""
    path = tmp_path / "a.bin"
    engine = open_engine()
    engine.prefill(SYSTEM, save_to=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactLoadError):
        engine.load(path)
    text, stats = run(engine, SYSTEM)
    assert expected_text((tmp_path / "model.json").read_bytes(), SYSTEM, SAMPLING) == text
    assert stats.cached_tokens == 0


def test_a_model_file_may_be_written_by_hand(tmp_path: Path) -> None:
    """As json.dumps writes it, with a space; the engine's context is the smaller of the two."""
    path = tmp_path / "hand.json"
    path.write_text('{"rkcached_memory_model": 1, "context_tokens": 100}')
    assert path.read_bytes().startswith(MODEL_MAGIC)
    contexts = [
        MemoryEngine(spec(path, context_tokens=asked)).info.context_tokens for asked in (0, 50, 500)
    ]
    assert contexts == [100, 50, 100]


@pytest.mark.parametrize(
    "content", ['{"rkcached_memory_model": 2}', '{"rkcached_memory_model": 1, "faluts": []}']
)
def test_a_model_file_with_a_mistake_is_refused(tmp_path: Path, content: str) -> None:
    """A wrong version or a misspelt key is named."""
    path = tmp_path / "wrong.json"
    path.write_text(content)
    with pytest.raises(ModelLoadError, match=r"2|faluts"):
        MemoryEngine(spec(path))


def test_a_model_that_cannot_save_is_uncacheable_but_answers(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    """Prefill says that it is of no use; generate works."""
    engine = open_engine(MemoryModel(can_save=False))
    with pytest.raises(Uncacheable):
        engine.prefill(SYSTEM, save_to=tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()
    assert run(engine, SYSTEM)[0]


def test_delays_take_the_time_that_the_model_orders(open_engine: OpenEngine) -> None:
    """Loading, prefill and decode each last at least as long as asked."""
    started = time.monotonic()
    engine = open_engine(
        MemoryModel(load_ms=30, prefill_us_per_token=1000, decode_us_per_token=2000)
    )
    load_ms = (time.monotonic() - started) * 1000
    _, stats = run(engine, "x" * 30, Sampling(max_new_tokens=10))
    assert load_ms >= 30
    assert stats.prefill_ms >= 30
    assert stats.decode_ms >= 20


def test_what_an_aborted_prefill_has_read_serves_the_next_run(open_engine: OpenEngine) -> None:
    """The state keeps the whole batches that were done."""
    engine = open_engine(MemoryModel(prefill_us_per_token=1000))

    def abort(done: int, _total: int) -> None:
        if done:
            engine.abort()

    with pytest.raises(Aborted):
        engine.prefill("a" * 1000, save_to=Path("/dev/null"), on_progress=abort)
    _, stats = run(engine, "a" * 30)
    assert stats.cached_tokens > 0
    assert stats.finish is FinishReason.LENGTH


@pytest.mark.parametrize("op", ["prefill", "save", "load", "generate", "close"])
def test_an_ordered_error_is_raised_once_at_its_place(
    open_engine: OpenEngine, tmp_path: Path, op: str
) -> None:
    """The second call fails, the first and the third do not."""
    fault = msgspec.convert({"op": op, "kind": "error", "at": 2 if op != "close" else 1}, Fault)
    engine = open_engine(MemoryModel(faults=(fault,)))
    path = tmp_path / "a.bin"
    calls: dict[str, Callable[[], object]] = {
        "prefill": lambda: engine.prefill(SYSTEM, save_to=path),
        "save": lambda: engine.prefill(SYSTEM, save_to=path),
        "load": lambda: engine.load(path),
        "generate": lambda: run(engine, SYSTEM, Sampling(max_new_tokens=1)),
        "close": engine.close,
    }
    if op == "load":
        engine.prefill(SYSTEM, save_to=path)
    if op != "close":
        calls[op]()
    with pytest.raises(EngineError, match=f"fault at {op}"):
        calls[op]()
    calls[op]()


def test_an_error_amid_an_answer_leaves_the_engine_usable(
    open_engine: OpenEngine, tmp_path: Path
) -> None:
    """The pieces before it were delivered; the next answer is right."""
    engine = open_engine(MemoryModel(faults=(Fault(op="generate", kind="error", at=5),)))
    pieces: list[Token] = []

    def collect(token: Token) -> bool:
        pieces.append(token)
        return False

    with pytest.raises(EngineError, match="generate 5"):
        engine.generate(SYSTEM, SAMPLING, collect)
    assert 0 < len(pieces) < 5
    assert (
        expected_text((tmp_path / "model.json").read_bytes(), SYSTEM, SAMPLING)
        == run(engine, SYSTEM)[0]
    )


def test_an_ordered_error_at_init_fails_the_load(open_engine: OpenEngine) -> None:
    """The constructor raises it."""
    with pytest.raises(EngineError, match="init"):
        open_engine(MemoryModel(faults=(Fault(op="init", kind="error"),)))


def test_garbage_on_stdout_goes_to_the_descriptor(
    open_engine: OpenEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    """As native libraries write it, past sys.stdout; the run goes on."""
    engine = open_engine(MemoryModel(faults=(Fault(op="generate", kind="garbage_stdout", at=2),)))
    assert run(engine, SYSTEM)[0]
    assert "native chatter" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("kind", "code"),
    [("segfault", -signal.SIGSEGV), ("abort", -signal.SIGABRT), ("exit", 3), ("hang", None)],
)
def test_a_crash_really_ends_or_hangs_the_process(
    tmp_path: Path, kind: str, code: int | None
) -> None:
    """After the first pieces of an answer, as a native library would do it."""
    fault = msgspec.convert({"op": "generate", "kind": kind, "at": 6}, Fault)
    model = write_model(tmp_path, MemoryModel(faults=(fault,)))
    command = [sys.executable, "-c", CRASH_SCRIPT, str(model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(2)]
        if code is None:
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(0.2)
            child.kill()
        else:
            assert code == child.wait(10)
    assert lines[0] == "ready\n"
    assert lines[1].strip()
