"""Reads what a model is made of: its files, its chat template, its tokenizer, its LoRA adapter."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import replace
from pathlib import Path
from typing import Final

from rkcached.engines.llamacpp.header import Header, read_header
from rkcached.engines.registry import EngineEntry
from rkcached.errors import RkcachedError, SourceError
from rkcached.host.digests import Digests, Signature
from rkcached.host.regular import open_regular
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.tokenizer_facts import MAX_TEMPLATE_BYTES, TokenizerFacts
from rkcached.sources import model_formats as formats
from rkcached.sources import tokenizer_files
from rkcached.sources.manifest import ModelConfig
from rkcached.sources.memory import Memory, Placed
from rkcached.sources.records import ModelSource, TemplateOrigin, TemplateSource, Trouble
from rkcached.sources.text_files import read_text, unusable
from rkcached.sources.tokenizer_files import TokenizerFiles
from rkcached.sources.values import TEMPLATE_SUFFIXES

ASSUMED_TEMPLATE: Final = "chatml"
"""The template of a model for which nothing names one: most models were trained with it."""


class ModelReader:
    """Reads models, and remembers what was read by the signatures of the files."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        self._templates = Memory[str]()
        self._headers = Memory[Header | None]()
        self._tokenizers = Memory[TokenizerFiles]()

    def turn(self) -> None:
        """A scan begins: what the one before did not ask for is forgotten."""
        for memory in (self._templates, self._headers, self._tokenizers):
            memory.turn()

    def model(self, config: ModelConfig, engine: EngineEntry) -> ModelSource | Trouble:
        """Look at everything that a model is made of. Never raises for a bad input."""
        try:
            template, beside = self._named_template(config)
            if not stat.S_ISREG(
                mode := config.path.stat().st_mode
            ):  # opening a FIFO would wait for its writer
                kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
                return Trouble(message=f"{config.path} is {kind}", hint="name a model file")

            with open_regular(config.path) as stream:
                start = stream.read(formats.START_BYTES)
            if trouble := formats.not_for(engine, config.path, start):
                return trouble

            facts = engine.inspect_model(config.path, self._header)
            signatures: dict[str, Signature] = {}
            own = self._tokenizer(config, engine, signatures)
            if own is None:
                own = TokenizerFiles(facts=facts.tokenizer)
            if own.facts.refusal:
                return Trouble(
                    message=own.facts.refusal,
                    hint="copy the file again, or take it from another source",
                    place=(own.facts.place,),
                )

            tokenizer = own.facts.completed_by(beside)
            if tokenizer.refusal:
                return Trouble(
                    message=tokenizer.refusal,
                    hint="name another file, or a built-in template",
                    place=("chat_template",),
                )

            digests = []
            for path in facts.files:
                self._digests.let_settle(path)
                digest, signatures[str(path)] = self._digests.digest_and_signature(path)
                digests.append(digest)

            return ModelSource(
                digest=_one_digest(digests),
                template=template or _own_template(own.facts),
                tokenizer=tokenizer,
                tokenizer_file=own.file,
                tokenizer_digest=own.digest,
                lora_digest=self._lora(config.lora, signatures),
                trained_tokens=facts.trained_tokens,
                state=facts.state,
                signatures=tuple(signatures.items()),
            )
        except Placed as error:
            return Trouble.of(error, *error.place)
        except RkcachedError as error:
            return Trouble.of(error)
        except OSError as error:
            return Trouble.of(unusable(Path(error.filename or config.path), error, "model file"))

    def _named_template(self, config: ModelConfig) -> tuple[TemplateSource | None, TokenizerFacts]:
        """The template that the manifest names, and what else is stated beside it.

        None if it names none. Errors: Placed.
        """
        name = config.chat_template
        nothing = TokenizerFacts()
        if name is None:
            return None, nothing
        if name in BUILTIN:
            source = TemplateSource(text=BUILTIN[name], name=name, origin=TemplateOrigin.BUILT_IN)
            return source, nothing

        path = Path(name)
        try:
            if path.suffix in TEMPLATE_SUFFIXES:
                text = self._templates.of((name,), lambda files: read_text(Path(files[0])))
                source = TemplateSource(text=text, name=name, origin=TemplateOrigin.FILE)
                return source, nothing

            facts = self._tokenizer_files(path).facts
        except SourceError as error:
            raise Placed(error, "chat_template") from error
        except OSError as error:
            raise Placed(unusable(path, error, "chat template"), "chat_template") from error

        if not facts.template:
            missing = SourceError(
                f"{path} has no chat template", hint="name another file, or a built-in template"
            )
            raise Placed(missing, "chat_template")
        source = TemplateSource(
            text=facts.template, name=facts.template_origin, origin=TemplateOrigin.FILE
        )
        return source, facts

    def _header(self, path: Path) -> Header | None:
        return self._headers.of((str(path),), lambda files: read_header(Path(files[0])))

    def _tokenizer(
        self, config: ModelConfig, engine: EngineEntry, signatures: dict[str, Signature]
    ) -> TokenizerFiles | None:
        """Read the tokenizer that the manifest names, and add the signatures of its files.

        None for an engine that takes none. Errors: Placed.
        """
        if not engine.takes_tokenizer:
            return None
        if config.tokenizer is None:
            return TokenizerFiles(facts=tokenizer_files.NONE)

        try:
            files = tokenizer_files.present(config.tokenizer)
            own = self._tokenizer_files(config.tokenizer)
            digests = []
            for file in files:
                digest, signatures[str(file)] = self._digests.digest_and_signature(file)
                digests.append(digest if len(files) == 1 else f"{file.name} {digest} ")
        except SourceError as error:
            raise Placed(error, "tokenizer") from error
        except OSError as error:
            path = Path(error.filename or config.tokenizer)
            raise Placed(unusable(path, error, "tokenizer"), "tokenizer") from error

        return replace(own, digest=_one_digest(digests))

    def _tokenizer_files(self, path: Path) -> TokenizerFiles:
        """Errors: SourceError, OSError."""
        names = tuple(map(str, tokenizer_files.present(path)))
        return self._tokenizers.of(
            names, lambda files: tokenizer_files.facts(tuple(map(Path, files)))
        )

    def _lora(self, path: Path | None, signatures: dict[str, Signature]) -> str:
        """The digest of a model's LoRA adapter; adds its signature. Errors: Placed."""
        if path is None:
            return ""
        try:
            if not path.is_file():
                raise FileNotFoundError(path)
            digest, signatures[str(path)] = self._digests.digest_and_signature(path)
        except OSError as error:
            raise Placed(unusable(path, error, "LoRA adapter"), "lora") from error
        return digest


def _own_template(facts: TokenizerFacts) -> TemplateSource:
    """The template of the model itself, or chatml if it has none. Errors: Placed."""
    if facts.template_bytes > MAX_TEMPLATE_BYTES:
        error = SourceError(
            f"{facts.template_origin} has {facts.template_bytes:,} bytes, the limit is "
            f"{MAX_TEMPLATE_BYTES:,}",
            hint="set chat_template in the manifest",
        )
        raise Placed(error, facts.place)

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
