"""The manifest: what parses and to what.

What does not, and how every problem is reported with line and hint.
"""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rkcached.engines.kinds import EngineKind, VerifyMode
from rkcached.errors import ManifestError, Problem
from rkcached.messages.builtin import BUILTIN, FORMATS
from rkcached.sources.manifest import (
    FingerprintMode,
    Manifest,
    ModelConfig,
    ModelParams,
    PromptConfig,
    SamplingParams,
    json_schema,
)
from rkcached.sources.parser import parse, parse_usable
from rkcached.sources.problems import NAME
from rkcached.sources.values import RKLLM_ABIS
from rkcached.sources.yaml_reader import MAX_CHARACTERS, MAX_NODES

FILE = Path("/etc/rkcached/manifest.yaml")
MINIMAL = """\
version: 1
models:
  m:
    path: m.gguf
"""


def good(text: str) -> Manifest:
    return parse(text, file=FILE)


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ManifestError) as caught:
        parse(text, file=FILE)
    return caught.value.problems


def problem(text: str) -> Problem:
    found = problems(text)
    assert len(found) == 1, "\n".join(map(str, found))
    return found[0]


def model(*lines: str) -> str:
    """A manifest with one model; `lines` are its keys from line 5 on."""
    return MINIMAL + "".join(f"    {line}\n" for line in lines)


# --- what parses ---


def test_defaults() -> None:
    """Two keys are enough; everything else has a default."""
    manifest = good(MINIMAL)
    config = manifest.models["m"]
    assert manifest.engine.kind is EngineKind.LLAMACPP
    assert manifest.engine.threads == 0
    assert manifest.cache.max_bytes is None
    assert manifest.cache.verify is VerifyMode.EXACT
    assert manifest.cache.fingerprint is FingerprintMode.FULL
    assert manifest.cache.min_tokens == 0
    assert config.chat_template is None
    assert config.bos_token is None
    assert config.eos_token is None
    assert config.thinking is None
    assert config.idle_unload_s is None
    assert config.params == ModelParams()
    assert config.prompts == {}
    assert config.prompts_from == ()


def test_short_and_long_form_are_one() -> None:
    """A path alone, a single file, and a list of one file mean the same prompt."""
    text = model("prompts:", "  a: p.md", "  b: {files: p.md}", "  c: {files: [p.md]}")
    prompts = good(text).models["m"].prompts
    assert prompts["a"] == prompts["b"] == prompts["c"]
    assert prompts["a"].files == (Path("/etc/rkcached/p.md"),)


@pytest.mark.parametrize(
    ("written", "preload"),
    [
        ("false", None),
        ("true", ()),
        ("a", ("a",)),
        ("[b, a, b]", ("b", "a")),
    ],
)
def test_preload(written: str, preload: tuple[str, ...] | None) -> None:
    """Nothing, the model alone, or the model with prompts in their order."""
    text = model(f"preload: {written}", "prompts: {a: a.md, b: b.md}")
    assert good(text).models["m"].preload == preload
    assert good(MINIMAL).models["m"].preload is None


def test_each_unknown_prompt_of_preload_is_a_problem() -> None:
    """With the nearest name; where files are prompts, only a look can tell."""
    text = model("preload: [cok, a, zzz]", "prompts: {cook: a.md, a: b.md}")
    found = [(problem.line, problem.message, problem.hint) for problem in problems(text)]
    assert found == [
        (5, "preload: there is no prompt 'cok'", "did you mean 'cook'?"),
        (5, "preload: there is no prompt 'zzz'", "known are cook, a"),
    ]
    (alone,) = problems(model("preload: cook"))
    assert alone.hint == "write `preload: true` for the model alone"
    good(model("preload: cook", "prompts_from: '*.md'"))


def test_long_form() -> None:
    """The long form has several files in their order, parameters and a description."""
    text = model(
        "prompts:",
        "  a:",
        "    files: [b.md, a.md]",
        "    params: {top_k: 1}",
        "    description: house rules",
    )
    prompt = good(text).models["m"].prompts["a"]
    assert [file.name for file in prompt.files] == ["b.md", "a.md"]
    assert prompt.params == SamplingParams(top_k=1)
    assert prompt.description == "house rules"


def test_sampling_of_the_model() -> None:
    """Without a prompt the sampling parameters are the model's, sorted.

    Without the length of the context.
    """
    sampling = (
        good(model("params: {temperature: 0, max_context_len: 8192}")).models["m"].sampling(None)
    )
    assert list(sampling) == sorted(sampling)
    assert sampling == {
        "frequency_penalty": 0.0,
        "max_new_tokens": 512,
        "presence_penalty": 0.0,
        "repeat_penalty": 1.1,
        "temperature": 0.0,
        "top_k": 40,
        "top_p": 0.9,
    }


def test_sampling_of_a_prompt() -> None:
    """A prompt changes only what it names; zero is a value like any other."""
    text = model(
        "params: {top_k: 20}",
        "prompts:",
        "  a: {files: a.md, params: {temperature: 0, max_new_tokens: 9}}",
    )
    config = good(text).models["m"]
    assert config.sampling("a") == config.sampling(None) | {"temperature": 0.0, "max_new_tokens": 9}


def test_sampling_of_a_prompt_that_was_found() -> None:
    """A prompt that prompts_from found is not named here and has the model's parameters."""
    config = good(MINIMAL).models["m"]
    assert config.sampling("found") == config.sampling(None)


def test_an_integer_is_a_float_where_a_float_is_due() -> None:
    """`temperature: 1` and `1.0` are one value, so that they fingerprint alike."""
    values = [
        good(model(f"params: {{temperature: {text}}}")).models["m"].params.temperature
        for text in ("1", "1.0")
    ]
    assert [repr(value) for value in values] == ["1.0", "1.0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 << 30),
        ("500 MB", 500_000_000),
        ('"1.5 gib"', 3 << 29),
        ("1048576", 1 << 20),
        ("'2097152'", 1 << 21),
        ("null", None),
    ],
)
def test_sizes(text: str, expected: int | None) -> None:
    """A size is a number of bytes, or a number with a unit."""
    assert expected == good(f"{MINIMAL}cache: {{max_bytes: {text}}}\n").cache.max_bytes


def test_paths_are_relative_to_the_file() -> None:
    """Relative paths start at the manifest's directory, by their letters alone.

    Absolute ones stay.
    """
    text = model(
        "chat_template: ../t/x.jinja",
        "prompts: {a: ./p//a.md, b: /srv/b.md}",
        "prompts_from: [e/*.md, '/srv/?.txt']",
    )
    config = good(text).models["m"]
    assert config.path == Path("/etc/rkcached/m.gguf")
    assert config.chat_template == "/etc/t/x.jinja"
    assert [str(prompt.files[0]) for prompt in config.prompts.values()] == [
        "/etc/rkcached/p/a.md",
        "/srv/b.md",
    ]
    assert config.prompts_from == ("/etc/rkcached/e/*.md", "/srv/?.txt")


def test_a_relative_file_gives_absolute_paths() -> None:
    """Paths are absolute even when the manifest was named by a relative path."""
    manifest = parse(MINIMAL, file=Path("conf/manifest.yaml"))
    assert manifest.file == Path("conf/manifest.yaml")
    assert manifest.models["m"].path == Path.cwd() / "conf" / "m.gguf"


def test_prompts_from_accepts_one_pattern() -> None:
    """A single pattern needs no list."""
    assert good(model("prompts_from: p/*.md")).models["m"].prompts_from == ("/etc/rkcached/p/*.md",)


@pytest.mark.parametrize("name", BUILTIN)
def test_builtin_templates(name: str) -> None:
    """Each built-in template is accepted by its name."""
    assert name == good(model(f"chat_template: {name}")).models["m"].chat_template


def test_off_is_a_word() -> None:
    """YAML 1.1 reads a bare `off` as false; here it is the word, as the documentation writes it."""
    manifest = good(f"{MINIMAL}cache: {{verify: off}}\n")
    assert manifest.cache.verify is VerifyMode.OFF


def test_words_that_old_yaml_mistakes_are_names() -> None:
    """`on`, dates, times and leading zeros are text by YAML 1.2.

    So they can be names and file names.
    """
    prompts = good(model("prompts: {on: off, 2024-01-01: 12:30, 007: 1_0}")).models["m"].prompts
    assert {n: p.files[0].name for n, p in prompts.items()} == {
        "on": "off",
        "2024-01-01": "12:30",
        "007": "1_0",
    }


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", ".001", "0.001"])
def test_every_way_to_write_a_float(text: str) -> None:
    """A number with an exponent needs no decimal point."""
    assert good(model(f"params: {{temperature: {text}}}")).models[
        "m"
    ].params.temperature == pytest.approx(0.001)


def test_anchors_and_merge_keys() -> None:
    """Anchors and merge keys work.

    What stands beside `<<` wins, and earlier merges win over later ones.
    """
    text = (
        model("params: &p {top_k: 1, top_p: 0.5}")
        + "  n:\n    path: n\n    params: {<<: *p, top_k: 2}\n"
    )
    manifest = good(text + "  o:\n    path: o\n    params: {<<: [{top_k: 3}, *p]}\n")
    assert [(m.params.top_k, m.params.top_p) for m in manifest.models.values()] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.5),
    ]


def test_byte_order_mark_and_crlf() -> None:
    """What a Windows editor saves parses too."""
    assert good("\ufeff" + MINIMAL.replace("\n", "\r\n")) == good(MINIMAL)


def test_line_of() -> None:
    """A place has the line of its key.

    What is not written has the line of the nearest thing around it.
    """
    manifest = good(
        model("prompts:", "  a: a.md", "  b:", "    files:", "      - x.md", "      - y.md")
    )
    assert manifest.line_of() == 1
    assert manifest.line_of("models") == 2
    assert manifest.line_of("models", "m") == 3
    assert manifest.line_of("models", "m", "prompts", "a", "files", 0) == 6
    assert manifest.line_of("models", "m", "prompts", "b", "files", 1) == 10
    assert manifest.line_of("models", "m", "params", "top_k") == 3
    assert manifest.line_of("cache", "verify") == 1


def test_a_comment_changes_nothing() -> None:
    """Manifests are equal when they ask for the same, wherever the lines are; else they are not."""
    assert good(MINIMAL) == good("# a comment\n\n" + MINIMAL)
    assert good(MINIMAL) != good(model("thinking: true"))
    assert good(MINIMAL) != parse(MINIMAL, file=Path("/elsewhere/manifest.yaml"))


def test_models_can_be_made_in_code() -> None:
    """Other modules' tests build the records directly, by keyword."""
    prompt = PromptConfig(files=(Path("/a.md"),), params=SamplingParams(top_k=3))
    config = ModelConfig(path=Path("/m.gguf"), prompts={"a": prompt})
    manifest = Manifest(version=1, models={"m": config})
    assert manifest.models["m"].sampling("a")["top_k"] == 3
    assert manifest.line_of("models") == 0


# --- what does not ---


def test_all_problems_at_once() -> None:
    """Every problem is reported, in file order, each with the file, its line and a hint."""
    text = """\
version: 2
engine: {kind: rkllm, abi: "1.4"}
cache:
  verify: exakt
models:
  Big Model:
    path: m.gguf
  m:
    chat_template: chatlm
    params:
      temprature: 0.7
      top_p: 0
    prompts:
      a: {files: [], params: {max_context_len: 64}}
      a: twice.md
"""
    found = problems(text)
    assert all(item.file == str(FILE) for item in found)
    assert all(item.hint for item in found)
    assert [(item.line, item.message) for item in found] == [
        (1, "version: expected 1, got 2"),
        (2, "abi: '1.4' is no known binary interface"),
        (4, "verify: unknown value 'exakt'"),
        (6, "'Big Model' cannot be a name"),
        (8, "missing key 'path'"),
        (9, "chat_template: 'chatlm' is neither a built-in template nor a .jinja file"),
        (11, "unknown key 'temprature'"),
        (12, "top_p: 0 is out of range"),
        (14, "files: at least one is needed, got a list without entries"),
        (14, "max_context_len is set per model, got 64"),
        (15, "duplicate key 'a', first given in line 14"),
    ]


def test_the_error_as_text() -> None:
    """A problem prints as file:line, message and hint, which is what every edge shows."""
    item = problem(model("params: {temprature: 1}"))
    assert (
        str(item)
        == "/etc/rkcached/manifest.yaml:5: unknown key 'temprature' (did you mean 'temperature'?)"
    )


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        (MINIMAL + "modles: {}", 5, "modles", "did you mean 'models'?"),
        (MINIMAL + "engine:\n  thread: 1", 6, "thread", "did you mean 'threads'?"),
        (MINIMAL + "cache: {max_size: 1}", 5, "max_size", "did you mean 'max_bytes'?"),
        (model("Path: x"), 5, "Path", "did you mean 'path'?"),
        (model("params: {topk: 1}"), 5, "topk", "did you mean 'top_k'?"),
        (model("prompts:", "  a: {file: a.md, files: b.md}"), 6, "file", "did you mean 'files'?"),
        (
            model("prompts:", "  a: {files: b.md, variables: {x: 1}}"),
            6,
            "variables",
            "write `chat_template_kwargs: ...`",
        ),
        (model("variables: {x: 1}"), 5, "variables", "write `chat_template_kwargs: ...`"),
        (
            model("prompts:", "  a: {files: b.md, params: {temp: 1}}"),
            6,
            "temp",
            "did you mean 'temperature'?",
        ),
        (
            MINIMAL + "file: x",
            5,
            "file",
            "known are version, engine, cache, serving, sources, models",
        ),
        (
            MINIMAL + "cache: {x: 1}",
            5,
            "x",
            (
                "known are max_bytes, verify, fingerprint, min_tokens, conversations, "
                "keep_retired_s, build, learn, trust"
            ),
        ),
    ],
)
def test_unknown_keys(text: str, line: int, key: str, hint: str) -> None:
    """An unknown key has the nearest known key of that place as its hint, or all of them."""
    item = problem(text)
    assert (item.line, item.message, item.hint) == (line, f"unknown key '{key}'", hint)


@pytest.mark.parametrize(
    ("section", "message", "hint"),
    [
        (
            "engine: {kind: llamacp}",
            "kind: unknown value 'llamacp'",
            "did you mean 'llamacpp'? known are rkllm, llamacpp, memory",
        ),
        (
            "engine: {kind: vllm}",
            "kind: unknown value 'vllm'",
            "did you mean 'rkllm'? known are rkllm, llamacpp, memory",
        ),
        (
            "engine: vllm",
            "engine: expected a mapping, got 'vllm'",
            "write `engine: {kind: ...}`; did you mean 'rkllm'? known are rkllm, llamacpp, memory",
        ),
        ("engine: {kind: 5}", "kind: unknown value 5", "known are rkllm, llamacpp, memory"),
        ("cache: {verify: true}", "verify: unknown value true", "known are off, hit, exact"),
        ("cache: {verify: }", "verify: unknown value nothing", "known are off, hit, exact"),
        (
            "cache: {fingerprint: Full}",
            "fingerprint: unknown value 'Full'",
            "did you mean 'full'? known are full, kv",
        ),
    ],
)
def test_unknown_values(section: str, message: str, hint: str) -> None:
    """A closed choice names the value, the nearest choice if one is near, and all of them."""
    item = problem(f"{MINIMAL}{section}\n")
    assert (item.line, item.message, item.hint) == (5, message, hint)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("2025-01-31", date(2025, 1, 31)), ("today", "today"), ("'2024-02-29'", date(2024, 2, 29))],
)
def test_the_date_of_a_template(written: str, expected: object) -> None:
    """A day, or the word for the day at hand."""
    assert good(model(f"template_date: {written}")).models["m"].template_date == expected


@pytest.mark.parametrize("written", ["tomorrow", "2025-02-30", "20250131", "31.1.2025", "5", "[]"])
def test_what_is_no_date(written: str) -> None:
    """Nothing is guessed."""
    item = problem(model(f"template_date: {written}"))
    assert item.message.startswith("template_date: expected a date, got ")
    assert item.hint == "write YYYY-MM-DD, or `today`"
    assert item.line == 5


def test_variables_of_a_template() -> None:
    """The model's, changed by the prompt's; `thinking` is the short form of one."""
    text = model(
        "thinking: false",
        "chat_template_kwargs: {reasoning_effort: low, documents: [{title: a}]}",
        "prompts:",
        "  plain: p.md",
        "  slow: {files: p.md, chat_template_kwargs: {enable_thinking: true}}",
    )
    config = good(text).models["m"]
    own = {"reasoning_effort": "low", "documents": [{"title": "a"}]}
    assert config.template_variables() == own | {"enable_thinking": False}
    assert config.template_variables("plain") == config.template_variables()
    assert config.template_variables("found by a pattern") == config.template_variables()
    assert config.template_variables("slow") == own | {"enable_thinking": True}
    assert config.thinks is False


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("7", "chat_template_kwargs: expected a mapping, got 7"),
        ("{'a b': 1}", "chat_template_kwargs: 'a b' cannot be the name of a variable"),
        ("{messages: []}", "chat_template_kwargs: messages cannot be set in a manifest"),
        ("{x: .inf}", "chat_template_kwargs: it holds what JSON cannot express"),
        (
            f"{{x: {'y' * 20_000}}}",
            "chat_template_kwargs: 20,009 bytes are too many, at most 16,384",
        ),
    ],
)
def test_variables_that_cannot_be(written: str, message: str) -> None:
    """For a model and for a prompt alike."""
    assert problem(model(f"chat_template_kwargs: {written}")).message == message
    prompt = f"prompts: {{p: {{files: p.md, chat_template_kwargs: {written}}}}}"
    assert problem(model(prompt)).message == message


def test_thinking_and_its_variable_may_not_differ() -> None:
    """The same value twice is fine."""
    both = model("thinking: true", "chat_template_kwargs: {enable_thinking: false}")
    item = problem(both)
    assert item.message == "thinking is true, but chat_template_kwargs has enable_thinking: false"
    assert item.hint == "keep one of them"
    same = good(model("thinking: true", "chat_template_kwargs: {enable_thinking: true}"))
    assert same.models["m"].template_variables() == {"enable_thinking": True}


def rkllm(*lines: str) -> str:
    return model(*lines) + "\nengine: {kind: rkllm}\n"


def test_an_rkllm_manifest() -> None:
    """What only RKLLM has: the library, its interface, tokens, an adapter, the board's options."""
    text = rkllm(
        "tokenizer: t.json",
        "lora: l.rkllm",
        "lora_scale: 0.5",
        "npu: {enabled_cpus: [4, 5], n_keep: -1}",
    )
    manifest = good(text)
    config = manifest.models["m"]
    assert manifest.engine.library == Path("/usr/lib/librkllmrt.so")
    assert (manifest.engine.abi, manifest.engine.concurrent) == (None, False)
    assert (config.tokenizer, config.lora) == (FILE.parent / "t.json", FILE.parent / "l.rkllm")
    assert (config.lora_scale, config.npu.enabled_cpus, config.npu.n_keep) == (0.5, (4, 5), -1)


def test_the_interfaces_are_those_of_the_binding() -> None:
    """The manifest, which loads no engine, has the names that the binding has."""
    from rkcached.engines.rkllm.abi import ABIS

    assert tuple(abi.name for abi in ABIS) == RKLLM_ABIS


@pytest.mark.parametrize(
    "key", ["tokenizer: t.json", "lora: l.rkllm", "lora_scale: 2", "npu: {n_keep: 4}"]
)
def test_what_only_rkllm_has_is_refused_elsewhere(key: str) -> None:
    """It would be ignored in silence."""
    item = problem(model(key))
    assert item.message == f"{key.partition(':')[0]} is for the rkllm engine only"
    assert item.line == 5


@pytest.mark.parametrize("tokens", [1000, 32768])
def test_rkllms_contexts_are_multiples_of_32_up_to_16384(tokens: int) -> None:
    """The runtime refuses others when the model is loaded, minutes later."""
    item = problem(rkllm(f"params: {{max_context_len: {tokens}}}"))
    assert item.message == f"max_context_len: RKLLM takes multiples of 32 up to 16384, got {tokens}"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (model("params: {temperature: 5.1}"), "temperature: 5.1 is out of range", "0..5"),
        (model("params: {temperature: -1}"), "temperature: -1 is out of range", "0..5"),
        (model("params: {top_p: 0}"), "top_p: 0 is out of range", "more than 0, at most 1"),
        (model("params: {top_k: 100001}"), "top_k: 100001 is out of range", "0..100000"),
        (
            model("params: {repeat_penalty: 0}"),
            "repeat_penalty: 0 is out of range",
            "more than 0, at most 10",
        ),
        (
            model("params: {frequency_penalty: 2.5}"),
            "frequency_penalty: 2.5 is out of range",
            "-2..2",
        ),
        (model("params: {presence_penalty: -3}"), "presence_penalty: -3 is out of range", "-2..2"),
        (model("params: {max_new_tokens: 0}"), "max_new_tokens: 0 is out of range", "1..131072"),
        (
            model("prompts: {a: {files: a, params: {top_k: -1}}}"),
            "top_k: -1 is out of range",
            "0..100000",
        ),
        (model("idle_unload_s: 0.5"), "idle_unload_s: 0.5 is out of range", "1..31536000"),
        (MINIMAL + "engine: {threads: 257}", "threads: 257 is out of range", "0..256"),
        (MINIMAL + "cache: {min_tokens: -1}", "min_tokens: -1 is out of range", "0..1048576"),
        (
            MINIMAL + "cache: {max_bytes: 1 KiB}",
            "max_bytes: '1 KiB' is out of range",
            "1 MiB to 1 EiB",
        ),
        (MINIMAL + "cache: {max_bytes: 0}", "max_bytes: 0 is out of range", "1 MiB to 1 EiB"),
        (
            MINIMAL + f"cache: {{max_bytes: {1 << 61}}}",
            f"max_bytes: {1 << 61} is out of range",
            "1 MiB to 1 EiB",
        ),
    ],
)
def test_out_of_range(text: str, message: str, hint: str) -> None:
    """A number out of range is shown with the range."""
    item = problem(text)
    assert (item.line, item.message, item.hint) == (5, message, f"allowed is {hint}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (model("params: {temperature: warm}"), "temperature: expected a number, got 'warm'"),
        (model("params: {temperature: '0.7'}"), "temperature: expected a number, got '0.7'"),
        (model("params: {temperature: true}"), "temperature: expected a number, got true"),
        (model("params: {temperature: }"), "temperature: expected a number, got nothing"),
        (model("params: {temperature: .nan}"), "temperature: expected a finite number, got nan"),
        (model("params: {temperature: -.inf}"), "temperature: expected a finite number, got -inf"),
        (model("params: {temperature: 1e999}"), "temperature: expected a finite number, got inf"),
        (model("params: {top_k: 1.5}"), "top_k: expected a whole number, got 1.5"),
        (model("params: {top_k: true}"), "top_k: expected a whole number, got true"),
        (model("params: [1]"), "params: expected a mapping, got a list"),
        (model("prompts: [a.md]"), "prompts: expected a mapping, got a list"),
        (model("prompts: {a: 5}"), "a: expected a path or a mapping, got 5"),
        (model("prompts: {a: }"), "a: expected a path or a mapping, got nothing"),
        (model("prompts: {a: {files: 5}}"), "files: expected a path or a list of paths, got 5"),
        (model("prompts: {a: {files: [b, 5]}}"), "files: expected a path, got 5"),
        (model("prompts: {a: {files: [5]}}"), "files: expected a path, got 5"),
        (
            model("prompts: {a: {files: a, description: [x]}}"),
            "description: expected text, got a list",
        ),
        (
            model("prompts_from: {a: b}"),
            "prompts_from: expected a path or a list of paths, got a mapping",
        ),
        (model("thinking: yes"), "thinking: expected true or false, got 'yes'"),
        (model("bos_token: 1"), "bos_token: expected text, got 1"),
        (model("chat_template: []"), "chat_template: expected text, got a list"),
        (model("idle_unload_s: never"), "idle_unload_s: expected a number, got 'never'"),
        (
            model("preload: 3"),
            "preload: expected true, a prompt or a list of prompts, got 3",
        ),
        (model("preload: []"), "preload: the list is empty"),
        (MINIMAL + "cache: {max_bytes: 1.5}", "max_bytes: expected a size, got 1.5"),
        (MINIMAL + "cache: {max_bytes: true}", "max_bytes: expected a size, got true"),
        (MINIMAL + "cache: {max_bytes: -5}", "max_bytes: expected a size, got -5"),
        (
            MINIMAL + "cache: {max_bytes: 2 GiB or so}",
            "max_bytes: expected a size, got '2 GiB or so'",
        ),
        (MINIMAL + "cache: {max_bytes: 2 GiX}", "max_bytes: unknown unit in '2 GiX'"),
        (MINIMAL + "cache: {build: 5}", "build: expected a mapping, got 5"),
        (MINIMAL + "cache: {build: {idle_s: 1m}}", "idle_s: expected a number, got '1m'"),
        (MINIMAL + "cache: {build: {window: 2-5}}", "window: expected two times of day, got '2-5'"),
        (
            MINIMAL + "cache: {build: {window: '02:00-24:00'}}",
            "window: expected two times of day, got '02:00-24:00'",
        ),
        (MINIMAL + "cache: {build: {window: 120}}", "window: expected two times of day, got 120"),
        (
            MINIMAL + "cache: {build: {window: '02:00-02:00'}}",
            "window: 02:00-02:00 begins and ends at the same time",
        ),
        (MINIMAL + "engine: fast", "engine: expected a mapping, got 'fast'"),
        (MINIMAL + "cache:", "cache: expected a mapping, got nothing"),
    ],
)
def test_wrong_types(text: str, message: str) -> None:
    """A value of the wrong kind is told in plain words, without a library's name or address."""
    item = problem(text)
    assert (item.line, item.message) == (5, message)
    assert "pydantic" not in str(item)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("params: {temperature: hot}", "allowed is 0..5"),
        ("params: {temperature: .nan}", "allowed is 0..5"),
        ("params: {top_k: many}", "allowed is 0..100000"),
        ("prompts: {a: {files: a, params: {top_p: low}}}", "allowed is more than 0, at most 1"),
        ("idle_unload_s: soon", "allowed is 1..31536000"),
        ("npu: 5", "its keys are enabled_cpus, embed_flash, base_domain_id, n_keep, ignore_eos"),
        ("prompts: {a: [b.md, c.md]}", "write `a: {files: [b.md, c.md]}`"),
        ("prompts: {a: [b, c, d, e]}", "write `a: {files: [b, c, d, ...]}`"),
        (
            "chat_template: chatmll",
            f"did you mean 'chatml'? known are {', '.join(FORMATS)}",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_is_allowed(key: str, hint: str) -> None:
    """A value of the wrong kind has the bounds, the keys or the form that is meant beside it.

    As one out of range.
    """
    assert problem(model(key)).hint == hint


def test_nothing_where_a_default_is() -> None:
    """A key left empty says how to get its default."""
    assert problem(f"{MINIMAL}cache:\n").hint == "remove the key to get its default"


@pytest.mark.parametrize("text", ["1.0", '"1"', "true", "0", "", "[1]", "10000000000000000000000"])
def test_version(text: str) -> None:
    """Only the number 1 is a version."""
    item = problem(MINIMAL.replace("version: 1", f"version: {text}"))
    assert item.line == 1
    assert item.message.startswith("version: expected 1, got ")


def test_missing_keys() -> None:
    """What is required and missing is reported at what should hold it."""
    found = problems("models:\n  a: {}\n  b: {thinking: true}\n")
    assert [(item.line, item.message) for item in found] == [
        (1, "missing key 'version'"),
        (2, "missing key 'path'"),
        (3, "missing key 'path'"),
    ]


@pytest.mark.parametrize("text", ["version: 1\n", "version: 1\nmodels: {}\n"])
def test_no_models(text: str) -> None:
    """A manifest without models is one problem, whether the key is missing or empty."""
    assert problem(text).message == "no models declared"


@pytest.mark.parametrize("context", [32, 512])
def test_the_answer_must_fit_the_context(context: int) -> None:
    """max_new_tokens is less than max_context_len, also when it is the default."""
    item = problem(model("params:", f"  max_context_len: {context}"))
    assert item.line == 5
    assert (
        item.message
        == f"max_new_tokens is 512, but must be less than the model's max_context_len, {context}"
    )


def test_the_answers_of_prompts_must_fit_the_context() -> None:
    """So is each prompt's max_new_tokens, reported at its own line."""
    params = "{files: p, params: {max_new_tokens: 4096}}"
    found = problems(model("prompts:", f"  a: {params}", "  b: p", f"  c: {params}"))
    assert [item.line for item in found] == [6, 8]
    assert {item.message for item in found} == {
        "max_new_tokens is 4096, but must be less than the model's max_context_len, 4096"
    }


def test_the_context_is_the_models() -> None:
    """A prompt cannot have its own length of context, and is told where that belongs."""
    item = problem(
        model("prompts:", "  a:", "    files: a", "    params:", "      max_context_len: 1024")
    )
    assert (item.line, item.message) == (9, "max_context_len is set per model, got 1024")
    assert item.hint == "move it to the model's params"


def test_duplicate_names() -> None:
    """Two prompts of one name are a problem with both lines.

    YAML alone would keep the last in silence.
    """
    item = problem(model("prompts:", "  a: one.md", "  b: two.md", "  a: three.md"))
    assert (item.line, item.message) == (8, "duplicate key 'a', first given in line 6")


def test_duplicate_in_an_aliased_value_is_one_problem() -> None:
    """A problem inside an anchored value is reported once, however often the value is used."""
    item = problem(
        model("params: &p {top_k: 1, top_k: 2}")
        + "  n: {path: n, params: *p}\n  o: {path: o, params: *p}\n"
    )
    assert item.line == 5


@pytest.mark.parametrize(
    "name",
    ["Qwen", "-a", ".a", "a/b", "a b", "ä", "a" * 65, '""', '"a\\n"', '"../x"', "[key]", '"a\\0"'],
)
def test_bad_names(name: str) -> None:
    """A name that could not be a file name is refused, for models and for prompts."""
    quoted = name if name.startswith('"') else f'"{name}"'
    text = (
        f"version: 1\nmodels:\n  {quoted}: {{path: m}}\n"
        f"  m: {{path: m, prompts: {{{quoted}: p}}}}\n"
    )
    assert [item.line for item in problems(text)] == [3, 4]


@pytest.mark.parametrize("name", ["a", "0", "qwen3-0.6b", "a._-", "a" * 64])
def test_good_names(name: str) -> None:
    """A name that obeys the rule is accepted, and the exported pattern agrees."""
    assert NAME.fullmatch(name)
    assert list(good(f'version: 1\nmodels: {{"{name}": {{path: m}}}}\n').models) == [name]


def test_a_bad_name_suggests_a_good_one() -> None:
    """The hint has the rule and a name that obeys it."""
    item = problem("version: 1\nmodels:\n  Qwen3 0.6B!: {path: m}\n")
    assert item.message == "'Qwen3 0.6B!' cannot be a name"
    assert item.hint.endswith("for example 'qwen3-0.6b'")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("7", "a number"),
        ("1.5", "a number"),
        ("true", "a YAML boolean"),
        ("False", "a YAML boolean"),
        ("~", "null"),
    ],
)
def test_keys_that_are_not_text(key: str, what: str) -> None:
    """A name that YAML reads as a number, boolean or null is refused.

    Other programs would read it differently.
    """
    found = problems(f"version: 1\nmodels:\n  {key}: {{path: m}}\n")
    assert found[0].line == 3
    assert found[0].message.startswith(f"a key must be text, but '{key}' is ")
    assert found[0].message.endswith(what)
    assert found[0].hint == "put it in quotes"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("p/", "names a directory"),
        ("p/..", "names a directory"),
        ('""', "names a directory"),
        ("p/*/a.md", "wildcards work only in the last part"),
        ("'p[0]/a.md'", "wildcards work only in the last part"),
        ("p/**", "wildcards work only in the last part"),
        ("~/p/*.md", "'~' is not expanded"),
        ('"p\\0.md"', "no path can have"),
    ],
)
def test_bad_patterns(value: str, message: str) -> None:
    """prompts_from looks into one directory for each pattern."""
    item = problem(model(f"prompts_from: [ok/*.md, {value}]"))
    assert item.line == 5
    assert message in item.message


@pytest.mark.parametrize("value", ['""', "~/m.gguf", '"a\\0b"'])
def test_bad_paths(value: str) -> None:
    """A path that cannot be meant is refused before anything looks for it."""
    assert problem(f"version: 1\nmodels:\n  m:\n    path: {value}\n").line == 4


def test_too_many_files() -> None:
    """A prompt has at most 64 files."""
    files = ", ".join(f"{number}.md" for number in range(65))
    item = problem(model(f"prompts: {{a: {{files: [{files}]}}}}"))
    assert item.message == "files: at most 64 entries are allowed, got 65"


def test_too_many_prompts_to_preload() -> None:
    """At most 64, and the error says which to choose."""
    names = ", ".join(f"p{number}" for number in range(65))
    item = problem(model(f"preload: [{names}]", "prompts_from: '*.md'"))
    assert item.message == "preload: at most 64 entries are allowed, got 65"
    assert item.hint == "name those that are asked for most"


def test_too_long_text() -> None:
    """Text has a limit too, and the message does not repeat the text."""
    item = problem(model(f"prompts: {{a: {{files: a, description: {'x' * 1001}}}}}"))
    assert item.message == "description: at most 1000 characters are allowed, got 1001"


def test_long_values_are_cut_in_messages() -> None:
    """A message stays one line of reasonable length."""
    assert len(problem(model(f"params: {{temperature: {'x' * 10_000}}}")).message) < 120


# --- YAML itself ---


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "\ufeff"])
def test_empty_documents(text: str) -> None:
    """Nothing is not a manifest."""
    assert problem(text).message in {
        "the manifest is empty",
        "expected a mapping at the top of the manifest, got nothing",
    }


@pytest.mark.parametrize(
    ("text", "what"), [("- a\n", "a list"), ("\n\nhello\n", "'hello'"), ("5", "5")]
)
def test_documents_that_are_no_mapping(text: str, what: str) -> None:
    """A list or a word at the top is one problem, at its line."""
    item = problem(text)
    assert item.message == f"expected a mapping at the top of the manifest, got {what}"
    assert item.line == text.count("\n", 0, len(text) - 1) + 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (model('bos_token: "<s>', "thinking: true", "embedding: false"), 5),
        (model("bos_token: '<s>", "thinking: true", "eos_token: '</s>'"), 5),
        (model('prompts: {a: "x.md, b: y.md}', "thinking: true"), 5),
        (model("prompts:", "  a: 'x.md", "  b: it's.md"), 6),
    ],
)
def test_an_open_quote_is_told_where_it_opens(text: str, line: int) -> None:
    """YAML notices it at the next quote or at the end of the file.

    What is to be mended is where it opens.
    """
    item = problem(text)
    assert item.line == line
    assert "the quote that opens here" in item.message
    assert item.hint.startswith("close the quote")


def test_an_open_bracket_is_named() -> None:
    """The problem shows further down; the message says where the bracket opens."""
    item = problem(model("prompts: {a: x.md, b: y.md", "params: {top_k: 1}"))
    assert item.line == 6
    assert item.message.endswith("for the bracket that opens in line 5")


# --- what is left of a broken one ---


def test_what_is_right_of_a_broken_manifest_is_usable() -> None:
    """A wrong value is left out alone.

    A model or prompt that lacks something is left out with all it has.
    """
    text = """\
version: 2
models:
  a:
    path: a.gguf
    params: {temperature: hot, top_k: 7}
    prompts: {good: g.md, bad: {file: b.md}, worse: 5, joined: {files: [x.md, 1, 2, y.md]}}
  b: {pth: b.gguf, prompts: {never: n.md}}
  Big: {path: c.gguf}
"""
    found = parse_usable(text, file=FILE)
    assert found.problems == problems(text)
    assert found.manifest is not None
    assert list(found.manifest.models) == ["a"]
    left = found.manifest.models["a"]
    assert left.params == ModelParams(top_k=7)
    assert {n: [f.name for f in p.files] for n, p in left.prompts.items()} == {
        "good": ["g.md"],
        "joined": ["x.md", "y.md"],
    }
    assert found.manifest.line_of("models", "a", "prompts", "good") == 6
    assert found.engine_known


@pytest.mark.parametrize("engine", ["vllm", "{kind: vllm}", "{library: 5}", "{knd: rkllm}"])
def test_an_engine_with_a_problem_is_not_known(engine: str) -> None:
    """What is usable then has another engine than the one that is meant, and says so."""
    found = parse_usable(f"{MINIMAL}engine: {engine}\n", file=FILE)
    assert found.manifest is not None
    assert not found.engine_known


@pytest.mark.parametrize(
    "text", ["version: 1\n", "models: {}\n", "version: 1\nmodels: {m: 5}\n", "a: 1\n"]
)
def test_nothing_may_be_left(text: str) -> None:
    """Without one model there is nothing to look at."""
    found = parse_usable(text, file=FILE)
    assert found.manifest is None
    assert found.problems


# --- keys of the administrator's own ---


def test_keys_for_anchors() -> None:
    """A key at the top that begins with x- has any content, for anchors to be used below.

    Changes nothing.
    """
    text = "x-params: &p {top_k: 1}\nx-list: [1, {a: b}]\n" + model("params: *p")
    assert good(text).models["m"].params.top_k == 1
    assert good("x-other: 5\n" + MINIMAL) == good(MINIMAL)


def test_such_keys_are_at_the_top_only() -> None:
    """Elsewhere they are unknown keys, as nothing there needs a place for anchors."""
    assert problem(model("x-note: 5")).message == "unknown key 'x-note'"


def test_the_schema_has_keys_for_anchors() -> None:
    """Editors accept them too: any content, at the top, and no other unknown key."""
    schema = json_schema()
    assert schema["patternProperties"] == {"^x-": {}}
    assert schema["additionalProperties"] is False


def test_two_documents() -> None:
    """One file is one manifest."""
    item = problem(MINIMAL + "---\n" + MINIMAL)
    assert item.line == 5
    assert item.message.startswith("not valid YAML: ")


def test_tabs() -> None:
    """A tab used for indenting has its line and the cure."""
    item = problem("version: 1\nmodels:\n\tm: x\n")
    assert (item.line, item.hint) == (3, "indent with spaces, not tabs")


@pytest.mark.parametrize(
    "text", ["a: [1", "a: b: c", "'", "*nobody", "&a", "? [", "%YAML 9.9\n---\n", "a: |-5x\n"]
)
def test_broken_yaml(text: str) -> None:
    """A syntax error is one problem with a line."""
    assert problem(text).line >= 1


@pytest.mark.parametrize("character", ["\0", "\x07", "\ud800", "\x7f"])
def test_binary_text(character: str) -> None:
    """A character that YAML forbids is shown escaped, with its line."""
    item = problem(f"version: 1\nmodels: {character}\n")
    assert (item.line, item.message) == (2, f"character {character!r} is not allowed in YAML")


def test_recursive_alias() -> None:
    """A value that contains itself is refused, also through a merge key."""
    for text in ("version: 1\nmodels: &a\n  m: *a\n", "version: 1\nmodels: &a\n  <<: *a\n"):
        assert problem(text).message == "an alias refers to a value that contains it"


def test_billion_laughs() -> None:
    """A few lines of aliases cannot fill the memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "once aliases are expanded" in problem("\n".join(lines)).message


@pytest.mark.parametrize("unit", ["[", "- ", "{a: ", "? "])
def test_deep_nesting(unit: str) -> None:
    """Nesting is bounded before anything recurses."""
    assert problem(unit * 100_000).message == "nested deeper than 50 levels"


def test_deep_nesting_through_aliases() -> None:
    """Aliases cannot make a value deeper than the text may be."""
    lines = ["a0: &a0 x", *(f"a{n}: &a{n} [[[[*a{n - 1}]]]]" for n in range(1, 30))]
    assert problem("\n".join(lines)).message == "nested deeper than 50 levels"


def test_too_much_text() -> None:
    """The text has a limit, and so has the number of values in it."""
    assert problem(f"a: [{'x,' * (MAX_NODES + 1)}]").message == f"more than {MAX_NODES} values"
    assert "characters" in problem("#" * (MAX_CHARACTERS + 1)).message


@pytest.mark.parametrize("key", ["[a, b]", "{a: b}"])
def test_keys_that_are_no_words(key: str) -> None:
    """A list or mapping as a key is a problem, not a traceback."""
    item = problem(f"{MINIMAL}? {key}\n: 1\n")
    assert item.line == 5
    assert item.message.startswith("a key must be text, got ")


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_huge_numbers(digits: int) -> None:
    """A number beyond any size is a problem of its value."""
    for where in (
        model(f"params: {{top_k: {'9' * digits}}}"),
        model(f"params: {{top_p: {'9' * digits}}}"),
    ):
        assert {5} == {item.line for item in problems(where)}


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object:os.system {}",
        "!!binary aGk=",
        "!!set {a}",
        "!mine x",
        "!!int abc",
        "!!bool maybe",
    ],
)
def test_tags(value: str) -> None:
    """A tag is never followed to anything but plain data."""
    assert problems(model(f"bos_token: {value}"))[0].line == 5


@pytest.mark.parametrize("value", ["5", "[5]", "text"])
def test_bad_merges(value: str) -> None:
    """Only mappings can be merged."""
    item = problem(model(f"<<: {value}"))
    assert item.line == 5
    assert item.message.startswith("'<<' merges mappings, got ")


# --- the schema ---


def sections(schema: Any) -> list[dict[str, Any]]:
    """Every sub-schema that describes a mapping of known keys."""
    if isinstance(schema, list):
        return [found for item in schema for found in sections(item)]
    if not isinstance(schema, dict):
        return []
    below = [found for item in schema.values() for found in sections(item)]
    return (
        [schema, *below]
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
        else below
    )


def test_schema() -> None:
    """The schema is draft 2020-12, closed everywhere.

    Has no key that is not one of the manifest's.
    """
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == [
        "version",
        "engine",
        "cache",
        "serving",
        "sources",
        "models",
    ]
    found = sections(schema)
    assert {
        "Manifest",
        "EngineConfig",
        "CacheConfig",
        "ModelConfig",
        "ModelParams",
        "SamplingParams",
    } <= {section["title"] for section in found}
    assert all(section["additionalProperties"] is False for section in found)


def test_every_field_is_described() -> None:
    """Each key of each section has a description, its own or its section's."""
    for section in sections(json_schema()):
        for key, field in section["properties"].items():
            assert "description" in field or "$ref" in field, f"{section['title']}.{key}"


def test_prompts_have_a_short_form_in_the_schema() -> None:
    """An editor that checks against the schema accepts a path alone."""
    assert {"type": "string"} in json_schema()["$defs"]["PromptConfig"]["anyOf"]


# --- whatever is thrown at it ---

YAML_LINES = (
    "version: 1\n",
    "models:\n",
    "  m:\n",
    "    path: x\n",
    "    prompts:\n",
    "      a: b\n",
    "    params:\n",
)
YAML_WORDS = (
    "<<:",
    "&a",
    "*a",
    "-",
    "?",
    ":",
    "[",
    "]",
    "{",
    "}",
    ",",
    "!!int",
    "!x",
    "|",
    ">",
    "'",
    '"',
    "\\",
    "#",
    "%",
    "---",
    "...",
    "~",
    "true",
    "off",
    "1e999",
    ".nan",
    "top_k",
    "files",
    "@",
    "`",
)
YAML_BREAKS = ("\n", "\r", "\t", " ", "  ", "\x00", "\ud800", "\x85", "\u2028", "9" * 20)
YAML_BITS = st.sampled_from(YAML_LINES + YAML_WORDS + YAML_BREAKS)


def only_problems(text: str) -> None:
    found: tuple[Problem, ...] = ()
    try:
        parse(text, file=FILE)
    except ManifestError as error:
        found = error.problems
    for item in found:
        assert 1 <= item.line <= len(re.split(r"\r\n|[\n\r\x85\u2028\u2029]", text)) + 1
        assert item.message
        str(item).encode()  # can be printed


@settings(derandomize=True, max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(YAML_BITS, max_size=30).map("".join)))
@example("? !!merge {}\n: 5")
@example("models: {? !!null x : {path: a}}")
def test_any_text_parses_or_has_problems(text: str) -> None:
    """Any text makes a manifest or a list of printable problems with lines in the text."""
    only_problems(text)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["a.md", "x.jinja", "2GiB"]),
)
WORDS = st.sampled_from(
    [
        "version",
        "engine",
        "cache",
        "models",
        "kind",
        "threads",
        "max_bytes",
        "verify",
        "path",
        "params",
        "prompts",
        "files",
        "description",
        "prompts_from",
        "chat_template",
        "thinking",
        "idle_unload_s",
        "top_k",
        "top_p",
        "max_context_len",
        "max_new_tokens",
        "m",
        "M",
        "[key]",
    ]
)
TREES = st.recursive(
    LEAVES,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(WORDS | st.integers(), below, max_size=5)
    ),
    max_leaves=20,
)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(TREES, TREES, TREES, TREES)
def test_any_data_parses_or_has_problems(engine: Any, params: Any, prompts: Any, rest: Any) -> None:
    """Valid YAML of any shape, put where a section is due, has problems and never a traceback."""
    model = {
        "path": "m",
        "params": params,
        "prompts": prompts,
        **(rest if isinstance(rest, dict) else {"x": rest}),
    }
    data = {
        "version": 1,
        "engine": engine,
        "cache": rest,
        "models": {"m": model, "n": {"path": "n", "prompts": {"a": rest}}},
    }
    only_problems(yaml.safe_dump(data, allow_unicode=False))


def test_prompts_may_be_comments_only() -> None:
    """The key is what is left when the last prompt is taken out."""
    assert good(f"{MINIMAL}    prompts:\n      # a: a.md\n").models["m"].prompts == {}
    prompts = json_schema()["$defs"]["ModelConfig"]["properties"]["prompts"]
    assert prompts["anyOf"][1] == {"type": "null"}
