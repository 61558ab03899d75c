"""Commands on the service's manifest say what the service sees.

Running or not, asked by root or by a member.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from machine import UNIT, Machine

HIDDEN = "/home/me/models/m.model cannot be read: /home is hidden from the service"
DROP_IN = "ProtectHome=tmpfs and BindReadOnlyPaths=/home/me/models"
OPENED = "[Service]\nProtectHome=tmpfs\nBindReadOnlyPaths=/home/me/models\n"


@pytest.fixture
def at_home(machine: Machine) -> Iterator[Machine]:
    """The model lies in the home of the user me, who is in the group rkcached; the daemon runs."""
    machine.run("useradd", "--create-home", "--groups", "rkcached", "me")
    machine.run(
        "sh", "-c", "mkdir /home/me/models && mv /var/lib/rkcached-models/m.model /home/me/models/"
    )
    machine.run("chmod", "755", "/home/me")
    manifest = machine.read("/etc/rkcached/manifest.yaml")
    machine.write(
        "/etc/rkcached/manifest.yaml",
        manifest.replace("/var/lib/rkcached-models/", "/home/me/models/"),
    )
    machine.systemctl("start", UNIT)
    machine.wait_line("2 blocked")
    yield machine
    machine.run("userdel", "--remove", "me")


def stop(machine: Machine) -> None:
    machine.systemctl("stop", "rkcached.socket", "rkcached-admin.socket", UNIT)
    assert machine.main_pid == 0


def says_hidden(machine: Machine, user: str) -> None:
    """Each command, in the same words."""
    check = machine.run("rkcached", "check", user=user, code=78).stderr
    assert HIDDEN in check
    assert DROP_IN in check
    assert "manifest.yaml:5: " in check
    [problem] = json.loads(machine.run("rkcached", "check", "--json", user=user, code=78).stdout)
    assert (problem["line"], problem["message"]) == (5, HIDDEN)
    explained = json.loads(machine.run("rkcached", "explain", "m/a", "--json", user=user).stdout)
    assert (explained["state"], explained["reason"]) == ("blocked", HIDDEN)
    assert explained["action"]["action"] == "blocked"
    assert DROP_IN in explained["hint"]
    assert "at its next look" not in machine.run("rkcached", "explain", "m/a", user=user).stdout
    planned = json.loads(machine.run("rkcached", "plan", "--json", user=user).stdout)
    assert [(action["action"], action["reason"]) for action in planned] == [("blocked", HIDDEN)] * 2


def test_a_model_in_home_while_the_daemon_runs(at_home: Machine) -> None:
    """The same words from everyone, status included; root and members see the same."""
    assert {p["reason"] for p in at_home.status()["prompts"]} == {HIDDEN}
    for user in ("", "me"):
        says_hidden(at_home, user)
    at_home.run("rkcached", "verify")


def test_the_doctor_says_what_the_service_sees(at_home: Machine) -> None:
    """A model that root could read is a failure of the service; a member is told, too."""
    for user in ("", "me"):
        report = json.loads(at_home.run("rkcached", "doctor", "--json", user=user, code=1).stdout)
        [model] = [check for check in report["checks"] if check["name"] == "model m"]
        assert (model["outcome"], model["finding"]) == ("fail", HIDDEN)
        assert DROP_IN in model["next_step"]


def test_a_model_in_home_while_it_does_not_run(at_home: Machine) -> None:
    """What the unit would hide; the daemon is not started for that."""
    stop(at_home)
    for user in ("", "me"):
        says_hidden(at_home, user)
    assert at_home.main_pid == 0


def test_the_drop_in_of_the_hint_opens_the_folder(at_home: Machine) -> None:
    """As an administrator writes it, he finds the model served, and each command content."""
    at_home.drop_in("home", OPENED)
    at_home.systemctl("restart", UNIT)
    at_home.wait_line("2 fresh")
    assert (
        "ok, 1 model, 2 prompts, as the daemon sees it" in at_home.run("rkcached", "check").stdout
    )
    assert "m/a: fresh" in at_home.run("rkcached", "explain", "m/a").stdout
    assert at_home.run("rkcached", "verify", "m", "--deep").stdout.count("loads, ") == 2
    stop(at_home)
    assert "ok, " in at_home.run("rkcached", "check").stdout
    assert "nothing to do, 2 fresh" in at_home.run("rkcached", "plan").stdout


def test_a_prompt_of_root_alone(machine: Machine) -> None:
    """The hint is the command; what it says is enough."""
    machine.run("chmod", "600", "/etc/rkcached/prompts/b.md")
    machine.systemctl("start", UNIT)
    machine.wait_line("1 fresh, 1 blocked")
    command = (
        "sudo chgrp rkcached /etc/rkcached/prompts/b.md && sudo chmod 640 "
        "/etc/rkcached/prompts/b.md"
    )
    assert f"permission denied (`{command}`)" in machine.run("rkcached", "check", code=78).stderr
    [prompt] = [p for p in machine.status()["prompts"] if p["state"] == "blocked"]
    assert prompt["hint"] == f"`{command}`"
    machine.run("sh", "-c", command.replace("sudo ", ""))  # root, on a machine without sudo
    machine.run("rkcached", "check")
    machine.systemctl("reload", UNIT)
    machine.wait_line("2 fresh")


def test_a_folder_that_refuses(machine: Machine) -> None:
    """It is named, and not the file in it, which everyone may read."""
    machine.run("chmod", "700", "/etc/rkcached/prompts")
    for name in ("start", "stop"):
        machine.systemctl(name, UNIT)
        said = machine.run("rkcached", "check", code=78).stderr
        assert "permission denied by the folder /etc/rkcached/prompts (`sudo chmod " in said
        assert "2 problems" in said
    machine.run("chmod", "755", "/etc/rkcached/prompts")
    machine.run("rkcached", "check")


def test_a_manifest_of_ones_own_is_looked_at_with_ones_own_eyes(at_home: Machine) -> None:
    """What the service may not see is nothing to it."""
    text = (
        "version: 1\nengine: {kind: memory}\n"
        "models: {m: {path: models/m.model, prompts: {a: a.md}}}\n"
    )
    at_home.write("/home/me/manifest.yaml", text)
    at_home.write("/home/me/a.md", "Be brief.")
    assert (
        "ok, 1 model, 1 prompt\n"
        in at_home.run("rkcached", "check", "-m", "/home/me/manifest.yaml").stdout
    )
    planned = at_home.run(
        "sh", "-c", "cd /home/me && rkcached plan --json", code=66
    ).stdout  # there is no store yet
    assert [action["action"] for action in json.loads(planned)] == ["build"]
