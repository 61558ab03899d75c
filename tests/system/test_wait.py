"""`rkcached wait`: it ends when prompt caches are fresh.

Else it says why they never will be, or what it waits for.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
from collections.abc import Iterator

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S

FOR_LONG = ("--timeout", str(DEADLINE_S))


@pytest.fixture
def slow(workspace: Workspace) -> Workspace:
    """A daemon whose first build does not end while a test runs; `b` waits for that."""
    workspace.memory_model(prefill_us_per_token=60_000_000)
    workspace.write("a.md", "word " * 40)
    workspace.write("b.md", "word " * 50)
    workspace.declare("{a: a.md, b: b.md}")
    workspace.start()
    workspace.wait_state("a", "building")
    return workspace


class Waiting:
    """`rkcached wait` in the background."""

    def __init__(self, space: Workspace) -> None:
        self._space = space
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self._space.popen("wait", *FOR_LONG, *arguments, text=True, **pipes)
        self._started.append(process)
        return process

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def waiting(workspace: Workspace) -> Iterator[Waiting]:
    started = Waiting(workspace)
    yield started
    started.close()


def test_all_are_fresh(two_prompts: Workspace) -> None:
    """It returns at once, and says how many; names choose."""
    assert two_prompts.cli("wait", *FOR_LONG).stdout.startswith("2 fresh, after ")
    assert two_prompts.cli("wait", "m/a", *FOR_LONG).stdout.startswith("1 fresh, ")
    told = json.loads(two_prompts.cli("wait", "m", "--json", *FOR_LONG).stdout)
    assert (told["outcome"], told["errors"]) == ("fresh", [])
    assert [prompt["prompt"] for prompt in told["prompts"]] == ["a", "b"]


def test_a_change_made_just_before_counts(two_prompts: Workspace) -> None:
    """The daemon has not heard of it yet; `wait` returns when the new text is fresh, each time."""
    for number in range(5):
        two_prompts.write("prompts/a.md", f"Another text, number {number}.\n")
        built = len(two_prompts.built())
        two_prompts.cli("wait", *FOR_LONG)
        assert len(two_prompts.built()) == built + 1


def test_it_hears_of_the_build(workspace: Workspace, waiting: Waiting) -> None:
    """It begins before the daemon.

    Ends when the last prompt is fresh, without asking again and again.
    """
    workspace.memory_model(prefill_us_per_token=2_000)
    for name in "ab":
        workspace.write(f"{name}.md", f"You are {name}. " * 20)
    workspace.declare("{a: a.md, b: b.md}")
    process = waiting.start()
    workspace.start(ready=False)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("2 fresh, ")
    assert workspace.built() == ["a", "b"]
    events = workspace.log_text().count(" path=/v1/events ")
    asked = workspace.log_text().count(" path=/v1/status ")
    assert events <= 1  # it is told of at its end
    assert asked <= 12  # no more than there were changes


def test_it_survives_a_restart(slow: Workspace, waiting: Waiting) -> None:
    """A daemon that goes is waited for."""
    process = waiting.start("m/a")
    slow.logged(" path=/v1/status ")
    slow.stop()
    slow.memory_model()
    assert process.poll() is None
    slow.start()
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, out[:8], err) == (0, "1 fresh,", "")


def test_it_never_will_be(two_prompts: Workspace) -> None:
    """A prompt that is blocked for good: its reason and hint, at once; in JSON, too."""
    two_prompts.write("prompts/a.md", "word " * 9000)
    two_prompts.wait_state("a", "blocked")
    done = two_prompts.cli("wait", *FOR_LONG, code=os.EX_DATAERR)
    first, second = done.stderr.splitlines()
    assert first.startswith("error: m/a is blocked: the prompt has 45047 tokens")
    assert second.startswith("hint: shorten the prompt")
    done = two_prompts.cli("wait", "--json", *FOR_LONG, code=os.EX_DATAERR)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["outcome"] == "never"
    assert [error["message"] for error in told["errors"]] == [first.removeprefix("error: ")]
    two_prompts.cli("wait", "m/b", *FOR_LONG)
    two_prompts.write("prompts/b.md", "")
    assert "m/b is blocked" in two_prompts.cli("wait", "m/b", *FOR_LONG, code=os.EX_DATAERR).stderr


def test_what_is_tried_again_is_waited_for(workspace: Workspace) -> None:
    """A prompt that is blocked until the next attempt is not given up."""
    workspace.memory_model(faults=[{"op": "save", "kind": "error"}])
    workspace.write("a.md", "You are a.")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.logged(" build failed ")
    assert workspace.cli("wait", *FOR_LONG).stdout.startswith("1 fresh, ")


def test_time_is_up(slow: Workspace) -> None:
    """It says what it still waits for, with an exit code of its own."""
    done = slow.cli("wait", "--timeout", "2", code=os.EX_TEMPFAIL)
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: time is up after 2 s: 0 of 2 fresh; m/a is building")
    assert error.endswith(", m/b is missing")
    assert "--timeout" in hint
    told = json.loads(
        slow.cli("wait", "m/b", "--json", "--timeout", "2", code=os.EX_TEMPFAIL).stdout
    )
    assert (told["outcome"], told["prompts"][0]["state"]) == ("timeout", "missing")


def test_no_daemon_in_time(workspace: Workspace) -> None:
    """It waited for one, at the socket that it names."""
    done = workspace.cli("wait", "--timeout", "0.5", code=os.EX_TEMPFAIL)
    error, hint = done.stderr.splitlines()
    assert error == f"error: time is up after 0.5 s: no daemon answers on {workspace.socket}"
    assert hint.startswith("hint: start it with ")
    workspace.cli("wait", "--timeout", "0", code=os.EX_USAGE)


def test_what_is_not_declared(two_prompts: Workspace) -> None:
    """A name that is not declared, and a manifest that is rejected, end it at once."""
    done = two_prompts.cli("wait", "m/a", "m/typo", *FOR_LONG, code=os.EX_NOINPUT)
    assert "'m/typo' is not declared" in done.stderr
    assert "known: m, m/a, m/b" in done.stderr
    two_prompts.write("manifest.yaml", "version: 7\n")
    done = two_prompts.cli("wait", *FOR_LONG, code=os.EX_CONFIG)
    assert f"{two_prompts.manifest}:1: " in done.stderr


def test_a_socket_that_one_may_not_open(two_prompts: Workspace) -> None:
    """It is not waited for."""
    if os.geteuid() != 0:
        pytest.skip("only root can give up what lets root open everything")
    two_prompts.socket.chmod(0)
    weak = [
        "setpriv",
        "--bounding-set=-dac_override,-dac_read_search",
        "--inh-caps=-dac_override,-dac_read_search",
    ]
    done = subprocess.run(
        [*weak, "--", *two_prompts.command("wait"), *FOR_LONG],
        env=two_prompts.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert (done.returncode, "permission denied" in done.stderr) == (os.EX_NOPERM, True), (
        done.stderr
    )


def test_progress_at_a_terminal(slow: Workspace) -> None:
    """Standard error says what is waited for, where it is a terminal."""
    ours, theirs = pty.openpty()
    environment = {**slow.environment, "TERM": "xterm"}
    process = slow.popen(
        "wait", *FOR_LONG, env=environment, stdout=subprocess.DEVNULL, stderr=theirs
    )
    try:
        os.close(theirs)
        seen = b""
        while b"0 of 2 fresh; m/a is building" not in seen:
            seen += os.read(ours, 1 << 16)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0"])
def test_a_time_that_is_none(workspace: Workspace, seconds: str) -> None:
    """It is a wrong command line."""
    workspace.cli("wait", f"--timeout={seconds}", code=64)
