"""llama.cpp itself finds the template and the special tokens that we find in a model's header."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.cli.launcher import small_model
from rkcached.engines.base import ModelSpec, Sampling
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.engines.llamacpp.header import read_header
from rkcached.messages.message import Message
from rkcached.messages.template import ChatTemplate
from tests.gguf_files import UINT32, flag_pair, pair, rewrite, text_pair

pytestmark = pytest.mark.model

ADD_BOS = "tokenizer.ggml.add_bos_token"
BEFORE = "tokenizer.ggml.pre"
BOS = "tokenizer.ggml.bos_token_id"

CASES: dict[str, dict[str, bytes | None]] = {
    "as-it-is": {},
    "silent": {ADD_BOS: None},
    "adding": {ADD_BOS: flag_pair(ADD_BOS, True)},
    "silent-llama3": {ADD_BOS: None, BEFORE: text_pair(BEFORE, "llama-bpe")},
    "llama3-that-does-not": {BEFORE: text_pair(BEFORE, "llama-bpe")},
    "silent-tekken": {ADD_BOS: None, BEFORE: text_pair(BEFORE, "tekken")},
    "another-bos": {BOS: pair(BOS, UINT32, 0), ADD_BOS: flag_pair(ADD_BOS, True)},
}


def load(path: Path) -> LlamaCppEngine:
    return LlamaCppEngine(
        ModelSpec(path=str(path), context_tokens=64, scratch_dir=str(path.parent))
    )


def test_tokens_that_plain_text_has(tmp_path: Path) -> None:
    """Without `parse_special` llama.cpp finds the marks of gpt-oss, but no other control token."""
    path = tmp_path / "m.gguf"
    data = small_model().read_bytes()
    assert data.count(b"<issue_start>") == 1
    path.write_bytes(data.replace(b"<issue_start>", b"<|constrain|>"))
    header = read_header(path)
    assert header is not None
    special = header.tokenizer.special
    assert special.always == {"<|constrain|>"}
    engine = load(path)
    try:
        for token in sorted(special.control or ()):
            asked = {"content": f"a{token}b", "add_special": False, "parse_special": False}
            tokens = engine._endpoints.ask("POST", "/tokenize", asked)["tokens"]
            assert (len(tokens) == 3) is (token in special.always), token
    finally:
        engine.close()
        path.unlink()


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_agrees(tmp_path: Path, case: str) -> None:
    """On the template, BOS and EOS, whether it adds BOS, and which texts are one token."""
    path = tmp_path / "m.gguf"
    rewrite(small_model(), path, CASES[case])
    header = read_header(path)
    assert header is not None
    own = header.tokenizer
    engine = load(path)
    try:
        props = engine._endpoints.ask("GET", "/props")
        assert props["chat_template"] == own.template
        assert (props["bos_token"], props["eos_token"]) == (own.special.bos, own.special.eos)

        plain = {"content": "lamp", "add_special": False}
        dressed = engine._endpoints.ask("POST", "/tokenize", plain | {"add_special": True})[
            "tokens"
        ]
        bare = engine._endpoints.ask("POST", "/tokenize", plain)["tokens"]
        assert (len(dressed) == len(bare) + 1) is own.special.adds_bos

        assert own.special.control
        for token in sorted(own.special.control):
            asked = {"content": f"a{token}b", "add_special": False, "parse_special": True}
            assert len(engine._endpoints.ask("POST", "/tokenize", asked)["tokens"]) == 3, token
    finally:
        engine.close()
        path.unlink()


def test_bos_comes_once(tmp_path: Path) -> None:
    """A template that writes it has as many tokens on a vocabulary that adds one as on another.

    None is lost and none is doubled: the engine reads exactly one, at the start.
    """
    counts = []
    for adds in (True, False):
        path = tmp_path / str(adds) / "m.gguf"
        path.parent.mkdir()
        bos = {BOS: pair(BOS, UINT32, 0), ADD_BOS: flag_pair(ADD_BOS, adds)}
        rewrite(small_model(), path, bos)
        header = read_header(path)
        assert header is not None
        special = header.tokenizer.special
        assert special.adds_bos is adds
        source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        chat = ChatTemplate(source, name="t", special=special, takes_tokens=True)
        prompt = chat.render([Message(role="user", content=f"Why {special.bos} is a token?")])
        engine = load(path)
        try:
            ids = list(engine.tokenize(prompt))
            ran = engine.generate(prompt, Sampling(max_new_tokens=1), lambda _: False)
        finally:
            engine.close()
            path.unlink()

        assert (ids[0], ids.count(0)) == (0, 1)
        assert ran.prompt_tokens == len(ids)
        counts.append(len(ids))

    assert counts[0] == counts[1]
