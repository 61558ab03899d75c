"""Tells what a worker's process can open of the store.

The kernel has noted folders, and not their paths. Of a folder that was made anew since, the process
sees nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from rkcached.host.landlock import Reach
from rkcached.worker.model import WorkerModel, reach_of

StoreReach = Callable[[str], Reach]
"""The folders of a store that the worker of this model works in. Blocking."""


class OpenedFolders:
    """Those of the process that was started last."""

    def __init__(self, store: StoreReach | None) -> None:
        """Without a `store` a process can open all files."""
        self._store = store
        # Each path with the folder that it was; None if there was none.
        self._folders: dict[str, os.stat_result | None] = {}

    def reach_now(self, model: WorkerModel, scratch_dir: str) -> Reach | None:
        """The files that a process can open that starts now; None: all. Blocking."""
        if self._store is None or not model.confine:
            return None
        store = self._store(model.name)
        self._folders = {path: _stat(path) for path in (*store.read, *store.fill)}
        return reach_of(model, scratch_dir, store)

    def lost(self) -> str:
        """The path of a folder that the process does not see; empty if there is none."""
        for path, opened in self._folders.items():
            now = _stat(path)
            if now is not None and (opened is None or not os.path.samestat(now, opened)):
                return path
        return ""


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - paths are text in a message
    except OSError:
        return None
