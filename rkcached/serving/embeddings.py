"""Makes embeddings: each text is one operation of its own, so that a long list does not keep others waiting."""

from __future__ import annotations

import asyncio
from collections import Counter

from rkcached import errors
from rkcached.api.prepare import Preparation, as_request_error
from rkcached.api.requests import EmbeddingRequest
from rkcached.errors import RequestError
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.loop import Reconciler
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers


class Embeddings:
    def __init__(
        self, reconciler: Reconciler, preparation: Preparation, workers: Workers, gates: Gates
    ) -> None:
        self._reconciler = reconciler
        self._preparation = preparation
        self._workers = workers
        self._gates = gates
        self._requests: Counter[str] = Counter()

    async def make(self, request: EmbeddingRequest) -> tuple[list[bytes], int]:
        """A vector (little-endian float32, of length 1) for each input, and the tokens of all.

        Errors: RequestError.
        """
        serving = self._reconciler.snapshot.manifest.serving
        name = self._preparation.embedding(request.model).name
        if any(isinstance(content, str) and "\0" in content for content in request.each()):
            said = "the text has a NUL character"
            raise RequestError(
                400,
                said,
                code="invalid_value",
                param="input",
                hint="many runtimes stop reading there",
            )
        if self._requests[name] > serving.queue:
            raise RequestError(
                503,
                f"{serving.queue} requests wait for the model {name!r} already",
                code="queue_full",
                hint="try again in a moment; serving.queue in the manifest is the limit",
                retry_after_s=1,
            )
        self._requests[name] += 1
        try:
            async with asyncio.timeout(serving.request_timeout_s):
                embedded = [await self._one(name, content) for content in request.each()]
        except TimeoutError:
            limit_s = serving.request_timeout_s
            said = f"the request was not answered within {limit_s:g} s"
            raise RequestError(
                504, said, code="request_timeout", hint="send fewer texts at once"
            ) from None
        except errors.RkcachedError as error:
            raise as_request_error(error, text="input") from error
        finally:
            self._requests[name] -= 1
        return [one.vector for one in embedded], sum(one.tokens for one in embedded)

    async def _one(self, name: str, content: str | tuple[int, ...]) -> protocol.Embedded:
        engine = self._reconciler.snapshot.manifest.engine

        def make(operation_id: int) -> protocol.Embed:
            if isinstance(content, str):
                return protocol.Embed(id=operation_id, text=content)
            return protocol.Embed(id=operation_id, tokens=content)

        async with self._gates.hold(name, Priority.LIVE, concurrent=engine.concurrent):
            worker = self._workers.get(worker_model(engine, self._preparation.embedding(name)))
            done = await worker.run(make)
        if not isinstance(done, protocol.Embedded):
            raise TypeError(done)
        return done
