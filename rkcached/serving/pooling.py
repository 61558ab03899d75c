"""Has models read texts that they do not answer: for vectors, and for relevance scores.

Each text is an operation of its own, so a long list does not block others.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from rkcached import errors
from rkcached.plan.desired import DesiredModel
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.serving.failures import as_request_error, refuse_beyond_the_queue, timed_out
from rkcached.serving.models import find_embedding_model, find_reranker
from rkcached.worker import protocol
from rkcached.worker.gate import Gates, Priority
from rkcached.worker.pool import Workers

EmbeddingInput = str | tuple[int, ...]
"""A text, or the ids of its tokens."""

FindModel = Callable[[Snapshot, str], DesiredModel]


class PoolingModels:
    def __init__(self, published: Published, workers: Workers, gates: Gates) -> None:
        self._published = published
        self._workers = workers
        self._gates = gates
        # By model: the users whose requests run or wait.
        self._owners: dict[str, list[int]] = defaultdict(list)

    async def embed(
        self, model: str, inputs: Sequence[EmbeddingInput], owner: int
    ) -> tuple[list[bytes], int]:
        """A vector (little-endian float32, of length 1) for each input, and the tokens of all.

        `owner`: the uid of the client. Errors: RequestError.
        """
        results: list[protocol.Embedded] = await self._run_each(
            model, find_embedding_model, list(map(_embed, inputs)), owner, _part_of(inputs)
        )
        return [result.vector for result in results], sum(result.tokens for result in results)

    async def rank(
        self, model: str, query: str, documents: Sequence[str], owner: int
    ) -> tuple[list[float], int]:
        """The score of each document, and the tokens of all. Errors and `owner` as for `embed`."""
        operations = [protocol.Rank(query=query, document=document) for document in documents]

        def too_long(at: int) -> str:
            """The longer one: both are read together."""
            return "query" if len(query) > len(documents[at]) else f"documents.{at}"

        results: list[protocol.Ranked] = await self._run_each(
            model, find_reranker, operations, owner, too_long
        )
        return [result.score for result in results], sum(result.tokens for result in results)

    async def _run_each(
        self,
        model: str,
        find: FindModel,
        operations: Sequence[protocol.Embed | protocol.Rank],
        owner: int,
        too_long: Callable[[int], str],
    ) -> list[Any]:
        """The results, in order.

        `too_long`: the parameter to shorten if the operation at this place has too many tokens.
        Errors: RequestError.
        """
        config = self._published.now.manifest.serving
        owners = self._owners[model]
        refuse_beyond_the_queue(model, owners[1:], owner, config.queue)

        owners.append(owner)
        results: list[Any] = [None] * len(operations)
        at = 0
        try:
            async with asyncio.timeout(config.request_timeout_s):
                for at, operation in enumerate(operations):
                    results[at] = await self._run(model, find, operation, owner)
        except TimeoutError:
            limit_s = config.request_timeout_s or 0.0  # without a limit there is no timeout
            raise timed_out(limit_s, hint="send fewer texts at once") from None
        except errors.RkcachedError as error:
            raise as_request_error(error, text_param=too_long(at)) from error
        finally:
            owners.remove(owner)
        return results

    async def _run(
        self, name: str, find: FindModel, operation: protocol.Embed | protocol.Rank, owner: int
    ) -> Any:
        engine = self._published.now.manifest.engine
        async with self._gates.hold(
            name, Priority.LIVE, caller=owner, concurrent=engine.concurrent
        ):
            # Another look may have changed the model meanwhile.
            worker = self._workers.get(worker_model(engine, find(self._published.now, name)))
            return await worker.run(operation)


def _part_of(inputs: Sequence[EmbeddingInput]) -> Callable[[int], str]:
    """The parameter of each input: where there is one only, it may not have come as a list."""
    return lambda at: "input" if len(inputs) == 1 else f"input.{at}"


def _embed(content: EmbeddingInput) -> protocol.Embed:
    if isinstance(content, str):
        return protocol.Embed(text=content)
    return protocol.Embed(tokens=content)
