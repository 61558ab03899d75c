"""Writes what repeats the program: lists in man pages and docs/manifest.md, completions.

The commands come from click, the manifest's keys from the documented example. The rest of a man
page is written by hand in `man/*.in`, and the rest of docs/manifest.md in that file, above the
generated part. The results are committed, so that an installation needs no tool; a test fails when
they are out of date. Then run:

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
from rkcached.messages.builtin import FORMATS

ROOT = Path(__file__).parents[1]
COMPLETIONS = {"bash": "rkcached.bash", "zsh": "_rkcached", "fish": "rkcached.fish"}
_EXAMPLE = ROOT / "etc" / "rkcached" / "manifest.example.yaml"
# In docs/manifest.md, what follows this line is generated.
_KEYS_HEADING = "## Every key"
_KEYS_TEXT = (
    "Only `version`, `models` and each model's `path` are required. Relative paths start from the "
    "directory of the manifest; `~` and variables are not expanded. A key that is not listed here "
    "is an error. Keys at the top that begin with `x-` are the exception: rkcached ignores them, "
    "so they can hold values that several models share by YAML's anchors (`&`) and aliases (`*`). "
    "`NAME` stands for a name that you choose. In brackets: what the key accepts, and its "
    "default."
)
_KEYS_NOTE = f"""\
{textwrap.fill(_KEYS_TEXT, 120)}

<!-- Made by `make docs` from etc/rkcached/manifest.example.yaml. -->"""
_TEMPLATES_TEXT = (
    "Each writes the text that the model's own template writes, byte for byte. They differ only "
    "where the model's own refuses system messages, or refuses, loses or garbles tools, calls or "
    "their results, or the model was not trained on them: there the built-in one writes them as a "
    "related model does, or refuses them. The one of TeleChat2, whose own was not available, "
    "writes what its documents say. Fine-tuned models have the format of the model that they come "
    "from, unless their page says otherwise."
)
# Mappings whose keys are names that the administrator chooses.
_NAMED = ("models", "prompts")
_KEY_LINE = re.compile(r"(?P<indent> *)(?P<key>[^\s#:][^:]*):")


def everything() -> dict[Path, str]:
    """The content of each generated file."""
    made = {ROOT / "completions" / name: completion(shell) for shell, name in COMPLETIONS.items()}
    for page, lists in (
        ("rkcached.1", {"@COMMANDS@": commands()}),
        ("rkcached-manifest.5", {"@KEYS@": keys(), "@TEMPLATES@": templates()}),
    ):
        text = (ROOT / "man" / f"{page}.in").read_text(encoding="utf-8")
        for mark, lines in lists.items():
            text = text.replace(mark, "\n".join(lines))
        made[ROOT / "man" / page] = text
    page_file = ROOT / "docs" / "manifest.md"
    by_hand = page_file.read_text(encoding="utf-8").partition(f"\n{_KEYS_HEADING}\n")[0]
    made[page_file] = (
        "\n".join([f"{by_hand}\n{_KEYS_HEADING}\n", _KEYS_NOTE, *key_sections(), *template_table()])
        + "\n"
    )
    return made


def completion(shell: str) -> str:
    """The script that click makes; it asks the program at each completion."""
    complete = get_completion_class(shell)
    assert complete is not None
    script = complete(cli, {}, "rkcached", "_RKCACHED_COMPLETE").source()
    return "\n".join(line.rstrip() for line in script.splitlines()).strip() + "\n"


def commands() -> Iterator[str]:
    for name, command in leaves(cli):
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


def leaves(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Each command with its whole name; of a group, those in it."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def keys() -> Iterator[str]:
    """Each key in mdoc, with what it accepts, its default and its meaning."""
    for key, accepts, meaning in documented_keys():
        yield f".It Ic {key}"
        yield from prose(f"{accepts}.")
        yield from prose(meaning)


def key_sections() -> Iterator[str]:
    """Each key in Markdown: a section for each mapping, in the order of the example."""
    sections: dict[str, list[str]] = {}
    for key, accepts, meaning in documented_keys():
        above, _, name = key.rpartition(".")
        words = f"* `{name}` ({accepts})" + (f": {meaning}" if meaning else "")
        lines = textwrap.wrap(
            words, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        sections.setdefault(above, []).extend(lines)

    for above, lines in sections.items():
        yield from ["", f"### `{above}`" if above else "### At the top", "", *lines]


def templates() -> Iterator[str]:
    """Each built-in chat template in mdoc, with its models."""
    for name, format_ in FORMATS.items():
        yield f".It Li {name.replace('-', chr(92) + '-')}"
        yield from prose(f"{format_.models}.")


def template_table() -> Iterator[str]:
    """Each built-in chat template in Markdown, with its models."""
    yield from ["", "## Built-in chat templates", "", *textwrap.wrap(_TEMPLATES_TEXT, 120), ""]
    yield from ["| model | `chat_template` |", "|---|---|"]
    for name, format_ in FORMATS.items():
        yield f"| {format_.models} | `{name}` |"


def documented_keys() -> Iterator[tuple[str, str, str]]:
    """Each key of the documented example: its dotted name, its bounds and default, its meaning."""
    way: list[str] = []
    comment: list[str] = []
    for line in _EXAMPLE.read_text(encoding="utf-8").splitlines():
        if line.strip().startswith("#"):
            comment.append(line.strip().removeprefix("#").strip())
            continue
        if match := _KEY_LINE.match(line):
            way[len(match["indent"]) // 2 :] = [match["key"]]
            if comment and comment[0].startswith(f"{match['key']}: "):
                accepts = comment[0].removeprefix(f"{match['key']}: ")
                yield dotted(way), accepts, " ".join(comment[1:])
        comment = []


def dotted(way: list[str]) -> str:
    return ".".join(
        "NAME" if above in _NAMED else key for above, key in zip(["", *way], way, strict=False)
    )


def prose(text: str) -> Iterator[str]:
    """Plain text as mdoc: a line for each sentence, escaped for roff."""
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
