"""Reads what prompt caches are made from: prompt files, model files, templates, the runtime.

A file that did not change is not read again. Whatever is wrong with an input becomes a `Trouble` of
that input alone; the scan itself never fails. Runs in a thread, one scan at a time.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from rkcached.engines.registry import ENGINES
from rkcached.errors import RkcachedError, SourceError
from rkcached.host.access import explained
from rkcached.host.digests import Digests
from rkcached.messages.tools import ToolSet, parse_tools
from rkcached.sources.learned_texts import Learned
from rkcached.sources.manifest import EngineConfig, Manifest
from rkcached.sources.memory import Memory, Placed
from rkcached.sources.model_reader import ModelReader
from rkcached.sources.patterns import matches, stem
from rkcached.sources.problems import NAME
from rkcached.sources.records import (
    Declaration,
    FolderNotice,
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    Trouble,
    kept,
)
from rkcached.sources.stored_texts import StoredTexts
from rkcached.sources.text_files import TOOLS, read_text


class SourceReader:
    """Scans sources and remembers texts by the signature of their files. One thread at a time."""

    def __init__(
        self,
        digests: Digests,
        stored: StoredTexts | None = None,
        today: Callable[[], date] = date.today,
    ) -> None:
        self._today = today
        self._digests = digests
        self._stored = stored
        self._prompts = Memory[PromptSource]()
        self._tools = Memory[ToolSet]()
        # Prompts whose links must not lead out of the folder that they were found in.
        self._confined = Memory[PromptSource]()
        self._within: dict[str, Path] = {}
        self._models = ModelReader(digests)
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
        notices: dict[str, tuple[FolderNotice, ...]] = {}
        within: dict[str, Path] = {}
        self._prompts.turn()
        self._confined.turn()
        self._tools.turn()
        self._models.turn()

        for name, config in manifest.models.items():
            models[name] = self._models.model(config, engine)
            claimed = self._add_named(name, manifest, prompts)

            self._within = within
            for position, pattern in enumerate(config.prompts_from):
                line = manifest.line_of("models", name, "prompts_from", position)
                try:
                    matched = tuple(matches(pattern))
                except OSError as error:
                    unlisted[name] = _unlisted(
                        Path(pattern).parent, error, "create the folder, or correct prompts_from"
                    )
                    continue

                has_others = bool(config.prompts)
                if notice := self._notice(pattern, len(matched), has_others=has_others):
                    notices[name] = (*notices.get(name, ()), notice)
                for path in matched:
                    if path in claimed:
                        continue  # declared by name, perhaps with parameters of its own
                    if not manifest.sources.follow_links:
                        within[path] = Path(pattern).parent
                    key = Key(name, _printable(stem(path)))
                    if not NAME.fullmatch(key.prompt):
                        # A README, or a copy that a synchronising program made.
                        skipped[_printable(path)] = None
                        continue

                    self._declare(prompts, key, self._found(key, path, prompts), (path,), line=line)

            if self._stored is not None:
                unlisted |= self._add_stored(name, self._stored, prompts)

        # After all others, which come first where there is little room.
        unlisted |= self._add_learned(manifest, prompts)
        self._declared = prompts
        return Sources(
            runtime=self._runtime(manifest.engine),
            models=models,
            prompts=prompts,
            unlisted_models=unlisted,
            skipped_files=tuple(skipped),
            notices=notices,
            today=self._today(),
        )

    def _add_named(
        self, model: str, manifest: Manifest, prompts: dict[Key, Declaration]
    ) -> set[str]:
        """The prompts that the manifest names; returns their files."""
        claimed: set[str] = set()
        for prompt, entry in manifest.models[model].prompts.items():
            files = tuple(map(str, entry.files))
            tools_file = str(entry.tools or "")
            source = self._prompt(files, tools_file)
            if tools_file:
                files = (*files, tools_file)

            claimed.update(files)
            self._declare(
                prompts,
                Key(model, prompt),
                source,
                files,
                has_tools=bool(tools_file),
                description=entry.description,
                line=manifest.line_of("models", model, "prompts", prompt),
            )

        return claimed

    def _notice(self, pattern: str, matched: int, *, has_others: bool) -> FolderNotice | None:
        """A doubt whether a prompts_from folder is the one that is meant.

        An unmounted folder is empty, and a folder on which another disk is mounted has other files.
        `has_others`: the model has prompts by name, so the folder may be for prompts to come.
        """
        folder = Path(pattern).parent
        try:
            device = folder.stat().st_dev
        except OSError:
            return None

        first_device, before = self._found_on.get(pattern, (device, 0))
        if matched:
            self._found_on[pattern] = (first_device, matched)

        if device != first_device:
            files = f"matches {_files(matched)}" if matched else "matches no file"
            text = (
                f"{folder} is on another file system than when the daemon started, "
                f"and {pattern} {files} now: is it mounted?"
            )
            return FolderNotice(text, lacks_prompts=not matched)

        if not matched and before:
            text = (
                f"{pattern} matches no file any more, but matched {_files(before)} before: "
                "is the folder mounted?"
            )
            return FolderNotice(text, lacks_prompts=True)

        if not matched:
            return FolderNotice(f"{pattern} matches no file", lacks_prompts=not has_others)
        return None

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

    def _add_learned(
        self, manifest: Manifest, prompts: dict[Key, Declaration]
    ) -> dict[str, Trouble]:
        """The texts that the daemon learned; returns why those of a model cannot be listed."""
        unlisted: dict[str, Trouble] = {}
        config = manifest.cache.learn
        if self._stored is None or config is None:
            return unlisted

        texts = self._stored.learned
        found: list[Learned] = []
        for model in manifest.models:
            try:
                found += texts.all(model, shared=config.share)
            except OSError as error:
                unlisted[model] = _unlisted(texts.folder(model), error, "check its owner")

        for key, owner, path in found:
            if key in prompts or not NAME.fullmatch(key.prompt):
                continue
            of = "" if owner is None else f" of uid {owner}"
            files = (str(path),)
            self._declare(
                prompts,
                key,
                self._prompt(files),
                files,
                stored=True,
                learned=True,
                owner=owner,
                description=f"learned from requests{of}",
            )
        return unlisted

    def read_again(self, declared: Declaration) -> Declaration:
        """The same declaration, with the text and the tools that its files have now."""
        return replace(declared, source=self._prompt(declared.text_files, declared.tools_file))

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

    def _prompt(self, files: tuple[str, ...], tools_file: str = "") -> PromptSource | Trouble:
        try:
            folder = self._within.get(files[0])
            if folder is None:
                source = self._prompts.of(files, _join)
            else:
                source = self._confined.of(files, functools.partial(_join, within=folder))
            if not tools_file:
                return source
            tools = self._tools.of((tools_file,), _read_tools)
            return replace(source, tools=tools)
        except Placed as error:
            return Trouble.of(error, *error.place)
        except RkcachedError as error:
            return Trouble.of(error)

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


def _join(files: tuple[str, ...], within: Path | None = None) -> PromptSource:
    """The prompt that these files are. `within`: see `read_text`. Errors: SourceError."""
    texts = []

    for position, path in enumerate(files):
        try:
            text = read_text(Path(path), within=within)
        except SourceError as error:
            raise Placed(error, "files", position) from error
        texts.append(text.rstrip("\r\n"))  # the final newline is not part of a prompt

    text = "\n\n".join(texts)  # as paragraphs
    if not text.strip():
        raise SourceError(
            f"{', '.join(files)}: the prompt is empty", hint="write the prompt's text into the file"
        )

    return PromptSource(text=text, digest=hashlib.sha256(text.encode()).hexdigest())


def _read_tools(files: tuple[str, ...]) -> ToolSet:
    """The tools in the one file that a prompt names for them. Errors: SourceError."""
    (path,) = files
    try:
        return parse_tools(read_text(Path(path), TOOLS), name=path)
    except SourceError as error:
        raise Placed(error, "tools") from error


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{number} files"


def _unlisted(folder: Path, error: OSError, hint: str) -> Trouble:
    refused = explained(folder, error, folder=True, hint=hint)
    return Trouble(message=f"{folder} cannot be listed: {refused.reason}", hint=refused.hint)


def _printable(text: str) -> str:
    """A file name as text that can be printed and sent; bytes that are not UTF-8 are escaped."""
    return text.encode(errors="backslashreplace").decode()
