"""Finds the model that a request names. The error of one that cannot be used has the reason."""

from __future__ import annotations

from rkcached.errors import RequestError
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.names import hint_for
from rkcached.sources.records import Trouble

MOST_COMPARED = 500
"""Names that a wrong one is compared with: the event loop waits meanwhile."""


def find_model(snapshot: Snapshot, name: str) -> DesiredModel:
    """Errors: RequestError 404 for an unknown model, 503 for one that cannot be used now.

    400 for the name of a prompt.
    """
    model = snapshot.model(name)
    if model is None:
        raise _no_model(snapshot, name)
    if isinstance(model, Trouble):
        raise RequestError(
            503,
            f"the model {name!r} cannot be used: {model.message}",
            code="model_unavailable",
            hint=model.hint,
        )
    return model


def _no_model(snapshot: Snapshot, name: str) -> RequestError:
    model, slash, _ = name.partition("/")
    if slash and snapshot.model(model) is not None:
        return RequestError(
            400,
            f"{name!r} is MODEL/PROMPT, and here only a model can be named",
            code="invalid_value",
            param="model",
            hint=f"write {model!r}",
        )
    known = sorted(snapshot.desired.models)
    return RequestError(
        404,
        f"the model {name!r} does not exist",
        code="model_not_found",
        param="model",
        hint=hint_for(name, known, "models", most_compared=MOST_COMPARED),
    )


def find_text_model(snapshot: Snapshot, name: str) -> DesiredModel:
    """A model that writes text. Errors: RequestError."""
    model = find_model(snapshot, name)
    if model.config.pools:
        raise writes_nothing(model)
    return model


def writes_nothing(model: DesiredModel) -> RequestError:
    """The error of a request that needs a model that writes text."""
    if model.config.rerank:
        makes, code, path = "relevance scores", "model_is_reranker", "/v1/rerank"
    else:
        makes, code, path = "embeddings", "model_is_embedding", "/v1/embeddings"
    return RequestError(
        400,
        f"the model {model.name!r} makes {makes} only, and writes no text",
        code=code,
        param="model",
        hint=f"use {path} for it, or name a model that writes text",
    )


def find_embedding_model(snapshot: Snapshot, name: str) -> DesiredModel:
    """A model that makes vectors. Errors: RequestError."""
    model = find_model(snapshot, name)
    if not model.config.embedding:
        raise RequestError(
            400,
            f"the model {name!r} makes no embeddings",
            code="model_not_embedding",
            param="model",
            hint="ask a model that the manifest declares with embedding: true",
        )
    return model


def find_reranker(snapshot: Snapshot, name: str) -> DesiredModel:
    """A model that scores documents. Errors: RequestError."""
    model = find_model(snapshot, name)
    if not model.config.rerank:
        raise RequestError(
            400,
            f"the model {name!r} does not rank documents",
            code="model_not_reranker",
            param="model",
            hint="ask a model that the manifest declares with rerank: true",
        )
    return model
