"""The scripts that the figures in docs/ come from can be run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BENCH,
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.long
def test_the_growth_is_drawn(tmp_path: Path) -> None:
    """As text and lines in an SVG, with the aims; without such figures there is no picture."""
    script = (
        "import sys; from pathlib import Path; from _pictures import draw_scale; from _figures "
        "import Figure\n"
        "names = [(n, m) for n in (10, 10_000) for m in (1, 16) if n > m]\n"
        "figures = [Figure(part='scale', table=f'{m} models', name='resident memory',\n"
        "                  column=f'{n:,} prompts', value=n / 100, unit='MB',\n"
        "                  aim=150 if n == 10_000 else None) for n, m in names]\n"
        "facts = {'cpu': 'a CPU', 'cores': 2, 'date': '2026-01-01T00:00:00'}\n"
        "draw_scale(figures, facts, Path(sys.argv[1])); draw_scale([], facts, Path(sys.argv[2]))\n"
    )
    drawn, not_drawn = tmp_path / "scale.svg", tmp_path / "none.svg"
    done = run("-c", script, str(drawn), str(not_drawn), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(
        words in drawn.read_text()
        for words in ("resident memory (MB)", "16 models", "aim", "a CPU")
    )
    assert not not_drawn.exists()


def test_the_tables_are_markdown(tmp_path: Path) -> None:
    """A row for each figure, or one for those that are compared; a missed aim is named."""
    script = (
        "from _figures import *\n"
        "figures = [of_median('edit', 'the rest', [3.0, 5.0, 4.0], 'ms', aim=500, note='quiet'),\n"
        "           of_median('edit', 'the rest', [2.0], 'ms')] + [\n"
        "    Figure(part='peers', table='times', name='235 tokens', column=who, value=value,\n"
        "           unit='ms', aim=aim) for who, value, aim in (('a', 9, None), ('b', 1200, 14))]\n"
        "print_tables(Console(width=200), machine(), figures)\n"
    )
    printed = run("-c", script, folder=tmp_path).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    assert "### edit" in printed
    assert ["", "measured", "aim", "note"] in rows
    assert ["the rest", "4.00 ms", "500 ms, met", "p95 4.90, n=3; quiet"] in rows
    assert ["the rest", "2.00 ms", "", "p95 2.00, n=1"] in rows
    assert "### peers: times" in printed
    assert ["", "a", "b", "aim"] in rows
    assert ["235 tokens", "9.00 ms", "1,200 ms", "14 ms, missed"] in rows


def test_every_script_explains_itself(tmp_path: Path) -> None:
    """Its options, without measuring."""
    for script in ("measure.py", "soak.py"):
        assert "usage:" in run(script, "--help", folder=tmp_path).stdout


ROWS = [
    "plain",
    "a date line at the end",
    "the user's name and a trailing blank",
    "one tool, undeclared",
    "one tool, declared",
    "a memory block",
    "conversation, turn 8",
    "two conversations in turn, turn 4 of the first",
    "two conversations in turn, turn 4 of the second",
    "agent loop, six tools declared, step 4",
]


def test_programs_send_what_the_tables_say(tmp_path: Path) -> None:
    """Their rows are those of the page; runs differ, and what is measured comes last."""
    script = (
        "import json; from _programs import SHAPES, Conversation\n"
        "seen = []\n"
        "for shape in SHAPES:\n"
        "    runs = []\n"
        "    for number in (7, 8):\n"
        "        kept, asked = {}, []\n"
        "        for turn in shape.turns(number):\n"
        "            talk = kept.setdefault(turn.conversation, Conversation())\n"
        "            asked.append((turn.row, talk.ask(turn)))\n"
        "            if shape.keeps_answers: talk.answered('yes')\n"
        "        runs.append((shape.adds_to_system(number), asked))\n"
        "    seen.append((shape.name, len(shape.tools), len(shape.declared_tools), runs))\n"
        "print(json.dumps(seen))\n"
    )
    seen = json.loads(run("-c", script, folder=tmp_path).stdout)
    rows = []
    for name, tools, declared, ((system, asked), (other_system, other_asked)) in seen:
        assert (declared == tools) == (name != "tool")
        assert (system != other_system) == (name in ("date", "name"))
        measured = [row for row, _ in asked if row]
        assert [row for row, _ in asked][-len(measured) :] == measured
        rows += measured
        for (_, messages), (_, others) in zip(asked, other_asked, strict=True):
            assert messages[0] != others[0]
    assert rows == ROWS

    page = (BENCH.parent / "docs" / "peers.md").read_text()
    assert [row for row in rows if f"\n| {row}" not in page] == [ROWS[-2]]
    assert f"\n| {ROWS[-3]}, of the second |" in page

    asked = {name: runs[0][1] for name, _, _, runs in seen}
    assert [message["role"] for message in asked["memory"][0][1]] == ["system", "user"]
    assert len(asked["conversation"][-1][1]) == 8 + 7
    assert [len(messages) for _, messages in asked["two conversations"]] == [1, 1, 3, 3, 5, 5, 7, 7]
    last = asked["agent"][-1][1]
    roles = [message["role"] for message in last]
    assert roles == ["user", *["assistant", "tool"] * 3, "assistant"]
    assert last[-3]["tool_calls"][0]["id"] == last[-2]["tool_call_id"]
    assert [(tools, declared) for name, tools, declared, _ in seen if tools] == [
        (1, 0),
        (1, 1),
        (6, 6),
    ]


ANSWERS = """
from _daemon import BenchError
from _programs import SHAPES
from _shapes import *
from _shapes import _Run, _rates, _times
from rich.console import Console
from _figures import machine, print_tables

def sample(ttft_s, *, reused=600, sent=620, state="hit", load_ms=9.0, system="s", tokens=10):
    moments = [ttft_s, ttft_s + 0.01, ttft_s + 0.01 * (tokens - 2), ttft_s + 9]
    chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("x", "y", "z", "")]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    report = {"state": state, "load_ms": load_ms, "model_load_ms": 0.0}
    chunks[-1] |= {"rkcached": report, "usage": {"completion_tokens": tokens}}
    answer = Answer(moments=tuple(moments), chunks=tuple(chunks))
    return Sample(answer=answer, messages=[system], sent=sent, reused=reused)
"""


def test_the_tables_of_programs(tmp_path: Path) -> None:
    """Medians and pairs, with the aim that belongs to each table; short answers have no speed."""
    script = ANSWERS + (
        "samples = {}\n"
        "for table, ours, theirs in ((AFTER_OTHERS, .103, .100), (AFTER_RESTART, .1, 2.0)):\n"
        "    samples[table, 'plain', OURS] = [sample(ours)] * 3\n"
        "    samples[table, 'plain', THEIRS] = [sample(theirs, reused=599)] * 3\n"
        "    samples[table, 'date', OURS] = [sample(ours + 1, tokens=8)]\n"
        "    samples[table, 'date', THEIRS] = [sample(theirs)]\n"
        "figures = [*_times(samples, AFTER_OTHERS), *_times(samples, AFTER_RESTART)]\n"
        "print_tables(Console(width=400), machine(), [*figures, *_rates(samples)])\n"
    )
    printed = run("-c", script, folder=tmp_path)
    assert printed.returncode == 0, printed.stderr
    tables = [part.split("|---")[-1] for part in printed.stdout.split("### ")[1:]]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for table in tables
        for line in table.splitlines()
        if line.startswith("| ")
    ]
    plain = ["plain", "620", "600", "620", "599", "103.0 ms", "100.0 ms", "3.00 ms", "5 ms, met"]
    date = ["date", "620", "600", "620", "600", "1,103 ms", "100.0 ms", "1,003 ms", "5 ms, missed"]
    assert cells[:2] == [plain, date]
    assert cells[2][5:] == ["100.0 ms", "2,000 ms", "-1,900 ms", "0.00 ms", "0 ms, met"]
    assert [row[0] for row in cells] == ["plain", "date", "plain", "date", "plain"]
    assert cells[4][1:] == ["100.0 tokens/s", "100.0 tokens/s", "0.00 ms", "0.1 ms, met"]


def test_what_was_not_measured_has_no_table(tmp_path: Path) -> None:
    """A prompt that was no hit, other tokens; a server that was not new."""
    script = ANSWERS + (
        "class Texts: systems = {'house': 'You are.'}\n"
        "def check(shape, ours, theirs, **others):\n"
        "    run = _Run(SHAPES[shape], Texts(), 1)\n"
        "    try: run._check(ours, theirs, **{'restarted': False, 'first': True} | others)\n"
        "    except BenchError as error: print('refused:', error)\n"
        "    else: print('taken')\n"
        "good = sample(1)\n"
        "check(0, good, good)\n"
        "check(0, sample(1, state='partial'), good)\n"
        "check(1, sample(1, state='partial'), good)\n"
        "check(0, good, sample(1, sent=621))\n"
        "check(0, good, sample(1, sent=621, system='other'))\n"
        "check(0, good, good, restarted=True)\n"
        "check(0, good, sample(1, reused=0), restarted=True)\n"
        "check(7, good, good, restarted=True, first=False)\n"
    )
    done = run("-c", script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    verdicts = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert verdicts == [
        "taken",
        "refused",
        "taken",
        "refused",
        "taken",
        "refused",
        "taken",
        "taken",
    ], done.stdout
