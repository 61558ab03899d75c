"""Sentences on what works, but gives less than its owner may know. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rkcached.engines.registry import ENGINES
from rkcached.errors import TemplateError
from rkcached.messages.builtin import OLD_NAMES
from rkcached.messages.environment import names_in
from rkcached.plan.chat_templates import special_tokens
from rkcached.plan.worker_model import max_loaded
from rkcached.sources.manifest import THINKING, Manifest, ModelConfig
from rkcached.sources.problems import nearest
from rkcached.sources.records import ModelSource, Sources, TemplateOrigin
from rkcached.sources.values import TODAY

_CLOCK: Final = "strftime_now"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """A sentence, and the way in the manifest to what it is about."""

    text: str
    place: tuple[str | int, ...]


def notices(manifest: Manifest, sources: Sources) -> tuple[Remark, ...]:
    """The remarks that `status` shows for as long as they are true."""
    return (
        *_doubtful_folders(sources),
        *_cut_contexts(manifest, sources),
        *_assumed_templates(manifest, sources),
        *_old_template_names(manifest),
        *_preloads_without_room(manifest),
        *_unknown_preloads(manifest, sources),
    )


def _doubtful_folders(sources: Sources) -> Iterator[Remark]:
    """Folders of prompts that may not be those that are meant."""
    for name, notices_of_folders in sources.notices.items():
        for notice in notices_of_folders:
            yield Remark(text=notice.text, place=("models", name, "prompts_from"))


def warnings(manifest: Manifest, sources: Sources) -> Iterator[Remark]:
    """The remarks that `check` alone shows."""
    yield from _unloaded_preloads(manifest)
    for name, config in manifest.models.items():
        source = sources.models[name]
        if not isinstance(source, ModelSource) or config.pools:
            continue

        try:
            used = names_in(source.template.text)
        except TemplateError:
            continue  # it is the model's trouble

        place = ("models", name)
        special = special_tokens(config, source)
        known = {"bos_token": special.bos != "" or special.adds_bos, "eos_token": special.eos != ""}
        for token, is_known in known.items():
            stated = is_known or token in config.model_fields_set
            if token in used and not stated:
                yield Remark(
                    text=f"the chat template of {name} writes {token}, which neither the "
                    f"model's files nor the manifest state (set {token})",
                    place=place,
                )

        yield from _changes_nothing(name, config, used)
        if config.template_date == TODAY and _CLOCK in used:
            yield Remark(
                text=f"template_date of {name} is today, so its prompt caches are built anew each "
                "day, within a minute after midnight (state a date to keep them)",
                place=(*place, "template_date"),
            )


def _preloads_without_room(manifest: Manifest) -> Iterator[Remark]:
    """Models that are not loaded at the start, because others before them take all the room."""
    limit = max_loaded(manifest.engine)
    names = [name for name, config in manifest.models.items() if config.preload is not None]
    if limit is None:
        return

    winners = ", ".join(names[:limit])
    fit = "1 model fits" if limit == 1 else f"{limit} models fit"
    come = "comes" if limit == 1 else "come"
    for name in names[limit:]:
        text = (
            f"preload of {name} waits for room: {fit} (engine.max_loaded), and {winners} {come} "
            "first in the manifest (raise engine.max_loaded if the memory holds more, or remove "
            "one preload)"
        )
        yield Remark(text=text, place=("models", name, "preload"))


def _unknown_preloads(manifest: Manifest, sources: Sources) -> Iterator[Remark]:
    """Prompts that no file is, where files are prompts."""
    for name, config in manifest.models.items():
        known = [key.prompt for key in sources.prompts if key.model == name]
        for prompt in config.preload or ():
            if prompt in known or name in sources.unlisted_models:
                continue
            hint = "prompts_from finds no file: correct it, or write `preload: true`"
            if known:
                hint = nearest(prompt, known)
            text = f"preload of {name}: there is no prompt {prompt!r} ({hint})"
            yield Remark(text=text, place=("models", name, "preload"))


def _unloaded_preloads(manifest: Manifest) -> Iterator[Remark]:
    """Models that are loaded ahead only until they are unloaded."""
    for name, config in manifest.models.items():
        if config.preload is None or config.idle_unload_s is None:
            continue
        text = (
            f"{name} has preload and idle_unload_s: after {config.idle_unload_s:g} idle seconds it "
            "is unloaded, and stays so until somebody asks or the daemon starts (remove "
            "idle_unload_s to keep it loaded)"
        )
        yield Remark(text=text, place=("models", name, "idle_unload_s"))


def _changes_nothing(name: str, config: ModelConfig, used: frozenset[str]) -> Iterator[Remark]:
    """Switches that the chat template does not look at."""
    place = ("models", name)
    if config.thinking is not None and THINKING not in used:
        text = (
            f"thinking of {name} changes nothing: its chat template does not use {THINKING} "
            "(remove it)"
        )
        yield Remark(text=text, place=(*place, "thinking"))

    if config.template_date is not None and _CLOCK not in used:
        text = (
            f"template_date of {name} changes nothing: its chat template does not use {_CLOCK} "
            "(remove it)"
        )
        yield Remark(text=text, place=(*place, "template_date"))

    stated: list[tuple[tuple[str | int, ...], Mapping[str, Any]]] = [
        (place, config.chat_template_kwargs)
    ]
    for prompt, declared in config.prompts.items():
        stated.append(((*place, "prompts", prompt), declared.chat_template_kwargs))
    for where, variables in stated:
        for variable in sorted(variables.keys() - used):
            text = f"{variable} changes nothing: the chat template of {name} does not use it "
            text += "(remove it)"
            yield Remark(text=text, place=(*where, "chat_template_kwargs", variable))


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
        if not isinstance(source, ModelSource) or config.pools:
            continue
        if source.template.origin is not TemplateOrigin.ASSUMED:
            continue

        remedy = "set chat_template to one that rkcached-manifest(5) lists, or a .jinja file"
        if ENGINES[manifest.engine.kind].takes_tokenizer:
            remedy = (
                "set tokenizer to the files of its Hugging Face repository, "
                "or chat_template to the model's format"
            )
        text = (
            f"no chat template is known for {name}, so {source.template.name} is assumed ({remedy})"
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
