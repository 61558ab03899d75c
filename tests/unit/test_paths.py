"""Paths as clients of other servers write them."""

from __future__ import annotations

import pytest
from starlette.routing import Route

from rkcached.api import paths
from rkcached.api.anthropic.routes import AnthropicApi
from rkcached.api.bundle_routes import BundleApi
from rkcached.api.cache_routes import CacheApi
from rkcached.api.endpoints import Endpoint
from rkcached.api.llama_server import LlamaServerApi
from rkcached.api.ollama.routes import OllamaApi
from rkcached.api.openai_responses.routes import ResponsesApi
from rkcached.api.paths import RIGHT_ONES, usual_path
from rkcached.api.routes import Api
from rkcached.api.suggest_routes import SuggestApi


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1//chat/completions", "/v1/chat/completions"),
        ("/completions", "/v1/completions"),
        ("/embeddings/", "/v1/embeddings"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/models/m/a", "/v1/models/m/a"),
        ("/health", "/healthz"),
        ("/v1/health", "/healthz"),
        ("/health/", "/healthz"),
        ("/", "/"),
        ("//", "/"),
        ("", ""),
        ("*", "*"),
        ("/healthz", "/healthz"),
        ("/metrics", "/metrics"),
        ("/modelsx", "/modelsx"),
        ("/api/chat", "/api/chat"),
    ],
)
def test_the_usual_path(path: str, expected: str) -> None:
    assert usual_path(path) == expected


HANDLERS = (
    Api,
    BundleApi,
    CacheApi,
    SuggestApi,
    AnthropicApi,
    ResponsesApi,
    OllamaApi,
    LlamaServerApi,
)


def declared() -> set[str]:
    """The paths of all endpoints."""
    methods = [method for handlers in HANDLERS for method in vars(handlers).values()]
    found = [getattr(method, "rkcached_endpoint", None) for method in methods]
    return {one.path for one in found if isinstance(one, Endpoint)}


def test_every_endpoint_below_v1_is_known() -> None:
    """A new one has its path without /v1, too."""
    below = {path.split("/")[2] for path in declared() if path.startswith("/v1/")}

    assert below == paths._BELOW_V1


def test_the_right_ones_are_there() -> None:
    """An error sends nobody to an endpoint that does not exist, or from one that does."""
    routes = [Route(path, lambda _: None) for path in declared()]

    for wrong, right in RIGHT_ONES.items():
        assert right in declared()
        assert not any(route.path_regex.fullmatch(wrong) for route in routes)
