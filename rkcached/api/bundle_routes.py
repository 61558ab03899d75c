"""The HTTP route that imports a bundle: its body is the bundle's file, however large that is.

It is read as it comes, and one prompt cache at a time lies on the disk beside those in use. While
one is proven, nothing more is read, so the client waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rkcached.api.endpoints import endpoint
from rkcached.api.exchange import answer
from rkcached.api.responses import BundleImported
from rkcached.errors import FormatError, NotTrusted, RequestError, WorkerUnavailable
from rkcached.reconcile.loop import Reconciler
from rkcached.store.bundles import BundleReader


class BundleApi:
    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    @endpoint(
        "POST",
        "/v1/import",
        summary="Import the bundle in the body: publish its prompt caches that are declared here, "
        "and prove themselves. With ?prove=true each is compared with a prefill, and the bundle "
        "need not be signed.",
        answers={200: BundleImported},
        errors=(400, 415, 503),
        admin=True,
    )
    async def _import(self, request: Request) -> Response:
        body = _Body(request.stream())
        prefill = request.query_params.get("prove") == "true"
        try:
            outcomes = await self._reconciler.import_bundle(
                BundleReader(body.read), prefill=prefill
            )
        except ClientDisconnect as error:
            raise RequestError(499, "the client went away", code="client_gone") from error
        except FormatError as error:
            await body.drain()  # or its client does not hear why
            code = "bundle_damaged"
            if isinstance(error, NotTrusted):
                code = "bundle_not_trusted"
            raise RequestError(400, error.message, code=code, hint=error.hint) from error
        except WorkerUnavailable as error:
            raise RequestError(
                503, error.message, code="shutting_down", hint=error.hint, retry_after_s=2
            ) from error
        return answer(BundleImported.model_validate({"prompts": outcomes}, from_attributes=True))


class _Body:
    """The body of a request, in pieces of the size that is asked for."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._buffer = bytearray()

    async def read(self, most_bytes: int) -> bytes:
        """So many bytes, or fewer at the end. Errors: ClientDisconnect."""
        while len(self._buffer) < most_bytes:
            chunk = await anext(self._chunks, None)
            if chunk is None:
                break
            self._buffer += chunk
        data = bytes(self._buffer[:most_bytes])
        del self._buffer[:most_bytes]
        return data

    async def drain(self) -> None:
        with contextlib.suppress(ClientDisconnect):
            async for _ in self._chunks:
                pass
