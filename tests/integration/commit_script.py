"""Commits, and dies at each step in turn: `commit_script.py ROOT CONTENT`.

For n = 1, 2, ... a child works on the store ROOT/n and ends, as in a power cut, just before its nth
call by which a commit reaches the file system; until one gets to the end. Prints how many calls
there were. The children are forks, so that Python starts once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rkcached.sources.records import Key
from rkcached.store.store import Store
from tests.integration.test_store import publish

DIED = 77
REACHES_DISK = (
    (os, "fsync"),
    (os, "fchmod"),
    (Path, "chmod"),
    (Path, "mkdir"),
    (Path, "open"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "write_bytes"),
)


def commit(root: Path, nth: int, content: str) -> None:
    store = Store(root)
    store.open()
    calls = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                os._exit(DIED)
            return function(*args, **kwargs)

        return call

    for owner, name in REACHES_DISK:
        setattr(owner, name, dying(getattr(owner, name)))
    publish(store, Key("m", "p"), content)


def main() -> None:
    nth, code = 0, DIED
    while code == DIED:
        nth += 1
        pid = os.fork()
        if pid == 0:
            commit(Path(sys.argv[1], str(nth)), nth, sys.argv[2])
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(nth - 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
