"""What an administrator does every day: edit, reload, restart, stop, read the journal."""

from __future__ import annotations

import pytest
from machine import STORE, UNIT, Machine

from tests.waiting import wait_until


@pytest.fixture
def running(machine: Machine) -> Machine:
    """The daemon runs and both prompts are fresh."""
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")
    return machine


def test_an_edited_prompt_becomes_fresh_in_systemctl_status(running: Machine) -> None:
    """Root saves a file in /etc; nobody gives a command."""
    built = running.status()["reconcile"]["builds"]
    running.write("/etc/rkcached/prompts/a.md", "You are somebody else.\n" * 20)
    wait_until(
        lambda: running.status()["reconcile"]["builds"] == built + 1, "the prompt is rebuilt"
    )
    assert running.wait_line("2 fresh") == "2 fresh, 0 blocked"
    assert 'Status: "2 fresh, 0 blocked"' in running.systemctl("status", UNIT)
    assert "somebody else" in running.read(f"{STORE}/m/a.bin")


def test_reload_puts_the_manifest_in_force(running: Machine) -> None:
    """When `systemctl reload` returns, the new manifest is in force.

    The process is the same.
    """
    before = running.main_pid
    running.declare({name: f"You are prompt {name}.\n" * 20 for name in "abc"})
    running.systemctl("reload", UNIT)
    assert [p["prompt"] for p in running.status()["prompts"]] == ["a", "b", "c"]
    assert running.main_pid == before
    assert running.show("ActiveState") == "active"
    running.wait_line("3 fresh")


def test_reload_of_a_broken_manifest_fails_and_changes_nothing(running: Machine) -> None:
    """File and line are in the status line and in the journal.

    Requests go on with the last good one.
    """
    good = running.read("/etc/rkcached/manifest.yaml")
    running.write("/etc/rkcached/manifest.yaml", good + "    promts: {}\n")
    assert "failed" in running.run("systemctl", "reload", UNIT, code=1).stderr
    line = running.wait_line("rejected")
    assert line.startswith("2 fresh, 0 blocked, manifest rejected: /etc/rkcached/manifest.yaml:8: ")
    assert running.show("ActiveState") == "active"
    assert running.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    said = [entry["MESSAGE"] for entry in running.journal("PRIORITY=3")]
    assert any("manifest rejected" in message and "manifest.yaml:8" in message for message in said)
    running.write("/etc/rkcached/manifest.yaml", good)
    running.systemctl("reload", UNIT)
    assert running.wait_line("2 fresh") == "2 fresh, 0 blocked"


def test_reload_drops_no_request(running: Machine) -> None:
    """A reply that runs while the manifest is reloaded is finished."""
    running.declare({"a": "You are A.\n", "b": "You are B.\n"}, decode_us_per_token=20_000)
    running.systemctl("reload", UNIT)
    running.wait_line("2 fresh")
    body = '{"model": "m/a", "max_tokens": 100, "messages": [{"role": "user", "content": "hello"}]}'
    asking = (
        f"curl -sS --unix-socket /run/rkcached/rkcached.sock -d '{body}' "
        "http://localhost/v1/chat/completions"
    )
    answer = running.run("sh", "-c", f"{asking} & sleep 0.5; systemctl reload {UNIT}; wait").stdout
    assert '"completion_tokens":100' in answer


def test_a_hang_up_looks_again(running: Machine) -> None:
    """SIGHUP by hand: systemd hears of the reload and of its end."""
    looks = running.status()["reconcile"]["looks"]
    running.systemctl("kill", "--kill-whom=main", "-s", "HUP", UNIT)
    wait_until(lambda: running.status()["reconcile"]["looks"] > looks, "the daemon looked again")
    wait_until(lambda: running.show("ActiveState") == "active", "it is active again")


def test_restart_rebuilds_nothing(running: Machine) -> None:
    """The next daemon finds its caches fresh at once."""
    running.systemctl("restart", UNIT)
    assert running.show("StatusText") == "2 fresh, 0 blocked"
    assert running.status()["reconcile"]["builds"] == 0


@pytest.mark.parametrize(
    ("tokens", "grace_s", "end"), [(100, 60, '"completion_tokens":100'), (3000, 1, '"error"')]
)
def test_stop_lets_a_reply_end_or_tells_it(
    running: Machine, tokens: int, grace_s: int, end: str
) -> None:
    """One that ends within the grace is finished.

    One that takes minutes gets an error, and the stop does not wait.
    """
    running.declare({"a": "You are A.\n", "b": "You are B.\n"}, decode_us_per_token=50_000)
    manifest = running.read("/etc/rkcached/manifest.yaml")
    running.write(
        "/etc/rkcached/manifest.yaml", f"{manifest}serving: {{shutdown_grace_s: {grace_s}}}\n"
    )
    running.systemctl("reload", UNIT)
    running.wait_line("2 fresh")
    body = (
        f'{{"model": "m/a", "max_tokens": {tokens}, "messages": [{{"role": "user", "content": '
        '"hello"}]}'
    )
    curl = "curl -sS --unix-socket /run/rkcached/rkcached.sock http://localhost/v1"
    asking = f"{curl}/chat/completions -d '{body}'"
    runs = f"""until {curl}/status | grep -q '"running":1'; do sleep 0.05; done"""
    answer = running.run("sh", "-c", f"{asking} & {runs}; systemctl stop {UNIT}; wait").stdout
    assert end in answer
    assert running.show("Result") == "success"


def test_stop_ends_soon_during_a_build(machine: Machine) -> None:
    """Long before the build is over, cleanly, with no half file.

    The next start builds what is missing.
    """
    machine.declare({"a": "You are prompt A.\n" * 100}, prefill_us_per_token=1_000_000)
    machine.systemctl("start", UNIT)
    machine.wait_line("1 building m/a")
    machine.systemctl("stop", "rkcached.socket", "rkcached-admin.socket", UNIT)
    assert machine.show("Result") == "success"
    assert machine.show("ExecMainStatus") == "0"
    assert machine.run("find", f"{STORE}/m", "-type", "f").stdout == ""
    machine.declare({"a": "You are prompt A.\n" * 100})
    machine.systemctl("start", UNIT)
    machine.wait_line("1 fresh")


def test_a_manifest_that_never_was_good_is_not_tried_again(machine: Machine) -> None:
    """Exit code 78, no restart, file and line in the status; mended, it starts."""
    machine.systemctl("stop", "rkcached.socket", "rkcached-admin.socket")
    good = machine.read("/etc/rkcached/manifest.yaml")
    machine.write("/etc/rkcached/manifest.yaml", "version: 1\nmodles: {}\n")
    machine.systemctl("start", UNIT, code=1)
    assert (machine.show("ActiveState"), machine.show("ExecMainStatus")) == ("failed", "78")
    assert machine.show("NRestarts") == "0"
    assert "manifest.yaml:2" in machine.systemctl("status", UNIT, code=3)
    machine.write("/etc/rkcached/manifest.yaml", good)
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")


def test_who_asks_a_daemon_that_cannot_start_is_told_why(machine: Machine) -> None:
    """The connection that starts it gets 503 with file and line.

    It does not start the daemon over and over.
    """
    good = machine.read("/etc/rkcached/manifest.yaml")
    machine.write("/etc/rkcached/manifest.yaml", "version: 1\nmodles: {}\n")
    status, answer = machine.curl("/v1/models")
    assert status == 503
    assert "/etc/rkcached/manifest.yaml:1" in answer["error"]["message"]
    assert machine.show("ActiveState", "rkcached.socket") == "active"
    machine.write("/etc/rkcached/manifest.yaml", good)
    assert machine.ask("m/a")


def test_the_journal_is_searchable_by_field(running: Machine) -> None:
    """One event an entry, with its priority; no text of a prompt anywhere."""
    built = [
        entry
        for entry in running.journal("MODEL=m", "PROMPT=a")
        if entry["EVENT"] == "artifact built"
    ]
    assert len(built) >= 1
    last = built[-1]
    assert (last["PRIORITY"], last["REASON"], last["ARTIFACT_STATE"]) == ("6", "missing", "fresh")
    assert last["MESSAGE"].startswith("artifact built model=m prompt=a ")
    assert int(last["TOKENS"]) > 0
    running.run("rm", "/etc/rkcached/prompts/b.md")
    wait_until(
        lambda: running.journal("ARTIFACT_STATE=blocked", "PROMPT=b"), "the missing prompt is told"
    )
    assert running.journal("ARTIFACT_STATE=blocked", "PROMPT=b")[-1]["PRIORITY"] == "4"
    assert not [entry for entry in running.journal() if "You are prompt" in str(entry)]


@pytest.mark.long
def test_the_log_lines_of_a_prompt(running: Machine) -> None:
    """`rkcached logs` finds them in the journal; with -f it goes on."""
    both = running.run("rkcached", "logs").stdout
    assert "prompt=a" in both
    assert "prompt=b" in both
    one = running.run("rkcached", "logs", "m/a", "-n", "500").stdout
    assert "artifact built" in one
    assert "prompt=b" not in one
    followed = running.run(
        "sh", "-c", "timeout 10 rkcached logs -f -n 0 m/b & sleep 1; rkcached regenerate m/b; wait"
    ).stdout
    assert "artifact built" in followed
