"""The scripts that the figures in docs/ come from can be run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
