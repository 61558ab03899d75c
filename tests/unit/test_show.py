"""What people read of a status.

Nothing in it commands a terminal, nothing is said twice, and it fits.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from rkcached.api import words
from rkcached.cli import output
from rkcached.cli.status import live, show
from rkcached.cli.status.browsing import Browsing
from rkcached.cli.status.picture import picture

PAGE_DOWN = b"\x1b[6~"
HOSTILE = "\x1b[31mred\x1b[2J \u202e\x9b5m\x07\x7f"


def prompt(name: str, state: str, reason: str = "", **more: Any) -> dict[str, Any]:
    base = {
        "model": "m",
        "prompt": name,
        "state": state,
        "reason": reason,
        "hint": "",
        "description": "",
        "learned": False,
        "tools": [],
    }
    return {**base, "retry_at": None, "hits": 0, "misses": 0, "last_used": None, **more}


def a_status(prompts: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    model = {
        "name": "m",
        "worker": "stopped",
        "trouble": "",
        "notices": [],
        "last_failure": "",
        "restarts": 0,
        "waiting": 0,
    }
    return {
        "format": 1,
        "version": "1",
        "pid": 1,
        "started_at": 0.0,
        "uptime_s": 1.0,
        "ready": True,
        "starting": None,
        "summary": "1 fresh",
        "manifest": {"file": "m.yaml", "ok": True, "problems": [], "skipped_files": []},
        "engine": "memory",
        "cache": {
            "trouble": "",
            "used_bytes": 1000,
            "max_bytes": None,
            "orphan_bytes": 0,
            "retired": 0,
            "retired_bytes": 0,
            "foreign_bytes": 0,
            "quarantine_bytes": 0,
            "conversations": 0,
            "conversation_bytes": 0,
            "free_bytes": 2_000_000,
        },
        "watching": "inotify",
        "answers": {},
        "saved_today_s": 0,
        "recent": [],
        "running": 0,
        "models": [{**model, "state_s": None}],
        "notices": [],
        "suggestions": [],
        "retired": [],
        "building": next((one for one in prompts if "progress" in one), None),
        "prompts": prompts,
        **more,
    }


def suggestion(**more: Any) -> dict[str, Any]:
    counts = {"tokens": 1911, "size_bytes": 8000, "requests": 34, "prefilled": 34}
    return {"id": "3f2a", "model": "m", "uid": 1000, "prefill_ms": 6240.0, **counts, **more}


def test_what_is_repeated_is_one_line() -> None:
    """What costs most, with the next step; counts that are not known are left out."""
    first = suggestion()
    line = (
        "model m: 1,911 tokens began 34 requests of uid 1000 and were prefilled in all of them, "
        "6.2 s each time; `rkcached suggest` says how to make a prompt of them"
    )
    assert f"{line}\n" in printed(a_status([], suggestions=[first]), 200)
    both = [first, suggestion(prefilled=2, tokens=0, prefill_ms=80.4)]
    assert "make a prompt of them (and 1 more)" in printed(a_status([], suggestions=both), 200)
    assert words.suggestion_of(both[1]) == (
        "8.0 kB began 34 requests of uid 1000 and were prefilled in 2 of them, 80 ms each time"
    )


def seen(status: dict[str, Any], width: int = 80, height: int = 24, **options: Any) -> list[str]:
    """The lines of the live picture."""
    console = Console(file=io.StringIO(), width=width, height=height)
    with console.capture() as captured:
        console.print(*picture(words.shown(status), console, **options).parts, sep="\n")
    return [line.rstrip() for line in captured.get().splitlines()]


def printed(status: dict[str, Any], width: int = 80, *, verbose: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    with console.capture() as captured:
        show.print_status(console, status, verbose=verbose)
    return captured.get()


@pytest.mark.parametrize("width", [80, 200])
def test_hostile_words(width: int) -> None:
    """Whatever comes from files or models is shown with escapes."""
    status = a_status(
        [
            prompt("a", "fresh", description=HOSTILE),
            prompt("b", "blocked", HOSTILE, hint=HOSTILE),
            prompt(HOSTILE, "orphan", "not in the manifest"),
        ],
        manifest={"file": HOSTILE, "ok": False, "problems": [f"{HOSTILE}:1: {HOSTILE}"]},
        summary=f"1 fresh, manifest rejected: {HOSTILE}:1: {HOSTILE}",
    )
    status["models"][0]["last_failure"] = HOSTILE
    status["cache"]["trouble"] = HOSTILE
    texts = [
        printed(status, width),
        "\n".join(seen(status, width)),
        "\n".join(live.facts_of(status).values()),
    ]
    for text in texts:
        assert text.replace("\n", "").isprintable()
        assert r"\x1b[31mred\x1b[2J \u202e\x9b5m\x07\x7f" in " ".join(text.split())
    assert texts[0].count("rejected") == 1


def test_json_is_the_same_document() -> None:
    """--json says the same, with escapes of its own for what a terminal would obey.

    Other letters stay.
    """
    data = {"a": HOSTILE, "b": "größer 猫 \U000e0001"}
    for indent in (None, 2):
        text = output.json_text(data, indent=indent)
        assert json.loads(text) == data
        assert text.replace("\n", "").isprintable()
        assert "größer 猫" in text


def test_a_description_of_several_lines() -> None:
    """It is one line of a table."""
    assert (
        words.shown(a_status([prompt("a", "fresh", description="one\n  two")]))["prompts"][0][
            "description"
        ]
        == "one two"
    )


def test_a_state_says_it_all() -> None:
    """No reason is added to missing, nor to a build because of that; equal reasons are one line."""
    waiting = [prompt(f"p{number:02}", "missing", "missing") for number in range(20)]
    building = prompt(
        "now",
        "building",
        "missing",
        progress={"done_tokens": 1, "total_tokens": 2, "elapsed_ms": 5},
    )
    blocked = [prompt(f"b{number}", "blocked", "source missing") for number in range(3)]
    status = a_status([building, *waiting, *blocked])
    lines = seen(status)
    assert [line for line in lines if "source missing" in line] == ["3 prompts: source missing"]
    assert not [line for line in lines if ": missing" in line]
    names = [line.split()[0] for line in lines if line.startswith("m/")]
    assert names[:6] == ["m/b0", "m/b1", "m/b2", "m/now", "m/p00", "m/p01"]
    assert "3 prompts: source missing" in printed(status)
    assert words.note_of(building) == "1 of 2 tokens"


def test_what_is_built_for_the_same_reason() -> None:
    """Equal reasons are one line; other changes are told as they are."""
    reason = "its text changed"
    prompts = [prompt(f"p{number}", "stale", reason) for number in range(5)]
    lines = seen(a_status([*prompts, prompt("q", "stale", f"{reason}, params.top_k: 1 -> 2")]))
    assert [line for line in lines if ": " in line and "changed" in line] == [
        "5 prompts: its text changed",
        "m/q: its text changed, params.top_k: 1 -> 2",
    ]


def test_no_gain_is_said_once() -> None:
    """Its figures are in the table."""
    prompts = [
        prompt(f"p{number}", "fresh", f"no gain: {number} ms with the cache, 0 ms without")
        for number in (1, 2)
    ]
    assert "2 prompts: no gain, see cold and warm" in seen(a_status(prompts))


def test_a_build_before_its_worker() -> None:
    """While one is said to be building, the model is not said to be stopped.

    The daemon's own words stay.
    """
    progress = {"done_tokens": 0, "total_tokens": 0, "elapsed_ms": 5}
    status = a_status([prompt("a", "building", "missing", progress=progress)])
    assert "model m: about to start" in seen(status)
    assert "model m: about to start" in printed(status)
    assert status["models"][0]["worker"] == "stopped"


@pytest.mark.parametrize(
    ("width", "height"), [(20, 5), (40, 10), (60, 12), (80, 24), (109, 30), (110, 30), (200, 50)]
)
def test_every_prompt_can_be_reached(width: int, height: int) -> None:
    """At each size nothing is wider or higher than the terminal.

    From page to page no prompt is left out.
    """
    artifact = {
        "tokens": 123456,
        "size_bytes": 123456789,
        "cold_ttft_ms": 12345.0,
        "warm_ttft_ms": 1234.0,
    }
    prompts = [
        prompt(
            f"prompt-{number:02}",
            "quarantined" if number % 5 == 0 else "fresh",
            "x " * (number % 5 == 0) * number,
        )
        | {"artifact": {**artifact, "verified": "exact"}}
        for number in range(40)
    ]
    status = a_status(
        prompts,
        manifest={"file": "f", "ok": False, "problems": ["/a/b/m.yaml:7: " + "words " * 99]},
    )
    status["models"] *= 9
    console = Console(file=io.StringIO(), width=width, height=height)
    shown = words.shown(status)
    browsing: Browsing | None = Browsing()
    first, found = 0, list[int]()
    while len(found) < 40:
        assert browsing is not None
        drawn = picture(shown, console, browsing=browsing)
        lines = seen(status, width, height, browsing=browsing)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        assert (drawn.first, drawn.count) == (min(first, 40 - drawn.count), drawn.count)
        names = [line.split()[0] for line in lines if line.startswith(("m/", "m…"))]
        assert len(names) >= drawn.count
        found += range(first, drawn.first + drawn.count)
        first = drawn.first + drawn.count
        browsing = replace(browsing, first=drawn.first)
        browsing = browsing.pressed(PAGE_DOWN, browsing.rows(shown["prompts"]), drawn.count)
    assert len(found) == 40


def test_names_stay_when_figures_go() -> None:
    """The narrower the table, the fewer figures; times stay longest, name and state to the end."""
    artifact = {
        "tokens": 64,
        "size_bytes": 600,
        "cold_ttft_ms": 100.0,
        "warm_ttft_ms": 9.0,
        "verified": "exact",
    }
    prompts = [prompt("a_prompt_with_a_name", "fresh", artifact=artifact)]
    heads = {
        width: next(x for x in seen(a_status(prompts), width) if x.startswith("prompt "))
        for width in (30, 48, 80)
    }
    assert {width: head.split() for width, head in heads.items()} == {
        30: ["prompt", "state"],
        48: ["prompt", "state", "cold", "warm"],
        80: ["prompt", "state", "tokens", "size", "cold", "warm", "hits"],
    }
    assert any(line.startswith("m/a_prompt_with_a_name") for line in seen(a_status(prompts), 30))


@pytest.mark.parametrize(
    ("typed", "keys", "rest"),
    [
        (b"jk", [b"j", b"k"], b""),
        (b"\x1b[A\x1b[6~q", [b"\x1b[A", b"\x1b[6~", b"q"], b""),
        (b"j\x1b[6", [b"j"], b"\x1b[6"),
        (b"\x1b", [], b"\x1b"),
        (b"\x1bq", [b"\x1b", b"q"], b""),
        (b"\x1bOB\x1b[1;5Aj", [b"\x1bOB", b"\x1b[1;5A", b"j"], b""),
        (b"\x1b[\x03q", [b"\x1b", b"[", b"\x03", b"q"], b""),
    ],
)
def test_keys(typed: bytes, keys: list[bytes], rest: bytes) -> None:
    """Escape sequences are whole keys, wherever a read ends; an escape alone swallows nothing."""
    assert live.split_keys(typed) == (keys, rest)


def test_what_changed() -> None:
    """A line for each prompt that changed or went, none for the others.

    None for what changes by itself.
    """
    before = a_status([prompt("a", "fresh"), prompt("b", "fresh"), prompt("c", "fresh")])
    after = a_status([prompt("a", "fresh"), prompt("b", "stale", "text changed")], uptime_s=99.0)
    after["cache"] = {**after["cache"], "free_bytes": 5}
    told = list(live.changes(live.facts_of(before), live.facts_of(after)))
    assert told == ["m/b stale: text changed", "m/c: no longer there"]


def test_lines_in_a_pipe_end_where_their_words_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A table pads its cells; only a terminal has a right edge."""
    show.print_status(output.console(), a_status([prompt("a", "fresh"), prompt("bb", "stale")]))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("m/bb") for line in lines)
    assert [line for line in lines if line != line.rstrip()] == []


def test_warnings_are_one_line() -> None:
    """The rest is there on demand; what is wrong with manifest or store is always whole."""
    notices = [f"the folder {number} has no file; {'is it mounted? ' * 9}" for number in range(3)]
    status = a_status([prompt("a", "stale", "its text changed")], notices=notices)
    at_a_terminal = [line.plain for line in show.warnings(status, 80, whole=False)]
    for lines in (at_a_terminal, seen(status)):
        [line] = [line for line in lines if "the folder" in line]
        assert line.startswith("3 warnings (`rkcached status -v`): the folder 0 has no file")
        assert len(line) == 80
    verbose = " ".join(printed(status, verbose=True).split())
    in_a_file = " ".join(printed(status).split())
    for notice in notices:
        assert " ".join(notice.split()) in verbose
        assert " ".join(notice.split()) in in_a_file
    assert "stale: something that its prompt cache depends on changed" in verbose
    assert "the folder 2 has no file" in live.facts_of(status)["warnings"]
    assert "polling" in printed(a_status([], watching="polling"), 200)


def test_a_learned_prompt_and_a_retired_cache_are_shown_as_such() -> None:
    """In the table, on the live screen and in its lines alike."""
    retired = [{"model": "m", "prompt": "old", "kept_until": 0.0}]
    status = a_status([prompt("learned-1", "fresh", learned=True)], retired=retired)
    status["cache"] |= {"retired": 1234, "retired_bytes": 5_000_000}
    for text in (printed(status, 200), "\n".join(seen(status, 200))):
        assert "m/learned-1  fresh, learned" in text
        assert "retired: 1,234 (m/old and 1,231 more), 5.0 MB" in text
    assert live.facts_of(status)["m/learned-1"] == "m/learned-1 fresh, learned"


def test_thousands_are_separated() -> None:
    """In figures of prompts, builds, answers and times."""
    artifact = {
        "tokens": 123456,
        "size_bytes": 600,
        "cold_ttft_ms": 12345.0,
        "warm_ttft_ms": 1234.4,
        "verified": "exact",
    }
    progress = {"done_tokens": 1024, "total_tokens": 45047, "elapsed_ms": 5}
    prompts = [
        prompt("a", "fresh", artifact=artifact, hits=4321, last_used=1.0),
        prompt("b", "building", progress=progress),
    ]
    recent = [{"state": "partial", "ttft_ms": 5432.0}]
    status = a_status(prompts, answers={"hit": 98765}, recent=recent)
    lines = "\n".join(seen(status, 120))
    for figure in ("123,456", "12,345 ms", "1,234 ms", "4,321", "98,765 hit", "partial 5,432 ms"):
        assert figure in lines
    assert "1,024 of 45,047 tokens" in lines


def test_what_a_worker_uses() -> None:
    """Memory and CPU time stand beside its state, but are no news for a line of a pipe."""
    status = a_status([])
    status["models"][0] |= {"worker": "idle", "memory_bytes": 1_240_000_000, "cpu_s": 192.4}
    line = "model m: idle, 1.24 GB of memory, 3 min 12 s of CPU time"
    assert line in seen(status)
    assert line in printed(status)
    assert live.facts_of(status)["model m"] == "model m: idle"


def test_figures_of_a_daemon_that_is_gone_are_old() -> None:
    """They are shown with their time, and dimmed."""
    status = a_status([prompt("a", "fresh")])
    assert "figures are of" not in "\n".join(seen(status))
    assert f"daemon gone, waiting; the figures are of {words.when(1e9)}" in seen(
        status, old_since=1e9
    )
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)
    with console.capture() as captured:
        console.print(*picture(words.shown(status), console, old_since=1e9).parts, sep="\n")
    first, *others = [line for line in captured.get().splitlines() if line.strip()]
    assert "\x1b[1;7m" in first
    assert all("\x1b[2" in line or "\x1b[1;2" in line for line in others)
