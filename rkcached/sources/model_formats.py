"""Recognises files that are no model of the engine, by their first bytes. Pure.

A mistaken path or a failed download is told apart from a damaged model, as each has another remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rkcached.engines.kinds import EngineKind
from rkcached.engines.registry import ENGINES, EngineEntry
from rkcached.sources.records import Trouble

START_BYTES: Final = 64

_NPU: Final = "get the model as .rkllm for your chip, or convert it; docs/rkllm.md says how"
_CPU: Final = (
    "get the model as GGUF, or convert it with convert_hf_to_gguf.py of llama.cpp; "
    "docs/models.md says where to get one"
)

# The first bytes in small letters, what such a file is, and the next thing to do.
_OTHERS: Final = (
    (b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull` in its repository"),
    (b"<!doctype html", "a web page", "download the file itself, not the page about it"),
    (b"<html", "a web page", "download the file itself, not the page about it"),
)
_SET_ENGINE: Final = "set engine.kind to llamacpp, which reads it, or path to another file"
_UNKNOWN: Final = "set path to a file of that format, or engine.kind to the engine that reads it"


def not_for(engine: EngineEntry, path: Path, start: bytes) -> Trouble | None:
    """The trouble of a file that is no model for this engine; None if it may be one.

    `start`: the first START_BYTES of the file.
    """
    what, hint = _other(engine, start)
    if start.startswith(engine.model_magic) and not what:
        return None

    message = f"{path} is not a {engine.model_format}"
    return Trouble(message=f"{message}, but {what}" if what else message, hint=hint)


def _other(engine: EngineEntry, start: bytes) -> tuple[str, str]:
    """Name what the file is instead, empty if that is not known; and the next thing to do."""
    if not start:
        return "empty", "its download or copy has failed: get the file again"
    for beginning, what, hint in _OTHERS:
        if start.lower().startswith(beginning):
            return what, hint
    convert = _NPU if engine.on_npu else _CPU
    if start.startswith(b"PK\x03\x04"):
        return "a ZIP archive, as PyTorch writes models", convert
    if start[8:10] == b'{"':  # after the length of the header
        return "a safetensors file", convert

    gguf = ENGINES[EngineKind.LLAMACPP]
    if engine is not gguf and start.startswith(gguf.model_magic):
        return f"a {gguf.model_format}", _SET_ENGINE
    return "", _UNKNOWN
