"""The manifest as a file: the last good one stays in force, and every input that it names.

Blocking. `manifest` parses the text.
"""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Iterator
from pathlib import Path

from rkcached import errors
from rkcached.engines.registry import ENGINES
from rkcached.host.access import refusal
from rkcached.host.digests import Signature, settled, signature_of
from rkcached.host.logs import log
from rkcached.host.regular import read_regular
from rkcached.messages.builtin import BUILTIN
from rkcached.sources import tokenizer_files
from rkcached.sources.manifest import Manifest, ModelConfig
from rkcached.sources.parser import parse
from rkcached.sources.patterns import links
from rkcached.sources.stored_texts import StoredTexts
from rkcached.sources.text_files import utf8

MAX_MANIFEST_BYTES = 4 << 20


class ManifestFile:
    """The manifest on disk: the last good one, and what is wrong with the present one."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.last_good = manifest
        self.error: errors.ManifestError | None = None
        self._signature: Signature | None = None

    def read(self) -> Manifest:
        """The last good manifest, which is the same object as before if nothing in it changed.

        Blocking.
        """
        signature, lasting = None, False
        with contextlib.suppress(OSError):
            info = self.path.stat()
            signature, lasting = signature_of(info), settled(info)

        if signature is not None and signature == self._signature:
            return self.last_good
        try:
            manifest = read_manifest(self.path)
        except errors.ManifestError as error:
            if self.error is None or self.error.problems != error.problems:
                for problem in error.problems:
                    log.error(
                        "manifest rejected",
                        problem=str(problem),
                        consequence="the last good one stays in force",
                    )

            self.error = error
            self._signature = None
            return self.last_good

        if self.error is not None:
            log.info("manifest mended", file=str(self.path))
            self.error = None

        self._signature = signature if lasting else None
        if manifest != self.last_good:
            log.info("manifest applied", file=str(self.path), models=len(manifest.models))
            self.last_good = manifest

        return self.last_good


def read_manifest(path: Path) -> Manifest:
    """Read and parse a manifest. Errors: ManifestError, also when the file cannot be read."""
    return parse(manifest_text(path), file=path)


def manifest_text(path: Path) -> str:
    """Read the text of the manifest's file. Errors: ManifestError."""
    try:
        info = path.stat()
        if stat.S_ISREG(info.st_mode) and info.st_size > MAX_MANIFEST_BYTES:
            why = f"{info.st_size:,} bytes are too many"
            raise OSError(errno.EFBIG, why)  # noqa: TRY301 - translated below
        if not stat.S_ISREG(info.st_mode):  # reading a pipe would wait for its writer
            raise OSError(errno.EINVAL, "it is not a regular file")  # noqa: TRY301
        return utf8(path, read_regular(path, MAX_MANIFEST_BYTES))
    except errors.SourceError as error:
        problem = errors.Problem(file=str(path), line=0, message=error.message, hint=error.hint)
        raise errors.ManifestError((problem,)) from error
    except OSError as error:
        reason = error.strerror
        hint = "name one with --manifest or RKCACHED_MANIFEST; `rkcached init` writes one"
        if (refused := refusal(path, error)) is not None:
            reason, hint = refused
        problem = errors.Problem(
            file=str(path), line=0, message=f"the manifest cannot be read: {reason}", hint=hint
        )
        raise errors.ManifestError((problem,)) from error


def model_files(model: ModelConfig) -> Iterator[Path]:
    """The files that the manifest names for a model, besides its own and its prompts'.

    Where it names a folder, all that are looked for in it, whether they are there or not.
    """
    if model.chat_template is not None and model.chat_template not in BUILTIN:
        yield from tokenizer_files.candidates(Path(model.chat_template))
    if model.tokenizer is not None:
        yield from tokenizer_files.candidates(model.tokenizer)
    if model.lora is not None:
        yield model.lora


def inputs(manifest: Manifest, stored: StoredTexts) -> tuple[list[Path], list[Path]]:
    """The files, and the folders with any content, whose change may change the plan."""
    engine = ENGINES[manifest.engine.kind]
    files = [manifest.file]
    folders: list[Path] = []

    for name, model in manifest.models.items():
        folders.append(stored.folder(name))
        files.extend(engine.model_files(model.path))
        files.extend(model_files(model))
        for prompt in model.prompts.values():
            files.extend(prompt.files)
            if prompt.tools is not None:
                files.append(prompt.tools)

        for pattern in model.prompts_from:
            folders.append(Path(pattern).parent)
            with contextlib.suppress(OSError):  # the look says so
                files.extend(links(pattern))

    if engine.names_library:
        files.append(manifest.engine.library)  # also while it is missing or no library
    with contextlib.suppress(errors.RkcachedError):
        files.extend(engine.locate_runtime(manifest.engine.library, manifest.engine.abi).files)

    return files, folders
