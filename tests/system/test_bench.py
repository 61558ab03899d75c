"""`rkcached bench` and `rkcached compare`.

Real runs through the real daemon, and what is said of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S, wait_until

TEXT = (
    "You are the keeper of a lighthouse. You answer in one sentence, and you know every ship. " * 4
)


PREFILL_US = 200
"""What the engine takes for a token of a prompt. It takes longer on a busy machine, never less."""


@pytest.fixture
def slow(workspace: Workspace, request: pytest.FixtureRequest) -> Workspace:
    """A running daemon with a prompt of some 360 tokens.

    Its engine reads 5,000 tokens a second, unless a parameter gives the microseconds of one.
    """
    prefill_us = getattr(request, "param", PREFILL_US)
    workspace.memory_model(prefill_us_per_token=prefill_us, decode_us_per_token=100)
    workspace.write("long.md", TEXT)
    workspace.write("tiny.md", "Hi.")
    workspace.declare("{long: long.md, tiny: tiny.md}", top="cache: {min_tokens: 100}")
    workspace.start()
    workspace.wait_state("long", "fresh")
    workspace.wait_state("tiny", "uncached")
    return workspace


def measured(space: Workspace, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(space.cli("bench", "--json", *arguments).stdout)
    return found


@contextlib.contextmanager
def started(space: Workspace, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A bench that goes on, in a session of its own.

    It is killed at the end if it is still there.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with space.popen("bench", *arguments, **pipes, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_each_state_is_what_it_says(slow: Workspace) -> None:
    """Cold takes nothing from a cache, file loads it, memory has it; the parts are the whole.

    So on the engine.
    """
    found = measured(slow, "m/long", "--runs", "5")
    (prompt,) = found["prompts"]
    tokens = slow.prompt("long")["artifact"]["tokens"]
    cold, file, memory = (prompt["states"][state]["runs"] for state in ("cold", "file", "memory"))
    assert [len(runs) for runs in (cold, file, memory)] == [5, 5, 5]
    assert {(run["cached_tokens"], run["load_ms"]) for run in cold} == {(0, 0.0)}
    assert all(run["cached_tokens"] >= tokens and run["load_ms"] > 0 for run in file)
    assert all(run["cached_tokens"] >= tokens and run["load_ms"] == 0 for run in memory)
    for run in (*cold, *file, *memory):
        parts = ("queue_ms", "load_ms", "prefill_ms", "first_decode_ms", "socket_ms")
        assert sum(run[part] for part in parts) == pytest.approx(run["ttft_ms"], abs=0.1)
        assert run["decode_tokens_per_s"] > 0
    assert min(run["prefill_ms"] for run in cold) >= tokens * PREFILL_US / 1000
    median = {state: one["summary"]["ttft_ms"]["median"] for state, one in prompt["states"].items()}
    for state in ("file", "memory"):  # how much it saves depends on what else the machine does
        saved = 1 - median[state] / median["cold"]
        assert prompt["reduction"][state] == pytest.approx(saved, abs=0.001)
    assert prompt["no_gain"] == found["direct"] == ""
    for state in ("cold", "file", "memory"):
        direct = prompt["states"][state]["direct"]
        assert [run["cached_tokens"] == 0 for run in direct] == [state == "cold"] * 5
        assert {"median", "p95"} == prompt["states"][state]["summary"]["daemon_share_ms"].keys()


def test_it_says_enough_to_repeat_it(slow: Workspace) -> None:
    """Machine, versions, the model's file and digest, parameters.

    -o keeps the same, and the table fits 80 columns.
    """
    kept = slow.root / "a.json"
    done = slow.cli("bench", "--runs", "2", "--no-direct", "-o", str(kept), COLUMNS="80")
    assert done.stderr.splitlines() == [
        "measuring m/long, 1 of 2",
        "measuring m/tiny, 2 of 2",
    ]  # a line for each
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = json.loads(kept.read_text())
    assert (found["program"], found["format"]) == ("rkcached bench", 1)
    assert found["machine"].keys() >= {
        "board",
        "cpu",
        "cores",
        "memory_bytes",
        "kernel",
        "clocks",
        "clocks_fixed",
    }
    assert found["versions"].keys() == {"rkcached", "daemon", "python"}
    model = found["models"]["m"]
    assert (model["engine"], model["runtime"], model["file"]) == (
        "memory",
        "1",
        str(slow.root / "m.model"),
    )
    assert len(model["digest"]) == 64
    assert model["params"]["max_context_len"] == 4096
    assert model["threads"] is None  # this engine decides by itself
    assert found["parameters"]["runs"] == 2
    assert found["direct"] == "not asked for"
    assert "2 runs are few" in " ".join(found["warnings"])
    assert "m/long" in done.stdout
    assert "saves" in done.stdout
    tiny = next(prompt for prompt in found["prompts"] if prompt["prompt"] == "tiny")
    assert "cache.min_tokens is 100" in tiny["no_gain"]
    assert len(tiny["states"]["cold"]["runs"]) == 2
    assert tiny["states"]["file"]["runs"] == tiny["states"]["memory"]["runs"] == []


@pytest.mark.long
@pytest.mark.parametrize("slow", [50], indirect=True, ids=["quick"])
def test_sweep_leaves_nothing(slow: Workspace) -> None:
    """Prompts near 128 to 2,048 tokens, and one cut to the context; drawn with their labels.

    All are removed at the end.
    """
    svg, png = slow.root / "a.svg", slow.root / "a.png"
    found = measured(slow, "--sweep", "--runs", "1", "--plot", str(svg))
    lengths = [prompt["tokens"] for prompt in found["prompts"]]
    assert lengths[:5] == pytest.approx([128, 256, 512, 1024, 2048], abs=40)
    assert 3500 < lengths[5] < 4096
    for prompt in found["prompts"]:  # each was read, by the time that its tokens take
        (cold,) = prompt["states"]["cold"]["runs"]
        assert cold["ttft_ms"] > cold["prefill_ms"] >= prompt["tokens"] * 50 / 1000
    assert all(
        prompt["states"]["file"]["runs"][0]["cached_tokens"] >= prompt["tokens"]
        for prompt in found["prompts"]
    )
    assert all(prompt["states"]["file"]["direct"] for prompt in found["prompts"])
    texts = " ".join(ET.parse(svg).getroot().itertext())
    for label in (
        "prompt length (tokens)",
        "time to first token (ms)",
        "cold",
        "from file",
        "prefill",
        "first decode",
    ):
        assert label in texts
    assert {prompt["prompt"] for prompt in slow.status()["prompts"]} == {"long", "tiny"}
    wait_until(
        lambda: sorted(path.stem for path in slow.cache.glob("m/*.memory_cache")) == ["long"],
        "files are gone",
    )
    slow.cli("bench", "m/long", "--runs", "1", "--no-direct", "--plot", str(png))
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_sweep_leaves_nothing(slow: Workspace, number: signal.Signals) -> None:
    """Ctrl-C: no stored prompt, no engine of its own, no traceback.

    A sentence tells what became of it.
    """
    with started(slow, "--sweep", "--runs", "1000") as process:
        wait_until(
            lambda: sum(prompt["state"] == "fresh" for prompt in slow.status()["prompts"]) > 2,
            "a prompt is stored",
        )
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert "Traceback" not in said
        assert "interrupted: nothing of it was kept; the sweep's prompts were removed" in said
        assert {prompt["prompt"] for prompt in slow.status()["prompts"]} == {"long", "tiny"}
        wait_until(lambda: _of_session(process.pid) == [], "its processes are gone")


@pytest.mark.long
def test_interrupted_bench_keeps_what_it_has(slow: Workspace) -> None:
    """Prompts that were measured before Ctrl-C are shown, drawn and kept.

    Those that were not are named.
    """
    slow.write("longer.md", TEXT * 5)
    slow.declare("{long: long.md, longer: longer.md}")
    slow.wait_state("longer", "fresh")
    kept, drawn = slow.root / "kept.json", slow.root / "kept.svg"
    with started(
        slow, "--runs", "10", "--no-direct", "-o", str(kept), "--plot", str(drawn)
    ) as process:
        assert process.stderr is not None
        assert any("measuring m/longer, 2 of 2" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        shown, said = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, said.strip()) == (130, "")
        assert (
            "not to be trusted: interrupted, this is what was measured until then; not measured: "
            "m/longer" in shown
        )
        found = json.loads(kept.read_text())
        assert found["ended"] == "interrupted"
        assert [
            (prompt["prompt"], len(prompt["states"]["file"]["runs"])) for prompt in found["prompts"]
        ] == [("long", 10)]
        assert "m/long" in " ".join(ET.parse(drawn).getroot().itertext())
        again = slow.cli("bench", "--from", str(kept))
        assert again.stdout == shown


def _of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_no_gain_is_explained(workspace: Workspace) -> None:
    """A model whose state cannot be saved: the cold runs are there, and why there are no others."""
    workspace.memory_model(can_save=False)
    workspace.write("a.md", TEXT)
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_settled()
    (prompt,) = measured(workspace, "--runs", "1")["prompts"]
    assert len(prompt["states"]["cold"]["runs"]) == len(prompt["states"]["cold"]["direct"]) == 1
    assert "cannot save its KV state" in prompt["no_gain"]
    assert "cannot save its KV state" in " ".join(
        workspace.cli("bench", "--runs", "1", "--no-direct").stdout.split()
    )


def test_engine_that_cannot_be_loaded_twice(slow: Workspace) -> None:
    """As where the daemon's worker has the NPU for itself.

    The socket is measured, and it is said why not more.
    """
    other = slow.write("other.yaml", slow.manifest.read_text().replace("m.model", "none.model"))
    found = measured(slow, "m/long", "--runs", "1", "-m", str(other))
    assert "none.model" in found["direct"]
    assert found["prompts"][0]["states"]["file"]["runs"]
    assert found["prompts"][0]["states"]["file"]["direct"] == []


@pytest.mark.long
def test_errors(workspace: Workspace) -> None:
    """Each is a sentence, the next step, and a code of sysexits."""
    assert "no daemon answers" in workspace.cli("bench", code=69).stderr
    assert "neither SVG nor PNG" in workspace.cli("bench", "--plot", "a.gif", code=64).stderr
    assert "cannot write none/a.json" in workspace.cli("bench", "-o", "none/a.json", code=73).stderr
    workspace.write("a.json", '{"program": "another"}')
    workspace.write("b.json", '{"program": "rkcached bench", "format": 99}')
    workspace.write("c.json", '{"program": "rkcached bench", "format": 1}')
    assert (
        "a.json is not a result of rkcached bench"
        in workspace.cli("compare", "a.json", "b.json", code=65).stderr
    )
    assert "has format 99" in workspace.cli("compare", "b.json", "a.json", code=65).stderr
    assert "damaged result" in workspace.cli("compare", "c.json", "a.json", code=65).stderr
    assert (
        "cannot read none.json" in workspace.cli("compare", "none.json", "a.json", code=66).stderr
    )


def test_unknown_names(slow: Workspace) -> None:
    """What there is, is named."""
    said = slow.cli("bench", "m/none", code=66).stderr
    assert "there is no prompt of 'm/none'" in said
    assert "known: m/long, m/tiny" in said
    assert "no model 'none'" in slow.cli("bench", "none", "--sweep", code=66).stderr


@pytest.mark.long
@pytest.mark.parametrize("slow", [20], indirect=True, ids=["quick"])
def test_compare_before_and_after(slow: Workspace) -> None:
    """A result is within the noise of itself; an engine that reads slowly is slower where it reads.

    So slowly that no other work of the machine takes as long: 20 us for a token, then 800.
    """
    before, after = slow.root / "a.json", slow.root / "b.json"
    slow.cli("bench", "m/long", "--runs", "6", "--no-direct", "-o", str(before))
    slow.stop()
    slow.memory_model(prefill_us_per_token=800, decode_us_per_token=100)
    slow.start()
    slow.wait_state("long", "fresh")
    slow.cli("bench", "m/long", "--runs", "6", "--no-direct", "-o", str(after))
    found = json.loads(slow.cli("compare", str(before), str(after), "--json").stdout)
    assert "models.m.digest" in {difference["what"] for difference in found["differences"]}
    cold = next(row for row in found["rows"] if row["what"] == "cold, ms")
    assert (cold["verdict"], cold["ratio"] > 2) == ("slower", True)
    same = json.loads(slow.cli("compare", str(before), str(before), "--json").stdout)
    assert same["differences"] == []
    assert {row["verdict"] for row in same["rows"]} == {"within the noise", "one sample"}
    shown = slow.cli("compare", str(before), str(after)).stdout
    assert shown.index("models.m.digest") < shown.index("slower")


@pytest.mark.long
def test_a_text_that_changed_is_not_compared(slow: Workspace) -> None:
    """A shorter one was called faster, with all else the same."""
    before, after = slow.root / "a.json", slow.root / "b.json"
    slow.cli("bench", "m/long", "m/tiny", "--runs", "5", "--no-direct", "-o", str(before))
    slow.write("long.md", TEXT[len(TEXT) // 2 :])
    wait_until(lambda: slow.built() == ["long", "long"], "the edit is built")
    slow.cli("bench", "m/long", "m/tiny", "--runs", "5", "--no-direct", "-o", str(after))
    found = json.loads(slow.cli("compare", str(before), str(after), "--json").stdout)
    assert [difference["what"] for difference in found["differences"]] == ["m/long: text"]
    rows = {(row["prompt"], row["what"]): row["verdict"] for row in found["rows"]}
    assert rows["m/long", ""] == "not compared: its text changed"
    assert sum(prompt == "m/long" for prompt, _ in rows) == 1
    assert "cold, ms" in {what for prompt, what in rows if prompt == "m/tiny"}
    assert "its text changed" in slow.cli("compare", str(before), str(after)).stdout


@pytest.mark.long
@pytest.mark.model
def test_real_model(workspace: Workspace, small_model: Path) -> None:
    """llama.cpp: the cold run is cold by the library's own count.

    The file holds every token of the prompt.
    """
    workspace.write("cook.md", TEXT)
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: llamacpp, threads: 1}\n"
        f"models:\n  m:\n    path: {small_model}\n"
        "    params: {max_context_len: 512, max_new_tokens: 32, temperature: 0}\n"
        "    prompts: {cook: cook.md}\n",
    )
    workspace.start()
    workspace.wait_state("cook", "fresh")
    found = measured(workspace, "--runs", "1")
    assert found["models"]["m"]["threads"] == 1
    (prompt,) = found["prompts"]
    runs = {state: one["runs"][0] for state, one in prompt["states"].items()}
    assert runs["cold"]["cached_tokens"] == 0
    assert runs["file"]["cached_tokens"] >= prompt["tokens"] > 60
    assert runs["file"]["load_ms"] > 0 == runs["memory"]["load_ms"]
    assert found["direct"] == ""
    assert prompt["states"]["cold"]["direct"][0]["cached_tokens"] == 0
    assert prompt["states"]["file"]["direct"][0]["cached_tokens"] >= prompt["tokens"]
