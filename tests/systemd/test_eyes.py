"""Commands on the service's manifest say what the service sees.

Running or not, asked by root or by a member.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import UNIT, Machine

from tests.rkllm_standin import standin

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


def doctors_report(machine: Machine, *, code: int = 0, user: str = "") -> dict[str, Any]:
    """The checks of doctor by name."""
    printed = machine.run("rkcached", "doctor", "--json", code=code, user=user).stdout
    return {check["name"]: check for check in json.loads(printed)["checks"]}


def says_hidden(machine: Machine, user: str) -> None:
    """Each command, in the same words."""
    check = machine.run("rkcached", "check", user=user, code=78).stderr
    assert HIDDEN in check
    assert DROP_IN in check
    assert "manifest.yaml:5: " in check
    checked = json.loads(machine.run("rkcached", "check", "--json", user=user, code=78).stdout)
    [problem] = checked["problems"]
    assert (problem["line"], problem["message"]) == (5, HIDDEN)
    explained = json.loads(machine.run("rkcached", "explain", "m/a", "--json", user=user).stdout)
    assert (explained["state"], explained["reason"]) == ("blocked", HIDDEN)
    assert explained["action"]["action"] == "blocked"
    assert DROP_IN in explained["hint"]
    assert "at its next look" not in machine.run("rkcached", "explain", "m/a", user=user).stdout
    planned = json.loads(machine.run("rkcached", "plan", "--json", user=user).stdout)
    assert [(action["action"], action["reason"]) for action in planned["actions"]] == [
        ("blocked", HIDDEN)
    ] * 2


@pytest.mark.long
def test_a_model_in_home_while_the_daemon_runs(at_home: Machine) -> None:
    """The same words from everyone, status included; root and members see the same."""
    assert {p["reason"] for p in at_home.status()["prompts"]} == {HIDDEN}
    for user in ("", "me"):
        says_hidden(at_home, user)
    at_home.run("rkcached", "verify")


def test_the_doctor_says_what_the_service_sees(at_home: Machine) -> None:
    """A model that root could read is a failure of the service; a member is told, too."""
    for user in ("", "me"):
        model = doctors_report(at_home, user=user, code=1)["model m"]
        assert (model["outcome"], model["finding"]) == ("fail", HIDDEN)
        assert DROP_IN in model["next_step"]


@pytest.mark.long
def test_a_model_in_home_while_it_does_not_run(at_home: Machine) -> None:
    """What the unit would hide; the daemon is not started for that."""
    stop(at_home)
    for user in ("", "me"):
        says_hidden(at_home, user)
    assert at_home.main_pid == 0


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_manifest_of_root_alone(machine: Machine, running: bool) -> None:
    """Each command has the daemon's words for it, and doctor fails, though root could read it.

    The commands once ended with 64, a mistake on the command line, and doctor said that all is ok.
    """
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")
    if not running:
        stop(machine)
    manifest = "/etc/rkcached/manifest.yaml"
    machine.run("sh", "-c", f"chown root:root {manifest}; chmod 640 {manifest}")
    command = f"sudo chgrp rkcached {manifest} && sudo chmod 640 {manifest}"
    words = f"{manifest}: the manifest cannot be read: permission denied (`{command}`)"
    for looking in (["check"], ["plan"], ["verify"], ["explain", "m/a"]):
        assert words in machine.run("rkcached", *looking, code=78).stderr
    report = doctors_report(machine, code=1)
    assert report["manifest"]["outcome"] == "fail"
    assert words in report["manifest"]["finding"]
    assert not {"model m", "prompts", "memory", "disk"} & report.keys()  # root's look is no help
    machine.run("sh", "-c", command.replace("sudo ", ""))
    machine.run("rkcached", "check")
    assert doctors_report(machine)["manifest"]["outcome"] == "ok"


@pytest.mark.long
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_runtime_library_of_root_alone(machine: Machine, tmp_path: Path, running: bool) -> None:
    """Doctor looked with root's eyes, and said that it is ok."""
    library = "/opt/librkllmrt.so"
    machine.write(library, standin.build("D", tmp_path).read_bytes())
    machine.write("/opt/m.rkllm", standin.write_model(tmp_path / "m.rkllm").read_bytes())
    machine.write(
        "/etc/rkcached/manifest.yaml",
        f"version: 1\nengine: {{kind: rkllm, library: {library}}}\nmodels:\n  m:\n"
        "    path: /opt/m.rkllm\n    chat_template: chatml\n    prompts: {a: prompts/a.md}\n",
    )
    machine.run("sh", "-c", f"chown root:root {library} && chmod 700 {library}")
    if running:
        machine.systemctl("start", UNIT)
    words = f"the runtime library {library} cannot be read: permission denied"
    command = f"sudo chgrp rkcached {library} && sudo chmod 640 {library}"
    assert f"{words} (`{command}`)" in machine.run("rkcached", "check", code=78).stderr
    check = doctors_report(machine, code=1)["runtime library"]
    assert (check["outcome"], check["finding"], check["next_step"]) == (
        "fail",
        words,
        f"`{command}`",
    )
    machine.run("sh", "-c", command.replace("sudo ", ""))
    assert doctors_report(machine, code=1)["runtime library"]["outcome"] == "ok"  # it has no NPU


@pytest.fixture
def people(machine: Machine) -> Iterator[Machine]:
    """A member of the group, al, and bob, who is in no group; the daemon has run."""
    machine.run("useradd", "--groups", "rkcached", "al")
    machine.run("useradd", "bob")
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")
    yield machine
    machine.run("userdel", "al")
    machine.run("userdel", "bob")


LOOKING = (["check"], ["plan"], ["explain", "m/a"], ["verify"], ["gc", "--dry-run"])


@pytest.mark.long
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_a_plain_user_is_told_to_use_sudo_or_to_join(people: Machine, running: bool) -> None:
    """He was told to open the folder for everybody, and then to take the manifest from the service.

    Doctor said that there is no manifest.
    """
    if not running:
        stop(people)
    for looking in LOOKING:
        done = people.run("rkcached", *looking, user="bob", code=None)
        command = f"`sudo rkcached {' '.join(looking)}`"
        hint = f"run it with sudo: {command}; or `sudo adduser bob rkcached`, then log in again"
        assert (done.returncode, hint in done.stderr) == (78 if looking == ["check"] else 73, True)
        assert not re.search("chgrp|chmod|check the directory", done.stderr)
    report = doctors_report(people, user="bob", code=1)
    assert report["manifest"]["outcome"] == "fail"
    assert "permission denied by the folder /etc/rkcached" in report["manifest"]["finding"]
    assert "`sudo rkcached doctor --json`" in report["manifest"]["finding"]
    error = people.run("rkcached", "run", user="bob", code=78).stderr
    assert "(`sudo adduser bob rkcached`, then log in again)" in error


@pytest.mark.long
def test_a_member_is_told_to_use_sudo(people: Machine) -> None:
    """A manifest of root's group is the service's trouble, too: sudo says how to mend it."""
    stop(people)
    manifest = "/etc/rkcached/manifest.yaml"
    people.run("sh", "-c", f"chown root:root {manifest} && chmod 640 {manifest}")
    for looking in LOOKING:
        error = people.run("rkcached", *looking, user="al", code=78).stderr
        assert f"run it with sudo: `sudo rkcached {' '.join(looking)}`" in error
        assert not re.search("chgrp|chmod|adduser", error)
    people.run("chgrp", "rkcached", manifest)
    people.run("chmod", "600", "/etc/rkcached/prompts/b.md")
    error = people.run("rkcached", "check", user="al", code=78).stderr
    assert (
        "b.md cannot be read: permission denied (run it with sudo: `sudo rkcached check`)" in error
    )


@pytest.mark.long
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
    assert [action["action"] for action in json.loads(planned)["actions"]] == ["build"]
