"""Writes the demo's workspace for a model, once, and never over a visitor's edits."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Final

from rkcached.cli.init.folder import FoundModel, look_at
from rkcached.cli.init.text import ENGINE_WORDS, format_lines, scalar
from rkcached.cli.launcher import small_model
from rkcached.engines.registry import ENGINES
from rkcached.errors import RuntimeLibraryError, SourceError, StoreError, UsageError
from rkcached.sources.manifest import EngineConfig, Manifest
from rkcached.sources.manifest_file import manifest_text
from rkcached.sources.parser import parse

PROMPTS: Final = ("prompts/reviewer.md", "prompts/greenhouse.md")

_CONTEXT: Final = 2048
"""In tokens: room for each prompt and an answer, and little memory."""


def prepare(root: Path, model: Path | None, library: Path | None) -> list[str]:
    """Write what is not there yet, and look for the engine's runtime; returns findings in words.

    `model`: None for the small one. `library`: the runtime of a model for the NPU, None to look for
    it. Errors: ManifestError, RuntimeLibraryError, SourceError, StoreError, UsageError.
    """
    findings = []
    manifest = root / "manifest.yaml"
    if not manifest.exists():
        found = _look_at(model or small_model())
        text = _manifest_of(found, _library_of(found, library))
        _write(manifest, text.encode())
        findings.append(f"model {found.path}, chat template: {found.format}")

    declared = parse(manifest_text(manifest), file=manifest)
    _refuse_another(manifest, declared, model, library)
    for name in PROMPTS:
        if not (root / name).exists():
            _write(root / name, resources.files("rkcached.cli.demo").joinpath(name).read_bytes())

    engine = declared.engine
    runtime = ENGINES[engine.kind].locate_runtime(engine.library, engine.abi)
    if ENGINES[engine.kind].names_library:
        findings.append(f"runtime library {engine.library}, version {runtime.version}")
    return findings


def _look_at(path: Path) -> FoundModel:
    """Errors: SourceError."""
    found = look_at(path)
    if found.pools:
        raise SourceError(
            f"{path} is a model for {found.pools}, which answers nothing",
            hint="name one that answers; `rkcached init` declares models of both kinds",
        )
    return found


def _library_of(model: FoundModel, named: Path | None) -> Path | None:
    """The runtime library: as named, beside the model, or where it is usually installed.

    None for an engine that brings its own. Errors: RuntimeLibraryError, UsageError.
    """
    if not ENGINES[model.engine].names_library:
        if named is not None:
            raise UsageError("--library is for .rkllm models", hint="leave out --library")
        return None

    library = named
    if library is None:
        library = EngineConfig().library
        beside = model.path.with_name(library.name)
        if beside.is_file():
            library = beside

    if not library.is_file():
        raise RuntimeLibraryError(
            f"there is no runtime library at {library}",
            hint="docs/rkllm.md says where to get it; put it there or beside the model, or name it "
            "with --library FILE",
        )
    return library


def _manifest_of(model: FoundModel, library: Path | None) -> str:
    engine = f"{model.engine.value}    # {ENGINE_WORDS[model.engine]}"
    if library is not None and library != EngineConfig().library:
        engine += f"\n  library: {scalar(str(library))}"

    facts = {
        "@ENGINE@": engine,
        "@NAME@": scalar(model.name),
        "@MODEL@": scalar(str(model.path)),
        "@FORMAT@": "\n".join(format_lines(model, model.path.parent / "demo")),
        "@CONTEXT@": str(min(_CONTEXT, model.context_tokens)),
    }
    text = resources.files("rkcached.cli.demo").joinpath("manifest.yaml").read_text("utf-8")
    for place, fact in facts.items():
        text = text.replace(place, fact)
    return text


def _refuse_another(
    manifest: Path, declared: Manifest, model: Path | None, library: Path | None
) -> None:
    """Refuse what the command line names and the manifest does not. Errors: UsageError."""
    hint = "edit it, or name another workspace with --dir DIR"
    paths = {config.path for config in declared.models.values()}
    if model is not None and model not in paths:
        raise UsageError(f"{manifest} is of another model, and is not overwritten", hint=hint)
    if library is not None and library != declared.engine.library:
        raise UsageError(
            f"{manifest} names {declared.engine.library} as engine.library, and is not overwritten",
            hint=hint,
        )


def _write(path: Path, content: bytes) -> None:
    """Errors: StoreError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {error.strerror}",
            hint="name a folder that you may write to with --dir DIR",
        ) from error
