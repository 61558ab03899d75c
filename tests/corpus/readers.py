"""Finds the chat templates in archives: a reader for each way in which a package keeps them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.archives import Archive


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A template, as a reader found it."""

    name: str
    source: str
    bos: str | None = None
    eos: str | None = None
    """The model's tokens; None where the package does not tell them."""
    hostile: bool = False
    """Whether it was published as an attack on the program that renders it."""


Reader = Callable[[Archive], Iterator[Found]]


def in_order(*readers: Reader) -> Reader:
    """All that several readers find."""

    def read(archive: Archive) -> Iterator[Found]:
        for reader in readers:
            yield from reader(archive)

    return read


def jinja_files(pattern: str, *, hostile: bool = False) -> Reader:
    """Each member that matches is a template."""

    def read(archive: Archive) -> Iterator[Found]:
        for path, text in archive.texts(pattern):
            yield Found(name=Path(path).stem, source=text, hostile=hostile)

    return read


def read_ggufdoctor(archive: Archive) -> Iterator[Found]:
    """Templates of GGUF files, each with its model's tokens beside it, and those of Ollama."""
    folder = r"[^/]+/tests/data/templates/"
    facts = {path: json.loads(text) for path, text in archive.texts(folder + r".*\.json")}
    for path, text in archive.texts(folder + r".*\.jinja"):
        model = facts[path.removesuffix(".jinja").removesuffix(".upstream") + ".json"]
        yield Found(
            name=Path(path).stem, source=text, bos=model["bos_token"], eos=model["eos_token"]
        )

    for _, text in archive.texts(r"[^/]+/src/ggufdoctor/ollama_data/index\.json"):
        for number, entry in enumerate(json.loads(text)):
            yield Found(name=f"ollama-{number:02d}-{entry['name']}", source=entry["template"])


_SCRIPT_TEXT = r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""


def read_ollama_utils(archive: Archive) -> Iterator[Found]:
    """A table in TypeScript of models with the template of their GGUF file."""
    entry = re.compile(rf"model: {_SCRIPT_TEXT},\s*gguf:\s*{_SCRIPT_TEXT},")
    for _, text in archive.texts(r"package/src/chat-template-automap\.ts"):
        for match in entry.finditer(text):
            model = _script_text(match[1]).removeprefix("library/")
            yield Found(name=f"ollama-{model}", source=_script_text(match[2]))


def _script_text(literal: str) -> str:
    """The text of a literal in JavaScript that has JSON's escapes and the escaped quote."""
    body = literal[1:-1]
    if literal[0] == "'":
        body = body.replace("\\'", "'").replace("\\\\", "\0").replace('\\"', '"')
        body = body.replace('"', '\\"').replace("\0", "\\\\")
    text: str = json.loads(f'"{body}"')
    return text


def python_texts(pattern: str) -> Reader:
    """The texts in Python modules that are templates, named after the variable they are set to."""

    def read(archive: Archive) -> Iterator[Found]:
        for path, text in archive.texts(pattern):
            if "{{" not in text:
                continue
            module = Path(path).stem
            for number, (variable, source) in enumerate(_Texts(ast.parse(text)).found):
                if _is_template(source):
                    yield Found(name=f"{module}-{variable or number}", source=source)

    return read


class _Texts(ast.NodeVisitor):
    """The texts of a module, each with the variable that it is set to, or with ""."""

    def __init__(self, module: ast.Module) -> None:
        self.found: list[tuple[str, str]] = []
        self._variable = ""
        self._values: dict[str, str] = {}
        self.visit(module)

    def visit_Assign(self, node: ast.Assign) -> None:
        match node.targets:
            case [ast.Name(id=name)]:
                self._variable = name
                value = self._text(node.value)
                if value is not None:
                    self._values[name] = value
        self.generic_visit(node)
        self._variable = ""

    def generic_visit(self, node: ast.AST) -> None:
        text = self._text(node)
        if text is None:
            super().generic_visit(node)
        elif not isinstance(node, ast.Name):
            self.found.append((self._variable, text))

    def _text(self, node: ast.AST) -> str | None:
        """The text that a literal, a known name, or a sum of them is; else None."""
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.Name(id=name):
                return self._values.get(name)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                first = self._text(left)
                second = self._text(right)
                return None if first is None or second is None else first + second
        return None


def _is_template(text: str) -> bool:
    """Whether a text is a chat template, and a whole one."""
    if len(text) < 60 or "{{" not in text or not re.search(r"\bmessages?\b", text):
        return False

    for word in ("if", "for"):
        opened = re.findall(rf"\{{%-?\s*{word}\b", text)
        closed = re.findall(rf"\{{%-?\s*end{word}\b", text)
        if len(opened) != len(closed):
            return False  # a piece of a template

    return re.search(r"\{%-?\s*(for|if|set)\b", text) is not None
