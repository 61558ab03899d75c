"""The KV states of llama.cpp's server, which it calls slots.

They share the cells of one context. Where a run needs the room of others, llama.cpp clears those;
where a file does, they are cleared here, the one that was not chosen for the longest time first.
"""

from __future__ import annotations

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

    def save(self, path: Path) -> int:
        """Write the chosen one to a file; returns its tokens. Errors: RefusedError, EngineError."""
        return int(self._act("save", self.chosen, path)["n_saved"])

    def restore(self, path: Path) -> int:
        """Read the chosen one from a file; returns its tokens.

        If it is refused there may have been no room, so others give way. Errors: RefusedError, when
        there are none any more; EngineError.
        """
        while True:
            try:
                tokens = int(self._act("restore", self.chosen, path)["n_restored"])
            except RefusedError:
                if not self._erase_oldest():
                    raise
            else:
                self._sizes[self.chosen] = tokens
                return tokens

    def erase(self, slot: int) -> None:
        self._act("erase", slot)
        self._sizes[slot] = 0

    def note_run(self, tokens: int, context_tokens: int) -> None:
        """A run has left so many tokens in the chosen one.

        Others that llama.cpp cleared for it are cleared once more: one that is taken for empty, and
        is not, would be reused for anybody.
        """
        self._sizes[self.chosen] = tokens
        if sum(self._sizes) <= context_tokens:
            return

        theirs = {slot["id"]: slot for slot in self._endpoints.ask("GET", "/slots")}
        for slot, size in enumerate(self._sizes):
            if size and slot != self.chosen and not theirs[slot].get("n_prompt_tokens"):
                self.erase(slot)

    def _erase_oldest(self) -> bool:
        """Clear the one, beside the chosen, that was not chosen for the longest time, if any."""
        for slot in self._order[:-1]:
            if self._sizes[slot]:
                self.erase(slot)
                return True
        return False

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
