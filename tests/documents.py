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
    return _fenced(page.read_text(encoding="utf-8"), languages)


def blocks_under(page: Path, title: str, *languages: str) -> list[str]:
    """The fenced blocks below a heading of a page, as far as the next heading."""
    pieces = re.split(r"^(#+ .*)$", _without_blocks_headings(page), flags=re.MULTILINE)
    (text,) = [
        text
        for heading, text in zip(pieces[1::2], pieces[2::2], strict=True)
        if heading.lstrip("#").strip() == title
    ]
    return _fenced(text.replace(_HASH, "#"), languages)


_HASH = "\ufdd0"


def _without_blocks_headings(page: Path) -> str:
    """The page, with another letter for the # of comments in its blocks."""
    text = page.read_text(encoding="utf-8")
    fenced = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    return fenced.sub(lambda block: block[0].replace("#", _HASH), text)


def _fenced(text: str, languages: tuple[str, ...]) -> list[str]:
    """The fenced blocks of a text in these languages."""
    fenced = re.findall(r"^```([\w-]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for language, block in fenced if language in languages]


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
