"""Requests as programs send them, each with the state that docs/programs.md promises.

The shapes are recorded from the programs, or read in their source where `source` names a
repository; the texts are ours. `make test-programs` runs the programs themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Workspace

MODEL = "qwen3-0.6b"
RECORDED = {
    file.stem: json.loads(file.read_text())
    for file in sorted((Path(__file__).parent / "requests").glob("*.json"))
}


def report_of(text: str) -> dict[str, Any]:
    """The report of a whole answer, of server-sent events, or of lines of JSON."""
    lines = [line.removeprefix("data: ") for line in text.splitlines()]
    found = None
    for line in lines:
        if not line.startswith("{"):
            continue
        piece = json.loads(line)
        found = piece.get("rkcached") or piece.get("response", {}).get("rkcached") or found
    assert found is not None, text
    report: dict[str, Any] = found
    return report


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    """A daemon on which all that the programs send is declared."""
    space = Workspace(tmp_path_factory.mktemp("programs"))
    space.memory_model(context_tokens=16384, prefill_us_per_token=20)  # so that loading is worth it
    prompts: dict[str, Any] = {}
    for name, recorded in RECORDED.items():
        prompts[name] = {"files": f"{name}.md"}
        space.write(f"{name}.md", recorded["declared"]["system"])
        if recorded["declared"]["tools"]:
            prompts[name]["tools"] = f"{name}.tools.json"
            space.write(f"{name}.tools.json", json.dumps(recorded["declared"]["tools"]))
    model = {
        "path": "m.model",
        "chat_template": "qwen3",
        "params": {"max_context_len": 16384, "max_new_tokens": 16},
        "prompts": prompts,
    }
    manifest = {"version": 1, "engine": {"kind": "memory"}, "models": {MODEL: model}}
    space.write("manifest.yaml", yaml.safe_dump(manifest))
    space.start()
    space.wait_settled()
    yield space
    assert space.stop() == 0, space.log_text()


@pytest.mark.parametrize("name", RECORDED)
def test_the_request_is_answered_from_its_prompt(served: Workspace, name: str) -> None:
    """What the program asks for first is there, and what it sends needs nothing left out of it."""
    recorded = RECORDED[name]
    for path in recorded["first"]:
        assert served.request("GET", path).status_code == 200, path

    answered = served.request("POST", recorded["path"], json=recorded["body"])
    assert answered.status_code == 200, answered.text
    report = report_of(answered.text)
    assert (report["state"], report["cache"]) == (recorded["state"], name), report
    assert report["ignored"] == recorded["ignored"]


def test_every_shape_says_where_it_is_from() -> None:
    """A repository with a path and a commit, or what was run, with its version."""
    assert len(RECORDED) >= 20
    for name, recorded in RECORDED.items():
        assert recorded["source"], name
        for source in recorded["source"]:
            assert set(source) in ({"ran"}, {"repository", "path", "commit"}), name
