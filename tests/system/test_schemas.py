"""Schemas that no run can be held to.

400 before the first token, no worker dies, no prompt cache is blamed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

HOSTILE: list[dict[str, Any]] = [
    {"type": "string", "pattern": "^a{99999999999}$"},
    {"$schema": 5},
    {"$ref": "#/title", "title": "no schema"},
    {"if": {"$ref": "#"}},
    {"$ref": "#"},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 1_000_000_000},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 66_000},
]

UNKEPT: list[dict[str, Any]] = [
    {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    {"allOf": [{"type": "integer", "multipleOf": number} for number in (9973, 9967, 9949, 9941)]},
    {"type": "string", "pattern": "^(a{1000}){1000}$"},
    {"anyOf": [{"type": "object", "properties": {"k": {"const": at}}} for at in range(900)]},
]
"""llama.cpp cannot compile them, or gives up over them at some token."""


def format_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def refuse(space: Workspace, schema: dict[str, Any]) -> None:
    """Each way to bring a schema is refused by its parameter, in a stream, too."""
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for stream in (False, True):
        error = space.ask("m/a", status=400, response_format=format_of(schema), stream=stream)[
            "error"
        ]
        assert (error["code"], error["param"]) == ("invalid_schema", "response_format"), error
    error = space.ask("m/a", status=400, tools=[tool], tool_choice="required")["error"]
    assert (error["code"], error["param"]) == ("invalid_schema", "tools"), error


def test_hostile_schemas_cost_nobody_anything(two_prompts: Workspace) -> None:
    """The worker is the same one afterwards, and the prompt cache that was asked for is fresh.

    The cause: the third request with a pattern that ended the worker quarantined the prompt cache
    for good.
    """
    two_prompts.ask("m/a")
    (before,) = two_prompts.status()["models"]
    for schema in HOSTILE:
        refuse(two_prompts, schema)
    (after,) = two_prompts.status()["models"]
    assert (after["pid"], after["restarts"]) == (before["pid"], 0)
    assert two_prompts.prompt("a")["state"] == "fresh"
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_a_number_that_no_float_holds_does_not_fit(workspace: Workspace) -> None:
    """1e999 is infinity to Python, and infinity has no multiples.

    An answer that does not fit, and no crash.
    """
    workspace.memory_model(script={"hello": "1e999"})
    workspace.declare("{}")
    workspace.start()
    error = workspace.ask(
        "m", status=422, response_format=format_of({"type": "number", "multipleOf": 0.01})
    )["error"]
    assert error["code"] == "answer_does_not_fit"
    assert workspace.status()["models"][0]["restarts"] == 0


@pytest.mark.long
@pytest.mark.model
def test_no_free_prose_where_a_schema_is_not_in_force(
    workspace: Workspace, small_model: Path
) -> None:
    """llama.cpp goes on without a grammar that it cannot keep to.

    Nothing of what it then says reaches the client.
    """
    workspace.write("a.md", "You are brief.\n")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n"
        "    params: {max_context_len: 1024}\n    prompts: {a: a.md}\n",
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    pid = workspace.status()["models"][0]["pid"]
    for schema in (*HOSTILE, *UNKEPT):
        error = workspace.ask("m/a", status=400, response_format=format_of(schema), stream=True)[
            "error"
        ]
        assert error["code"] == "invalid_schema", error

    fitting = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = workspace.ask("m/a", response_format=format_of(fitting), max_tokens=60)
    assert json.loads(answer["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert answer["rkcached"]["state"] == "hit"
    assert workspace.status()["models"][0]["pid"] == pid
