"""Measure how dense the code of a package is: `python scripts/density.py FOLDER [FOLDER ...]`.

Prints one column for each folder. Dense code packs several steps into a line and leaves no blank
line between them; it is short, and slow to read. tests/unit/test_density.py has our limits.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

COLUMNS = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WORDS = re.compile(r"\b(said|told|tell|tells|says)\b")


def measure(folder: Path) -> dict[str, float]:
    """The figures of all Python files below a folder."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    lines = [line for source in sources for line in source.splitlines()]
    code_lines = [line for line in lines if line.strip()]
    counts = Counter[str]()
    inside: list[str] = []
    for source in sources:  # one after the other: all trees together would not fit into a cache
        nodes = list(ast.walk(ast.parse(source)))
        counts.update(_kinds(nodes))
        inside += _inside_functions(source, nodes)
        counts["comments"] += _comments(source)

    def per_thousand(kind: str) -> float:
        return 1000 * counts[kind] / len(code_lines)

    return {
        "files": len(sources),
        "lines": len(lines),
        "statements": counts["statements"],
        "columns (median)": statistics.median(map(len, code_lines)),
        "% over 100 columns": 100 * sum(len(line) > COLUMNS for line in lines) / len(lines),
        "% blank in functions": 100
        * sum(not line.strip() for line in inside)
        / max(1, len(inside)),
        "ternaries /1000": per_thousand("ternaries"),
        "comprehensions /1000": per_thousand("comprehensions"),
        "tuple assignments /1000": per_thousand("tuple assignments"),
        "comments /100": 100 * counts["comments"] / len(code_lines),
        "docstrings 'What ...'": counts["What"],
        "said, told, says": sum(len(WORDS.findall(line)) for line in lines),
    }


def _kinds(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What is counted of each node."""
    for node in nodes:
        if isinstance(node, ast.stmt):
            yield "statements"
        match node:
            case ast.IfExp():
                yield "ternaries"
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                yield "comprehensions"
            case ast.Assign() if _packs(node):
                yield "tuple assignments"
            case ast.Expr(value=ast.Constant(value=str(text))):  # a docstring
                if text.lstrip().startswith("What "):
                    yield "What"


def _inside_functions(source: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The lines of all function bodies, without their docstrings; nested functions count once."""
    lines = source.splitlines()
    numbers: set[int] = set()
    for node in nodes:
        if isinstance(node, FUNCTIONS):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            body = node.body[1:] if has_docstring else node.body
            if body:
                numbers.update(range(body[0].lineno, (node.end_lineno or 0) + 1))
    yield from (lines[number - 1] for number in sorted(numbers))


def _comments(source: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def _packs(node: ast.Assign) -> bool:
    """Whether several values are assigned to several names at once, other than to swap them."""
    if not isinstance(node.value, ast.Tuple) or not isinstance(node.targets[0], ast.Tuple):
        return False
    names = {ast.unparse(target) for target in node.targets[0].elts}
    values = {ast.unparse(value) for value in node.value.elts}
    return names != values


def main() -> None:
    """Print the table."""
    rows = {folder: measure(Path(folder)) for folder in sys.argv[1:]}
    names = next(iter(rows.values())).keys()
    for name in names:
        print(f"{name:26}", *(f"{row[name]:10.1f}" for row in rows.values()))


if __name__ == "__main__":
    main()
