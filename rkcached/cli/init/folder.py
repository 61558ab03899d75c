"""Finds the models and the prompts of a folder, by their names and headers. It writes nothing."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rkcached.engines.kinds import EngineKind
from rkcached.engines.llamacpp import gguf
from rkcached.engines.llamacpp.header import read_header
from rkcached.errors import SourceError
from rkcached.sources import tokenizer_files
from rkcached.sources.manifest import RESERVED_MODELS, RESERVED_PROMPT
from rkcached.sources.problems import NAME

WHERE_MODELS_COME_FROM: Final = "docs/models.md says where to get one"

MAX_FILES: Final = 20_000
MAX_DEPTH: Final = 4
MAX_CONTEXT: Final = 4096
"""Of the context that is suggested, in tokens: more takes memory that few prompts need."""

_ENGINES: Final = {".gguf": EngineKind.LLAMACPP, ".rkllm": EngineKind.RKLLM}
_PROMPT_SUFFIXES: Final = (".md", ".txt")
_PROMPT_FOLDERS: Final = frozenset({"prompts", "system_prompts", "system-prompts"})
# Files of a folder that are about it, and no prompts.
_ABOUT: Final = re.compile(
    r"(readme|licen[cs]e|notice|changelog|contributing|authors|security|code_of_conduct"
    r"|requirements|cmakelists|todo|robots|model[_-]?card)\b.*",
    re.IGNORECASE,
)
_PASSED_OVER: Final = frozenset({"cache", "state", "node_modules", "__pycache__", "venv", "build"})

# The ends of file names that say how the numbers are stored, or for which chip.
_STORED_AS: Final = re.compile(
    r"[-_.](i?q\d\w*|bf16|f16|f32|fp16|w\d+a\d+\w*|g\d+|hybrid(-ratio-\d\.\d+)?|opt(-\d+)?"
    r"|(rk|rv)\d{4}\w*|npu\d*|gguf|rkllm|\d{5}-of-\d{5})$",
    re.IGNORECASE,
)
_RANK: Final = 4  # LLAMA_POOLING_TYPE_RANK of llama.h
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9._-]+")

# The beginnings of model names, and the built-in chat template of each; the longest that fits.
_TEMPLATES: Final = {
    "chatglm3": "chatglm3",
    "deepseek-r1-distill": "deepseek-r1-distill",
    "exaone-3.5": "exaone3.5",
    "exaone-4": "exaone4",
    "gemma-2": "gemma2",
    "gemma2": "gemma2",
    "gemma-3": "gemma3",
    "gemma3": "gemma3",
    "gemma-4": "gemma4",
    "gemma4": "gemma4",
    "glm-4-9b-0414": "glm4-0414",
    "internlm2": "internlm2",
    "internlm3": "internlm3",
    "llama-3-": "llama3",
    "llama-3.1": "llama3.1",
    "llama-3.2": "llama3.2",
    "llama-3.3": "llama3.3",
    "llama3.1": "llama3.1",
    "llama3.2": "llama3.2",
    "llama3.3": "llama3.3",
    "minicpm3": "minicpm3",
    "minicpm4-": "minicpm4",
    "minicpm4.1": "minicpm4.1",
    "phi-3-mini": "phi3",
    "phi-3.5-mini": "phi3.5",
    "phi-4-mini": "phi4-mini",
    "qwen1.5": "qwen2",
    "qwen2-": "qwen2",
    "qwen2.5": "qwen2.5",
    "qwen3-": "qwen3",
    "qwen3.5-0.8b": "qwen3.5-small",
    "qwen3.5-2b": "qwen3.5-small",
    "qwen3.5": "qwen3.5",
    "qwen3.6": "qwen3.6",
    "smollm2": "smollm2",
    "smollm3": "smollm3",
    "telechat2": "telechat2",
    "tinyllama": "tinyllama",
    "zephyr": "zephyr",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundModel:
    name: str
    """As the manifest will have it."""
    path: Path
    engine: EngineKind
    trained_tokens: int | None = None
    """The context that its file states."""
    context_tokens: int = MAX_CONTEXT
    """The context to begin with."""
    template: str = ""
    """A built-in chat template that its name suggests; empty where its files have one."""
    own_template: str = ""
    """The place of the template that its files have; empty if they have none."""
    tokenizer: Path | None = None
    """The folder with the tokenizer's files, for an engine that is given them."""
    pools: str = ""
    """`embedding` or `rerank` for a model that answers nothing."""

    @property
    def format(self) -> str:
        """Where its chat template comes from, in words."""
        return self.own_template or self.template or "unknown, chatml is assumed; see the manifest"


@dataclass(slots=True)
class Found:
    """The models and prompts of a folder, sorted by their paths."""

    models: list[FoundModel] = field(default_factory=list)
    prompts: dict[str, Path] = field(default_factory=dict)
    """The files of texts by the names of the prompts."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Files that look like models or prompts and are not used, each with the reason."""


def look_into(folder: Path) -> Found:
    """The models and prompts in a folder and below it. Errors: SourceError; OSError."""
    found = Found()
    for path, why_not in _files(folder):
        engine = _ENGINES.get(path.suffix.lower())
        if why_not:
            if engine is not None or path.suffix.lower() in _PROMPT_SUFFIXES or path.is_dir():
                found.skipped.append((path, why_not))
        elif not _is_text(path):
            if engine is not None or path.suffix.lower() in _PROMPT_SUFFIXES:
                found.skipped.append((path, "its name is not UTF-8"))
        elif engine is not None:
            _add_model(found, path, engine)
        elif path.suffix.lower() in _PROMPT_SUFFIXES and _may_be_prompt(path, folder):
            _add_prompt(found, path)
    return found


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """All that is there, in order, with the reason why it cannot be used; empty if it can be.

    Errors: SourceError if there are too many.
    """
    seen = 0
    for place, folders, files in os.walk(folder, onerror=_raise):
        depth = len(Path(place).relative_to(folder).parts)
        inner = (name for name in folders if name[0] != "." and name not in _PASSED_OVER)
        folders[:] = sorted(inner) if depth < MAX_DEPTH else []
        for name in folders:
            if (linked := Path(place, name)).is_symlink():
                yield linked, "it is a link to a folder; name that folder to init"
        for name in sorted(files):
            seen += 1
            if seen > MAX_FILES:
                raise SourceError(
                    f"{folder} has more than {MAX_FILES:,} files",
                    hint="name the folder that has your models and prompts: rkcached init FOLDER",
                )
            path = Path(place, name)
            if name[0] != ".":
                yield path, _why_no_file(path)


def _is_text(path: Path) -> bool:
    """Whether its name is UTF-8, as that of all that a manifest names must be."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _raise(error: OSError) -> None:
    raise error


def _why_no_file(path: Path) -> str:
    """The reason why it is no file that can be read; empty if it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        link = "it is a link that leads nowhere" if path.is_symlink() else ""
        return link or error.strerror or "it cannot be read"
    return "" if stat.S_ISREG(mode) else "it is a pipe, a socket or a device, and no file"


# Models


def look_at(path: Path) -> FoundModel:
    """The model in a file. Errors: SourceError if it is none that can be used."""
    engine = _ENGINES.get(path.suffix.lower())
    if engine is None:
        raise SourceError(
            f"{path} is no model: its name ends in neither .gguf nor .rkllm",
            hint=WHERE_MODELS_COME_FROM,
        )

    try:
        path.stat()
        return _model(path, engine, _free_name(model_name(path), {*RESERVED_MODELS}))
    except (SourceError, OSError) as error:
        raise SourceError(
            f"{path} cannot be used: {_reason(error)}", hint=WHERE_MODELS_COME_FROM
        ) from error


def _add_model(found: Found, path: Path, engine: EngineKind) -> None:
    first = gguf.shards(path)
    if len(first) == 1 and re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        return  # another file of a split model, which its first one stands for

    name = _free_name(model_name(path), {*RESERVED_MODELS, *(model.name for model in found.models)})
    try:
        found.models.append(_model(path, engine, name))
    except (SourceError, OSError) as error:
        found.skipped.append((path, _reason(error)))


def _reason(error: SourceError | OSError) -> str:
    if isinstance(error, SourceError):
        return error.message
    return error.strerror or "it cannot be read"


def _model(path: Path, engine: EngineKind, name: str) -> FoundModel:
    """Errors: SourceError, OSError."""
    if "mmproj" in path.name.lower():
        raise SourceError("it reads images for another model, and rkcached sends text only")
    if engine is EngineKind.RKLLM:
        return _rkllm(path, name)
    return _gguf(path, name)


def _gguf(path: Path, name: str) -> FoundModel:
    """Errors: SourceError, OSError."""
    header = read_header(path)
    if header is None:
        raise SourceError("its header is damaged or cut off")
    facts = (
        gguf.inspect(path, lambda _: header) if len(gguf.shards(path)) == 1 else gguf.inspect(path)
    )

    tokens = facts.trained_tokens or MAX_CONTEXT
    pooling = max((v for k, v in header.integers.items() if k.endswith(".pooling_type")), default=0)
    has_template = bool(facts.tokenizer.template)
    pools = ""
    if pooling or re.search("embed|rerank", name):
        pools = "rerank" if pooling == _RANK or "rerank" in name else "embedding"
    return FoundModel(
        name=name,
        path=path,
        engine=EngineKind.LLAMACPP,
        trained_tokens=facts.trained_tokens,
        context_tokens=min(tokens, MAX_CONTEXT),
        template="" if has_template or pools else template_of(name),
        own_template="the model's file" if has_template else "",
        pools=pools,
    )


def _rkllm(path: Path, name: str) -> FoundModel:
    """The format of such files is not documented, so only names and neighbours say something."""
    tokenizer = _tokenizer_folder(path)
    pools = "embedding" if "embed" in name else ""
    return FoundModel(
        name=name,
        path=path,
        engine=EngineKind.RKLLM,
        template="" if tokenizer or pools else template_of(name),
        own_template="the tokenizer's files" if tokenizer else "",
        tokenizer=tokenizer,
        pools=pools,
    )


def _tokenizer_folder(model: Path) -> Path | None:
    """The folder with the files of a model's tokenizer: one of its own before the one it is in."""
    for folder in (model.with_suffix(""), model.parent / "tokenizer", model.parent):
        for name in (tokenizer_files.TOKENIZER, tokenizer_files.CONFIG):
            if (folder / name).is_file():
                return folder
    return None


def model_name(path: Path) -> str:
    """A short name: that of the file, without how its numbers are stored and for which chip."""
    name = path.stem
    while (shorter := _STORED_AS.sub("", name)) != name and shorter:
        name = shorter
    return _name_of(name)


def template_of(name: str) -> str:
    """The built-in chat template that a model's name suggests; empty if none does."""
    fitting = [known for known in _TEMPLATES if name.startswith(known)]
    if not fitting:
        return ""
    template = _TEMPLATES[max(fitting, key=len)]
    for kind in ("instruct", "thinking"):
        if template == "qwen3" and f"{kind}-2507" in name:
            return f"qwen3-{kind}-2507"
    return template


# Prompts


def _may_be_prompt(path: Path, folder: Path) -> bool:
    """Whether a text is one: it lies in the folder itself, or in one that is named for prompts."""
    if _ABOUT.fullmatch(path.name):
        return False
    above = path.relative_to(folder).parts[:-1]
    return not above or bool(_PROMPT_FOLDERS & {part.lower() for part in above})


def _add_prompt(found: Found, path: Path) -> None:
    if path.stat().st_size == 0:
        found.skipped.append((path, "it is empty"))
        return
    name = _free_name(_name_of(path.stem), {*found.prompts, RESERVED_PROMPT})
    found.prompts[name] = path


# Names


def _name_of(text: str) -> str:
    name = _NOT_IN_NAMES.sub("-", text.lower()).strip("._-")[:60].rstrip("._-")
    return name if NAME.fullmatch(name) else "model"


def _free_name(name: str, taken: set[str] | frozenset[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free = f"{name}-{number}"
        number += 1
    return free
