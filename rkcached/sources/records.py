"""The records that this room hands on: the key of a prompt, its text, its model, the runtime.

Frozen, so that threads may share them. A wrong input is a `Trouble` in the place of what it should
have been. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from rkcached.engines.states import StateFacts
from rkcached.errors import RkcachedError
from rkcached.host.digests import Signature
from rkcached.messages.tokenizer_facts import TokenizerFacts

if TYPE_CHECKING:  # it reads JSON with a library that no command needs which only shows a plan
    from rkcached.messages.tools import ToolSet


class Key(NamedTuple):
    """A prompt of a model; written `model/prompt`."""

    model: str
    prompt: str

    def __str__(self) -> str:
        return f"{self.model}/{self.prompt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """Why something cannot be, and the next thing to do."""

    message: str
    hint: str = ""
    place: tuple[str | int, ...] = ()
    """The way in the manifest to what names it, from the model or prompt that has the trouble; for
    its line."""
    passing: bool = False
    """It may end without anybody's doing."""

    @classmethod
    def of(cls, error: RkcachedError, *place: str | int) -> Trouble:
        return cls(message=error.message, hint=error.hint, place=place, passing=error.passing)

    def __str__(self) -> str:
        return self.message + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """The text of a prompt, joined from its files, and its tools."""

    text: str
    digest: str
    """Of the text."""
    tools: ToolSet | None = None


class TemplateOrigin(StrEnum):
    """The place that a chat template comes from."""

    BUILT_IN = "built-in"
    """The manifest names one that is part of the program."""
    FILE = "file"
    """The manifest names a file that has it."""
    MODEL = "model"
    """The model's own files have it."""
    ASSUMED = "assumed"
    """Nothing names one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSource:
    """The source of a chat template, and where it comes from."""

    text: str
    name: str
    """For messages: a built-in name, or the file that has it."""
    origin: TemplateOrigin
    place: str = "chat_template"
    """The key of the model in the manifest that leads to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The digest of a model file, the facts in it, and the source of its chat template."""

    digest: str
    template: TemplateSource
    tokenizer: TokenizerFacts = field(default_factory=TokenizerFacts)
    """The facts that the model's files state of its special tokens."""
    tokenizer_file: str = ""
    """A `tokenizer.json` for an engine that then gets tokens, not text."""
    tokenizer_digest: str = ""
    """Of all files that the manifest names as the model's tokenizer."""
    lora_digest: str = ""
    trained_tokens: int | None = None
    """The model's own context, if the file tells it: the engine gives it none that is larger."""
    state: StateFacts = field(default_factory=StateFacts)
    """The kind of state that a prompt cache of it saves, as its files state it."""
    signatures: tuple[tuple[str, Signature], ...] = field(default=(), compare=False)
    """Path and signature of each file that has one of these digests: no part of what the model is.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSource:
    """The engine's library on disk."""

    version: str
    digest: str
    samples_per_run: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """A prompt that the manifest names, or that a prompts_from pattern found."""

    key: Key
    source: PromptSource | Trouble
    description: str = ""
    line: int = 0
    """In the manifest, for messages."""
    stored: bool = False
    """A client stored the text; the manifest says nothing of it."""
    learned: bool = False
    """The daemon stored it, because requests repeated it."""
    owner: int | None = None
    """The uid of the only user whom it serves; None: everybody."""
    files: tuple[str, ...] = ()
    """The files that the prompt was made of: those of its text, and last the one of its tools."""
    has_tools: bool = False
    """The last file is the one of its tools."""

    @property
    def text_files(self) -> tuple[str, ...]:
        return self.files[:-1] if self.has_tools else self.files

    @property
    def tools_file(self) -> str:
        """Empty if the prompt declares no tools."""
        return self.files[-1] if self.has_tools else ""


class FolderNotice(NamedTuple):
    """A sentence on a prompts_from folder that may not be the one that is meant."""

    text: str
    lacks_prompts: bool
    """Prompts are probably missing, not yet to come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything read from disk for one look at the world."""

    runtime: RuntimeSource | Trouble
    models: Mapping[str, ModelSource | Trouble]
    prompts: Mapping[Key, Declaration]
    unlisted_models: Mapping[str, Trouble] = field(default_factory=dict)
    """Models of which a prompts_from folder cannot be listed, and why."""
    skipped_files: tuple[str, ...] = ()
    """Files that a prompts_from pattern names, but whose own names cannot be a prompt's."""
    notices: Mapping[str, tuple[FolderNotice, ...]] = field(default_factory=dict)
    """By model: what seems wrong with its prompts_from folders."""
    today: date | None = None
    """The day of this look, for templates that get it."""


Thing = TypeVar("Thing")


def kept(before: Thing | None, now: Thing) -> Thing:
    """The older of two equal things.

    Of thousands of prompts hardly one changes: each look would keep new ones.
    """
    return before if before is not None and before == now else now
