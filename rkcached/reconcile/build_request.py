"""A build and all that it needs, as the runner hands it to the builder."""

from __future__ import annotations

from dataclasses import dataclass, field

from rkcached.messages.tools import ToolSet
from rkcached.plan.desired import DesiredModel
from rkcached.plan.records import Build
from rkcached.reconcile.index import ArtifactIndex
from rkcached.sources.manifest import CacheConfig, EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A build and what it needs."""

    action: Build
    model: DesiredModel
    text: str
    """The system message."""
    tools: ToolSet | None
    """Those that belong to the prompt."""
    engine: EngineConfig
    cache: CacheConfig
    claimed_bytes: int
    """Of the other artifacts in the store, and of files that are not the store's."""
    foreign_bytes: int
    """Of the latter."""
    needed_bytes: int
    """The least that the prompt cache takes, if that is known; else 0."""
    first_try: float
    """The loop's time when this build was first started; it may have stepped aside since."""
    index: ArtifactIndex = field(default_factory=ArtifactIndex)
    """Of the store: a prompt cache that begins alike may be continued."""
