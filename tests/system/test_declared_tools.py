"""Tools that belong to a prompt: they are in its cache, and a request that names it gets them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import Workspace

from tests.waiting import BEFORE_RESCAN_S, wait_until

TEXT = "You are the clerk of a harbour. You answer in one sentence.\n"
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def tool(name: str, description: str) -> Any:
    parameters = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Its name."},
            "days": {"type": "integer", "description": "How many."},
        },
        "required": ["city"],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", "The weather of a city."), tool("tide", "The tides of a harbour.")]
CONVERSATION = [
    {"role": "system", "content": TEXT},
    {"role": "user", "content": "hello"},
]


def harbour(space: Workspace, template: str = "chatml", **model: Any) -> Workspace:
    """A daemon with the prompt `clerk`, which has tools, and `plain`, which has none."""
    space.memory_model(**model)
    space.write("clerk.md", TEXT)
    space.write("tools.json", json.dumps(TOOLS, indent=2))
    space.declare(
        "{clerk: {files: clerk.md, tools: tools.json, description: harbour}, plain: clerk.md}",
        params="{max_context_len: 8192}",
        model=f"    chat_template: {template}",
    )
    space.start()
    space.wait_settled()
    return space


def is_hit(space: Workspace, answer: dict[str, Any]) -> bool:
    """Whether all of the prompt, its tools included, came from the cache of `clerk`."""
    report = answer["rkcached"]
    tokens = space.prompt("clerk")["artifact"]["tokens"]
    assert tokens > 1000  # the tools are in it; the memory engine's tokens are bytes
    return (report["state"], report["cache"]) == ("hit", "clerk") and (
        report["cached_tokens"] >= tokens
    )


@pytest.mark.parametrize("template", ["qwen3.5", "chatml", "llama3"])
def test_the_same_tools_are_a_hit(workspace: Workspace, template: str) -> None:
    """Where tools stand before, inside and after the system text; the prompt named or not."""
    space = harbour(workspace, template)
    assert is_hit(space, space.ask("m/clerk"))
    assert is_hit(space, space.ask("m", cache="clerk"))
    assert is_hit(space, space.ask("m/clerk", tools=TOOLS))
    assert is_hit(space, space.ask("m", messages=CONVERSATION, tools=TOOLS))
    turned = [dict(reversed(each.items())) for each in TOOLS]
    assert is_hit(space, space.ask("m", messages=CONVERSATION, tools=turned))


def test_other_tools_replace_the_declared_ones(workspace: Workspace) -> None:
    """And with `tool_choice: none` the model is shown none."""
    space = harbour(workspace)
    with_declared = space.ask("m/clerk")["usage"]["prompt_tokens"]
    own = space.ask("m/clerk", tools=TOOLS[:1])
    assert own["rkcached"]["state"] == "partial"  # the first tool is the same
    assert own["usage"]["prompt_tokens"] < with_declared

    bare = space.ask("m", messages=CONVERSATION)
    none = space.ask("m/clerk", tool_choice="none")
    assert none["usage"]["prompt_tokens"] == bare["usage"]["prompt_tokens"]
    assert none["choices"] == bare["choices"]
    assert none["rkcached"]["cache"] == "plain"  # the same text without tools

    empty = space.ask("m/clerk", tools=[])
    assert is_hit(space, empty)


def test_calls_come_back_as_calls(workspace: Workspace) -> None:
    """Though the request brought no tools; and one can be demanded by its name."""
    space = harbour(workspace, script={"hello": f"<tool_call>\n{CALL}\n</tool_call>"})
    answer = space.ask("m/clerk", max_tokens=200)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    assert answer["choices"][0]["finish_reason"] == "tool_calls"

    result = {"role": "tool", "tool_call_id": call["id"], "content": "-5 C"}
    asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [CONVERSATION[1], asked, result]
    assert is_hit(space, space.ask("m/clerk", messages=messages))

    wrong = {"type": "function", "function": {"name": "moon"}}
    error = space.ask("m/clerk", status=400, tool_choice=wrong)["error"]
    assert "one of weather, tide" in error["message"]


@pytest.mark.parametrize("more", [{}, {"tool_choice": "none"}])
def test_a_json_answer_beside_tools(workspace: Workspace, more: dict[str, Any]) -> None:
    """The prompt's tools do not stand in its way, shown or not."""
    space = harbour(workspace, script={"hello": "{}"})
    answer = space.ask("m/clerk", response_format={"type": "json_object"}, **more)
    assert answer["choices"][0]["message"]["content"] == "{}"


def test_an_edit_of_the_tools_rebuilds_their_prompt(workspace: Workspace) -> None:
    """It alone, and only if a template writes the difference."""
    space = harbour(workspace)
    assert sorted(space.built()) == ["clerk", "plain"]
    space.write("tools.json", json.dumps(TOOLS, separators=(",", ":")))
    space.hang_up()
    space.wait_settled()
    assert len(space.built()) == 2

    space.write("tools.json", json.dumps(TOOLS).replace("of a city", "of a town"))
    wait_until(lambda: len(space.built()) == 3, "the prompt is built again", BEFORE_RESCAN_S)
    space.wait_settled()
    assert space.built()[2] == "clerk"
    assert "reason='its tools changed'" in space.log_text()
    assert not is_hit(space, space.ask("m", messages=CONVERSATION, tools=TOOLS))
    assert is_hit(space, space.ask("m/clerk"))


def test_broken_tools_block_their_prompt(workspace: Workspace) -> None:
    """It alone: in the status, in the plan, in `check` with the line, and in the answer."""
    space = harbour(workspace)
    space.write("tools.json", '[\n  {"type": "function", "function": {"name": "a b"}}\n]')
    shown = space.wait_state("clerk", "blocked")
    reason = f"{space.root / 'tools.json'}: 0.function.name: String should match pattern"
    assert shown["reason"].startswith(reason)
    assert shown["hint"] == "correct it"
    assert shown["tools"] == []
    assert space.ask("m/plain")["rkcached"]["state"] == "hit"

    error = space.ask("m/clerk", status=503)["error"]
    assert error["code"] == "prompt_blocked"
    assert "0.function.name" in error["message"]
    checked = space.cli("check", code=78).stderr
    line = 1 + next(
        at for at, text in enumerate(space.manifest.read_text().splitlines()) if "tools:" in text
    )
    assert f"{space.manifest}:{line}: {reason}" in checked
    assert reason in space.cli("plan").stdout.replace("\n", " ")

    space.write("tools.json", "[{]")
    wait_until(lambda: "tools.json:1: not JSON" in space.prompt("clerk")["reason"], "it is told")
    space.write("tools.json", json.dumps(TOOLS))
    space.wait_state("clerk", "fresh")
    assert len(space.built()) == 2  # adopted: it is what it was


def test_the_commands_show_the_tools(workspace: Workspace) -> None:
    """Their number in the table and in `check`, their names in `explain` and in JSON."""
    space = harbour(workspace)
    assert space.prompt("clerk")["tools"] == ["weather", "tide"]
    assert space.prompt("plain")["tools"] == []
    assert "harbour, 2 tools" in space.cli("status").stdout
    assert "ok, 1 model, 2 prompts, 2 tools" in space.cli("check").stdout
    assert "tools: weather, tide" in space.cli("explain", "m/clerk").stdout
    explained = json.loads(space.cli("explain", "m/clerk", "--json").stdout)
    assert explained["tools"] == ["weather", "tide"]
    assert len(explained["wanted"]["tools.digest"]) == 64


def test_chat_shows_the_calls(workspace: Workspace) -> None:
    """Who asks at a terminal brings no tools, but the prompt has some."""
    space = harbour(workspace, script={"hello": f"Wait.<tool_call>\n{CALL}\n</tool_call>"})
    done = space.cli("chat", "m/clerk", "hello")
    assert done.stdout == 'Wait.\n[the model calls weather with {"city": "Oslo"}]\n\n'


def test_bench_measures_with_the_tools(workspace: Workspace) -> None:
    """The engine alone gets the text that the daemon sends."""
    space = harbour(workspace)
    done = space.cli("bench", "m/clerk", "--runs", "1", "--json")
    (measured,) = json.loads(done.stdout)["prompts"]
    tokens = space.prompt("clerk")["artifact"]["tokens"]
    from_file = measured["states"]["file"]
    for run in (*from_file["runs"], *from_file["direct"]):
        assert run["cached_tokens"] == tokens
    assert len(from_file["direct"]) == 1


# --- on the small model ---


@pytest.fixture
def real(workspace: Workspace, small_model: Path) -> Workspace:
    workspace.write("clerk.md", TEXT)
    workspace.write("tools.json", json.dumps(TOOLS))
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n"
        "    chat_template: chatml\n"  # the model's own cannot show tools
        "    params: {max_context_len: 2048, max_new_tokens: 16, temperature: 0}\n"
        "    prompts: {clerk: {files: clerk.md, tools: tools.json}, plain: clerk.md}\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


@pytest.fixture
def client(real: Workspace) -> Iterator[openai.OpenAI]:
    transport = httpx.HTTPTransport(verify=False, uds=str(real.socket))
    with httpx.Client(transport=transport, timeout=120) as http:
        yield openai.OpenAI(
            api_key="none", base_url="http://rkcached/v1", http_client=http, max_retries=0
        )


@pytest.mark.long
@pytest.mark.model
def test_an_agent_on_a_real_model(real: Workspace, client: openai.OpenAI) -> None:
    """The official client sends the tools with the same system message, or names the prompt.

    All of the prompt comes from its cache, and the answer is the one that is given without it.
    """
    asked: Any = {"model": "m", "messages": CONVERSATION, "tools": TOOLS, "max_tokens": 8}
    cold = client.chat.completions.create(**asked, extra_body={"cache": False})
    warm = client.chat.completions.create(**asked)
    tokens = real.prompt("clerk")["artifact"]["tokens"]
    assert tokens > 250
    assert warm.usage.prompt_tokens_details.cached_tokens >= tokens - 1
    assert (warm.rkcached["state"], warm.rkcached["cache"]) == ("hit", "clerk")
    assert warm.choices[0].message == cold.choices[0].message
    assert warm.usage.prompt_tokens - tokens < 20

    named = client.chat.completions.create(
        model="m/clerk", messages=[{"role": "user", "content": "hello"}], max_tokens=8
    )
    assert named.usage is not None
    assert named.usage.prompt_tokens == warm.usage.prompt_tokens
    assert named.choices[0].message.content == warm.choices[0].message.content

    real.write("tools.json", json.dumps(TOOLS).replace("of a city", "of a town"))
    wait_until(lambda: len(real.built()) == 3, "the tools' prompt is built again")
    real.wait_settled()
    assert real.built()[2] == "clerk"
    real.write("tools.json", "[")
    assert "not JSON" in real.wait_state("clerk", "blocked")["reason"]
    assert real.ask("m/plain")["rkcached"]["state"] == "hit"
