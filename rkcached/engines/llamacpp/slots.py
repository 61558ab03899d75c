"""The KV states of llama.cpp's server, which it calls slots.

They share the cells of one context, and each token of a run attends to the cells of all. So only
one is in the context at a time: the others are parked, in files in memory. To park one and to take
it back copies it twice; to leave it where it is would read all of it at each token.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from rkcached.engines.llamacpp.endpoints import Endpoints, RefusedError
from rkcached.errors import EngineError

_STATE_NAME = "state.bin"


class Slots:
    def __init__(self, endpoints: Endpoints, scratch: Path, count: int) -> None:
        """`scratch`: the folder that llama.cpp writes to and reads from."""
        self._endpoints = endpoints
        self._scratch = scratch
        # The tokens of each.
        self._sizes = [0] * count
        # In the order in which they were chosen.
        self._order = list(range(count))
        # Descriptors of files in memory: of those in the context, and of those that are only there.
        self._copies: dict[int, int] = {}
        self._parked: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def chosen(self) -> int:
        """The number of the slot that is acted on."""
        return self._order[-1]

    def choose(self, slot: int) -> None:
        self._order.remove(slot)
        self._order.append(slot)

    def tokens(self, slot: int) -> int:
        return self._sizes[slot]

    def tokens_when_idle(self) -> int | None:
        """The tokens of the chosen one; None while a run on it has not ended."""
        slot = self._endpoints.ask("GET", "/slots")[self.chosen]
        return None if slot["is_processing"] else int(slot.get("n_prompt_tokens", 0))

    def gather(self) -> None:
        """Have the chosen one in the context, and no other. Errors: EngineError.

        One that cannot be taken back is empty.
        """
        self._park_others()
        file = self._parked.get(self.chosen)
        if file is None:
            return
        try:
            tokens = int(self._act("restore", self.chosen, _path(file))["n_restored"])
        except EngineError:
            self.erase(self.chosen)
            return
        del self._parked[self.chosen]
        self._copies[self.chosen] = file
        self._sizes[self.chosen] = tokens  # the last one of an answer was never read

    def rest(self) -> None:
        """Copy the chosen one, so that it can be parked at once when another is chosen.

        Errors: EngineError.
        """
        has_others = any(size for slot, size in enumerate(self._sizes) if slot != self.chosen)
        if has_others and self.chosen not in self._parked:
            self._copy(self.chosen)

    def save(self, path: Path) -> int:
        """Write the chosen one to a file; returns its tokens. Errors: RefusedError, EngineError."""
        self.gather()
        return int(self._act("save", self.chosen, path)["n_saved"])

    def restore(self, path: Path) -> int:
        """Read the chosen one from a file; returns its tokens. Errors: RefusedError, EngineError.

        After an error it is empty.
        """
        self._park_others()
        self._drop_files(self.chosen)
        self._sizes[self.chosen] = 0
        tokens = int(self._act("restore", self.chosen, path)["n_restored"])
        self._sizes[self.chosen] = tokens
        return tokens

    def erase(self, slot: int) -> None:
        self._drop_files(slot)
        self._act("erase", slot)
        self._sizes[slot] = 0

    def note_run(self, tokens: int) -> None:
        """A run has left so many tokens in the chosen one."""
        self._drop_files(self.chosen)
        self._sizes[self.chosen] = tokens

    def close(self) -> None:
        for slot in range(len(self._sizes)):
            self._drop_files(slot)

    def _park_others(self) -> None:
        """Errors: EngineError."""
        for slot in self._order[:-1]:
            if not self._sizes[slot] or slot in self._parked:
                continue
            self._copy(slot)
            file = self._copies.pop(slot, None)
            if file is not None:
                self._act("erase", slot)
                self._parked[slot] = file

    def _copy(self, slot: int) -> None:
        """Have a file in memory with this one; none if the system has no memory for it."""
        if slot in self._copies or not self._sizes[slot]:
            return
        try:
            file = os.memfd_create("rkcached state", os.MFD_CLOEXEC)
        except OSError:
            return
        try:
            self._act("save", slot, _path(file))
        except RefusedError:
            os.close(file)
        except EngineError:
            os.close(file)
            raise
        else:
            self._copies[slot] = file

    def _drop_files(self, slot: int) -> None:
        for files in (self._copies, self._parked):
            if (file := files.pop(slot, None)) is not None:
                with contextlib.suppress(OSError):
                    os.close(file)

    def _act(self, action: str, slot: int, path: Path | None = None) -> Any:
        """llama.cpp takes names without a path only: a link in its folder leads to the file."""
        target = f"/slots/{slot}?action={action}"
        if path is None:
            return self._endpoints.ask("POST", target, {})

        link = self._scratch / _STATE_NAME
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(path.absolute())
        except OSError as error:
            raise EngineError(f"cannot make the link {link}: {error.strerror}") from error

        try:
            return self._endpoints.ask("POST", target, {"filename": _STATE_NAME})
        finally:
            link.unlink(missing_ok=True)


def _path(file: int) -> Path:
    """A name by which this process can open a file in memory."""
    return Path(f"/proc/self/fd/{file}")
