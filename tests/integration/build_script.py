"""One build of the memory engine in the store ROOT.

As a daemon and its worker do it: `build_script.py ROOT TEXT`. With a third argument `continued`, it
goes on from the artifact that is there, steps aside once, and goes on from what it had read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rkcached.engines.base import ModelSpec
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.memory import MemoryEngine
from rkcached.errors import Aborted, StoreError
from rkcached.host.digests import signature_of
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from rkcached.worker import building, protocol
from rkcached.worker.operations import Session
from tests.integration.test_store import make_sidecar

KEY = Key("m", "p")


def build(root: Path, text: str, *, continued: bool = False) -> None:
    store = Store(root / "cache")
    store.open()
    session = Session(MemoryEngine(ModelSpec(path=str(root / "m.model"), context_tokens=0)))
    base = None
    if continued:
        base = step_aside(session, store, text, base_of(store.scan().artifacts[KEY]))

    staged = store.staging.begin(KEY)
    built = session.build(operation(text, staged, base), lambda _: None, lambda: False)
    if base is not None:
        assert built.reused_tokens > 0, built
        store.staging.discard(Path(base.cache.path))
    try:
        store.staging.seal(staged)
    except StoreError:
        store.staging.discard(staged)
        raise
    store.commit(KEY, staged, make_sidecar(KEY, staged.read_bytes(), text.encode()), text.encode())
    store.close()


def operation(
    text: str, staged: Path, base: protocol.Base | None, partial: str = ""
) -> protocol.Build:
    return protocol.Build(
        id=1,
        prefix=text,
        probe=text + " Well?",
        path=str(staged),
        verify=VerifyMode.EXACT,
        min_tokens=0,
        base=base,
        partial=partial,
    )


def base_of(artifact: StoredArtifact) -> protocol.Base:
    assert artifact.signature is not None
    cache = protocol.CacheFile(
        path=str(artifact.path), signature=artifact.signature, fingerprint=artifact.fingerprint
    )
    return protocol.Base(cache=cache, tokens=artifact.tokens, prefill_ms=1.0)


def step_aside(session: Session, store: Store, text: str, base: protocol.Base) -> protocol.Base:
    """A build from this base that is interrupted after a batch; returns what it has read."""
    staged, partial = store.staging.begin(KEY), store.staging.begin(KEY)
    events: list[protocol.FromWorker] = []
    building.KEEP_MS = 0.0

    def stopped() -> bool:
        return sum(isinstance(event, protocol.Progress) for event in events) > 1

    try:
        session.build(operation(text, staged, base, str(partial)), events.append, stopped)
    except Aborted:
        store.staging.discard(staged)
    (kept,) = (event for event in events if isinstance(event, protocol.Kept))
    cache = protocol.CacheFile(
        path=str(partial), signature=signature_of(partial.stat()), fingerprint=""
    )
    return protocol.Base(cache=cache, tokens=kept.tokens, prefill_ms=kept.prefill_ms)


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2], continued="continued" in sys.argv[3:])
