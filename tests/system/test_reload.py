"""`rkcached reload`, as `systemctl reload` runs it."""

from __future__ import annotations

from conftest import Workspace


def test_reload_returns_when_the_manifest_is_in_force(two_prompts: Workspace) -> None:
    """It prints how things stand then."""
    two_prompts.declare("{a: prompts/a.md}")
    assert two_prompts.cli("reload").stdout.startswith("1 fresh, ")
    assert [p["prompt"] for p in two_prompts.status()["prompts"] if p["state"] == "fresh"] == ["a"]


def test_reload_of_a_broken_manifest_says_every_problem(two_prompts: Workspace) -> None:
    """With file and line; the last good manifest stays in force."""
    good = two_prompts.manifest.read_text()
    two_prompts.write("manifest.yaml", good + "    promts: {}\n    parms: {}\n")
    refused = two_prompts.cli("reload", code=78)
    assert [line.split(": ")[0] for line in refused.stderr.splitlines()] == [
        f"{two_prompts.manifest}:9",
        f"{two_prompts.manifest}:10",
    ]
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_reload_without_a_daemon(workspace: Workspace) -> None:
    """One sentence and the next thing to do."""
    assert "no daemon answers on" in workspace.cli("reload", code=69).stderr
