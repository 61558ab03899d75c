"""Records that describe a worker: its model, its deadlines, its backoff."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rkcached.engines.base import ModelSpec
from rkcached.host import landlock
from rkcached.host.digests import Signature, signature_of
from rkcached.host.landlock import Reach
from rkcached.worker import protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerModel:
    """The model that a worker hosts, and its options.

    A worker whose model has another `identity` hosts the wrong thing, and is replaced.
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
    """Limit of the memory that its process takes for itself."""
    confine: bool = True
    """See `host.confine`."""
    devices: tuple[str, ...] = ()
    """The device nodes that its engine opens."""
    trained_tokens: int | None = None
    """The model's own context, if that is known."""
    signatures: tuple[tuple[str, Signature], ...] = field(default=(), compare=False)
    """Path and signature of each file that `identity` was made of. They may change after the model
    is loaded."""

    def replaced_file(self) -> str:
        """The path of a file that changed since the identity was made of it; empty if none did."""
        for path, signature in self.signatures:
            try:
                info = os.stat(path)  # noqa: PTH116 - paths are text in a specification
                if signature_of(info) == signature:
                    continue
            except OSError:
                pass
            return path
        return ""


def reach_of(model: WorkerModel, scratch_dir: str, store: Reach) -> Reach:
    """The files that the worker of a model can open: also its scratch folder and part of the store.

    Blocking.
    """
    spec = model.spec
    files = [spec.path, spec.tokenizer, spec.lora, *(path for path, _ in model.signatures)]
    if spec.library and not spec.library.startswith(landlock.SYSTEM):
        # What it links to may lie beside it.
        files += map(str, Path(spec.library).parent.glob("*.so*"))
    return Reach(
        read=(*store.read, *filter(None, files)),
        fill=store.fill,
        own=(scratch_dir,),
        devices=model.devices,
    )


class Keeper(Protocol):
    """Keeps the states of conversations that something else takes the place of in memory."""

    def places(self, model: WorkerModel, count: int) -> tuple[str, ...]:
        """The paths of `count` new files for states; empty if conversations are not saved."""

    def take(self, model: WorkerModel, saved: protocol.Saved) -> None:
        """A state is in its file now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long, in seconds, the daemon waits for a worker before it kills it."""

    start_s: float = 300.0
    """From exec to Ready: loading a large model from a slow card."""
    silence_s: float = 300.0
    """Between two events of an operation: the longest batch of a prefill."""
    grammar_s: float = 30.0
    """From the end of a prefill to the first piece of an answer that is held to a JSON schema."""
    stop_s: float = 2.0
    """From asking a worker to leave to killing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Seconds before a worker is started again, doubled with each consecutive failure."""

    base_s: float = 0.25
    limit_s: float = 30.0

    def delay(self, failures: int) -> float:
        """Seconds after so many consecutive failures; none after the first."""
        if failures <= 1:
            return 0.0
        return min(self.base_s * 2.0 ** min(failures - 2, 20), self.limit_s)
