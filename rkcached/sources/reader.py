"""Reads what prompt caches are made from: prompt files, model files, templates, the runtime.

A file that did not change is not read again. Whatever is wrong with an input becomes a `Trouble` of
that input alone; the scan itself never fails. Runs in a thread, one scan at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from rkcached.engines.llamacpp.header import Header, read_header
from rkcached.engines.registry import ENGINES, EngineEntry
from rkcached.errors import RkcachedError, SourceError
from rkcached.host.access import Refusal, refusal
from rkcached.host.digests import Digests, Signature, settled, signature_of
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.tokenizer_facts import MAX_TEMPLATE_BYTES, TokenizerFacts
from rkcached.sources.manifest import EngineConfig, Manifest, ModelConfig
from rkcached.sources.patterns import matches, stem
from rkcached.sources.problems import NAME
from rkcached.sources.records import (
    Declaration,
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    TemplateOrigin,
    TemplateSource,
    Trouble,
    kept,
)
from rkcached.sources.stored_texts import StoredTexts
from rkcached.sources.text_files import read_text, unusable

ASSUMED_TEMPLATE = "chatml"
"""The template of a model for which nothing names one: most models were trained with it."""

Content = TypeVar("Content")


class _Placed(SourceError):
    """An error of one input, and the way in the manifest to what names it."""

    def __init__(self, error: SourceError, *place: str | int) -> None:
        super().__init__(error.message, hint=error.hint)
        self.place = place


class _Made(NamedTuple, Generic[Content]):
    files: tuple[str, ...]
    signature: Signature
    content: Content


class _Memory(Generic[Content]):
    """A memory of what was made of files: kept while scans ask for it and no file changes."""

    def __init__(self) -> None:
        self._now: dict[tuple[str, ...], _Made[Content]] = {}
        self._before = self._now

    def turn(self) -> None:
        """A scan begins: what the one before did not ask for is forgotten."""
        self._before, self._now = self._now, {}

    def of(self, files: tuple[str, ...], make: Callable[[tuple[str, ...]], Content]) -> Content:
        """Make it anew only if a file changed. Errors: what `make` raises."""
        infos = _infos(files)
        signature = signature_of(*infos)
        made = self._now.get(files) or self._before.get(files)
        if made is None or made.signature != signature:
            lasting = len(infos) == len(files) and settled(*infos)
            made = _Made(files, signature, make(files))
            if not lasting:  # a second change may leave the same signature
                return made.content

        self._now[made.files] = made
        return made.content


class SourceReader:
    """Scans sources and remembers texts by the signature of their files. One thread at a time."""

    def __init__(self, digests: Digests, stored: StoredTexts | None = None) -> None:
        self._digests = digests
        self._stored = stored
        self._prompts = _Memory[PromptSource]()
        self._templates = _Memory[str]()
        self._headers = _Memory[Header | None]()
        # By the last scan.
        self._declared: Mapping[Key, Declaration] = {}
        # By prompts_from pattern: the device that its folder was on when it first matched, and how
        # many it matched.
        self._found_on: dict[str, tuple[int, int]] = {}

    def scan(self, manifest: Manifest) -> Sources:
        """Look at every input that the manifest names. Never raises for a bad input."""
        engine = ENGINES[manifest.engine.kind]
        prompts: dict[Key, Declaration] = {}
        models: dict[str, ModelSource | Trouble] = {}
        unlisted: dict[str, Trouble] = {}
        skipped: dict[str, None] = {}
        notices: dict[str, None] = {}
        self._prompts.turn()
        self._templates.turn()
        self._headers.turn()

        for name, config in manifest.models.items():
            models[name] = self._model(config, engine)
            claimed: set[str] = set()

            for prompt, entry in config.prompts.items():
                files = tuple(map(str, entry.files))
                claimed.update(files)
                line = manifest.line_of("models", name, "prompts", prompt)
                source = self._prompt(files)
                self._declare(
                    prompts,
                    Key(name, prompt),
                    source,
                    files,
                    description=entry.description,
                    line=line,
                )

            for position, pattern in enumerate(config.prompts_from):
                line = manifest.line_of("models", name, "prompts_from", position)
                try:
                    matched = tuple(matches(pattern))
                except OSError as error:
                    unlisted[name] = _unlisted(
                        Path(pattern).parent, error, "create the folder, or correct prompts_from"
                    )
                    continue

                if notice := self._notice(pattern, len(matched)):
                    notices[notice] = None
                for path in matched:
                    if path in claimed:
                        continue  # declared by name, perhaps with parameters of its own
                    key = Key(name, _printable(stem(path)))
                    if not NAME.fullmatch(key.prompt):
                        # A README, or a copy that a synchronising program made.
                        skipped[_printable(path)] = None
                        continue

                    self._declare(prompts, key, self._found(key, path, prompts), (path,), line=line)

            if self._stored is not None:
                unlisted |= self._add_stored(name, self._stored, prompts)

        self._declared = prompts
        return Sources(
            runtime=self._runtime(manifest.engine),
            models=models,
            prompts=prompts,
            unlisted_models=unlisted,
            skipped_files=tuple(skipped),
            notices=tuple(notices),
        )

    def _notice(self, pattern: str, matched: int) -> str:
        """A sentence on a prompts_from folder that may not be the one that is meant, or nothing.

        An unmounted folder is empty, and a folder on which another disk is mounted has other files.
        """
        folder = Path(pattern).parent
        try:
            device = folder.stat().st_dev
        except OSError:
            return ""

        first_device, before = self._found_on.get(pattern, (device, 0))
        if matched:
            self._found_on[pattern] = (first_device, matched)

        if device != first_device:
            files = (
                f"{pattern} matches {_files(matched)}" if matched else f"{pattern} matches no file"
            )
            return (
                f"{folder} is on another file system than when the daemon started, "
                f"and {files} now: is it mounted?"
            )

        if not matched and before:
            return (
                f"{pattern} matches no file any more, but matched {_files(before)} before: "
                "is the folder mounted?"
            )

        return "" if matched else f"{pattern} matches no file"

    def _declare(
        self,
        prompts: dict[Key, Declaration],
        key: Key,
        source: PromptSource | Trouble,
        files: tuple[str, ...],
        **fields: Any,
    ) -> None:
        declared = kept(
            self._declared.get(key), Declaration(key=key, source=source, files=files, **fields)
        )
        prompts[declared.key] = declared

    def _add_stored(
        self, model: str, stored: StoredTexts, prompts: dict[Key, Declaration]
    ) -> dict[str, Trouble]:
        """The texts that clients stored; returns why they cannot be listed, if so."""
        try:
            keys = stored.keys(model)
        except OSError as error:
            return {model: _unlisted(stored.folder(model), error, "check its owner")}

        for key in keys:
            if key not in prompts and NAME.fullmatch(key.prompt):
                files = (str(stored.path(key)),)
                self._declare(prompts, key, self._prompt(files), files, stored=True)

        return {}

    def read_again(self, declared: Declaration) -> Declaration:
        """The same declaration, with the text that its files have now."""
        return replace(declared, source=self._prompt(declared.files))

    def _found(
        self, key: Key, path: str, prompts: dict[Key, Declaration]
    ) -> PromptSource | Trouble:
        """The prompt of a file that a pattern found."""
        if key in prompts:
            return Trouble(
                message=f"{path} makes a second prompt named {key.prompt!r}",
                hint="rename the file, or declare only one of them",
            )
        return self._prompt((path,))

    def _prompt(self, files: tuple[str, ...]) -> PromptSource | Trouble:
        try:
            return self._prompts.of(files, _join)
        except _Placed as error:
            return Trouble.of(error, *error.place)
        except RkcachedError as error:
            return Trouble.of(error)

    def _model(self, config: ModelConfig, engine: EngineEntry) -> ModelSource | Trouble:
        try:
            template = self._named_template(config)
            if not stat.S_ISREG(
                mode := config.path.stat().st_mode
            ):  # opening a FIFO would wait for its writer
                kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
                return Trouble(message=f"{config.path} is {kind}", hint="name a model file")

            with config.path.open("rb") as stream:
                if stream.read(len(engine.model_magic)) != engine.model_magic:
                    return Trouble(
                        message=f"{config.path} is not a {engine.model_format}",
                        hint="set path to a file of that format, "
                        "or engine.kind to the engine that reads it",
                    )

            facts = engine.inspect_model(config.path, self._header)
            signatures: dict[str, Signature] = {}
            digests = []
            for path in facts.files:
                self._digests.let_settle(path)
                digest, signatures[str(path)] = self._digests.digest_and_signature(path)
                digests.append(digest)

            return ModelSource(
                digest=_one_digest(digests),
                template=template or _own_template(facts.tokenizer),
                tokenizer=facts.tokenizer,
                tokenizer_digest=self._optional(config.tokenizer, "tokenizer", signatures),
                lora_digest=self._optional(config.lora, "LoRA adapter", signatures),
                trained_tokens=facts.trained_tokens,
                signatures=tuple(signatures.items()),
            )
        except _Placed as error:
            return Trouble.of(error, *error.place)
        except RkcachedError as error:
            return Trouble.of(error)
        except OSError as error:
            return Trouble.of(unusable(Path(error.filename or config.path), error, "model file"))

    def _named_template(self, config: ModelConfig) -> TemplateSource | None:
        """The template that the manifest names; None if it names none. Errors: _Placed."""
        name = config.chat_template
        if name is None:
            return None
        if name in BUILTIN:
            return TemplateSource(text=BUILTIN[name], name=name, origin=TemplateOrigin.BUILT_IN)

        try:
            text = self._templates.of((name,), lambda files: read_text(Path(files[0])))
        except SourceError as error:
            raise _Placed(error, "chat_template") from error
        return TemplateSource(text=text, name=name, origin=TemplateOrigin.FILE)

    def _header(self, path: Path) -> Header | None:
        return self._headers.of((str(path),), lambda files: read_header(Path(files[0])))

    def _optional(self, path: Path | None, noun: str, signatures: dict[str, Signature]) -> str:
        """The digest of a file that a model may have; adds its signature. Errors: SourceError."""
        if path is None:
            return ""
        try:
            if not path.is_file():
                raise FileNotFoundError(path)
            digest, signatures[str(path)] = self._digests.digest_and_signature(path)
            return digest
        except OSError as error:
            key = "lora" if noun == "LoRA adapter" else noun
            raise _Placed(unusable(path, error, noun), key) from error

    def _runtime(self, engine: EngineConfig) -> RuntimeSource | Trouble:
        try:
            runtime = ENGINES[engine.kind].locate_runtime(engine.library, engine.abi)
            digests = "".join(self._digests.digest(path) for path in runtime.files)
        except RkcachedError as error:
            return Trouble.of(error)
        except OSError as error:
            return Trouble(
                message=f"the engine's library cannot be read: {error}", hint="install it again"
            )

        digest = hashlib.sha256(digests.encode()).hexdigest()
        return RuntimeSource(
            version=runtime.version, digest=digest, samples_per_run=runtime.samples_per_run
        )


def _own_template(facts: TokenizerFacts) -> TemplateSource:
    """The template of the model itself, or chatml if it has none. Errors: _Placed."""
    if facts.template_bytes > MAX_TEMPLATE_BYTES:
        error = SourceError(
            f"{facts.template_origin} has {facts.template_bytes:,} bytes, the limit is "
            f"{MAX_TEMPLATE_BYTES:,}",
            hint="name a chat_template",
        )
        raise _Placed(error, facts.place)

    if not facts.template:
        return TemplateSource(
            text=BUILTIN[ASSUMED_TEMPLATE], name=ASSUMED_TEMPLATE, origin=TemplateOrigin.ASSUMED
        )
    return TemplateSource(
        text=facts.template,
        name=facts.template_origin,
        origin=TemplateOrigin.MODEL,
        place=facts.place,
    )


def _one_digest(digests: list[str]) -> str:
    """The digest of a model that has these files, in this order.

    That of a single file is the file's own.
    """
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _infos(files: tuple[str, ...]) -> list[os.stat_result]:
    """Of these files, one after the other; fewer, if one is not there."""
    infos = []
    with contextlib.suppress(OSError):
        for path in files:
            infos.append(os.stat(path))  # noqa: PERF401, PTH116 - up to the one that is not there
    return infos


def _join(files: tuple[str, ...]) -> PromptSource:
    """The prompt that these files are. Errors: SourceError."""
    texts = []

    for position, path in enumerate(files):
        try:
            text = read_text(Path(path))
        except SourceError as error:
            raise _Placed(error, "files", position) from error
        texts.append(text.rstrip("\r\n"))  # the final newline is not part of a prompt

    text = "\n\n".join(texts)  # as paragraphs
    if not text.strip():
        raise SourceError(
            f"{', '.join(files)}: the prompt is empty", hint="write the prompt's text into the file"
        )

    return PromptSource(text=text, digest=hashlib.sha256(text.encode()).hexdigest())


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"


def _unlisted(folder: Path, error: OSError, hint: str) -> Trouble:
    refused = refusal(folder, error, folder=True) or Refusal(error.strerror or str(error), hint)
    return Trouble(message=f"{folder} cannot be listed: {refused.reason}", hint=refused.hint)


def _printable(text: str) -> str:
    """A file name as text that can be printed and sent; bytes that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()
