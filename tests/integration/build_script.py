"""One build of the memory engine in the store ROOT.

As a daemon and its worker do it: `build_script.py ROOT TEXT`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rkcached.engines.base import ModelSpec
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.memory import MemoryEngine
from rkcached.errors import StoreError
from rkcached.sources.records import Key
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.operations import Session
from tests.integration.test_store import make_sidecar


def build(root: Path, text: str) -> None:
    key = Key("m", "p")
    store = Store(root / "cache")
    store.open()
    session = Session(MemoryEngine(ModelSpec(path=str(root / "m.model"), context_tokens=0)))
    staged = store.staging.begin(key)
    operation = protocol.Build(
        id=1,
        prefix=text,
        probe=text + " Well?",
        path=str(staged),
        verify=VerifyMode.EXACT,
        min_tokens=0,
    )
    session.build(operation, lambda _: None, lambda: False)
    try:
        store.staging.seal(staged)
    except StoreError:
        store.staging.discard(staged)
        raise
    store.commit(key, staged, make_sidecar(key, staged.read_bytes(), text.encode()), text.encode())
    store.close()


if __name__ == "__main__":
    build(Path(sys.argv[1]), sys.argv[2])
