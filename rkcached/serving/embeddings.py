"""Makes embeddings. Each input is an operation of its own, so a long list does not block others."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence

from rkcached import errors
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.snapshot import Published
from rkcached.serving.failures import as_request_error, refuse_beyond_the_queue, timed_out
from rkcached.serving.models import find_embedding_model
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers

EmbeddingInput = str | tuple[int, ...]
"""A text, or the ids of its tokens."""


class Embeddings:
    def __init__(self, published: Published, workers: Workers, gates: Gates) -> None:
        self._published = published
        self._workers = workers
        self._gates = gates
        # By model: the users whose requests run or wait.
        self._owners: dict[str, list[int]] = defaultdict(list)

    async def make(
        self, model: str, inputs: Sequence[EmbeddingInput], owner: int
    ) -> tuple[list[bytes], int]:
        """A vector (little-endian float32, of length 1) for each input, and the tokens of all.

        `owner`: the uid of the client. Errors: RequestError.
        """
        config = self._published.now.manifest.serving
        owners = self._owners[model]
        refuse_beyond_the_queue(model, owners[1:], owner, config.queue)

        owners.append(owner)
        try:
            async with asyncio.timeout(config.request_timeout_s):
                results = [await self._embed(model, content, owner) for content in inputs]
        except TimeoutError:
            limit_s = config.request_timeout_s or 0.0  # without a limit there is no timeout
            raise timed_out(limit_s, hint="send fewer texts at once") from None
        except errors.RkcachedError as error:
            raise as_request_error(error, text_param="input") from error
        finally:
            owners.remove(owner)

        vectors = [result.vector for result in results]
        return vectors, sum(result.tokens for result in results)

    async def _embed(self, name: str, content: EmbeddingInput, owner: int) -> protocol.Embedded:
        engine = self._published.now.manifest.engine
        operation = _operation(content)

        async with self._gates.hold(
            name, Priority.LIVE, caller=owner, concurrent=engine.concurrent
        ):
            model = find_embedding_model(self._published.now, name)
            worker = self._workers.get(worker_model(engine, model))
            result = await worker.run(operation)

        if not isinstance(result, protocol.Embedded):
            raise TypeError(result)
        return result


def _operation(content: EmbeddingInput) -> protocol.Embed:
    if isinstance(content, str):
        return protocol.Embed(text=content)
    return protocol.Embed(tokens=content)
