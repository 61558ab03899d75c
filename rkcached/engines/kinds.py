"""The names of the engines, as the manifest writes them."""

from __future__ import annotations

from enum import StrEnum


class EngineKind(StrEnum):
    RKLLM = "rkllm"
    LLAMACPP = "llamacpp"
    MEMORY = "memory"
