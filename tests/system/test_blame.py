"""Which deaths of a worker are a prompt cache's fault: those while it is loaded, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Workspace


def crashing(space: Workspace, op: str, at: int, kind: str = "segfault") -> Workspace:
    """A daemon whose prompt `a` is fresh, and whose workers crash at the `at`-th call of `op`."""
    space.memory_model(faults=[{"op": op, "kind": kind, "at": at}])
    space.write("a.md", "You are prompt A.\n")
    space.declare("{a: a.md}", top="cache: {verify: off}")
    space.start()
    space.wait_state("a", "fresh")
    return space


def outcome(space: Workspace, **body: Any) -> str:
    """The state of the cache that an answer reports, or the code of its error."""
    request = {"model": "m/a", "messages": [{"role": "user", "content": "hello"}], **body}
    answer = space.request("POST", "/v1/chat/completions", json=request).json()
    state: str = answer["rkcached"]["state"] if "rkcached" in answer else answer["error"]["code"]
    return state


@pytest.mark.parametrize("kind", ["segfault", "abort", "exit"])
def test_a_crash_in_an_answer_is_not_the_caches_fault(workspace: Workspace, kind: str) -> None:
    """Also where the cache was in memory already, so that nothing tells that it was loaded.

    The cause: whoever died before the first piece of an answer was taken to have died over the
    prompt cache.
    """
    space = crashing(workspace, "generate", 2, kind)
    for _ in range(4):
        assert outcome(space, max_tokens=1) == "hit"
        assert outcome(space, max_tokens=1) == "worker_died"  # at its first token
    assert space.prompt("a")["state"] == "fresh"
    assert "artifact not loadable" not in space.log_text()


def test_a_request_that_ended_its_worker_twice_is_refused(workspace: Workspace) -> None:
    """With the reason, and no worker dies of it again. Any other request is answered.

    Every second answer of a worker crashes here.
    """
    space = crashing(workspace, "generate", 2)
    for _ in range(2):
        assert outcome(space, max_tokens=1) == "hit"
        assert outcome(space, max_tokens=2) == "worker_died"
    restarts = space.status()["models"][0]["restarts"]

    body = {"model": "m/a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    response = space.request("POST", "/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (422, "request_ends_worker")
    assert "2 times" in error["message"]
    assert "SIGSEGV" in error["message"]
    assert "10 minutes" in error["message"]
    assert space.status()["models"][0]["restarts"] == restarts
    assert outcome(space, max_tokens=1) == "hit"
    assert space.prompt("a")["state"] == "fresh"


def test_a_crash_while_it_is_loaded_is_the_caches_fault(workspace: Workspace) -> None:
    """The request is answered without it; after three such deaths the cache is left alone."""
    space = crashing(workspace, "load", 1)
    for _ in range(3):
        assert outcome(space) == "miss"
        outcome(space, cache=False)  # the state in memory is not used again
    assert "loading it failed 3 times" in space.wait_state("a", "quarantined")["reason"]
