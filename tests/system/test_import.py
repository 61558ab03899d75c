"""`rkcached prompts import`: prompts out of recorded requests, which then hit their caches."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import yaml
from conftest import Workspace

from tests.documents import DOCS, blocks, commands

MANIFEST = DOCS / "manifest.md"
TEXT = "You are the clerk of a harbour. You answer in one sentence.\n"
(EXAMPLE,) = blocks(MANIFEST, "json")
TOOLS = json.loads(EXAMPLE)


def request(question: str, text: Any = TEXT, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    return {"model": "qwen3-0.6b", "messages": messages, **more}


def record(space: Workspace, *lines: Any) -> str:
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return str(space.write("requests.jsonl", "\n".join(written) + "\n"))


def imported(space: Workspace, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = space.cli("prompts", "import", *arguments, "--json", code=code)
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def test_the_example_of_the_manual(workspace: Workspace) -> None:
    """The command prints what the page says, and the manifest that it prints is fresh at once.

    Each of the requests that it counts is then a hit: all of the prompt comes from its cache.
    """
    sent = [request(question, tools=TOOLS) for question in ("one", "two", "three")]
    record(workspace, *sent, request("four", "Another.", tools=TOOLS))
    (line,) = [line for line in commands(MANIFEST) if "prompts import" in line]
    shown = workspace.cli(*line.split()[1:]).stdout
    (expected,) = [block for block in blocks(MANIFEST, "text") if "would have been" in block]
    assert shown == expected

    manifest = yaml.safe_load(shown)
    manifest["models"]["qwen3-0.6b"] |= {"path": "m.model", "chat_template": "chatml"}
    workspace.memory_model()
    top = {"version": 1, "engine": {"kind": "memory"}}
    workspace.write("manifest.yaml", yaml.safe_dump({**top, **manifest}))
    workspace.start()
    workspace.wait_settled()
    tokens = workspace.prompt("you-are-the-clerk-of", "qwen3-0.6b")["artifact"]["tokens"]
    for body in sent:
        answer = workspace.request("POST", "/v1/chat/completions", json=body).json()
        assert answer["rkcached"]["state"] == "hit"
        assert answer["rkcached"]["cached_tokens"] >= tokens


def test_what_is_grouped(workspace: Workspace) -> None:
    """By text, tools and model; whatever the form of the line and of the text."""
    parts = [{"type": "text", "text": TEXT.strip()}]
    turned = [dict(reversed(tool.items())) for tool in TOOLS]
    file = record(
        workspace,
        request("a", tools=TOOLS),
        {"custom_id": "1", "method": "POST", "body": request("b", parts, tools=turned)},
        request("c", tools=TOOLS, tool_choice="none"),
        request("d"),
        request("e", "Be kind.\nAlways."),
        {**request("f", "Be kind.\nAlways."), "model": "Other/Model"},
        "",
    )
    data = imported(workspace, file)
    assert (data["requests"], data["served"]) == (6, 4)
    with_tools, without = data["prompts"]
    assert (with_tools["requests"], with_tools["tools"]) == (2, ["get_weather"])
    assert (without["requests"], without["tools"], without["tools_file"]) == (2, [], None)
    assert with_tools["name"] != without["name"]
    assert (workspace.root / with_tools["text_file"]).read_text() == TEXT
    written = (workspace.root / with_tools["tools_file"]).read_text()
    assert json.loads(written) == TOOLS

    everything = imported(workspace, file, "--at-least", "1")
    assert (everything["served"], len(everything["prompts"])) == (6, 4)
    models = yaml.safe_load(everything["manifest"])["models"]
    assert list(models) == ["qwen3-0.6b", "MODEL"]


def test_no_file_is_overwritten(workspace: Workspace) -> None:
    """The same prompt keeps its files; another one of the name gets a number."""
    first = record(workspace, request("a"), request("b"))
    (one,) = imported(workspace, first)["prompts"]
    (again,) = imported(workspace, first)["prompts"]
    assert again == one

    mine = workspace.write(one["text_file"], "Mine.\n")
    (other,) = imported(workspace, first)["prompts"]
    assert other["name"] == f"{one['name']}-2"
    assert mine.read_text() == "Mine.\n"
    assert (workspace.root / other["text_file"]).read_text() == TEXT


@pytest.mark.parametrize("kind", ["link", "fifo", "folder", "device"])
def test_what_is_no_file_keeps_its_name(workspace: Workspace, kind: str) -> None:
    """It is neither read nor taken for the prompt's own file."""
    place = workspace.root / "prompts/you-are-the-clerk-of.md"
    place.parent.mkdir()
    match kind:
        case "link":
            place.symlink_to(workspace.root / "nowhere")
        case "fifo":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case _:
            place.symlink_to("/dev/zero")

    (made,) = imported(workspace, record(workspace, request("a"), request("b")))["prompts"]
    assert made["name"] == "you-are-the-clerk-of-2"
    assert (workspace.root / made["text_file"]).read_text() == TEXT


def test_a_folder_that_is_a_link_to_nowhere(workspace: Workspace) -> None:
    """Nothing is said to be written that is not."""
    (workspace.root / "prompts").symlink_to(workspace.root / "nowhere")
    file = record(workspace, request("a"), request("b"))
    done = workspace.cli("prompts", "import", file, code=os.EX_CANTCREAT)
    assert "cannot be written" in done.stderr


def test_what_is_written_can_be_declared(workspace: Workspace) -> None:
    """Whatever the first words are, and at the limit of sizes."""
    limit = 1 << 20
    properties = {f"p{number}": {"enum": ["x" * 28] * 90} for number in range(300)}
    parameters = {"type": "object", "properties": properties}  # too large with line breaks
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    bodies = [
        request("a", "Generate binary."),
        request("b", "Long " + "x" * (limit - 6)),
        request("c", "Longer " + "x" * (limit - 7)),
        request("d", "Tools.", tools=[tool]),
        request("e", "More tools.", tools=[tool, tool, tool]),
    ]
    data = imported(workspace, record(workspace, *bodies), "--at-least", "1")
    names = ["generate-binary-2", "long-" + "x" * 43, "tools"]
    assert [prompt["name"] for prompt in data["prompts"]] == names
    assert [line["line"] for line in data["skipped"]] == [3, 5]

    manifest = yaml.safe_load(data["manifest"])
    manifest["models"]["qwen3-0.6b"] |= {"path": "m.model", "chat_template": "chatml"}
    workspace.memory_model()
    top = {"version": 1, "engine": {"kind": "memory"}}
    workspace.write("manifest.yaml", yaml.safe_dump({**top, **manifest}))
    workspace.cli("check")


def test_a_line_without_end(workspace: Workspace) -> None:
    """It is left out, and the next line counts."""
    file = record(workspace, " " * (40 << 20) + "{", request("a"), request("b"))
    data = imported(workspace, file)
    assert (data["requests"], data["served"]) == (2, 2)
    assert data["skipped"] == [{"line": 1, "reason": "it has more than 16,777,216 bytes"}]


def test_lines_of_no_use_are_told(workspace: Workspace) -> None:
    """With the number of each and the reason; the rest of the file counts."""
    file = record(
        workspace,
        request("a"),
        "{",
        "[1]",
        {"messages": []},
        {"model": "m", "messages": [{"role": "user", "content": "q"}]},
        request("b", tools=[{"type": "function"}]),
        request("c", "a\0b"),
        request("d"),
    )
    data = imported(workspace, file)
    assert (data["requests"], data["served"]) == (5, 2)
    assert [line["line"] for line in data["skipped"]] == [2, 3, 4, 5, 6, 7]
    reasons = [line["reason"] for line in data["skipped"]]
    assert reasons[0].startswith("it is not JSON: ")
    assert reasons[3] == "it does not begin with a system message"
    assert reasons[4] == "tools: 0.function is missing"
    done = workspace.cli("prompts", "import", file)
    assert "line 2 is left out: it is not JSON" in done.stderr
    assert "1 more line left out" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.jsonl"], os.EX_NOINPUT, "cannot be read: No such file"),
        (["none.jsonl"], os.EX_DATAERR, "it is no request for a chat completion"),
        (["ok.jsonl", "--to", "ok.jsonl"], os.EX_CANTCREAT, "cannot be written"),
        (["ok.jsonl", "--at-least", "0"], os.EX_USAGE, "--at-least"),
    ],
)
def test_what_cannot_be_imported(
    workspace: Workspace, arguments: list[str], code: int, words: str
) -> None:
    """One sentence, and the next step where there is one."""
    workspace.write("none.jsonl", "{}\n")
    workspace.write("ok.jsonl", f"{json.dumps(request('a'))}\n" * 2)
    done = workspace.cli("prompts", "import", *arguments, code=code)
    assert words in done.stderr


def test_nothing_came_often(workspace: Workspace) -> None:
    """It says so, and writes nothing."""
    done = workspace.cli("prompts", "import", record(workspace, request("a"), request("b", "B.")))
    assert done.stdout == (
        "# No prompt was made: of 2 requests, fewer than 2 have the same system message and "
        "tools.\n"
    )
    assert not (workspace.root / "prompts").exists()
