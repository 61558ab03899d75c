"""A request that finds its prompt being built, and by the figures does better to wait."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from conftest import Workspace

from rkcached.api.prepare import Preparation
from rkcached.api.requests import ChatRequest
from rkcached.reconcile.events import Events
from rkcached.serving import dispatcher
from rkcached.serving.conversations import Conversations
from rkcached.serving.dispatcher import Serving
from rkcached.serving.job import End
from rkcached.sources.records import Key
from rkcached.store.store import Store
from tests.integration.reconciling import reconciling
from tests.waiting import wait_until

TEXT = "You keep a café in Zürich, and never forget the salt. " * 20


@pytest.mark.parametrize("waits", [True, False])
async def test_a_request_that_waits_lets_the_build_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    """And is answered from all that the build has read, before the next build begins."""
    space = Workspace(tmp_path)
    space.memory_model(prefill_us_per_token=1000)
    space.write("a.md", TEXT)
    space.write("b.md", "You are another one. " * 60)
    space.declare("{a: a.md, b: b.md}")
    monkeypatch.setattr(dispatcher, "sooner_to_wait", lambda *_: waits)

    store = Store(space.cache)
    async with reconciling(space, store) as reconciler:
        serving = Serving(
            reconciler=reconciler,
            workers=reconciler._workers,
            gates=reconciler._builds._gates,
            events=Events(),
            conversations=Conversations(store.conversations, reconciler._published),
        )
        preparation = Preparation(reconciler._published)

        def reads() -> bool:
            building = reconciler.snapshot.building
            return building is not None and building.done_tokens > 300

        await asyncio.to_thread(wait_until, reads, "much is read")
        request = ChatRequest.model_validate(
            {"model": "m/a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        )
        job, _ = await preparation.chat(request, time.monotonic(), 1, 0)
        parts = [part async for part in serving.run(job)]
        (end,) = [part for part in parts if isinstance(part, End)]
        read = len(job.model.template.prefix(TEXT).encode())
        assert (end.report.cached_tokens == read) is waits
        building = reconciler.snapshot.building
        # The build that was waited for may still be publishing its file.
        assert building is None or waits or building.key == Key("m", "a")
        await serving.close(1.0)
        preparation.close()
