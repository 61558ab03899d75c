"""Sentences on what works, but gives less than its owner may know. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rkcached.engines.registry import ENGINES
from rkcached.messages.builtin import OLD_NAMES
from rkcached.sources.manifest import Manifest
from rkcached.sources.records import ModelSource, Sources, TemplateOrigin


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A sentence, and the way in the manifest to what it is about."""

    text: str
    place: tuple[str | int, ...]


def notices(manifest: Manifest, sources: Sources) -> tuple[Remark, ...]:
    """The remarks that `status` shows for as long as they are true."""
    return (
        *_cut_contexts(manifest, sources),
        *_assumed_templates(manifest, sources),
        *_old_template_names(manifest),
    )


def _cut_contexts(manifest: Manifest, sources: Sources) -> Iterator[Remark]:
    """Contexts that are declared larger than the model's own. The engine cuts them."""
    for name, config in manifest.models.items():
        source = sources.models[name]
        params = config.params
        own = source.trained_tokens if isinstance(source, ModelSource) else None
        if own is None or params.max_context_len <= own:
            continue

        more = f", and max_new_tokens to less than {own}" if params.max_new_tokens >= own else ""
        text = (
            f"max_context_len of {name} is {params.max_context_len}, "
            f"but the context is cut to the model's own, {own} tokens "
            f"(set max_context_len to {own}{more})"
        )
        yield Remark(text=text, place=("models", name, "params", "max_context_len"))


def _assumed_templates(manifest: Manifest, sources: Sources) -> Iterator[Remark]:
    """Models that are asked in a form which nothing states to be theirs."""
    for name, config in manifest.models.items():
        source = sources.models[name]
        if not isinstance(source, ModelSource) or config.embedding:
            continue
        if source.template.origin is not TemplateOrigin.ASSUMED:
            continue

        remedy = "set chat_template to the right one"
        if ENGINES[manifest.engine.kind].takes_tokenizer:
            remedy = "set tokenizer to the files of its Hugging Face repository, or chat_template"
        text = (
            f"no chat template is known of {name}, so {source.template.name} is assumed ({remedy})"
        )
        yield Remark(text=text, place=("models", name))


def _old_template_names(manifest: Manifest) -> Iterator[Remark]:
    """Built-in templates by names that promise more models than they fit."""
    for name, config in manifest.models.items():
        better = OLD_NAMES.get(config.chat_template or "")
        if better is None:
            continue

        text = (
            f"chat_template {config.chat_template} of {name} is an old name that does not say "
            f"which models it is for, and still works (write {better}, or the name of this "
            "model's format: rkcached-manifest(5) lists them)"
        )
        yield Remark(text=text, place=("models", name, "chat_template"))
