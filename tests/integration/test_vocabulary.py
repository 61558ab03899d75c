"""What a GGUF file states of its chat template and its special tokens."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from rkcached.engines.llamacpp.gguf import inspect
from rkcached.engines.llamacpp.header import read_header
from rkcached.host.digests import Digests
from rkcached.messages.tokenizer_facts import TokenizerFacts
from rkcached.plan.desired import Desired, DesiredModel, Resolver
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import ModelSource, TemplateOrigin, Trouble
from tests.gguf_files import (
    ARRAY,
    INT32,
    STRING,
    UINT32,
    flag_pair,
    gguf,
    integers_pair,
    pair,
    split_pairs,
    text,
    text_pair,
    texts_pair,
    vocabulary,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
TOKENS = {
    "<unk>": UNKNOWN,
    "<s>": CONTROL,
    "</s>": CONTROL,
    "a": NORMAL,
    "[|user|]": USER_DEFINED,
    "<think>": USER_DEFINED,
    "<|im_end|>": NORMAL,
}
BOS = pair("tokenizer.ggml.bos_token_id", UINT32, 1)
EOS = pair("tokenizer.ggml.eos_token_id", UINT32, 2)


def facts(path: Path, *pairs: bytes) -> TokenizerFacts:
    path.write_bytes(gguf(*pairs))
    header = read_header(path)
    assert header is not None
    return header.tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


def test_the_special_tokens(path: Path) -> None:
    """Control and unknown ones, and what llama.cpp takes for one whatever its type."""
    found = facts(path, *vocabulary(TOKENS), BOS, EOS)
    assert found.special.control == {"<unk>", "<s>", "</s>", "<|im_end|>"}
    assert (found.special.bos, found.special.eos) == ("<s>", "</s>")
    assert found.added == {"[|user|]", "<think>"}
    assert found.special_origin == f"tokenizer.ggml.token_type of {path}"


def test_tokens_that_are_found_in_plain_text(path: Path) -> None:
    """Of gpt-oss llama.cpp makes user-defined tokens at load, whatever the file says."""
    marks = dict.fromkeys(("<|channel|>", "<|end|>", "<|im_start|>"), CONTROL)
    special = facts(path, *vocabulary(marks)).special
    assert special.control == set(marks)
    assert special.always == {"<|channel|>", "<|end|>"}
    assert facts(path, *vocabulary({"<|end|>": CONTROL})).special.always == set()


def test_a_vocabulary_without_types(path: Path) -> None:
    """llama.cpp takes all tokens for normal ones then."""
    found = facts(path, texts_pair("tokenizer.ggml.tokens", TOKENS))
    assert found.special.control == {"<|im_end|>"}


def test_a_file_without_a_vocabulary(path: Path) -> None:
    """It states nothing, which is not the same as having no special tokens."""
    assert facts(path).special.control is None


def test_a_vocabulary_that_is_longer_than_one_reading(path: Path) -> None:
    """Its end is found, and what comes after it."""
    many = {f"word number {number}, which is a long one": NORMAL for number in range(50_000)}
    found = facts(path, *vocabulary({**TOKENS, **many, "<|last|>": CONTROL}), BOS, EOS)
    assert found.special.control == {"<unk>", "<s>", "</s>", "<|im_end|>", "<|last|>"}
    assert path.stat().st_size > 2 << 20
    assert found.special.eos == "</s>"


@pytest.mark.parametrize(
    ("model", "before", "stated", "adds"),
    [
        ("llama", "", None, True),
        ("llama", "", False, False),
        ("bert", "", None, True),
        ("t5", "", None, False),
        ("rwkv", "", None, False),
        ("plamo2", "", None, False),
        ("gpt2", "", None, False),
        ("gpt2", "smollm", None, False),
        ("gpt2", "qwen2", None, False),
        ("gpt2", "qwen2", True, True),
        ("gpt2", "llama-bpe", None, True),
        ("gpt2", "llama-bpe", False, False),
        ("gpt2", "tekken", None, True),
        ("gpt2", "gemma4", False, True),
        ("gemma4", "", False, True),
        ("no_vocab", "", None, False),
    ],
)
def test_whether_llama_cpp_adds_bos(
    path: Path, model: str, before: str, stated: bool | None, adds: bool
) -> None:
    """By the metadata, or by the kind of the vocabulary where they say nothing."""
    pairs = vocabulary(TOKENS, model=model, before=before)
    if stated is not None:
        pairs.append(flag_pair("tokenizer.ggml.add_bos_token", stated))
    assert facts(path, *pairs).special.adds_bos is adds


@pytest.mark.parametrize(
    ("model", "bos", "eos"),
    [("llama", "<s>", "</s>"), ("gpt2", "", ""), ("t5", "", "<s>"), ("bert", "", "")],
)
def test_first_and_last_token_where_the_metadata_state_none(
    path: Path, model: str, bos: str, eos: str
) -> None:
    """A number beyond the vocabulary counts as none, as in llama.cpp."""
    found = facts(path, *vocabulary(TOKENS, model=model))
    assert (found.special.bos, found.special.eos) == (bos, eos)
    beyond = pair("tokenizer.ggml.eos_token_id", UINT32, 99)
    assert facts(path, *vocabulary(TOKENS, model=model), beyond).special.eos == eos


def test_the_template(path: Path) -> None:
    """With the key that has it."""
    found = facts(path, text_pair("tokenizer.chat_template", "{{ 1 }}"))
    assert found.template == "{{ 1 }}"
    assert found.template_origin == f"tokenizer.chat_template of {path}"


def test_a_second_template_for_tools(path: Path) -> None:
    """It is used where there are tools; another named one is not."""
    found = facts(
        path,
        texts_pair("tokenizer.chat_templates", ["tool_use", "rag"]),
        text_pair("tokenizer.chat_template.tool_use", "with {{ tools }}"),
        text_pair("tokenizer.chat_template.rag", "with documents"),
        text_pair("tokenizer.chat_template", "without"),
    )
    assert "with {{ tools }}" in found.template
    assert "without" in found.template
    assert "documents" not in found.template
    assert found.template_origin == f"tokenizer.chat_template and .tool_use of {path}"


def test_the_first_file_of_a_split_model_has_them(tmp_path: Path) -> None:
    """The others have the weights alone."""
    first = tmp_path / "m-00001-of-00002.gguf"
    template = text_pair("tokenizer.chat_template", "{{ 1 }}")
    first.write_bytes(gguf(template, *split_pairs(1, 2, 2), tensors=1))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(gguf(*split_pairs(2, 2, 2), tensors=1))
    assert inspect(first).tokenizer.template == "{{ 1 }}"


LENGTH = struct.Struct("<Q")
HOSTILE = {
    "types-cut-off": text("tokenizer.ggml.token_type") + struct.pack("<IIQ", ARRAY, INT32, 1 << 60),
    "tokens-cut-off": text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 1 << 40),
    "token-too-long": text("tokenizer.ggml.tokens")
    + struct.pack("<IIQ", ARRAY, STRING, 2)
    + LENGTH.pack((1 << 64) - 1)
    + bytes(64),
    "template-cut-off": text("tokenizer.chat_template")
    + struct.pack("<I", STRING)
    + LENGTH.pack(1 << 19)
    + b"{{ 1 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_vocabulary_that_is_damaged_is_no_header(path: Path, case: str) -> None:
    """The engine says best what is wrong; and nothing is raised, nor memory taken."""
    path.write_bytes(gguf(HOSTILE[case]) + bytes(100))
    assert read_header(path) is None


def test_fewer_types_than_tokens(path: Path) -> None:
    """Those that are there count."""
    pairs = vocabulary(TOKENS)
    pairs[2] = integers_pair("tokenizer.ggml.token_type", [NORMAL, CONTROL])
    assert facts(path, *pairs).special.control == {"<s>", "<|im_end|>"}


def test_tokens_that_are_no_text_or_too_long(path: Path) -> None:
    """No template writes them, so no user could be taken for one."""
    long = "<" + "x" * 1000 + ">"
    found = facts(path, *vocabulary({"<s>": CONTROL, long: CONTROL, "": CONTROL}), BOS)
    assert found.special.control == {"<s>"}
    assert found.special.bos == ""


def test_control_tokens_beyond_all_bounds(path: Path) -> None:
    """They are refused with the number."""
    path.write_bytes(gguf(*vocabulary({f"<{number}>": CONTROL for number in range(70_000)})))
    source, _ = resolve(path)
    assert isinstance(source, Trouble)
    assert "states 70,000 control tokens, the limit is 65,536" in source.message
    assert source.hint


# --- as the manifest uses it ---


def resolve(path: Path, more: str = "") -> tuple[ModelSource | Trouble, Desired]:
    manifest = parse(
        f"version: 1\nmodels: {{m: {{path: {path}, {more}}}}}\n", file=path.parent / "manifest.yaml"
    )
    sources = SourceReader(Digests()).scan(manifest)
    return sources.models["m"], Resolver().resolve(manifest, sources)


OWN = text_pair(
    "tokenizer.chat_template",
    "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}",
)


def test_the_models_own_template_is_the_default(path: Path) -> None:
    """With its own tokens, and nothing to remark."""
    path.write_bytes(gguf(OWN, *vocabulary(TOKENS), BOS, EOS))
    source, desired = resolve(path)
    assert isinstance(source, ModelSource)
    assert source.template.origin is TemplateOrigin.MODEL
    model = desired.models["m"]
    assert isinstance(model, DesiredModel)
    assert model.template.prefix("Be brief.") == "<s>[Be brief.]</s>["
    assert model.template.name == f"tokenizer.chat_template of {path}"
    assert desired.notices == ()


def test_the_manifest_is_stronger_than_the_model(path: Path) -> None:
    """Template and tokens."""
    path.write_bytes(gguf(OWN, *vocabulary(TOKENS), BOS, EOS))
    source, _ = resolve(path, "chat_template: phi")
    assert isinstance(source, ModelSource)
    assert source.template.origin is TemplateOrigin.BUILT_IN
    _, desired = resolve(path, "bos_token: '', eos_token: '<e>'")
    model = desired.models["m"]
    assert isinstance(model, DesiredModel)
    assert model.template.prefix("Be brief.") == "[Be brief.]<e>["


def test_a_model_without_a_template_is_asked_in_chatml(path: Path) -> None:
    """Which is said, with the remedy; an embedding model needs none."""
    path.write_bytes(gguf(*vocabulary(TOKENS)))
    source, desired = resolve(path)
    assert isinstance(source, ModelSource)
    assert source.template.origin is TemplateOrigin.ASSUMED
    assert desired.notices == (
        (
            "no chat template is known for m, so chatml is assumed "
            "(set chat_template to one that rkcached-manifest(5) lists, or a .jinja file)"
        ),
    )
    assert resolve(path, "embedding: true")[1].notices == ()
    assert resolve(path, "chat_template: chatml")[1].notices == ()


def test_a_template_of_the_models_own_that_does_not_parse(path: Path) -> None:
    """The file that has it is named, and the line of the manifest is the model's path."""
    path.write_bytes(gguf(text_pair("tokenizer.chat_template", "{% if %}")))
    model = resolve(path)[1].models["m"]
    assert isinstance(model, Trouble)
    assert f"template tokenizer.chat_template of {path}, line 1" in model.message
    assert model.place == ("path",)


def test_a_template_that_is_too_long(path: Path) -> None:
    """It is refused, unless the manifest has another."""
    path.write_bytes(gguf(text_pair("tokenizer.chat_template", "x" * ((1 << 20) + 1))))
    source, _ = resolve(path)
    assert isinstance(source, Trouble)
    assert source.message.endswith("has 1,048,577 bytes, the limit is 1,048,576")
    assert source.hint == "set chat_template in the manifest"
    assert isinstance(resolve(path, "chat_template: chatml")[0], ModelSource)
