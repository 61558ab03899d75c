"""Writes what repeats the program: the command and key lists of the man pages, and the shells' completions.

The commands come from click, the manifest's keys from the documented example; the rest of each page is written by hand
in `man/*.in`. What it makes is committed, so that an installation needs no tool; a test says when to run it again:

    make docs
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from rkcached.cli.main import cli

ROOT = Path(__file__).parents[1]
COMPLETIONS = {"bash": "rkcached.bash", "zsh": "_rkcached", "fish": "rkcached.fish"}
_EXAMPLE = ROOT / "etc" / "rkcached" / "manifest.example.yaml"
_NAMED = ("models", "prompts")
"""Mappings whose keys are names that the administrator chooses."""
_KEY_LINE = re.compile(r"(?P<indent> *)(?P<key>[^\s#:][^:]*):")


def everything() -> dict[Path, str]:
    """The content of each generated file."""
    made = {ROOT / "completions" / name: completion(shell) for shell, name in COMPLETIONS.items()}
    for page, lists in (
        ("rkcached.1", {"@COMMANDS@": commands()}),
        ("rkcached-manifest.5", {"@KEYS@": keys()}),
    ):
        text = (ROOT / "man" / f"{page}.in").read_text(encoding="utf-8")
        for mark, lines in lists.items():
            text = text.replace(mark, "\n".join(lines))
        made[ROOT / "man" / page] = text
    return made


def completion(shell: str) -> str:
    """The script that click makes; it asks the program at each completion."""
    complete = get_completion_class(shell)
    assert complete is not None
    script = complete(cli, {}, "rkcached", "_RKCACHED_COMPLETE").source()
    return "\n".join(line.rstrip() for line in script.splitlines()).strip() + "\n"


def commands() -> Iterator[str]:
    for name, command in cli.commands.items():
        context = click.Context(command, info_name=name)
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        arguments = [
            parameter for parameter in command.params if isinstance(parameter, click.Argument)
        ]
        words = [argument.make_metavar(context) for argument in arguments]
        yield f".It Cm {name}" + "".join(f" Ar {word}" for word in words)
        yield from prose(command.help or "")
        if options:
            yield ".Bl -tag -width Ds"
        for option in options:
            names = sorted(option.opts, key=len, reverse=True)
            value = "" if option.is_flag else f" Ar {option.make_metavar(context)}"
            yield ".It " + " , ".join(
                f"Fl {text.removeprefix('-').replace('-', chr(92) + '-')}{value}" for text in names
            )
            yield from prose(option.help or "")
        if options:
            yield ".El"


def keys() -> Iterator[str]:
    """Each key of the documented example with its bounds, its default and what it means."""
    way: list[str] = []
    comment: list[str] = []
    for line in _EXAMPLE.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        if found := _KEY_LINE.match(line):
            way[len(found["indent"]) // 2 :] = [found["key"]]
            if comment and comment[0].startswith(f"{found['key']}: "):
                yield f".It Ic {dotted(way)}"
                yield from prose(comment[0].removeprefix(f"{found['key']}: ") + ".")
                yield from prose(" ".join(comment[1:]))
        comment = []


def dotted(way: list[str]) -> str:
    return ".".join(
        "NAME" if above in _NAMED else key for above, key in zip(["", *way], way, strict=False)
    )


def prose(text: str) -> Iterator[str]:
    """Plain text as mdoc: a line for each sentence, and nothing in it that roff would take for its own."""
    for number, paragraph in enumerate(text.replace("\b", "").strip().split("\n\n")):
        if number:
            yield ".Pp"
        for sentence in re.split(r"(?<=[.?!])\s+(?=[A-Z`])", " ".join(paragraph.split())):
            quiet = re.sub(
                r"(?<!\w)-(?=[-\w])|(?<=-)-(?=\w)", r"\\-", sentence.replace("\\", r"\e")
            )
            for line in textwrap.wrap(quiet, 78, break_long_words=False, break_on_hyphens=False):
                yield rf"\&{line}" if line[0] in ".'" else line


def main() -> None:
    for path, content in everything().items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
