"""Learns what repeats: which beginnings would be worth a prompt, and stores one that is wanted.

`Repeats` has hashes only, so a text is taken from the next request that begins so. On the event
loop, but for rendering and writing.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Final

import structlog

from rkcached.engines.base import RunStats
from rkcached.errors import RequestError, RkcachedError
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.declarable import check_that_it_begins, system_part, text_to_declare
from rkcached.serving.job import Job
from rkcached.serving.repeats import Noted, Repeats, Suggestion
from rkcached.serving.reuse import Found
from rkcached.sources.manifest import RESERVED_PROMPT
from rkcached.sources.problems import NAME, NAME_RULE
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts
from rkcached.worker.held import NOBODY

log = structlog.get_logger()

MAX_WISHES: Final = 256
"""Outcomes of older ones are forgotten."""

STORED: Final = "stored"
"""The outcome of a wish that came true."""


@dataclass(slots=True)
class Wish:
    """Somebody wants the text of the next request with this beginning to be stored."""

    key: Key
    size_bytes: int
    """Of the beginning."""
    owner: int
    """The user whose requests these are."""
    outcome: str = ""
    """Empty while it waits; "stored", or why nothing was."""
    hint: str = ""
    is_taken: bool = False
    """A request has come, and its text is being stored."""


class Learning:
    def __init__(self, reconciler: Reconciler, stored: StoredTexts) -> None:
        self._reconciler = reconciler
        self._stored = stored
        self._repeats = Repeats(secrets.token_bytes(32))
        # By the id of the beginning, the oldest first.
        self._wishes: dict[str, Wish] = {}
        self._background: set[asyncio.Task[None]] = set()

    def suggestions(self, viewer: int | None) -> list[Suggestion]:
        """The beginnings that this user repeats, or anybody (None)."""
        return self._repeats.suggestions(viewer)

    def wish_for(self, suggestion: Suggestion) -> Wish | None:
        return self._wishes.get(suggestion.id)

    def wish(self, viewer: int | None, wanted: str, name: str) -> tuple[Suggestion, Wish]:
        """Store the next request that has the beginning `wanted`, as a prompt of this name.

        Errors: RequestError for an id that this user may not know, and for a name that is taken
        or that no prompt can have.
        """
        suggestion = self._find(viewer, wanted)
        if not NAME.fullmatch(name) or name == RESERVED_PROMPT:
            raise RequestError(
                400,
                f"{name!r} cannot name a prompt",
                code="invalid_name",
                param="name",
                hint=NAME_RULE,
            )

        key = Key(suggestion.model, name)
        if self._is_taken(key, but=suggestion.id):
            raise RequestError(
                409,
                f"there is a prompt {key} already",
                code="prompt_exists",
                param="name",
                hint="choose another name: nothing is overwritten",
            )

        wish = Wish(key=key, size_bytes=suggestion.size_bytes, owner=suggestion.owner)
        self._wishes.pop(suggestion.id, None)
        self._wishes[suggestion.id] = wish
        while len(self._wishes) > MAX_WISHES:
            del self._wishes[next(iter(self._wishes))]
        return suggestion, wish

    def _find(self, viewer: int | None, wanted: str) -> Suggestion:
        for suggestion in self.suggestions(viewer):
            if suggestion.id == wanted:
                return suggestion
        raise RequestError(
            404,
            f"there is no suggestion {wanted!r}",
            code="suggestion_not_found",
            param="id",
            hint="`rkcached suggest` lists them; those of before a restart are forgotten",
        )

    def _is_taken(self, key: Key, but: str) -> bool:
        wanted = (
            wish.key
            for suggestion, wish in self._wishes.items()
            if suggestion != but and not wish.outcome
        )
        is_declared = key in self._reconciler.snapshot.desired.prompts
        return is_declared or key in wanted or self._stored.path(key).exists()

    # Requests

    def answered(self, job: Job, found: Found, stats: RunStats) -> None:
        """A request was answered from what was found for it."""
        if job.cold or job.owner == NOBODY:
            return

        rendered = job.prompt.encode()
        noted = self._noted(job, rendered, found, stats)
        for beginning in self._repeats.note(job.model.name, job.owner, noted):
            wish = self._wishes.get(beginning)
            if wish is None or wish.is_taken or wish.owner != job.owner:
                continue
            wish.is_taken = True
            task = asyncio.create_task(self._fulfil(wish, job, rendered))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _noted(self, job: Job, rendered: bytes, found: Found, stats: RunStats) -> Noted:
        loaded_bytes = found.chosen.common_bytes if found.chosen is not None else 0
        reused_bytes = loaded_bytes
        if stats.cached_tokens is not None:
            share = stats.cached_tokens / max(1, stats.prompt_tokens)
            reused_bytes = int(share * len(rendered))

        declared_bytes = found.nearest.common_bytes if found.nearest is not None else 0
        if job.named is not None:
            text = self._reconciler.snapshot.desired.texts.get(job.named, "").encode()
            begin = rendered.find(text)
            if begin >= 0:
                declared_bytes = max(declared_bytes, begin + len(text))

        return Noted(
            rendered=rendered,
            prompt_tokens=stats.prompt_tokens,
            prefill_ms=stats.prefill_ms,
            reused_bytes=reused_bytes,
            declared_bytes=declared_bytes,
            system_bytes=system_part(job, rendered).end,
            with_tools=job.with_tools,
        )

    async def _fulfil(self, wish: Wish, job: Job, rendered: bytes) -> None:
        """Store the text of this request; the wish tells the outcome."""
        key = wish.key
        try:
            text = text_to_declare(job, rendered, wish.size_bytes)
            await asyncio.to_thread(check_that_it_begins, job, rendered, text)
            if key in self._reconciler.snapshot.desired.prompts:
                wish.outcome = f"there is a prompt {key} by now"
                wish.hint = "choose another name: nothing is overwritten"
                return
            await asyncio.to_thread(self._stored.create, key, text)
        except RkcachedError as error:
            wish.outcome = error.message
            wish.hint = error.hint
            log.warning("suggestion not stored", **key._asdict(), why=error.message)
            return

        wish.outcome = STORED
        log.info("suggestion stored", **key._asdict(), uid=wish.owner)
        self._reconciler.look_again(now=True)
