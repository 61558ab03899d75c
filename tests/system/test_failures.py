"""An answer that is the daemon's fault has its cause in the log.

One sentence at warning, whatever the endpoint.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from conftest import Workspace

from tests.waiting import wait_until

BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAULTS: dict[str, list[dict[str, Any]]] = {
    "breaks": [{"op": "generate", "kind": "error", "at": 3}],
    "dies": [{"op": "generate", "kind": "segfault", "at": 3}],
    "empty": [],
}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def troubled(workspace: Workspace) -> Workspace:
    """A running daemon with a model and a prompt in each kind of trouble."""
    for name, faults in FAULTS.items():
        workspace.memory_model(f"{name}.model", faults=faults)
    workspace.memory_model("m.model")
    workspace.write("bomb.jinja", BOMB)
    workspace.write("other.model", "no model")
    models = "".join(
        f"  {name}: {{path: {name}.model}}\n" for name in ("breaks", "dies", "gone", "other")
    )
    models += "  bomb: {path: m.model, chat_template: bomb.jinja}\n"
    workspace.declare("{blocked: none.md}", model=models)
    workspace.write("state", "a file in the place of the folder")
    workspace.start("--state-dir", str(workspace.root / "state"))
    workspace.wait_settled()
    return workspace


def told(space: Workspace, path: str, status: int, code: str) -> list[str]:
    """The causes in the log of answers with this code. They are logged after the answer."""
    line = re.compile(rf"warning request failed path={path} status={status} code={code} error=(.*)")
    wait_until(lambda: line.search(space.log_text()), f"a line {line.pattern} is in the log")
    return [match[1] for match in line.finditer(space.log_text())]


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("breaks", 500, "engine_error"),
        ("dies", 502, "worker_died"),
        ("gone", 503, "model_unavailable"),
        ("other", 503, "model_unavailable"),
        ("m/blocked", 503, "prompt_blocked"),
        ("bomb", 503, "template_exhausted"),
    ],
)
def test_a_failed_answer_has_its_cause_in_the_log(
    troubled: Workspace, model: str, status: int, code: str
) -> None:
    """The sentence that the client gets, with the request's id.

    Once for each failed request, also in a stream.
    """
    error = troubled.ask(model, status=status)["error"]
    assert error["code"] == code
    [cause] = told(troubled, "/v1/chat/completions", status, code)
    assert error["message"].partition(" (")[0] in cause
    if model == "breaks":
        return  # once in the life of its process
    answer = troubled.request(
        "POST", "/v1/chat/completions", json={"model": model, "stream": True, **HELLO}
    )
    assert code in answer.text
    wait_until(
        lambda: troubled.log_text().count(" request failed ") == 2,
        "the log has the cause of the second",
    )
    troubled.logged(f"status={answer.status_code} code={code}")


def test_every_endpoint_tells_its_causes(troubled: Workspace) -> None:
    """Those for changes, too, and those that only read. What is a client's fault is no warning."""
    with troubled.http(admin=True) as client:
        answers = {
            "/v1/completions": client.post(
                "/v1/completions", json={"model": "gone", "prompt": "x"}
            ),
            "/v1/embeddings": client.post("/v1/embeddings", json={"model": "gone", "input": "x"}),
            "/v1/models/gone": client.get("/v1/models/gone"),
            "/v1/models/load": client.post("/v1/models/load", json={"model": "gone"}),
            "/v1/cache/m": client.post("/v1/cache/m", json={"cache_name": "x", "content": "text"}),
        }
        assert (
            client.post("/v1/chat/completions", json={"model": "none", **HELLO}).status_code == 404
        )
        assert client.post("/v1/chat/completions", content=b"{").status_code == 400
    for path, answer in answers.items():
        assert answer.status_code == 503, (path, answer.text)
        assert told(troubled, path, 503, answer.json()["error"]["code"]), path
    assert troubled.log_text().count(" request failed ") == len(answers)


@pytest.mark.long
def test_a_silent_worker_has_its_cause_in_the_log(workspace: Workspace) -> None:
    """A deadline of ours."""
    workspace.memory_model(faults=[{"op": "generate", "kind": "hang", "at": 3}])
    workspace.declare("{}")
    manifest = workspace.manifest.read_text().replace(
        "{kind: memory}", "{kind: memory, timeout_s: 8}"
    )
    workspace.write("manifest.yaml", manifest)
    workspace.start()
    assert workspace.ask("m", status=504)["error"]["code"] == "worker_timeout"
    assert (
        "sent nothing for 8 s" in told(workspace, "/v1/chat/completions", 504, "worker_timeout")[0]
    )
