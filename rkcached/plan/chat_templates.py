"""The compiled chat templates of models and prompts: one for each source with its variables."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import replace
from datetime import date
from typing import Any

from rkcached.engines.registry import EngineEntry
from rkcached.messages.environment import Compile
from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.template import ChatTemplate
from rkcached.plan.fingerprint import Value
from rkcached.sources.manifest import ModelConfig
from rkcached.sources.records import ModelSource, Sources
from rkcached.sources.values import TODAY


class ChatTemplates:
    """Makes templates, and keeps those that the last two rounds asked for."""

    def __init__(self, compile_elsewhere: Compile | None = None) -> None:
        self._compile_elsewhere = compile_elsewhere
        self._now: dict[Hashable, ChatTemplate] = {}
        self._before = self._now

    def turn(self) -> None:
        """A round begins: what the one before did not ask for is forgotten."""
        self._before, self._now = self._now, {}

    def of(
        self,
        source: ModelSource,
        engine: EngineEntry,
        *,
        special: SpecialTokens,
        variables: Mapping[str, Any],
        today: date | None,
    ) -> ChatTemplate:
        """The template of a model, or of a prompt with variables of its own. Errors: TemplateError.

        It is the same object for as long as nothing in it changes.
        """
        takes_tokens = engine.reads_plain_text or source.tokenizer_file != ""
        slot = (source.template, special, _canonical(variables), today, takes_tokens)
        template = self._now.get(slot) or self._before.get(slot)
        if template is None:
            template = ChatTemplate(
                source.template.text,
                name=source.template.name,
                special=special,
                variables=variables,
                today=today,
                takes_tokens=takes_tokens,
                compile_elsewhere=self._compile_elsewhere,
            )

        self._now[slot] = template
        return template


def special_tokens(config: ModelConfig, source: ModelSource) -> SpecialTokens:
    """The model's own, but for those that the manifest states."""
    special = source.tokenizer.special_in(source.template.text)
    if config.bos_token is not None:
        special = replace(special, bos=config.bos_token)
    if config.eos_token is not None:
        special = replace(special, eos=config.eos_token)
    return special


def template_date(config: ModelConfig, sources: Sources) -> date | None:
    """The date that the model's template gets."""
    stated = config.template_date
    return sources.today if stated == TODAY else stated


def variable_components(variables: Mapping[str, Any]) -> dict[str, Value]:
    """The components of a fingerprint that the template's variables are.

    enable_thinking has one of its own, however the manifest states it.
    """
    others = dict(variables)
    thinking = others.get("enable_thinking")
    if isinstance(thinking, bool):
        del others["enable_thinking"]
    else:
        thinking = None

    components: dict[str, Value] = {"thinking": thinking}
    if others:
        components["chat_template_kwargs"] = _canonical(others)
    return components


def _canonical(variables: Mapping[str, Any]) -> str:
    return json.dumps(variables, sort_keys=True, ensure_ascii=False)
