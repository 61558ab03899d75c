"""Builds that hurt nobody: they read only what is new, and go on where they were."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

from tests.rkllm_standin import standin
from tests.waiting import wait_until

RULES = "".join(
    f"Rule {number}: you never forget what the guest of table {number} has asked for.\n"
    for number in range(20)
)


def on_the_small_model(space: Workspace, small_model: Path, prompts: str, top: str = "") -> None:
    space.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: llamacpp, threads: 1}}\n{top}\n"
        f"models:\n  m:\n    path: {small_model}\n"
        f"    params: {{max_context_len: 2048, temperature: 0.0}}\n    prompts: {prompts}\n",
    )


def built_after(space: Workspace, name: str, before: dict[str, Any]) -> dict[str, Any]:
    """The figures of a prompt cache that was built since."""

    def built() -> dict[str, Any] | None:
        figures: dict[str, Any] | None = space.prompt(name).get("artifact")
        is_new = figures is not None and figures["fingerprint"] != before["fingerprint"]
        return figures if is_new else None

    found: dict[str, Any] = wait_until(built, f"{name} is built anew")
    return found


@pytest.mark.long
@pytest.mark.model
def test_an_edit_at_the_end_of_a_long_prompt_reads_only_what_is_new(
    workspace: Workspace, small_model: Path
) -> None:
    """By the count of the engine. The answer is the one that a build of the whole gives."""
    workspace.write("a.md", RULES)
    on_the_small_model(workspace, small_model, "{a: a.md}")
    workspace.start()
    first = workspace.wait_state("a", "fresh")["artifact"]
    assert first["reused_tokens"] == 0

    workspace.write("a.md", RULES + "And always be kind.\n")
    edited = built_after(workspace, "a", first)
    assert first["tokens"] < edited["tokens"] < first["tokens"] + 12
    assert first["tokens"] - 12 < edited["reused_tokens"] < first["tokens"]
    assert edited["build_ms"] < first["build_ms"]
    assert edited["verified"] == "exact"
    assert edited["prefill_ms"] > first["prefill_ms"] / 2  # what a whole prefill would take

    continued = workspace.ask("m/a", "What is rule 7?", temperature=0)
    assert continued["rkcached"]["state"] == "hit"
    workspace.cli("regenerate", "m/a")
    assert workspace.prompt("a")["artifact"]["reused_tokens"] == 0
    whole = workspace.ask("m/a", "What is rule 7?", temperature=0)
    assert (
        continued["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]
    )


@pytest.mark.long
@pytest.mark.model
def test_prompts_that_begin_alike_are_read_once(workspace: Workspace, small_model: Path) -> None:
    """The second goes on from the first."""
    workspace.write("a.md", RULES)
    workspace.write("b.md", RULES + "You speak of nothing but fish. " * 3)
    on_the_small_model(workspace, small_model, "{a: a.md, b: b.md}")
    workspace.start()
    workspace.wait_settled()
    first = workspace.prompt("a")["artifact"]
    second = workspace.prompt("b")["artifact"]
    assert workspace.built() == ["a", "b"]
    assert first["tokens"] - 12 < second["reused_tokens"] <= first["tokens"]
    assert workspace.ask("m/b")["rkcached"]["state"] == "hit"


def on_the_memory_model(space: Workspace, *, us: int = 2000, top: str = "", **prompts: str) -> None:
    space.memory_model(prefill_us_per_token=us)
    for name, text in prompts.items():
        space.write(f"{name}.md", text)
    named = ", ".join(f"{name}: {name}.md" for name in prompts)
    space.declare(f"{{{named}}}", top=top)


def progress(space: Workspace) -> int:
    """The tokens that the running build has read; 0 without one."""
    building = space.status()["building"]
    return building["progress"]["done_tokens"] if building else 0


def test_a_build_that_steps_aside_goes_on_where_it_was(workspace: Workspace) -> None:
    """What it had read before a request came is not read again, and nothing of it stays."""
    on_the_memory_model(workspace, a=RULES)
    workspace.start()
    done = wait_until(lambda: (now := progress(workspace)) > 400 and now, "much is read")
    workspace.ask("m", "hello", max_tokens=1)
    figures = workspace.wait_state("a", "fresh")["artifact"]
    assert "build stepped aside" in workspace.log_text()
    assert figures["reused_tokens"] >= done
    assert figures["verified"] == "exact"
    assert figures["prefill_ms"] >= figures["tokens"] * 2 * 0.9
    assert list(workspace.cache.glob("**/.stage-*")) == []
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"


def test_a_request_for_a_prompt_that_is_being_built_takes_what_was_read(
    workspace: Workspace,
) -> None:
    """The build steps aside for it, and the request goes on where the build was."""
    on_the_memory_model(workspace, a=RULES)
    workspace.start()
    done = wait_until(lambda: (now := progress(workspace)) > 400 and now, "much is read")
    answer = workspace.ask("m/a", "hello", max_tokens=1)
    assert answer["rkcached"]["state"] in ("building", "partial")
    assert answer["rkcached"]["cached_tokens"] >= done
    figures = workspace.wait_state("a", "fresh")["artifact"]
    assert figures["reused_tokens"] >= done


def test_an_edit_forgets_what_the_build_before_it_had_read(workspace: Workspace) -> None:
    """It was of another text."""
    on_the_memory_model(workspace, us=4000, a=RULES)
    workspace.start()
    wait_until(lambda: progress(workspace) > 300, "something is read")
    with workspace.http() as client:
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
        client.post("/v1/chat/completions", json=body)
    workspace.write("a.md", "You are another one. " * 20)
    figures = workspace.wait_state("a", "fresh")["artifact"]
    assert figures["reused_tokens"] == 0
    assert list(workspace.cache.glob("**/.stage-*")) == []


@pytest.mark.long
def test_a_daemon_that_is_killed_leaves_nothing_of_a_build_that_stepped_aside(
    workspace: Workspace,
) -> None:
    """The next one sweeps it, and builds from the beginning."""
    on_the_memory_model(workspace, us=4000, a=RULES)
    workspace.start()
    wait_until(lambda: progress(workspace) > 300, "something is read")
    workspace.ask("m", "hello", max_tokens=1)
    wait_until(lambda: list(workspace.cache.glob("m/*/.stage-*")), "it is kept")
    workspace.stop(signal.SIGKILL)
    assert list(workspace.cache.glob("m/*/.stage-*"))
    workspace.start()
    figures = workspace.wait_state("a", "fresh")["artifact"]
    assert figures["reused_tokens"] == 0
    assert list(workspace.cache.glob("**/.stage-*")) == []


def on_the_standin(space: Workspace, *, group: str = "E", **keys: object) -> None:
    library = standin.build(group, space.root)
    standin.write_model(space.root / "m.rkllm", toolkit="1.1.4", **keys)
    space.write("a.md", RULES)
    space.write(
        "manifest.yaml",
        f"version: 1\nengine: {{kind: rkllm, library: {library}}}\nmodels:\n  m:\n"
        "    path: m.rkllm\n    chat_template: chatml\n"
        "    params: {max_context_len: 4096, max_new_tokens: 64, temperature: 0.0}\n"
        "    prompts: {a: a.md}\n",
    )


@pytest.mark.parametrize(
    ("continued", "reused", "says"),
    [
        ("saved", True, ""),
        pytest.param("ignored", False, "the runtime read everything", marks=pytest.mark.long),
        pytest.param("spoilt", False, "as a whole", marks=pytest.mark.long),
        pytest.param("crash", False, "died", marks=pytest.mark.long),
    ],
)
def test_rkllm_goes_on_from_a_prompt_cache_where_that_is_shown_to_work(
    workspace: Workspace, continued: str, says: str, *, reused: bool
) -> None:
    """Elsewhere each build comes to its end all the same, and is not tried in vain for ever."""
    on_the_standin(workspace, prefill_tps=2000, continued=continued)
    workspace.start()
    before = workspace.wait_state("a", "fresh")["artifact"]
    for number in range(4):
        workspace.write("a.md", RULES + f"And always be kind, {number}.\n")
        after = built_after(workspace, "a", before)
        assert (after["reused_tokens"] > 0.9 * before["tokens"]) is reused
        before = after
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert workspace.prompt("a")["state"] == "fresh"
    log = workspace.log_text()
    assert log.count("prompt caches built as a whole") == (not reused)
    assert says in log
    assert log.count("build begins anew") <= 2


# --- when they begin, and in which order ---


def local_time(text: str) -> str:
    """The TZ in which it is this time of day now, HH:MM:SS."""
    hours, minutes, seconds = map(int, text.split(":"))
    west_s = int(time.time() - (hours * 3600 + minutes * 60 + seconds)) % 86_400
    return f"RKC+{west_s // 3600:02}:{west_s // 60 % 60:02}:{west_s % 60:02}"


NIGHT = 'cache: {build: {window: "02:00-05:00"}}'


def test_builds_wait_for_their_window(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered meanwhile, and when it opens the builds begin: by a timer."""
    monkeypatch.setenv("TZ", local_time("01:59:48"))
    on_the_memory_model(workspace, us=0, top=NIGHT, a="You are A.", b="You are B.")
    workspace.start()
    assert workspace.prompt("a")["reason"] == "missing; waits for 02:00"
    assert workspace.prompt("a")["hint"] == "`rkcached wait MODEL/PROMPT` has it built now"
    assert workspace.prompt("a")["state"] == "missing"
    assert "builds wait for 02:00" in workspace.status()["summary"]
    assert workspace.ask("m/a")["rkcached"]["state"] == "missing"
    assert workspace.built() == []
    workspace.wait_settled()
    assert sorted(workspace.built()) == ["a", "b"]
    assert workspace.status()["reconcile"]["looks"] < 5
    assert "waits" not in workspace.prompt("a")["reason"]
    assert "rkcached wait" not in workspace.prompt("a")["hint"]
    assert "builds wait" not in workspace.status()["summary"]


def test_who_waits_for_a_build_gets_it_at_once(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `regenerate`, by storing a text, or by `wait`; the others still wait for the window."""
    monkeypatch.setenv("TZ", local_time("12:00:00"))
    texts = {name: f"You are {name}." for name in "abcd"}
    on_the_memory_model(workspace, us=0, top=NIGHT, **texts)
    workspace.start("--admin-socket", str(workspace.root / "admin.sock"))
    workspace.cli("wait", "m/b", "--timeout", "60")
    assert workspace.built() == ["b"]
    workspace.cli("regenerate", "m/c")
    stored = {"cache_name": "stored", "content": "You are stored."}
    answer = workspace.request("POST", "/v1/cache/m", admin=True, json=stored)
    assert answer.status_code == 200, answer.text
    assert workspace.built() == ["b", "c", "stored"]
    assert workspace.prompt("a")["reason"] == "missing; waits for 02:00"
    actions = json.loads(workspace.cli("plan", "--json").stdout)["actions"]
    assert {action["reason"] for action in actions} == {"missing; waits for 02:00"}
    workspace.write("b.md", "You are another b.")
    found = wait_until(
        lambda: (now := workspace.prompt("b"))["state"] == "stale" and now, "it is stale"
    )
    assert found["reason"] == "its text changed; waits for 02:00"
    workspace.cli("wait", "--timeout", "60")
    assert sorted(workspace.built()) == ["a", "b", "b", "c", "d", "stored"]


def test_builds_wait_until_nobody_asks(workspace: Workspace) -> None:
    """For so many seconds after the end of the last request, which is an event: nothing polls."""
    on_the_memory_model(workspace, us=0, top="cache: {build: {idle_s: 3}}", a="You are A.")
    workspace.memory_model(decode_us_per_token=50_000)
    workspace.start()
    workspace.wait_state("a", "fresh")  # nobody has ever asked
    asking = threading.Thread(target=workspace.ask, args=("m", "hello"), kwargs={"max_tokens": 200})
    asking.start()
    wait_until(lambda: workspace.status()["running"], "a request runs")
    workspace.write("a.md", "You are another A.")
    reason = "its text changed; waits until nobody has asked for 3 s"
    wait_until(lambda: workspace.prompt("a")["reason"] == reason, "it waits")
    actions = json.loads(workspace.cli("plan", "--json").stdout)["actions"]
    assert [action["reason"] for action in actions] == [reason]
    asking.join()
    ended = time.monotonic()
    assert workspace.built() == ["a"]
    workspace.wait_state("a", "fresh")
    assert time.monotonic() - ended > 2.5
    assert workspace.status()["reconcile"]["looks"] < 8


def test_what_requests_ask_for_is_built_first(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most wanted before the others, and those in the manifest's order."""
    monkeypatch.setenv("TZ", local_time("12:00:00"))
    texts = {name: f"You are {name}." for name in "abcd"}
    on_the_memory_model(workspace, us=0, top=NIGHT, **texts)
    workspace.start()
    for name in ("c", "d", "d"):
        assert workspace.ask(f"m/{name}")["rkcached"]["state"] == "missing"
    workspace.declare("{a: a.md, b: b.md, c: c.md, d: d.md}")
    workspace.wait_settled()
    assert workspace.built() == ["d", "c", "a", "b"]
