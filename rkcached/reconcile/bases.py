"""The prompt cache that a build goes on from, so that only the rest of its text has to be read.

It is the one that shares the longest beginning: of a prompt that begins alike, or of the same one
before an edit at its end. A model whose runtime turns out not to continue a prompt cache rightly is
built as a whole from then on, until it changes or the daemon starts anew.

On the event loop; reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rkcached.engines.kinds import VerifyMode
from rkcached.errors import RkcachedError, WorkerDied, WorkerTimeout
from rkcached.host.digests import signature_of
from rkcached.host.logs import log
from rkcached.plan.fingerprint import Fingerprint, differ_in_text_only, owner_in
from rkcached.plan.records import Build
from rkcached.reconcile.index import ArtifactIndex, Match
from rkcached.sources.records import Key
from rkcached.store.staging import Staging
from rkcached.worker import protocol

MOST_DEATHS = 2
"""A worker may die over a base for another reason, once."""


class Bases:
    """Chooses bases, and remembers the models that do better without."""

    def __init__(self) -> None:
        # The identities of models that are built as a whole.
        self._whole: set[str] = set()
        # By identity: how often the worker died over a base since the last that helped.
        self._deaths: dict[str, int] = {}

    def may_help(self, identity: str) -> bool:
        return identity not in self._whole

    def choose(
        self,
        index: ArtifactIndex,
        model: str,
        components: Mapping[str, str],
        prefix: str,
        probe: str,
    ) -> protocol.Base | None:
        """The base for a prefix, if there is one that is worth its load."""
        match = index.closest(model, prefix.encode(), owner_in(components))
        if match is None or not worth_loading(match):
            return None

        artifact = match.artifact
        if artifact.signature is None or not differ_in_text_only(artifact.components, components):
            return None
        return protocol.Base(
            cache=protocol.CacheFile(
                path=str(artifact.path),
                signature=artifact.signature,
                fingerprint=artifact.fingerprint,
            ),
            tokens=artifact.tokens,
            prefill_ms=artifact.sidecar.figures.prefill_ms,
            is_beginning=match.is_whole,
            probe=artifact.text.decode() + probe.removeprefix(prefix),
            answer=artifact.sidecar.answer_sha256,
        )

    def helped(self, identity: str) -> None:
        self._deaths.pop(identity, None)

    def failed(self, identity: str, model: str, error: RkcachedError) -> None:
        """A build with a base failed, in a way that the base or the runtime may be to blame for."""
        if isinstance(error, WorkerDied | WorkerTimeout):
            deaths = self._deaths[identity] = self._deaths.get(identity, 0) + 1
            if deaths < MOST_DEATHS:
                return
        self.give_up(identity, model, error.message)

    def give_up(self, identity: str, model: str, why: str) -> None:
        """Build this model's prompt caches as a whole from now on."""
        self._whole.add(identity)
        log.warning("prompt caches built as a whole", model=model, why=why)


class Partials:
    """The part that a build had read when it stepped aside, for its next attempt: of the last one.

    It is a staged file, so that nothing takes it for an artifact and a restart sweeps it.
    """

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._build: Build | None = None
        self._path: Path | None = None
        self._base: protocol.Base | None = None

    def of(self, build: Build) -> protocol.Base | None:
        """The part of this build that was kept."""
        if self._build is None or self._build.fingerprint.digest != build.fingerprint.digest:
            return None
        return self._base

    def holds(self, path: Path) -> bool:
        return path == self._path

    def keep(self, build: Build, path: Path, kept: protocol.Kept) -> None:
        """Take over a file that a worker has written."""
        try:
            signature = signature_of(path.stat())
        except OSError:
            self._staging.discard(path)
            return

        self.drop()
        cache = protocol.CacheFile(path=str(path), signature=signature, fingerprint="")
        self._build = build
        self._path = path
        self._base = protocol.Base(cache=cache, tokens=kept.tokens, prefill_ms=kept.prefill_ms)

    def drop_unwanted(self, wanted: Callable[[Key], Fingerprint | None]) -> None:
        """Remove the file, unless its build is still wanted: the prompt is to have that."""
        if self._build is None:
            return
        fingerprint = wanted(self._build.key)
        if fingerprint is None or fingerprint.digest != self._build.fingerprint.digest:
            self.drop()

    def drop(self) -> None:
        """Remove the file. Idempotent."""
        if self._path is not None:
            self._staging.discard(self._path)
        self._build = self._path = self._base = None


def worth_loading(match: Match) -> bool:
    """Whether reading what is shared takes longer than loading it and asking for its proof.

    By the figures that were measured when it was built; one that was not proven has none.
    """
    artifact = match.artifact
    figures = artifact.sidecar.figures
    if figures.verified == VerifyMode.OFF:
        return False
    spared_ms = figures.prefill_ms * match.common_bytes / max(1, len(artifact.text))
    return spared_ms > figures.load_ms + figures.warm_ttft_ms
