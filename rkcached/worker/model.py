"""What a worker hosts, and how long it is waited for."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from rkcached.engines.base import ModelSpec
from rkcached.host.digests import Signature, signature_of


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """What a worker hosts.

    `identity` tells whether a running worker still hosts the right thing.
    """

    name: str
    identity: str
    implementation: str
    spec: ModelSpec
    """Without a scratch directory: each process gets its own."""
    idle_unload_s: float | None
    timeout_s: float | None = None
    """Replaces the deadlines for loading and for silence."""
    max_memory_bytes: int | None = None
    """What its process may take for itself."""
    trained_tokens: int | None = None
    """The model's own context, if that is known."""
    signatures: tuple[tuple[str, Signature], ...] = field(default=(), compare=False)
    """Path and signature of each file that `identity` was made of. A loaded model stays what it is
    when they change."""

    def replaced_file(self) -> str:
        """A file that is not the one which gave the model its identity, if any."""
        for path, signature in self.signatures:
            try:
                if signature_of(os.stat(path)) == signature:  # noqa: PTH116 - paths are text in a specification
                    continue
            except OSError:
                pass
            return path
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long, in seconds, the daemon waits for a worker before it kills it."""

    start_s: float = 300.0
    """From exec to Ready: loading a large model from a slow card."""
    silence_s: float = 300.0
    """Between two events of an operation: the longest batch of a prefill."""
    stop_s: float = 2.0
    """From asking a worker to leave to killing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Seconds before a worker is started again after its nth failure in a row; the first is forgiven."""

    base_s: float = 0.25
    limit_s: float = 30.0

    def delay(self, failures: int) -> float:
        return (
            0.0 if failures <= 1 else min(self.base_s * 2.0 ** min(failures - 2, 20), self.limit_s)
        )
