"""Choices that the manifest and the engines share, as the manifest writes them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class EngineKind(StrEnum):
    """The names of the engines."""

    RKLLM = "rkllm"
    LLAMACPP = "llamacpp"
    MEMORY = "memory"


class VerifyMode(StrEnum):
    """How much a build must prove, and how much it has proved."""

    OFF = "off"
    TIME = "time"
    """Never asked for: the most that can be proved where the library measures nothing. Loading it
    is faster."""
    HIT = "hit"
    """After loading it, only the probe was prefilled."""
    EXACT = "exact"
    """And the probe's answer has the same tokens."""


class Pooling(StrEnum):
    """The way in which the states of all tokens become one vector."""

    MEAN = "mean"
    LAST = "last"


RANK: Final = "rank"
"""Instead of a way of pooling: a query and a document become one score."""
