"""`rkcached bench` when something comes in between.

What cannot be measured, other clients, signals, a terminal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Workspace
from terminal import Terminal

from tests.waiting import DEADLINE_S, wait_until

TEXT = (
    "You keep the {}. "
    + "You answer in one sentence, and you know every ship that passes by day and night. " * 4
)
STATES = ("cold", "file", "memory")


@pytest.fixture
def three(workspace: Workspace, request: pytest.FixtureRequest) -> Workspace:
    """A running daemon; the prompts `a` and `c` are fresh, `b` has no text.

    Its engine reads 5,000 tokens a second, unless a parameter gives the microseconds of one.
    """
    prefill_us = getattr(request, "param", 200)
    workspace.memory_model(prefill_us_per_token=prefill_us, decode_us_per_token=100)
    workspace.write("a.md", TEXT.format("lighthouse"))
    workspace.write("b.md", "")
    workspace.write("c.md", TEXT.format("harbour"))
    workspace.declare("{a: a.md, b: b.md, c: c.md}")
    workspace.start()
    workspace.wait_settled()
    return workspace


class Bench:
    """A `bench --json` that goes on. It is killed at the end if it is still there."""

    def __init__(self, space: Workspace, *arguments: str) -> None:
        self._said = space.root / "bench.stderr"
        with self._said.open("w") as said:
            self.process = space.popen(
                "bench",
                "--json",
                "--no-direct",
                *arguments,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                start_new_session=True,
            )
        self._space = space

    def wait_for(self, line: str) -> None:
        wait_until(lambda: line in self._said.read_text(), f"it says {line!r}")

    def wait_for_answers(self, more: int) -> None:
        wait_until(lambda: sum(self._space.status()["answers"].values()) >= more, f"{more} answers")

    def result(self, code: int = 0) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=DEADLINE_S)
        assert self.process.returncode == code, self._said.read_text()
        assert "Traceback" not in self._said.read_text()
        found: dict[str, Any] = json.loads(out)
        return found


@contextlib.contextmanager
def benching(space: Workspace, *arguments: str) -> Iterator[Bench]:
    bench = Bench(space, *arguments)
    try:
        yield bench
    finally:
        if bench.process.poll() is None:
            bench.process.kill()
        bench.process.communicate()


def runs_of(found: dict[str, Any], name: str) -> list[int]:
    prompt = next(prompt for prompt in found["prompts"] if prompt["prompt"] == name)
    return [len(prompt["states"][state]["runs"]) for state in STATES]


def test_a_blocked_prompt_does_not_keep_the_others_from_being_measured(three: Workspace) -> None:
    """One empty file ended the whole command.

    It is said in the result, the table has it, and the exit code tells.
    """
    found = json.loads(three.cli("bench", "--json", "--runs", "1", "--no-direct", code=1).stdout)
    assert [runs_of(found, name) for name in ("a", "c")] == [[1, 1, 1]] * 2
    (refused,) = found["refused"]
    assert refused.startswith("the prompt m/b cannot be used")
    assert "empty" in refused
    shown = " ".join(
        three.cli("bench", "m/a", "m/b", "--runs", "1", "--no-direct", code=1).stdout.split()
    )
    assert f"not measured: {refused}" in shown


def test_a_sweep_takes_what_a_budget_leaves(workspace: Workspace) -> None:
    """The short ones, which fit; the others are refused, and displace none of these."""
    workspace.memory_model(context_tokens=200_000)
    workspace.write("a.md", "a" * 115_000)
    workspace.declare(
        "{a: a.md}", params="{max_context_len: 200000}", top="cache: {max_bytes: 1 MiB}"
    )
    workspace.start()
    workspace.wait_state("a", "fresh")
    found = json.loads(
        workspace.cli("bench", "--sweep", "--json", "--runs", "1", "--no-direct", code=1).stdout
    )
    assert [prompt["length"] for prompt in found["prompts"]] == [128, 256, 512]
    assert all(len(prompt["states"]["file"]["runs"]) == 1 for prompt in found["prompts"])
    assert [refusal.split(":")[0] for refusal in found["refused"]] == [
        f"m, {n} tokens" for n in ("1,024", "2,048", "4,096")
    ]


@pytest.mark.long
def test_a_text_that_changes_before_its_turn_is_not_taken_for_the_old_one(three: Workspace) -> None:
    """Neither by its digest, nor by the engine alone, which would compute the old one."""
    three.write("b.md", "You are B, which is not empty any more. " * 20)
    three.wait_state("b", "fresh")
    with benching(three, "m/a", "m/b", "--direct", "--runs", "10") as bench:
        bench.wait_for("measuring m/a")
        three.write("b.md", "You are B, and short.")
        found = bench.result()
    a, b = found["prompts"]
    assert a["text_digest"] == hashlib.sha256(TEXT.format("lighthouse").encode()).hexdigest()
    assert b["text_digest"] == ""
    assert "m/b changed meanwhile" in found["direct"]
    assert [len(one["states"]["cold"]["direct"]) for one in (a, b)] == [10, 0]


def test_a_name_is_told_in_letters_that_are_not_obeyed(workspace: Workspace) -> None:
    """A file of such a name makes no prompt, and is named with escapes."""
    workspace.memory_model()
    workspace.write("prompts/x\x1b[31m.md", "You are red.")
    workspace.declare("{}", model="    prompts_from: prompts/*.md\n")
    workspace.start()
    workspace.wait_settled()
    for command in (("bench", "--runs", "1", "--no-direct"), ("status",), ("check",)):
        done = workspace.cli(*command, code=None)
        assert "\x1b" not in done.stdout + done.stderr
        assert (r"x\x1b[31m.md" in done.stdout + done.stderr) == (command[0] != "bench")


def test_only_a_blocked_prompt_is_an_error_of_the_input(three: Workspace) -> None:
    """Not 69, which is for a daemon that does not answer."""
    said = three.cli("bench", "m/b", "--runs", "1", code=66).stderr
    assert "the prompt m/b cannot be used" in said
    assert "hint: " in said


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_input(workspace: Workspace) -> None:
    """As above, for a model: each of its prompts is refused, and the sentence names one reason."""
    workspace.write("m.model", "no model")
    workspace.write("a.md", TEXT)
    workspace.declare("{a: a.md, b: a.md}")
    workspace.start()
    workspace.wait_settled()
    said = workspace.cli("bench", "--runs", "1", code=66).stderr
    assert "the model 'm' cannot be used" in said
    assert "1 more could not be measured either" in said


@pytest.mark.long
def test_a_prompt_that_is_removed_meanwhile(three: Workspace) -> None:
    """What was measured of it stays, it is said how much, and the next prompt is measured."""
    with benching(three, "m/a", "m/c", "--runs", "20") as bench:
        bench.wait_for_answers(12)
        three.declare("{b: b.md, c: c.md}")
        found = bench.result()
    assert runs_of(found, "c") == [20] * 3
    assert all(3 <= runs < 20 for runs in runs_of(found, "a"))
    said = " ".join(found["warnings"])
    assert (
        f"m/a: {min(runs_of(found, 'a'))} of 20 runs, then the model 'm' has no prompt 'a'" in said
    )


@pytest.mark.long
def test_a_prompt_that_is_edited_meanwhile(three: Workspace) -> None:
    """Its figures are of two texts, so there are none.

    That is no word about what its cache gains.
    """
    with benching(three, "m/a", "--runs", "20") as bench:
        bench.wait_for_answers(12)
        three.write("a.md", TEXT.format("bridge"))
        found = bench.result()
    (edited,) = found["prompts"]
    assert {edited["states"][state]["missing"] for state in STATES} == {
        "it changed while it was measured; measure it again"
    }
    assert runs_of(found, "a") == [0] * 3
    assert edited["no_gain"] == ""
    assert edited["reduction"] == {}


def test_a_daemon_that_dies_does_not_take_what_was_measured(three: Workspace) -> None:
    """The first prompt is whole, the second one has what it has.

    The third is named as not measured.
    """
    three.write("d.md", TEXT.format("quay"))
    three.declare("{a: a.md, c: c.md, d: d.md}")
    three.wait_state("d", "fresh")
    with benching(three, "--runs", "10") as bench:
        bench.wait_for("measuring m/c, 2 of 3")
        three.stop(signal.SIGKILL)
        found = bench.result(os.EX_UNAVAILABLE)
    assert runs_of(found, "a") == [10] * 3
    assert found["ended"] == "the daemon went away"
    said = " ".join(found["warnings"])
    assert "the daemon went away, this is what was measured until then; not measured: " in said
    assert "m/d" in said
    assert "d" not in [prompt["prompt"] for prompt in found["prompts"]]


def test_a_daemon_that_dies_before_anything_was_measured(workspace: Workspace) -> None:
    """Then there is the error only."""
    workspace.memory_model(faults=[{"op": "generate", "kind": "hang", "at": 1}])
    workspace.write("a.md", TEXT.format("lighthouse"))
    workspace.declare("{a: a.md}", top="cache: {min_tokens: 4000}")
    workspace.start()
    workspace.wait_state("a", "uncached")
    with benching(workspace, "m/a", "--runs", "1") as bench:
        wait_until(lambda: workspace.status()["running"], "it asks")
        workspace.stop(signal.SIGKILL)
        bench.process.communicate(timeout=DEADLINE_S)
        assert bench.process.returncode == 69
        bench.wait_for("the daemon broke the connection")


@pytest.mark.long
def test_other_clients_are_noticed(three: Workspace) -> None:
    """By the daemon's own counts; and not where nobody else asked."""
    quiet = json.loads(three.cli("bench", "m/a", "--json", "--runs", "2", "--no-direct").stdout)
    assert "other clients" not in " ".join(quiet["warnings"])
    asked = sum(three.status()["answers"].values())
    with benching(three, "m/a", "--runs", "20") as bench:
        bench.wait_for_answers(asked + 5)
        for _ in range(3):
            three.ask("m/c")
        found = bench.result()
    assert "other clients asked the daemon meanwhile: 3 answers" in " ".join(found["warnings"])


def test_a_sweep_refuses_the_name_of_a_prompt(three: Workspace) -> None:
    """It would have swept the whole model."""
    said = three.cli("bench", "--sweep", "m/nope", code=64).stderr
    assert "'m/nope' names a prompt" in said
    assert "name models only, as in `rkcached bench --sweep m`" in said


@pytest.mark.long
@pytest.mark.parametrize("three", [20], indirect=True, ids=["fast"])
def test_a_sweep_removes_what_killed_ones_left(three: Workspace) -> None:
    """Only what was stored by a process that is gone.

    A declared prompt of such a name is not its own to remove.
    """
    three.declare("{a: a.md, bench-99999999-128: c.md}")
    three.wait_state("bench-99999999-128", "fresh")
    with three.http(admin=True) as admin:
        body = {"cache_name": "bench-diary", "content": TEXT}
        assert admin.post("/v1/cache/m", json=body).status_code == 200
    with benching(three, "--sweep", "--runs", "1000") as bench:
        bench.wait_for("measuring")
        bench.process.send_signal(
            signal.SIGSTOP
        )  # it lives, but does not keep the others from the engine
        with benching(three, "--sweep", "--runs", "1") as second:
            second.result()
        left = {prompt["prompt"] for prompt in three.status()["prompts"]}
        assert sum(name.startswith(f"bench-{bench.process.pid}-") for name in left) >= 5
        bench.process.kill()
        bench.process.wait()
    with benching(three, "--sweep", "--runs", "1") as third:
        third.result()
    assert {prompt["prompt"] for prompt in three.status()["prompts"]} == {
        "a",
        "bench-99999999-128",
        "bench-diary",
    }


@pytest.mark.long
def test_progress_at_a_terminal(three: Workspace) -> None:
    """What runs, how many answers are done of all, and time.

    One line of 80 columns that is gone at the end.
    """
    terminal = Terminal(three, "bench", "m/a", "m/c", "--runs", "5", "--json")
    try:
        # What lasts for several of its ten pictures a second; a single run of a state may pass
        # between two.
        terminal.wait_for("m/a", "cold ", "/5", "/60")
        terminal.wait_for("m/a", "engine alone", "/60")
        terminal.wait_for("m/c", "/5", "0:00:0")
        found = json.loads(terminal.end())
        assert not "".join(terminal.screen.display).strip()
    finally:
        terminal.close()
    assert runs_of(found, "c") == [5] * 3
    done = {line.split("/60")[0].split()[-1] for line in terminal.seen if "/60" in line}
    assert len(done) > 12  # by the answer, not by the round
    assert not any("…" in line for line in terminal.seen)


@pytest.mark.long
def test_a_closed_terminal_leaves_no_stored_prompt(three: Workspace) -> None:
    """The kernel sends SIGHUP, and what is written then fails."""
    terminal = Terminal(three, "bench", "--sweep", "--runs", "1000")
    try:
        terminal.wait_for("/1000")
        assert len(three.status()["prompts"]) > 3
        terminal.hang_up()
        terminal.process.communicate(timeout=DEADLINE_S)
    finally:
        terminal.close()
    assert {prompt["prompt"] for prompt in three.status()["prompts"]} == {"a", "b", "c"}
