"""The status and its page of thousands of prompts.

In pieces, between which the event loop turns.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest

from rkcached.api.page.page import page
from rkcached.api.page.view import Rows, View
from rkcached.api.responses import Status
from rkcached.api.status import PIECE, pieces
from tests.unit.test_show import a_status, prompt

MANY = 20 * PIECE


def a_document(prompts: Iterator[dict[str, Any]]) -> Status:
    cache = {**a_status([])["cache"], "directory": "/c"}
    unknown = (
        *("runtime", "measures_reuse", "pid", "memory_bytes", "cpu_s", "model_load_ms", "preload"),
    )
    model = {"embedding": False, "rerank": False, **dict.fromkeys(unknown), "preload_trouble": ""}
    return Status.model_validate(
        {
            **a_status([]),
            "cache": cache,
            "reconcile": {"looks": 1, "last_look_ms": 1.0, "builds": 0},
            "models": [{**one, **model} for one in a_status([])["models"]],
            "building": prompt(
                "p0", "building", progress={"done_tokens": 7, "total_tokens": 9, "elapsed_ms": 1.0}
            ),
            "prompts": prompts,
        }
    )


def many() -> Iterator[dict[str, Any]]:
    return (prompt(f"p{number}", "fresh") for number in range(MANY))


async def received(chunks: AsyncGenerator[bytes]) -> tuple[str, int]:
    """What comes, and how often the event loop turned for others meanwhile."""
    turns, done = 0, False

    async def others() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    whole = b"".join([chunk async for chunk in chunks])
    done = True
    await task
    return whole.decode(), turns


def html(status: Status) -> AsyncGenerator[bytes]:
    rows = Rows(keys=(), matching=MANY, total=MANY, states={"fresh": MANY})
    return page(status, View(), rows, None)._chunks


@pytest.mark.parametrize("made", [pieces, html])
async def test_the_loop_turns_between_the_pieces(
    made: Callable[[Status], AsyncGenerator[bytes]],
) -> None:
    """Nobody waits until thousands of prompts are told of."""
    whole, turns = await received(made(a_document(many())))
    assert all(whole.count(f"p{number}") for number in range(MANY))
    assert turns >= MANY / PIECE / 2


@pytest.mark.parametrize("count", [0, 1, PIECE, PIECE + 1])
async def test_the_pieces_are_one_document(count: int) -> None:
    """The same as if it were written at once, for every number of prompts."""
    told = [prompt(f"p{number}", "fresh") for number in range(count)]
    whole, _ = await received(pieces(a_document(iter(told))))
    document = json.loads(whole)
    assert document["prompts"] == told
    assert document["building"]["progress"]["done_tokens"] == 7
    assert list(document)[-1] == "prompts"


async def test_the_page_has_the_words_of_the_commands() -> None:
    """Warnings in one line with the rest on demand, learned prompts, retired caches, answers."""
    document = a_document(iter([prompt("learned-1", "fresh", learned=True)]))
    retired = {"model": "m", "prompt": "old", "fingerprint": "f", "tokens": 1, "size_bytes": 2}
    changed = {
        "notices": ["the first", "the second"],
        "retired": [{**retired, "retired_at": 0.0, "kept_until": 1.0}],
        "cache": {**document.cache.model_dump(), "retired": 1, "retired_bytes": 2},
        "answers": {"partial": 1234},
        "recent": [{"time": 1.0, "model": "m", "prompt": "a", "state": "partial", "ttft_ms": 5.0}],
    }
    whole, _ = await received(html(Status.model_validate(document.model_dump() | changed)))
    summary, _, rest = whole.partition("</summary>")
    assert "2 warnings: the first" in summary
    assert '<p class="warn">the second</p>' in rest
    assert '<td role="cell" class="state fresh good">fresh, learned</td>' in whole
    assert "retired: 1 (m/old), 2 B, kept at least until" in whole
    assert "1,234 partial" in whole
    assert '<rect class="warn"' in whole
    assert "partial 5\N{NO-BREAK SPACE}ms" in whole


async def test_the_page_tells_of_the_build() -> None:
    """Above the table, whose rows come later."""
    whole, _ = await received(html(a_document(many())))
    assert whole.index("building m/p0") < whole.index("7 of 9 tokens") < whole.index('id="prompts"')
