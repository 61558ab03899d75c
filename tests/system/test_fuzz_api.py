"""schemathesis, which we did not write, on the API's own description.

Valid and invalid requests to each operation.

It holds every answer to the description: its status, its type, its fields; and no request may be a
server error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
import requests
import schemathesis
from conftest import Workspace
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
KNOWN = ["m", "m/a", "v", "nobody"]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    space = Workspace(tmp_path_factory.mktemp("fuzzed"))
    space.memory_model()
    space.write("a.md", "You are prompt A.\n")
    space.declare("{a: a.md}", model="  v: {path: m.model, embedding: true}")
    space.start()
    space.wait_settled()
    yield space
    assert space.ask("m/a")["rkcached"]["state"] == "hit"
    assert space.stop() == 0
    assert "Traceback" not in space.log_text()
    assert "request crashed" not in space.log_text()


def described(space: Workspace, *, admin: bool) -> dict[str, Any]:
    """What the socket says of itself.

    Model names are narrowed to a few, else nearly all requests were 404.
    """
    description: dict[str, Any]
    description = space.request("GET", "/openapi.json", admin=admin).json()
    for schema in description["components"]["schemas"].values():
        model = schema.get("properties", {}).get("model")
        if model and model.get("type") == "string" and schema.get("title", "").endswith("Request"):
            model["enum"] = KNOWN
    for path, operations in description["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if path.startswith("/v1/cache/{model}") and parameter["name"] == "model":
                    parameter["schema"]["enum"] = ["m", "v", "nobody"]
    for endless in ("/v1/events", "/v1/models/lend"):  # answers that never end
        description["paths"].pop(endless, None)
    return description


def is_valid(case: Any, description: dict[str, Any]) -> bool:
    """Whether the description allows this request, all of which is its body, after all.

    schemathesis breaks one of several forms of a message, which may make another good one: of the
    role `system` it makes `developer`.
    """
    operation = description["paths"][case.operation.path][case.operation.method]
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if schema is None or operation.get("parameters"):  # then these may be what is wrong
        return False
    whole = {**schema, "components": description["components"]}
    return bool(jsonschema.Draft202012Validator(whole).is_valid(case.body))


def check(case: Any, space: Workspace, description: dict[str, Any], *, admin: bool) -> None:
    prepared = requests.Request(**case.as_transport_kwargs(base_url="http://d")).prepare()
    with space.http(admin=admin) as client:
        request = httpx.Request(
            prepared.method or "",
            prepared.url or "",
            headers=dict(prepared.headers),
            content=prepared.body,
        )
        response = client.send(request)
    checks = [one for one in CHECKS if one is not negative_data_rejection]
    if response.is_success and not is_valid(case, description):
        checks.append(negative_data_rejection)
    case.validate_response(response, checks=checks)


EXAMPLES = int(os.environ.get("RKCACHED_FUZZ_EXAMPLES", "4"))
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("admin", [False, True], ids=["everyone", "admin"])
def test_every_operation_keeps_its_word(
    fuzzed: Workspace, mode: GenerationMode, *, admin: bool
) -> None:
    """Many requests that fit its description, and as many that do not, where that is possible."""
    tried = 0
    description = described(fuzzed, admin=admin)
    for found in schemathesis.openapi.from_dict(description).get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing in it can be wrong

        @SETTINGS
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            check(case, fuzzed, description, admin=admin)

        ask()
        tried += 1
    assert tried == (19 if mode is GenerationMode.NEGATIVE else 48)
