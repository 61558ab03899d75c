"""The RKLLM binding beyond what every engine promises, on the stand-in of the closed library.

The stand-in is strict: it ends the process when a handle is destroyed twice or during a run,
refuses parameters whose reserved bytes are not zero, and overwrites every buffer of a callback once
that returns.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from rkcached.engines.base import FinishReason, ModelSpec, NpuOptions, RunStats, Sampling, Token
from rkcached.engines.kinds import Pooling
from rkcached.engines.rkllm.engine import RkllmEngine
from rkcached.engines.rkllm.library import Library
from rkcached.errors import (
    ContextExceeded,
    EngineError,
    ModelLoadError,
    RuntimeLibraryError,
    SamplingFixed,
)
from tests.rkllm_standin import standin
from tests.rkllm_standin.tokens import byte_tokenizer
from tests.waiting import DEADLINE_S

GROUPS = ["B", "C", "C1", "D", "E"]
QUESTION = "Which lamp is on?"
GREEDY = Sampling(max_new_tokens=60)

each_group = pytest.mark.parametrize("group", GROUPS)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture
def make(built: Path, tmp_path: Path) -> Any:
    """Load an engine of a group.

    Keywords of the model file, and a dict of what else the spec says.
    """
    engines: list[RkllmEngine] = []

    def load(group: str, spec: dict[str, Any] | None = None, **keys: object) -> RkllmEngine:
        engine = RkllmEngine(
            ModelSpec(
                **{
                    "path": str(standin.write_model(tmp_path / f"{len(engines)}.rkllm", **keys)),
                    "context_tokens": 1024,
                    "library": str(standin.build(group, built)),
                    "abi": "1.1.0" if group == "B" else "",
                    "sampling": Sampling(max_new_tokens=100, temperature=0.0),
                    **(spec or {}),
                }
            )
        )
        engines.append(engine)
        return engine

    yield load
    for engine in engines:
        engine.close()


def ask(
    engine: RkllmEngine, sampling: Sampling = GREEDY, prompt: str = QUESTION
) -> tuple[str, RunStats]:
    pieces: list[str] = []

    def take(token: Token) -> bool:
        pieces.append(token.text)
        return False

    stats = engine.generate(prompt, sampling, take)
    return "".join(pieces), stats


# The library


@each_group
def test_the_version_decides_the_abi(group: str, built: Path) -> None:
    """String, symbols and layout agree; 1.1 says no version, so the manifest has to."""
    library = Library(standin.build(group, built), "1.1.0" if group == "B" else "")
    assert (standin.ABIS[group] in library.abi.versions, library.abi.group) == (True, group[0])


@pytest.mark.parametrize(("group", "says"), [("D", "1.3.0"), ("E", "1.2.3")])
def test_a_library_that_says_another_version_is_refused(group: str, says: str, built: Path) -> None:
    """Symbols cannot tell D from E: only the place of the default parameters gives the lie away."""
    path = standin.build(group, built, version=says)
    with pytest.raises(
        RuntimeLibraryError, match=f"says it is RKLLM {says}, but its default parameters"
    ) as caught:
        Library(path)
    assert "engine.abi" in caught.value.hint


@pytest.mark.parametrize(("group", "abi"), [("D", "1.2.1"), ("E", "1.3.0")])
def test_engine_abi_speaks_to_a_library_of_unknown_version(
    group: str, abi: str, built: Path
) -> None:
    """Refused when nothing is said, used deliberately when the manifest names the ABI."""
    path = standin.build(group, built, version="1.9.0")
    with pytest.raises(RuntimeLibraryError, match=r"1\.9\.0") as caught:
        Library(path)
    assert "engine.abi" in caught.value.hint
    assert Library(path, abi).abi.name == abi


def test_a_wrong_override_is_named(make: Any) -> None:
    """When the model cannot be loaded, the hint is about the override that is not the library's."""
    with pytest.raises(ModelLoadError) as caught:
        make("D", {"abi": "1.3.0"})
    assert (
        caught.value.hint
        == "the library says it is 1.2.3: remove engine.abi 1.3.0 from the manifest"
    )


def test_a_missing_dependency_is_named(built: Path, tmp_path: Path) -> None:
    """With the package that has it."""
    assert standin.build("D", built)  # there is a compiler
    dependency = tmp_path / "libgomp.so.1"
    subprocess.run(
        [
            "cc",
            "-shared",
            "-Wl,-soname,libgomp-absent.so.1",
            "-o",
            dependency,
            "-x",
            "c",
            "/dev/null",
        ],
        check=True,
    )
    command = ["cc", "-std=c11", "-DABI=121", "-fPIC", "-shared", "-pthread", "-Wl,--no-as-needed"]
    broken = tmp_path / "librkllmrt.so"
    subprocess.run([*command, "-o", broken, standin.HERE / "standin.c", dependency], check=True)
    dependency.unlink()
    with pytest.raises(
        RuntimeLibraryError, match=r"needs libgomp-absent\.so\.1, which is not installed"
    ):
        Library(broken)


# What the callback brings


@each_group
@pytest.mark.parametrize("thread", ["caller", "own"])
@pytest.mark.parametrize("waiting", ["empty", "bytes"])
def test_the_text_is_the_same_however_it_is_called_back(
    make: Any, group: str, thread: str, waiting: str
) -> None:
    """On whichever thread, and whatever comes with a character that is not complete."""
    expected, _ = ask(make(group))
    text, _ = ask(make(group, callback_thread=thread, waiting=waiting))
    assert expected == text
    assert not text.isascii()


def test_tokens_without_text_are_counted_and_not_shown(make: Any) -> None:
    """NULL is the text of special tokens."""
    text, stats = ask(make("D", null_text="yes"))
    assert stats.decode_tokens == 60
    assert len(text.encode()) < 60


def test_an_error_in_the_middle_of_a_reply_is_an_error(make: Any, tmp_path: Path) -> None:
    """The run says 0 and calls back ERROR; afterwards the engine works."""
    fault = tmp_path / "fault"
    fault.touch()
    engine = make("D", fault="token3:error", fault_file=fault)
    with pytest.raises(EngineError, match="reported an error after 3 tokens"):
        ask(engine)
    fault.unlink()
    assert ask(engine)[1].decode_tokens == 60


# Prompts


@each_group
def test_prompts_are_raw(make: Any, group: str) -> None:
    """Since 1.2.0 the runtime would wrap them in a template of its own: only BOS is added."""
    engine = make(group)
    path = Path(engine._spec.path).with_suffix(".cache")
    assert engine.prefill(QUESTION, save_to=path).prompt_tokens == len(QUESTION) + 1


def test_a_nul_byte_is_refused(make: Any) -> None:
    """C would end the prompt there, and a prompt cut short is a wrong answer."""
    with pytest.raises(EngineError, match="NUL byte at 3"):
        ask(make("E"), prompt="and\0on")


def tokenizer_file(path: Path, spoil: Callable[[Any], None]) -> Path:
    """The stand-in's tokens, and what training scripts leave behind in such files."""
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_tokenizer(path)))
    spoil(tokenizer)
    tokenizer.save(str(path))
    return path


def ends_texts(tokenizer: Any) -> None:
    around = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.post_processor = around


@pytest.mark.parametrize(
    ("spoil", "added"),
    [
        (lambda tokenizer: tokenizer.enable_truncation(16), 0),
        (lambda tokenizer: tokenizer.enable_padding(length=100), 0),
        (ends_texts, 1),
    ],
    ids=["cuts", "fills", "ends"],
)
def test_a_tokenizer_gives_the_whole_prompt_and_no_more(
    make: Any, tmp_path: Path, spoil: Any, added: int
) -> None:
    """Whatever the file orders: nothing is cut, filled or ended.

    What it puts before a text, BOS, is kept.
    """
    engine = make("D", {"tokenizer": str(tokenizer_file(tmp_path / "tokenizer.json", spoil))})
    prompt = "Which lamp is on, and which is not? " * 4
    _, stats = ask(engine, prompt=prompt)
    assert stats.prompt_tokens == len(engine.tokenize(prompt)) == len(prompt) + added
    with pytest.raises(ContextExceeded):
        ask(engine, prompt=prompt * 10)


def test_a_file_that_is_no_tokenizer_is_said_to_be_none(make: Any, tmp_path: Path) -> None:
    """With its path, and where to get one."""
    path = tmp_path / "tokenizer.json"
    path.write_text("{bad")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json is not a tokenizer"):
        make("D", {"tokenizer": str(path)})


# Sampling


@pytest.mark.parametrize("group", ["B", "C", "C1", "D"])
def test_sampling_is_fixed_before_1_3(make: Any, group: str) -> None:
    """The error has both values; what equals the model's is served."""
    engine = make(group, {"sampling": Sampling(max_new_tokens=20, temperature=0.7, top_k=20)})
    with pytest.raises(
        SamplingFixed, match=r"fixes temperature .* it is 0\.7, this run asks for 0\.2"
    ):
        ask(engine, Sampling(temperature=0.2))
    assert ask(engine, Sampling(max_new_tokens=5, temperature=0.7, top_k=20))[1].decode_tokens == 5
    assert not engine.info.greedy


def test_sampling_is_per_run_since_1_3(make: Any) -> None:
    """Greedy runs repeat themselves on a model that was loaded to sample; sampled ones do not."""
    engine = make("E", {"sampling": Sampling(max_new_tokens=20, temperature=0.9)})
    greedy = {ask(engine, Sampling(max_new_tokens=30, temperature=0.0))[0] for _ in range(3)}
    sampled = {
        ask(engine, Sampling(max_new_tokens=30, temperature=1.5, top_k=50))[0] for _ in range(3)
    }
    assert (len(greedy), len(sampled) > 1) == (1, True)


@each_group
def test_an_answer_may_be_shorter_than_the_models(make: Any, group: str) -> None:
    """Natively on 1.3, before it by counting and an abort, after which the engine works."""
    engine = make(group, decode_tps=2000)
    whole, _ = ask(engine)
    text, stats = ask(engine, Sampling(max_new_tokens=7))
    assert (stats.decode_tokens, stats.finish) == (7, FinishReason.LENGTH)
    assert whole.startswith(text)
    assert whole == ask(engine)[0]


def test_the_end_of_the_answer_is_a_stop(make: Any) -> None:
    """End of sequence before the limit."""
    assert ask(make("D", eos_after=9))[1].finish is FinishReason.STOP


# Adapter, hidden layers, hardware


@pytest.mark.parametrize("group", ["B", "D", "E"])
def test_a_lora_adapter_changes_the_answer(make: Any, group: str, tmp_path: Path) -> None:
    """By its scale, too; one that is missing is an error of loading."""
    adapter = tmp_path / "style.lora"
    adapter.write_text("adapter")
    plain = ask(make(group))[0]
    strong, weak = (
        ask(make(group, {"lora": str(adapter), "lora_scale": scale}))[0] for scale in (1.0, 0.5)
    )
    assert len({plain, strong, weak}) == 3
    with pytest.raises(ModelLoadError, match="LoRA adapter"):
        make(group, {"lora": str(tmp_path / "absent")})


@each_group
def test_the_last_hidden_layer_is_an_array(make: Any, group: str) -> None:
    """n_tokens x embd_size in float32, copied before the library reuses its buffer; or pooled."""
    engine = make(group, embd_size=24)
    hidden = engine.last_hidden_layer(QUESTION, None)
    assert (hidden.shape, hidden.dtype.name) == ((len(QUESTION) + 1, 24), "float32")
    assert hidden.tolist() == engine.last_hidden_layer(QUESTION, None).tolist()
    assert hidden.mean(axis=0).tolist() == engine.last_hidden_layer(QUESTION).tolist()
    assert hidden[-1].tolist() == engine.last_hidden_layer(QUESTION, Pooling.LAST).tolist()
    assert hidden[-1].tolist() != engine.last_hidden_layer("Another text.", Pooling.LAST).tolist()
    assert ask(engine)[0]


def said(capfd: pytest.CaptureFixture[str], start: str) -> list[str]:
    """Lines that the library printed."""
    return [line for line in capfd.readouterr().out.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("group", ["C", "C1", "D", "E"])
def test_the_boards_options_reach_the_library(
    make: Any, group: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each in its field; what is not given stays as the runtime has it."""
    npu = NpuOptions(enabled_cpus=(4, 5, 5, 7), embed_flash=False, base_domain_id=3, n_keep=16)
    make(group, {"npu": npu})
    make(group)
    assert said(capfd, "D rkllm: n_keep") == [
        "D rkllm: n_keep 16, embed_flash 0, base_domain_id 3, 3 cpus, mask 0xb0",
        "D rkllm: n_keep -1, embed_flash 1, base_domain_id 0, 4 cpus, mask 0xf",
    ]
    with pytest.raises(ModelLoadError):
        make(group, {"npu": NpuOptions(base_domain_id=99)})


def test_a_cpu_that_is_not_there_is_named(make: Any) -> None:
    """Where the library cannot pin its threads; it was said that the model must be converted."""
    with pytest.raises(ModelLoadError) as caught:
        make("D", {"npu": NpuOptions(enabled_cpus=(31,))}, pins="yes")
    hint = caught.value.hint
    assert hint.startswith("correct npu.enabled_cpus of the model: CPU 31 does not exist here, ")


def test_the_end_of_sequence_can_be_ignored(make: Any) -> None:
    """Since 1.3."""
    assert ask(make("E", eos_after=9))[1].decode_tokens == 9
    assert ask(make("E", {"npu": NpuOptions(ignore_eos=True)}, eos_after=9))[1].decode_tokens == 60


@pytest.mark.parametrize("group", ["D", "E"])
def test_the_thinking_flag_reaches_the_library(
    make: Any, group: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With every run of a model that declares it."""
    ask(make(group))
    assert said(capfd, "D rkllm: thinking") == []
    ask(make(group, {"thinking": True}))
    assert said(capfd, "D rkllm: thinking") == ["D rkllm: thinking"]


# Ownership


@each_group
def test_a_slow_abort_is_waited_for(make: Any, group: str) -> None:
    """The next run begins only when the aborted one has ended."""
    engine = make(group, decode_tps=200, abort_ms=150)
    ended = threading.Event()

    def abort_soon(_: Token) -> bool:
        threading.Thread(target=lambda: (engine.abort(), ended.set())).start()
        return False

    stats = engine.generate(QUESTION, Sampling(max_new_tokens=90), abort_soon)
    assert (ended.wait(DEADLINE_S), stats.finish) == (True, FinishReason.ABORT)
    assert ask(engine, Sampling(max_new_tokens=5))[1].decode_tokens == 5


@pytest.mark.parametrize("group", ["B", "D", "E"])
def test_no_abort_is_lost(make: Any, group: str) -> None:
    """Also one that comes when the run is ours already and the library's not yet.

    It forgets that.
    """
    engine = make(group, decode_tps=300)
    for _ in range(20):
        over = threading.Event()

        def abort_at_once(over: threading.Event = over) -> None:
            while engine._current.run is None and not over.is_set():
                pass
            engine.abort()

        thread = threading.Thread(target=abort_at_once)
        thread.start()
        stats = engine.generate(QUESTION, Sampling(max_new_tokens=90), lambda _: False)
        over.set()
        thread.join()
        assert (stats.finish, stats.decode_tokens < 60) == (FinishReason.ABORT, True)


def test_more_than_32_bits_is_more_than_fits(make: Any) -> None:
    """The answer ends where the context does, instead of at what is left of the number."""
    stats = ask(make("E"), Sampling(max_new_tokens=2**32 + 3))[1]
    assert stats.finish is FinishReason.LENGTH
    assert stats.prompt_tokens + stats.decode_tokens == 1024


LIVES = """
import gc, sys, threading, time
from pathlib import Path
from rkcached.engines.base import ModelSpec, Sampling
from rkcached.engines.rkllm.engine import RkllmEngine
def load():
    path, library, abi = sys.argv[1:4]
    sampling = Sampling(max_new_tokens=40, temperature=0.0)
    return RkllmEngine(
        ModelSpec(path=path, context_tokens=1024, library=library, abi=abi, sampling=sampling)
    )
"""


@each_group
@pytest.mark.parametrize(
    "life",
    [
        "e = load(); e.close(); e.close(); del e; gc.collect()",
        (
            "e = load(); e.generate('a', Sampling(max_new_tokens=3), lambda t: False); del e; "
            "gc.collect()"
        ),
        (
            "e = load(); e.generate('a', Sampling(max_new_tokens=3), lambda t: True); e.abort(); "
            "e.close(); e.abort()"
        ),
        (
            "a, b = load(), load(); a.close(); b.generate('a', Sampling(max_new_tokens=3), "
            "lambda t: "
            "False); b.close()"
        ),
        "e = load(); e.clear(); e.clear(); sys.exit(0)",
    ],
    ids=["closed twice", "forgotten", "aborted around its end", "two handles", "never closed"],
)
def test_a_handle_is_destroyed_once(group: str, life: str, built: Path, tmp_path: Path) -> None:
    """The stand-in ends the process with SIGABRT if it is destroyed in a run.

    So it does if it is destroyed again, or used afterwards.
    """
    model = standin.write_model(tmp_path / "m.rkllm")
    arguments = [model, standin.build(group, built), "1.1.0" if group == "B" else ""]
    done = subprocess.run(
        [sys.executable, "-c", LIVES + life, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_frees_the_interpreter(make: Any) -> None:
    """While the library works, other threads do: an abort would never come through otherwise."""
    engine = make("D", prefill_tps=40)
    beats = []
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.002):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    ask(engine, Sampling(max_new_tokens=1), "a" * 60)
    over.set()
    thread.join()
    assert len(beats) > 3  # of some hundred; none, if nobody else could run
