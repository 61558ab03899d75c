"""The documents as their readers see them.

Which pages there are, and the blocks and commands on them.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCS = ROOT / "docs"
PAGES = (README, CONTRIBUTING, *sorted(DOCS.glob("*.md")))

_PROGRAMS = (
    "make|sudo|sudoedit|curl|python|python3|export|rkcached|systemctl|journalctl|ssh|pytest|git|apt"
    "|cp|install"
)
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{_PROGRAMS})\b")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages; "" is a block that names none."""
    fenced = re.findall(
        r"^```([\w-]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [text for language, text in fenced if language in languages]


def commands(page: Path) -> list[str]:
    """The command lines in the blocks of a page, continued lines joined, comments removed."""
    lines = [
        line for block in blocks(page, "", "sh") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [_without_comment(line) for line in lines if _COMMAND.match(line)]


def commands_in_words(page: Path) -> list[str]:
    """The commands of rkcached that stand in the text and in the tables of a page."""
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.findall(r"`(?:sudo )?(rkcached [^`]+)`", re.sub(r"\n *", " ", text))


def row_commands(page: Path) -> list[str]:
    """The commands of rkcached that a row of a table begins with."""
    return re.findall(r"^\| `(rkcached [^`]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE)


def _without_comment(line: str) -> str:
    return re.sub(r"\s+# .*", "", line).strip()
