"""Which beginnings come again in requests, and are prefilled again each time? Pure.

Of each request the beginnings are noted that end at a multiple of BLOCK bytes, and the one that
ends with the system message. A beginning is known by a keyed hash alone: no text is kept, and who
does not have the key cannot find out by hashes what was asked. Users and models are kept apart,
each within a bound of its own, so that nobody's requests push out what is known of another's.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

BLOCK: Final = 256
"""Bytes. A beginning is told from others to this accuracy; a shorter one is not worth a word."""

MAX_BYTES: Final = 64 << 10
"""Of a request, no more is divided into blocks; its whole system message is noted all the same."""

MAX_BEGINNINGS: Final = 4096
"""For each user and model. The least recently used go first, the longer before the shorter."""

MAX_TABLES: Final = 16
"""Pairs of a user and a model; those who asked last. All together may take 20 MB."""

AFTER: Final = 3
"""So many requests make a beginning worth a suggestion."""

LEAST_PREFILLED: Final = 2
"""Of these, so many must have prefilled it: the first one always does."""

_ID_BYTES: Final = 6


class Noted(NamedTuple):
    """A request that was answered, as far as it matters here."""

    rendered: bytes
    """The whole prompt (UTF-8)."""
    prompt_tokens: int
    prefill_ms: float
    reused_bytes: int = 0
    """Of `rendered`: what was not prefilled; an estimate where the engine counts tokens."""
    declared_bytes: int = 0
    """Of `rendered`: what is declared or learned already."""
    system_bytes: int = 0
    """Where the system message ends in `rendered`; 0 if there is none, or the template changed it.
    """
    with_tools: bool = False


class Counted(NamedTuple):
    """A beginning of a request, and how often it came."""

    id: str
    size_bytes: int
    requests: int
    prefilled: int

    def is_worth_it(self, after: int) -> bool:
        """Whether it came at least `after` times and was prefilled more than once."""
        return self.requests >= after and self.prefilled >= LEAST_PREFILLED


@dataclass(slots=True)
class _Beginning:
    # The digest of the next shorter beginning that is noted.
    parent: bytes | None
    size: int
    requests: int = 0
    prefilled: int = 0
    # Of the requests that prefilled it.
    prefill_ms: float = 0.0
    tokens: int = 0
    system_bytes: int = 0
    with_tools: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A beginning that would be worth a prompt cache."""

    id: str
    """Means nothing to another daemon, nor to this one after a restart."""
    model: str
    owner: int
    """The uid of the user whose requests these are."""
    tokens: int
    """An estimate, by its share of the bytes of the last request."""
    size_bytes: int
    requests: int
    """So many began with it."""
    prefilled: int
    """In so many of them it was not found in the KV state, nor in a prompt cache."""
    prefill_ms: float
    """The mean of these."""
    system_bytes: int
    """See `Noted.system_bytes`."""
    with_tools: bool
    """The requests bring tools."""

    @property
    def beyond_system(self) -> bool:
        """It goes on after the system message, further than a template's marks there."""
        return self.size_bytes >= self.system_bytes + BLOCK

    @property
    def cost_ms(self) -> float:
        """The prefill that a prompt cache would have spared until now."""
        return self.prefill_ms * self.prefilled


_Table = OrderedDict[bytes, _Beginning]


class Repeats:
    """Counts of the beginnings of all users' requests. Not for several threads."""

    def __init__(self, key: bytes) -> None:
        """`key` is random and stays in this process: up to 64 bytes."""
        self._key = key
        self._tables: OrderedDict[tuple[str, int], _Table] = OrderedDict()

    def note(self, model: str, owner: int, request: Noted) -> list[Counted]:
        """Count the beginnings of a request; returns those, the longest first."""
        table = self._table(model, owner)
        length = len(request.rendered)
        share_tokens = request.prompt_tokens / max(1, length)
        share_ms = request.prefill_ms / max(1, length - request.reused_bytes)

        path: list[bytes] = []
        parent: bytes | None = None
        for size, digest in self._beginnings(model, owner, request):
            known = table.get(digest)
            if known is None:
                known = table[digest] = _Beginning(parent, size)
            known.requests += 1
            known.tokens = round(share_tokens * size)
            known.system_bytes = request.system_bytes
            known.with_tools = request.with_tools

            if size < request.declared_bytes + BLOCK:
                known.prefilled = 0
                known.prefill_ms = 0.0
            elif size >= request.reused_bytes + BLOCK:
                known.prefilled += 1
                known.prefill_ms += share_ms * (size - request.reused_bytes)
            path.append(digest)
            parent = digest

        path.reverse()
        for digest in path:  # the shortest was used last, so it outlives those that it begins
            table.move_to_end(digest)
        while len(table) > MAX_BEGINNINGS:
            table.popitem(last=False)
        return [_counted(digest, table) for digest in path if digest in table]

    def suggestions(self, owner: int | None = None, *, after: int = AFTER) -> list[Suggestion]:
        """The beginnings that came at least `after` times and were prefilled more than once.

        Those of one user, or of all (None); what cost most comes first. One that is part of a
        longer one that came as often is left out.
        """
        found = [
            suggestion
            for (model, of), table in self._tables.items()
            if owner in (None, of)
            for suggestion in _worth_it(model, of, table, after)
        ]
        found.sort(key=lambda suggestion: suggestion.cost_ms, reverse=True)
        return found

    def _table(self, model: str, owner: int) -> _Table:
        table = self._tables.setdefault((model, owner), OrderedDict())
        self._tables.move_to_end((model, owner))
        while len(self._tables) > MAX_TABLES:
            self._tables.popitem(last=False)
        return table

    def _beginnings(self, model: str, owner: int, request: Noted) -> Iterator[tuple[int, bytes]]:
        """The length and the digest of each beginning that is noted, the shortest first.

        Two users who ask the same have different digests.
        """
        text = memoryview(request.rendered)
        hasher = hashlib.blake2b(f"{model} {owner} ".encode(), key=self._key, digest_size=16)
        at = 0
        for size in sizes(len(text), request.system_bytes):
            hasher.update(text[at:size])
            at = size
            yield size, hasher.copy().digest()


def sizes(length: int, system_bytes: int) -> list[int]:
    """The lengths of the beginnings that are noted of a text of `length` bytes, ascending."""
    found = set(range(BLOCK, min(length, MAX_BYTES) + 1, BLOCK))
    if BLOCK <= system_bytes <= length:
        found.add(system_bytes)
    return sorted(found)


def _worth_it(model: str, owner: int, table: _Table, after: int) -> Iterator[Suggestion]:
    longer: dict[bytes, int] = {}
    for beginning in table.values():
        if beginning.parent is not None:
            longer[beginning.parent] = max(longer.get(beginning.parent, 0), beginning.requests)

    for digest, beginning in table.items():
        if beginning.requests < after or beginning.prefilled < LEAST_PREFILLED:
            continue
        if longer.get(digest, 0) >= beginning.requests:
            continue
        yield Suggestion(
            id=_id(digest),
            model=model,
            owner=owner,
            tokens=beginning.tokens,
            size_bytes=beginning.size,
            requests=beginning.requests,
            prefilled=beginning.prefilled,
            prefill_ms=beginning.prefill_ms / beginning.prefilled,
            system_bytes=beginning.system_bytes,
            with_tools=beginning.with_tools,
        )


def _counted(digest: bytes, table: _Table) -> Counted:
    known = table[digest]
    return Counted(_id(digest), known.size, known.requests, known.prefilled)


def _id(digest: bytes) -> str:
    return digest[:_ID_BYTES].hex()
