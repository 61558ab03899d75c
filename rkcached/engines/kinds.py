"""Choices that the manifest and the engines share, as the manifest writes them."""

from __future__ import annotations

from enum import StrEnum


class EngineKind(StrEnum):
    """The names of the engines."""

    RKLLM = "rkllm"
    LLAMACPP = "llamacpp"
    MEMORY = "memory"


class Pooling(StrEnum):
    """The way in which the states of all tokens become one vector."""

    MEAN = "mean"
    LAST = "last"
