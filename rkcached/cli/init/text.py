"""Words a manifest, with comments, for what was found in a folder. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from rkcached.cli.init.folder import FoundModel
from rkcached.engines.kinds import EngineKind

SCHEMA_NAME: Final = "manifest.schema.json"
"""The schema's file beside the manifest, for editors."""

SAMPLE: Final = """\
You are a helpful assistant. You answer in the language of the question, in at most three short
sentences. If you do not know something, you say so.
"""
"""The text of the prompt that is written where there is none."""

_HEAD: Final = """\
# yaml-language-server: $schema={schema}
# The manifest of rkcached: its models, and the prompts that are kept ready for them. Save it, or a
# prompt file, and whatever became stale is rebuilt; no command is given. Relative paths start from
# the folder of this file. `rkcached check` finds mistakes; man rkcached-manifest has all keys.
"""

ENGINE_WORDS: Final = {
    EngineKind.LLAMACPP: "runs .gguf models on the CPU",
    EngineKind.RKLLM: "runs .rkllm models on a Rockchip NPU, with the vendor's library",
}
"""The comment beside each engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The content of the manifest to be."""

    engine: EngineKind
    models: tuple[FoundModel, ...]
    prompts: Mapping[str, Path]
    """The files by the names of the prompts."""
    answering: str
    """The model that has the prompts; empty if none answers."""


def text_of(wanted: Wanted, folder: Path) -> str:
    """The manifest, whose paths start from `folder` where they lie in it."""
    return "\n".join(_lines(wanted, folder)) + "\n"


def _lines(wanted: Wanted, folder: Path) -> Iterator[str]:
    yield from _HEAD.format(schema=SCHEMA_NAME).splitlines()
    yield "version: 1"
    yield ""
    yield "engine:"
    yield f"  kind: {wanted.engine.value}    # {ENGINE_WORDS[wanted.engine]}"
    yield ""
    yield "models:"
    for number, model in enumerate(wanted.models):
        if number:
            yield ""
        yield from _model(wanted, model, folder)


def _model(wanted: Wanted, model: FoundModel, folder: Path) -> Iterator[str]:
    yield f"  {scalar(model.name)}:    # programs ask for it by this name"
    yield f"    path: {scalar(_path(model.path, folder))}"
    yield from format_lines(model, folder)
    yield "    params:"
    yield f"      max_context_len: {model.context_tokens}    # {_context_words(model)}"
    if model.pools:
        yield f"    {model.pools}: true    # for {_ENDPOINTS[model.pools]}; it has no prompts"
        return
    answer_tokens = min(512, model.context_tokens // 4)
    if wanted.engine is EngineKind.RKLLM:
        answer_tokens = min(256, answer_tokens)
        yield "      # Runtimes before 1.3.0 also generate this many at each build."
    yield f"      max_new_tokens: {answer_tokens}    # the longest answer"
    if model.name == wanted.answering:
        yield from _prompts(wanted, folder)
    else:
        yield "    #prompts: {name: prompts/name.md}    # prompts for this model"


def format_lines(model: FoundModel, folder: Path) -> Iterator[str]:
    """The lines of a model that say how messages become its text, with the reason."""
    if model.tokenizer is not None:
        yield "    # The model's own files: tokens, special tokens, and the chat template."
        yield f"    tokenizer: {scalar(_path(model.tokenizer, folder))}"
    elif model.template:
        yield "    # The model's format, guessed from its name: compare it with the model's page."
        yield f"    chat_template: {model.template}"
    elif not model.own_template and not model.pools:
        yield "    # Nothing tells the model's format, so chatml is assumed. Name one of those that"
        yield "    # rkcached-manifest(5) lists, or a .jinja file:"
        yield "    #chat_template: qwen3"
    elif model.own_template and not model.pools:
        yield f"    # Its chat template is in {model.own_template}."


_ENDPOINTS: Final = {"embedding": "/v1/embeddings", "rerank": "/v1/rerank"}


def _prompts(wanted: Wanted, folder: Path) -> Iterator[str]:
    if not wanted.prompts:
        return
    example = next(iter(wanted.prompts))
    yield f'    # Programs ask for one as "model": "{wanted.answering}/{example}".'
    yield "    # A request that begins with its text uses it, too."
    yield "    prompts:"
    for name, path in wanted.prompts.items():
        yield f"      {scalar(name)}: {scalar(_path(path, folder))}"


def _context_words(model: FoundModel) -> str:
    words = "tokens of prompt, question and answer together"
    if model.trained_tokens is not None and model.trained_tokens > model.context_tokens:
        words += f"; the model was made for {model.trained_tokens:,}"
    return words


def _path(path: Path, folder: Path) -> str:
    """As the manifest has it: from its folder where it lies in it."""
    if path.is_relative_to(folder):
        return os.fspath(path.relative_to(folder))
    return os.fspath(path)


def scalar(text: str) -> str:
    """A text in YAML, quoted where it must be."""
    return (
        yaml.safe_dump(text, allow_unicode=True, width=10_000)
        .removesuffix("\n")
        .removesuffix("\n...")
    )
