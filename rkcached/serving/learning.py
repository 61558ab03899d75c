"""Learns what repeats: which beginnings would be worth a prompt, and stores one that is wanted.

`Repeats` has hashes only, so a text is taken from the next request that begins so. With
`cache.learn` in the manifest, what repeats is stored without being asked for, for the one user who
sent it, and what was used least recently goes when the prompt caches of all these take too much. On
the event loop, but for rendering and writing.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from rkcached.engines.base import RunStats
from rkcached.errors import RequestError, RkcachedError, SourceError, StoreError
from rkcached.host.logs import log
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.declarable import check_that_it_begins, system_part, text_to_declare
from rkcached.serving.job import Job
from rkcached.serving.repeats import Counted, Noted, Repeats, Suggestion
from rkcached.serving.reuse import Found
from rkcached.sources.learned_texts import LEARNED, Learned
from rkcached.sources.manifest import RESERVED_PROMPT, LearnConfig
from rkcached.sources.problems import NAME, NAME_RULE
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts
from rkcached.worker.held import NOBODY

MAX_WISHES: Final = 256
"""Outcomes of older ones are forgotten."""

STORED: Final = "stored"
"""The outcome of a wish that came true."""


MAX_LEARNED: Final = 200
"""Texts, whether they have a prompt cache or not."""

MAX_KNOWN: Final = 4096
"""Beginnings that need no second thought."""

TOUCH_S: Final = 3600.0
"""The use of a learned prompt is noted on disk so often at most."""


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
    def __init__(self, reconciler: Reconciler, stored: StoredTexts, events: Events) -> None:
        self._reconciler = reconciler
        self._stored = stored
        self._repeats = Repeats(secrets.token_bytes(32))
        # By the id of the beginning, the oldest first.
        self._wishes: dict[str, Wish] = {}
        self._background: set[asyncio.Task[None]] = set()
        # By the id of a beginning: the prompt that was learned of it, or None if there can be none.
        self._known: dict[str, Key | None] = {}
        # By learned prompt, in Unix seconds.
        self._used: dict[Key, float] = {}
        self._touched: dict[Key, float] = {}
        self._too_large: set[Key] = set()
        self._making_room = asyncio.Lock()
        events.listen(self._take)

    def suggestions(self, viewer: int | None) -> list[Suggestion]:
        """The beginnings that this user repeats, or anybody (None)."""
        return self._repeats.suggestions(viewer)

    def wish_for(self, suggestion: Suggestion) -> Wish | None:
        return self._wishes.get(suggestion.id)

    def wish(self, wanted: str, name: str) -> tuple[Suggestion, Wish]:
        """Store the next request that has the beginning `wanted`, as a prompt of this name.

        Errors: RequestError for an id that is not known, and for a name that is taken or that no
        prompt can have.
        """
        suggestion = self._find(wanted)
        if not NAME.fullmatch(name) or name == RESERVED_PROMPT or name.startswith(LEARNED):
            raise RequestError(
                400,
                f"{name!r} cannot name a prompt",
                code="invalid_name",
                param="name",
                hint=_hint_for(name),
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

    def _find(self, wanted: str) -> Suggestion:
        for suggestion in self.suggestions(None):
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

        if found.chosen is not None:
            self._note_use(found.chosen.key)
        rendered = job.prompt.encode()
        noted = self._noted(job, rendered, found, stats)
        beginnings = self._repeats.note(job.model.name, job.owner, noted)
        for beginning in beginnings:
            wish = self._wishes.get(beginning.id)
            if wish is None or wish.is_taken:
                continue
            wish.is_taken = True
            self._do(self._fulfil(wish, job, rendered))

        config = self._reconciler.snapshot.manifest.cache.learn
        if config is None:
            return
        for beginning in beginnings:
            if beginning.is_worth_it(config.after):
                if beginning.id not in self._known:
                    self._do(self._learn(beginning, job, rendered, config))
                return

    def _do(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
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

    # Without being asked

    async def _learn(
        self, beginning: Counted, job: Job, rendered: bytes, config: LearnConfig
    ) -> None:
        """Make a prompt of what a request has of this beginning, if that can be."""
        self._remember(beginning.id, None)
        texts = self._stored.learned
        try:
            text = text_to_declare(job, rendered, beginning.size_bytes)
            await asyncio.to_thread(check_that_it_begins, job, rendered, text)
            owner = None if config.share else job.owner
            learned = texts.learned(job.model.name, owner, text)
            desired = self._reconciler.snapshot.desired
            if learned.key in desired.prompts or learned.key in self._too_large:
                return
            await asyncio.to_thread(texts.write, learned, text)
        except SourceError as error:
            log.debug("not learned", model=job.model.name, why=error.message)
            return
        except StoreError as error:
            del self._known[beginning.id]  # there may be room later
            log.warning("not learned", model=job.model.name, why=error.message, hint=error.hint)
            return

        self._remember(beginning.id, learned.key)
        self._used[learned.key] = time.time()
        log.info("prompt learned", **learned.key._asdict(), uid=job.owner, shared=config.share)
        await self._reconciler.next_look()
        await self._make_room()

    def _remember(self, beginning: str, key: Key | None) -> None:
        self._known[beginning] = key
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def _note_use(self, key: Key) -> None:
        """A request was answered from this prompt, which may be a learned one."""
        if key not in self._reconciler.snapshot.desired.learned:
            return
        now = time.time()
        self._used[key] = now
        if now - self._touched.get(key, 0.0) < TOUCH_S:
            return

        self._touched[key] = now
        self._do(self._touch(key))

    async def _touch(self, key: Key) -> None:
        for learned in await asyncio.to_thread(self._all_of, key.model):
            if learned.key == key:
                await asyncio.to_thread(self._stored.learned.used, learned.path)

    def _take(self, event: Event) -> None:
        """A prompt cache may have become one too many."""
        if event.kind != "build" or event.fields["result"] != "built":
            return
        key = Key(event.fields["model"], event.fields["prompt"])
        if key in self._reconciler.snapshot.desired.learned:
            self._do(self._make_room())

    async def _make_room(self) -> None:
        """Let go what was used least recently, until the prompt caches fit."""
        async with self._making_room:
            while (key := await self._one_too_many()) is not None:
                reason = "makes room"
                if key in self._too_large:
                    reason = "larger than cache.learn.max_bytes"
                log.info("learned prompt dropped", **key._asdict(), reason=reason)
                try:
                    await self.forget(key)
                except StoreError as error:
                    log.warning(
                        "learned prompt stays",
                        **key._asdict(),
                        why=error.message,
                        hint=error.hint,
                    )
                    return

    async def _one_too_many(self) -> Key | None:
        snapshot = self._reconciler.snapshot
        config = snapshot.manifest.cache.learn
        if config is None:
            return None

        keys = list(snapshot.desired.learned)
        sizes = {
            key: snapshot.artifacts[key].size_bytes for key in keys if key in snapshot.artifacts
        }
        for key, size_bytes in sizes.items():
            if size_bytes > config.max_bytes:
                self._too_large.add(key)  # or it would be learned again
                return key
        if sum(sizes.values()) > config.max_bytes:
            return min(sizes, key=await self._last_uses())
        if len(keys) > MAX_LEARNED:
            return min(keys, key=await self._last_uses())
        return None

    async def _last_uses(self) -> Callable[[Key], float]:
        """When each learned prompt was used last, in Unix seconds."""
        on_disk: dict[Key, float] = {}
        for model in self._reconciler.snapshot.desired.models:
            for learned in await asyncio.to_thread(self._all_of, model):
                on_disk[learned.key] = self._stored.learned.last_used(learned.path)
        return lambda key: self._used.get(key, on_disk.get(key, 0.0))

    async def forget(self, key: Key) -> bool:
        """Delete a learned text and its prompt cache; whether it was there. Errors: StoreError."""
        self._used.pop(key, None)
        for beginning in [known for known, of in self._known.items() if of == key]:
            del self._known[beginning]

        is_deleted = False
        for learned in await asyncio.to_thread(self._all_of, key.model):
            if learned.key == key:
                is_deleted = await asyncio.to_thread(self._stored.learned.delete, learned.path)
        await self._reconciler.forget(key)
        return is_deleted

    def _all_of(self, model: str) -> list[Learned]:
        """The learned texts of a model; none if they cannot be listed. Blocking."""
        with contextlib.suppress(OSError):
            return self._stored.learned.all(model, shared=True)
        return []


def _hint_for(name: str) -> str:
    """The next step after a name that no stored prompt can have."""
    if name == RESERVED_PROMPT:
        return f"choose another name: {name!r} is an address of its own in the HTTP API"
    if name.startswith(LEARNED):
        return f"choose another name: those of learned prompts begin with {LEARNED!r}"
    return NAME_RULE
