"""Models and prompt caches that are in memory before somebody asks (`preload`)."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S, wait_until

COOK = "You are a ship's cook. You answer in one short sentence, and never forget the salt. " * 3
CARPENTER = "You are a ship's carpenter. You answer in one short sentence, about wood. " * 3
FILES = "{cook: cook.md, carpenter: carpenter.md}"


@pytest.fixture
def ship(workspace: Workspace) -> Workspace:
    """A workspace with two prompts and a model of the memory engine; its daemon waits little."""
    workspace.memory_model()
    workspace.write("cook.md", COOK)
    workspace.write("carpenter.md", CARPENTER)
    workspace.hurry(serving__preload__QUIET_S=0.2, serving__preload__RETURN_S=0.4)
    return workspace


class Systemd:
    """The receiving end of a notification socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(DEADLINE_S)
        self.heard: list[str] = []

    def wait(self, assignment: str) -> None:
        while assignment not in self.heard:
            self.heard += self.socket.recv(1 << 16).decode().split("\n")


@pytest.fixture
def systemd(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """The daemon reports to it, as it does to systemd."""
    path = workspace.root / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    receiver = Systemd(path)
    with receiver.socket:
        yield receiver


def waiting_for(space: Workspace, ready: str) -> None:
    """A manifest of a model without prompts, with this value of `engine.ready`."""
    space.declare("{}", model="    preload: true\n")
    text = space.manifest.read_text()
    space.write("manifest.yaml", text.replace("kind: memory", f"kind: memory, ready: {ready}"))


def preloading(space: Workspace, preload: str = "cook") -> None:
    space.declare(FILES, model=f"    preload: {preload}\n")


def lines(space: Workspace, event: str) -> list[str]:
    return [line for line in space.log_text().splitlines() if f" {event} " in line]


def model(space: Workspace, name: str = "m") -> dict[str, Any]:
    found: dict[str, Any] = next(m for m in space.status()["models"] if m["name"] == name)
    return found


def wait_preloaded(space: Workspace, times: int = 1) -> None:
    wait_until(
        lambda: len(lines(space, "prompt preloaded")) >= times,
        lambda: f"the prompt was preloaded {times} times:\n{space.log_text()}",
    )


def preloaded_in_another_worker(space: Workspace, pid: int) -> bool:
    """Whether a worker that was started after this one has its prompt cache."""
    _, loaded, since = space.log_text().rpartition(" model loaded ")
    return bool(loaded) and f"pid={pid}\n" not in since and " prompt preloaded " in since


@pytest.mark.model
def test_the_first_answer_after_a_start_loads_nothing(
    workspace: Workspace, small_model: Path
) -> None:
    """On a real model: neither the model nor the prompt cache; and so does the first of another.

    A question of another kind took another of the states in memory.
    """
    workspace.write("cook.md", COOK)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\nmodels:\n  m:\n"
        f"    path: {small_model}\n    preload: cook\n"
        "    params: {max_context_len: 1024, max_new_tokens: 8, temperature: 0}\n"
        "    prompts: {cook: cook.md}\n",
    )
    workspace.start()
    workspace.wait_state("cook", "fresh")
    wait_preloaded(workspace)
    assert workspace.stop() == 0

    workspace.start()
    wait_preloaded(workspace, 2)
    answer = workspace.ask("m/cook", "What is for dinner?")
    report = answer["rkcached"]
    assert (report["model_load_ms"], report["load_ms"], report["state"]) == (0, 0, "hit")
    assert report["cached_tokens"] >= workspace.prompt("cook")["artifact"]["tokens"] - 1

    cold = workspace.ask("m", "How deep is the sea?", cache=False)
    assert cold["rkcached"]["state"] == "cold"
    report = workspace.ask("m/cook", "And for lunch?")["rkcached"]
    assert (report["model_load_ms"], report["load_ms"], report["state"]) == (0, 0, "hit")


def test_a_conversation_that_goes_on_keeps_its_state(ship: Workspace) -> None:
    """The engine goes back only if the state has lost the prompt."""
    preloading(ship)
    ship.start()
    ship.wait_settled()
    assert ship.stop() == 0

    times = len(lines(ship, "prompt preloaded")) + 1
    ship.start()  # nothing is left to build, which would take the state
    wait_preloaded(ship, times)
    first = ship.ask("m/cook", "What is for dinner?")
    assert first["rkcached"]["load_ms"] == 0
    wait_until(lambda: model(ship)["state_s"] > 0.5, "the daemon had a moment")

    messages = [
        {"role": "user", "content": "What is for dinner?"},
        {"role": "assistant", "content": first["choices"][0]["message"]["content"]},
        {"role": "user", "content": "And for lunch?"},
    ]
    second = ship.ask("m/cook", messages=messages)
    assert second["rkcached"]["load_ms"] == 0
    assert second["rkcached"]["cached_tokens"] > len(COOK) + len("What is for dinner?")
    assert len(lines(ship, "prompt preloaded")) == times


def test_after_another_prompt_the_engine_goes_back(ship: Workspace) -> None:
    preloading(ship, "[cook, carpenter]")
    ship.start()
    ship.wait_settled()
    wait_preloaded(ship)
    ship.logged("prompt cache read")
    assert ship.ask("m/carpenter")["rkcached"]["load_ms"] > 0
    before = len(lines(ship, "prompt preloaded"))
    wait_preloaded(ship, before + 1)
    assert ship.ask("m/cook")["rkcached"]["load_ms"] == 0
    assert "prompt=cook" in lines(ship, "prompt preloaded")[-1]


def test_a_worker_that_died_is_replaced_before_somebody_asks(ship: Workspace) -> None:
    preloading(ship)
    ship.start()
    wait_preloaded(ship)
    before = model(ship)["pid"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: preloaded_in_another_worker(ship, before), ship.log_text)
    assert model(ship)["pid"] not in (None, before)
    report = ship.ask("m/cook")["rkcached"]
    assert (report["model_load_ms"], report["load_ms"], report["state"]) == (0, 0, "hit")


def test_a_change_of_the_manifest_loads_and_of_the_text_reloads(ship: Workspace) -> None:
    """Without `preload` nothing is loaded after a restart; when it is added, at once."""
    ship.declare(FILES)
    ship.start()
    ship.wait_settled()
    assert ship.stop() == 0
    ship.start()
    ship.wait_settled()
    assert model(ship)["worker"] == "stopped"
    assert model(ship)["preload"] is None

    preloading(ship)
    wait_preloaded(ship)
    assert model(ship)["worker"] == "ready"
    assert model(ship)["preload"] == ["cook"]
    assert model(ship)["model_load_ms"] > 0
    assert "m: ready, preload cook" in ship.cli("status").stdout

    ship.write("cook.md", COOK.replace("salt", "pepper"))
    wait_preloaded(ship, 2)
    assert ship.ask("m/cook")["rkcached"]["load_ms"] == 0


def test_true_loads_the_model_alone(ship: Workspace) -> None:
    preloading(ship, "true")
    ship.start()
    ship.wait_settled()
    assert ship.stop() == 0
    ship.start()
    ship.logged("model loaded")
    report = ship.ask("m/cook")["rkcached"]
    assert report["model_load_ms"] == 0
    assert report["load_ms"] > 0


@pytest.mark.parametrize("ready", ["planned", "loaded"])
def test_a_model_that_cannot_be_loaded_is_said_and_keeps_nobody(
    ship: Workspace, systemd: Systemd, ready: str
) -> None:
    """It is not tried again and again; the daemon is ready and says why."""
    ship.memory_model(faults=[{"op": "init", "kind": "error"}])
    waiting_for(ship, ready)
    ship.start()
    systemd.wait("READY=1")
    ship.logged("model not preloaded")
    wait_until(lambda: model(ship)["preload_trouble"], "the status says why")
    assert model(ship)["worker"] == "backoff"
    assert len(lines(ship, "model not preloaded")) == 1


@pytest.mark.parametrize("ready", ["planned", "loaded"])
def test_ready_before_or_after_the_model_is_loaded(
    ship: Workspace, systemd: Systemd, ready: str
) -> None:
    """`engine.ready` decides.

    Meanwhile more time is asked for, so that systemd goes on waiting. A reload does not end that.
    """
    ship.memory_model(load_ms=2000)
    waiting_for(ship, ready)
    ship.start()
    ship.hang_up()
    systemd.wait("READY=1")
    assert ("model loaded" in ship.log_text()) is (ready == "loaded")
    extensions = [line for line in systemd.heard if line.startswith("EXTEND_TIMEOUT_USEC")]
    if ready == "loaded":
        assert len(extensions) > 3


def two_models(space: Workspace, *, of_x: str, of_y: str, engine: str = "") -> None:
    """The models x and y of which one fits, with these further keys."""
    for name in "xy":
        space.memory_model(f"{name}.model", seed=name)
    space.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: memory, max_loaded: 1{engine}}}\nmodels:\n"
        f"  x: {{path: x.model, prompts: {{cook: cook.md}}{of_x}}}\n"
        f"  y: {{path: y.model, prompts: {{cook: cook.md}}{of_y}}}\n",
    )


def loaded(space: Workspace) -> list[str]:
    return [m["name"] for m in space.status()["models"] if m["worker"] in ("ready", "busy")]


@pytest.mark.parametrize("engine", ["", ", concurrent: true"])
def test_where_one_fits_the_first_in_the_manifest_wins(ship: Workspace, engine: str) -> None:
    """A request for the other takes its place, and it comes back when nobody has asked.

    The builds of both need either model, and leave the first. `check` says so, and so does the
    status.
    """
    two_models(ship, of_x=", preload: true", of_y=", preload: cook", engine=engine)
    ship.start()
    ship.wait_settled()
    wait_until(lambda: loaded(ship) == ["x"], "x is loaded after the builds")

    ship.ask("y/cook")
    assert loaded(ship) == ["y"]
    wait_until(lambda: loaded(ship) == ["x"], "x came back")
    assert ship.ask("x/cook")["rkcached"]["model_load_ms"] == 0

    said = (
        "preload of y waits for room: 1 model fits (engine.max_loaded), and x comes first in the "
        "manifest"
    )
    assert f"manifest.yaml:5: warning: {said}" in ship.cli("check").stderr
    assert said in ship.cli("status").stdout


def test_a_model_that_is_used_is_not_unloaded_for_one_that_is_preloaded(ship: Workspace) -> None:
    """Not before nobody has asked for RETURN_S."""
    ship.hurry(serving__preload__QUIET_S=0.01, serving__preload__RETURN_S=600.0)
    two_models(ship, of_x=", preload: true", of_y="")
    ship.start()
    ship.wait_settled()
    wait_until(lambda: loaded(ship) == ["x"], "x is loaded after the builds")
    ship.ask("y/cook")
    wait_until(lambda: model(ship, "y")["state_s"] > 0.5, "the daemon had a moment")
    assert loaded(ship) == ["y"]
    assert ship.ask("y/cook")["rkcached"]["model_load_ms"] == 0


@pytest.mark.long
@pytest.mark.parametrize("how", ["idle", "by hand"])
def test_what_was_unloaded_on_purpose_stays_so(ship: Workspace, how: str) -> None:
    """Until the next start; `check` says it of idle_unload_s."""
    ship.declare(FILES, model="    preload: cook\n    idle_unload_s: 1\n")
    if how == "by hand":
        preloading(ship)
    ship.start()
    wait_preloaded(ship)
    if how == "by hand":
        ship.wait_settled()  # a build would load it again
        ship.request("POST", "/v1/models/unload", json={"model": "m"}, admin=True)
    else:
        said = "manifest.yaml:10: warning: m has preload and idle_unload_s: after 1 idle seconds"
        assert said in ship.cli("check").stderr

    wait_until(lambda: model(ship)["worker"] == "stopped", "the model was unloaded")
    ship.hang_up()
    wait_until(lambda: model(ship)["state_s"] > 0.5, "the daemon had a moment")
    assert model(ship)["worker"] == "stopped"
    assert ship.stop() == 0
    ship.start()
    wait_preloaded(ship, 2)


def test_a_cache_that_cannot_be_loaded_is_healed(ship: Workspace) -> None:
    """Nobody has asked yet: the file is quarantined and built again."""
    preloading(ship)
    ship.start()
    ship.wait_settled()
    wait_preloaded(ship)
    path = next(ship.cache.glob("m/cook.*_cache"))
    good = path.read_bytes()
    assert ship.stop() == 0
    path.write_bytes(b"x" * len(good))
    ship.start()
    ship.wait_settled()
    wait_preloaded(ship, 2)
    assert path.read_bytes() == good
    assert ship.ask("m/cook")["rkcached"]["load_ms"] == 0


def test_a_worker_that_dies_over_each_cache_ends_in_the_quarantine(ship: Workspace) -> None:
    """It is not started again for ever: the third death is the last."""
    ship.memory_model(faults=[{"op": "load", "kind": "segfault", "at": 1}])
    ship.declare(
        "{cook: cook.md}",
        top="cache: {verify: off}",  # the proof would find it out
        model="    preload: cook\n",
    )
    ship.start()
    ship.wait_state("cook", "quarantined")
    assert model(ship)["restarts"] == 3
    assert ship.ask("m/cook")["rkcached"]["state"] == "quarantined"


def test_a_prompt_of_a_folder_that_is_not_there_is_said(ship: Workspace) -> None:
    """Which files there are, only a look can tell."""
    ship.write("prompts/cook.md", COOK)
    ship.declare("{}", model="    prompts_from: prompts/*.md\n    preload: cok\n")
    said = (
        "manifest.yaml:10: warning: preload of m: there is no prompt 'cok' (did you mean 'cook'?)"
    )
    assert said in ship.cli("check").stderr
    ship.declare("{}", model="    prompts_from: prompts/*.txt\n    preload: cook\n")
    step = "(prompts_from finds no file: correct it, or write `preload: true`)"
    assert step in ship.cli("check").stderr
    ship.declare("{}", model="    prompts_from: prompts/*.md\n    preload: cook\n")
    assert "warning" not in ship.cli("check").stderr
    ship.start()
    wait_preloaded(ship)


def test_loads_are_counted_in_the_metrics(ship: Workspace) -> None:
    """Of each model how often it was loaded, and how long that took."""
    preloading(ship)
    ship.start()
    wait_preloaded(ship)
    os.kill(model(ship)["pid"], signal.SIGKILL)
    wait_preloaded(ship, 2)

    def figures() -> dict[str, str]:
        text = ship.request("GET", "/metrics").text
        return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    name = "rkcached_model_load_seconds"
    wait_until(
        lambda: float(figures()[f'{name}_count{{model="m"}}']) == 2, "both loads are counted"
    )
    assert float(figures()[f'{name}_sum{{model="m"}}']) > 0


@pytest.mark.long
def test_bench_and_doctor_say_how_long_the_first_answer_takes(ship: Workspace) -> None:
    """The answer that the model was loaded for is measured apart, and counts for no prompt."""
    ship.memory_model(load_ms=300)
    ship.declare(FILES)
    ship.start()
    ship.wait_settled()
    assert ship.stop() == 0
    ship.start()
    ship.wait_settled()
    name = "first answer of m"
    found = json.loads(ship.cli("doctor", "--json", code=None).stdout)["checks"]
    check = next(check for check in found if check["name"] == name)
    assert (check["outcome"], check["next_step"]) == ("skip", "run `rkcached bench m`")

    kept = ship.root / "kept.json"
    shown = ship.cli("bench", "--runs", "1", "--no-direct", "-o", str(kept)).stdout
    first = json.loads(kept.read_text())["first_answers"]["m"]
    assert first["ttft_ms"] > first["model_load_ms"] > 300
    assert first["first_decode_ms"] < first["model_load_ms"]
    assert "ms for loading the model" in shown

    found = json.loads(ship.cli("doctor", "--json", code=None).stdout)["checks"]
    check = next(check for check in found if check["name"] == name)
    assert check["outcome"] == "ok"
    assert " with cook (model " in check["finding"]
    assert model(ship)["model_load_ms"] > 300

    again = json.loads(ship.cli("bench", "m/cook", "--runs", "1", "--no-direct", "--json").stdout)
    assert again["first_answers"] == {}


def test_nothing_is_loaded_while_somebody_asks(ship: Workspace) -> None:
    """A model whose worker died comes back after the answer of another."""
    ship.memory_model("x.model")
    ship.memory_model("y.model", decode_us_per_token=80_000)
    ship.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n"
        "  x: {path: x.model, preload: cook, prompts: {cook: cook.md}}\n  y: {path: y.model}\n",
    )
    ship.start()
    wait_preloaded(ship)
    ship.ask("y", max_tokens=1)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(ship.ask, "y")
        wait_until(lambda: model(ship, "y")["worker"] == "busy", "the answer is under way")
        os.kill(model(ship, "x")["pid"], signal.SIGKILL)
        wait_until(lambda: model(ship, "x")["worker"] == "backoff", "the death was noticed")
        answer.result()
    wait_preloaded(ship, 2)
    log = ship.log_text()
    asked = log.rindex("path=/v1/chat/completions")
    assert asked < log.rindex("model loaded")
