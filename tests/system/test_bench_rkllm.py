"""`rkcached bench` where the engine is an NPU.

The stand-in refuses a model that another process has loaded.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from rkcached.cli.client import Client
from rkcached.errors import RequestError
from tests.rkllm_standin.standin import build, write_model
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def npu(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A running daemon with a fresh prompt, on a runtime that measures.

    One process at a time may have the model: the stand-in locks a file for that, which it can open
    only where it is not confined.
    """
    workspace.write("librkllmrt.so", build("D", tmp_path / "built").read_bytes())
    write_model(tmp_path / "m.rkllm", npu_file=tmp_path / "npu")
    workspace.write("a.md", "You are the keeper of a lighthouse.\n" * 4)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: rkllm, library: librkllmrt.so, confine: false}\nmodels:\n  m:\n"
        "    path: m.rkllm\n"
        "    params: {max_context_len: 4096, max_new_tokens: 32, temperature: 0}\n"
        "    prompts: {a: a.md}\n",
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    return workspace


def measured(space: Workspace, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        space.cli("bench", "--json", "--runs", "2", *arguments).stdout
    )
    return found


def test_a_model_is_not_loaded_twice_into_an_npu(npu: Workspace) -> None:
    """Unless it is asked for, the engine alone is not measured.

    It is said why, and what would do it.
    """
    found = measured(npu)
    (prompt,) = found["prompts"]
    assert "with --direct the daemon unloads it meanwhile" in found["direct"]
    assert len(prompt["states"]["cold"]["runs"]) == 2
    assert prompt["states"]["cold"]["direct"] == []
    assert npu.status()["models"][0]["restarts"] == 0
    assert " model lent " not in npu.log_text()


def test_the_daemon_lends_a_model_that_must_not_be_loaded_twice(npu: Workspace) -> None:
    """Asked for, the engine alone is measured while the daemon has nothing loaded.

    Then all is as before.
    """
    found = measured(npu, "--direct")
    (prompt,) = found["prompts"]
    assert found["direct"] == ""
    for state in ("cold", "file"):
        assert len(prompt["states"][state]["runs"]) == len(prompt["states"][state]["direct"]) == 2
        assert all(
            (run["cached_tokens"] == 0) == (state == "cold")
            for run in prompt["states"][state]["direct"]
        )
    assert npu.log_text().count(" model lent ") == 1
    assert npu.ask("m/a")["rkcached"]["state"] == "hit"
    assert npu.status()["models"][0]["restarts"] == 0


def test_requests_wait_while_a_model_is_lent(npu: Workspace) -> None:
    """They get their answer when the borrower leaves, even without a word.

    A model that is not there is not lent.
    """
    body = {"model": "m"}
    with ThreadPoolExecutor(1) as pool, Client(npu.root / "admin.sock") as admin:
        with admin.lent("m"):
            assert npu.children() == []
            waiting = pool.submit(npu.ask, "m/a")
            wait_until(lambda: npu.status()["running"] == 1, "a request waits")
            assert npu.status()["models"][0]["worker"] == "stopped"
            assert " model returned " not in npu.log_text()
        assert waiting.result()["rkcached"]["state"] == "hit"
        with pytest.raises(RequestError, match="none"), admin.lent("none"):
            pass
    assert npu.request("POST", "/v1/models/lend", json=body).status_code == 403
