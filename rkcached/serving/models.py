"""Finds the model that a request names. The error of one that cannot be used has the reason."""

from __future__ import annotations

from rkcached.errors import RequestError
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.records import Trouble


def find_model(snapshot: Snapshot, name: str) -> DesiredModel:
    """Errors: RequestError 404 for an unknown model, 503 for one that cannot be used now."""
    model = snapshot.model(name)
    if model is None:
        known = ", ".join(sorted(snapshot.desired.models)) or "none"
        raise RequestError(
            404,
            f"the model {name!r} does not exist; known models: {known}",
            code="model_not_found",
            param="model",
        )
    if isinstance(model, Trouble):
        raise RequestError(
            503,
            f"the model {name!r} cannot be used: {model.message}",
            code="model_unavailable",
            hint=model.hint,
        )
    return model


def find_text_model(snapshot: Snapshot, name: str) -> DesiredModel:
    """A model that writes text. Errors: RequestError."""
    model = find_model(snapshot, name)
    if model.config.embedding:
        raise RequestError(
            400,
            f"the model {name!r} makes embeddings only",
            code="model_is_embedding",
            param="model",
            hint="use /v1/embeddings",
        )
    return model


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
