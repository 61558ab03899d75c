"""YAML text to plain data plus the line of every path, with every problem at once.

Plain scalars follow the core schema of YAML 1.2, where only `true` and `false` are booleans. What
cannot be understood is left out of the data and noted as a Problem; only text that gives no data at
all raises. Sizes, depth and the expansion of aliases are bounded, so that no text can fill the
memory. Pure: no file is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml
from yaml.reader import Reader

from rkcached.errors import ManifestError, Problem

try:
    from yaml import CSafeLoader as _SafeLoader
except (
    ImportError
):  # PyYAML was built without libyaml; the pure loader is slower and has the same marks
    from yaml import SafeLoader as _SafeLoader  # type: ignore[assignment]

Steps: TypeAlias = tuple[str | int, ...]  # the way from the top of the document to a value

MAX_CHARACTERS: Final = 4 << 20
MAX_NODES: Final = (
    100_000  # counted after aliases are expanded, so a few lines cannot fill the memory
)
MAX_DEPTH: Final = 50
_TOO_MANY: Final = f"more than {MAX_NODES} values"
_TOO_DEEP: Final = f"nested deeper than {MAX_DEPTH} levels"


def show(value: object) -> str:
    """The value as a person would name it, short enough for a message."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"

    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def nearest_line(lines: Mapping[Steps, int], steps: Steps) -> int:
    return next(
        (lines[steps[:end]] for end in range(len(steps), -1, -1) if steps[:end] in lines), 0
    )


class _Loader(_SafeLoader):
    """Plain scalars by the core schema of YAML 1.2.

    No `yes` and `off`, no octal 010, no dates, no 12:30 = 750.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _form, _first in (
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(0|[1-9][0-9]*)$", "-+0123456789"),
    (
        "float",
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$",
        "-+.0123456789",
    ),
    ("float", r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$", "-+."),
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_form), list(_first))

_SCALARS: Final[Mapping[str, Callable[[str], object]]] = {
    "str": str,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=inf|nan)", "", text.lower())),
    "null": lambda _: None,
}
_KINDS: Final = {
    "bool": "a YAML boolean",
    "int": "a number",
    "float": "a number",
    "null": "the YAML null",
}


def _open_quote(
    error: yaml.MarkedYAMLError, last: yaml.Event | None
) -> tuple[int, str, str] | None:
    """Line, message and hint if an open quote broke the YAML, which shows only further down.

    `last` is the event before the error.
    """
    hint = "close the quote, or remove it: most text needs none"

    if error.context and "quoted scalar" in error.context and error.context_mark:
        return (
            error.context_mark.line + 1,
            "not valid YAML: the quote that opens here is never closed",
            hint,
        )

    # The next quote of the file closed it, and what follows there makes no sense.
    if isinstance(last, yaml.ScalarEvent) and last.style in ("'", '"') and error.problem_mark:
        if last.start_mark is None or last.end_mark is None:
            return None
        opened, closed = last.start_mark.line + 1, last.end_mark.line + 1
        if opened < closed == error.problem_mark.line + 1:
            return (
                opened,
                f"not valid YAML: the quote that opens here is closed only in line {closed}",
                hint,
            )

    return None


_COMPARE: Final = "compare the line and the one above with the examples of rkcached-manifest(5)"


def _syntax_hint(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    """The next thing to do about a line (1-based) that breaks the YAML."""
    lines = text.splitlines()
    if line <= len(lines) and re.match(r"\s*\t", lines[line - 1]):
        return "indent with spaces, not tabs"
    if error.context and "flow" in error.context:
        return "close the bracket, or put a comma before the next entry"
    if error.context and "block" in error.context:
        return "indent it as far as the keys that it stands beside"
    if error.problem and "mapping values" in error.problem:
        return "put the text in quotes, as it has a colon; or indent the line"
    return _COMPARE


class YamlReader:
    """Turns YAML text into plain data; remembers the line of every place in it, and problems."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[Steps, int] = {}
        self.problems: list[Problem] = []
        self._open: list[
            int
        ] = []  # the nodes being read, outermost first: an alias to one of them has no end
        self._count = 0

    def problem(self, line: int, message: str, hint: str = "") -> Problem:
        return Problem(file=str(self.file), line=line, message=message, hint=hint)

    def _fatal(self, line: int, message: str, hint: str = "") -> ManifestError:
        return ManifestError((self.problem(line, message, hint),))

    def _note(self, node: yaml.Node, message: str, hint: str = "") -> None:
        self.problems.append(self.problem(node.start_mark.line + 1, message, hint))

    def read(self, text: str) -> dict[str, Any]:
        """The document's data, without what cannot be understood; raises when nothing can be."""
        if len(text) > MAX_CHARACTERS:
            raise self._fatal(
                1,
                f"the manifest has {len(text)} characters, {MAX_CHARACTERS} are allowed",
                "put the texts of prompts into files",
            )

        if match := Reader.NON_PRINTABLE.search(text):
            line = text.count("\n", 0, match.start()) + 1
            raise self._fatal(
                line,
                f"character {match.group()!r} is not allowed in YAML",
                "save the file as UTF-8 text",
            )

        root = self._compose(text)
        if root is None or (isinstance(root, yaml.ScalarNode) and not root.value):
            raise self._fatal(1, "the manifest is empty", "start with `version: 1` and `models:`")
        data = self._value(root, ())
        if not isinstance(data, dict):
            message = f"expected a mapping at the top of the manifest, got {show(data)}"
            raise self._fatal(
                root.start_mark.line + 1, message, "start with `version: 1` and `models:`"
            )

        return data

    def _compose(self, text: str) -> yaml.Node | None:
        depth = nodes = 0
        last: yaml.Event | None = None

        try:
            for event in yaml.parse(text, Loader=_Loader):  # first, flat: composing recurses in C
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(
                    event, yaml.CollectionEndEvent
                )
                nodes += isinstance(event, yaml.NodeEvent)
                if depth > MAX_DEPTH or nodes > MAX_NODES:
                    line = event.start_mark.line + 1 if event.start_mark else 1
                    what = _TOO_DEEP if depth > MAX_DEPTH else _TOO_MANY
                    raise self._fatal(line, what, _COMPARE)

                last = event

            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            if opened := _open_quote(error, last):
                raise self._fatal(*opened) from error
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            message = f"not valid YAML: {error.problem or error.context}"
            if error.context and "flow" in error.context and error.context_mark:
                message += f" for the bracket that opens in line {error.context_mark.line + 1}"
            if (
                "nesting depth" in message
            ):  # libyaml's own limit, since PyYAML 6.0.4: reached before the first event
                raise self._fatal(line, _TOO_DEEP, _COMPARE) from error

            raise self._fatal(line, message, _syntax_hint(error, text, line)) from error
        except yaml.YAMLError as error:
            raise self._fatal(1, f"not valid YAML: {error}", _COMPARE) from error

    def _value(self, node: yaml.Node, steps: Steps) -> object:
        self.lines.setdefault(steps, node.start_mark.line + 1)
        self._count += 1
        line = node.start_mark.line + 1
        if self._count > MAX_NODES:
            raise self._fatal(line, f"{_TOO_MANY} once aliases are expanded", "use fewer aliases")
        if id(node) in self._open:
            raise self._fatal(
                line, "an alias refers to a value that contains it", "write the value out"
            )

        if len(self._open) >= MAX_DEPTH:
            raise self._fatal(line, _TOO_DEEP, _COMPARE)
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        self._open.append(id(node))

        try:
            match node:
                case yaml.MappingNode() if kind == "map":
                    return self._mapping(node, steps)
                case yaml.SequenceNode() if kind == "seq":
                    return [
                        self._value(item, (*steps, index)) for index, item in enumerate(node.value)
                    ]
                case yaml.ScalarNode() if kind in _SCALARS:
                    return _SCALARS[kind](node.value)

            self._note(node, f"the tag {show(node.tag)} is not supported", "remove the tag")
        except (ValueError, KeyError):
            self._note(node, f"{show(node.value)} cannot be read as {kind}", "write a plain value")
        finally:
            self._open.pop()

        return None

    def _mapping(self, node: yaml.MappingNode, steps: Steps) -> dict[str, object]:
        data: dict[str, object] = {}
        first: dict[str, int] = {}
        merged: list[yaml.Node] = []

        for key, value in node.value:
            if key.tag.endswith(":merge"):
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif not isinstance(key, yaml.ScalarNode):
                self._note(
                    key,
                    f"a key must be text, got {show(key.value)}",
                    "write one plain word before the colon",
                )
            elif key.value in first:
                message = f"duplicate key {show(key.value)}, first given in line {first[key.value]}"
                self._note(key, message, "remove one of them")
            else:
                kind = key.tag.rpartition(":")[2]
                if kind in _KINDS:
                    self._note(
                        key,
                        f"a key must be text, but {show(key.value)} is {_KINDS[kind]}",
                        "put it in quotes",
                    )

                first[key.value] = key.start_mark.line + 1
                self.lines.setdefault((*steps, key.value), first[key.value])
                data[key.value] = self._value(value, (*steps, key.value))

        for source in merged:
            below = self._value(source, steps)
            if not isinstance(below, dict):
                self._note(
                    source, f"'<<' merges mappings, got {show(below)}", "name an anchor of one"
                )
                continue

            data = below | data

        return data
