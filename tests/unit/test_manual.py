"""The man pages, completions and the files of etc/ say what the program has.

None of them can fall behind it.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from rkcached import errors
from rkcached.cli.main import cli
from rkcached.host.settings import Settings
from rkcached.sources.manifest import json_schema
from rkcached.sources.parser import parse

ROOT = Path(__file__).parents[2]
COMMAND_PAGE = (ROOT / "man" / "rkcached.1").read_text(encoding="utf-8")
MANIFEST_PAGE = (ROOT / "man" / "rkcached-manifest.5").read_text(encoding="utf-8")
GENERATOR = runpy.run_path(str(ROOT / "packaging" / "generate.py"))
GENERATED = GENERATOR["everything"]()
LEAVES: dict[str, click.Command] = dict(GENERATOR["leaves"](cli))
"""The commands by their whole names."""
SCHEMA = json_schema()


def words(page: str) -> str:
    """A page without roff's escapes."""
    return page.replace(r"\-", "-").replace(r"\&", "")


def section(command: str) -> str:
    """What the page says of one command."""
    listed = words(COMMAND_PAGE).partition("\n.Sh COMMANDS\n")[2].partition("\n.Sh ")[0]
    found = re.search(
        rf"^\.It Cm {re.escape(command)}\b.*?(?=^\.It Cm |\Z)", listed, re.DOTALL | re.MULTILINE
    )
    assert found, f"rkcached(1) does not tell of {command}"
    return found[0]


def keys(schema: dict[str, Any], way: str = "") -> Iterator[str]:
    """Every key that the schema knows, with NAME for the names that an administrator chooses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    for option in schema.get("anyOf", []):
        yield from keys(option, way)
    for key, child in schema.get("properties", {}).items():
        yield f"{way}{key}"
        yield from keys(child, f"{way}{key}.")
    for child in schema.get("patternProperties", {}).values():
        yield from keys(child, f"{way}NAME.")


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_what_is_generated_is_up_to_date(path: Path) -> None:
    """Man pages and completions are those that the program has now; `make docs` writes them."""
    assert GENERATED[path] == path.read_text(encoding="utf-8"), "run make docs"


@pytest.mark.parametrize("name", LEAVES)
def test_the_manual_has_each_command_and_option(name: str) -> None:
    """rkcached(1) names every command, and with it each of its options."""
    told = section(name)
    for parameter in LEAVES[name].params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert re.search(
                rf"^\.It .*Fl {re.escape(option.removeprefix('-'))}\b", told, re.MULTILINE
            ), option


def test_the_manual_has_no_command_of_the_past() -> None:
    """rkcached(1) names no command and no option that the program does not have."""
    told = words(COMMAND_PAGE).partition("\n.Sh COMMANDS\n")[2].partition("\n.Sh ")[0]
    assert list(LEAVES) == re.findall(r"^\.It Cm ([a-z -]+?)(?: Ar .*)?$", told, re.MULTILINE)
    known = {
        option
        for command in LEAVES.values()
        for parameter in command.params
        for option in parameter.opts
    }
    known |= set(cli.context_settings["help_option_names"])
    assert {f"-{option}" for option in re.findall(r"\bFl (-?[\w-]+)", told)} <= known


def test_the_manual_has_each_key() -> None:
    """rkcached-manifest(5) names the keys of the JSON schema, no more and no less."""
    assert sorted(set(keys(SCHEMA))) == sorted(
        re.findall(r"^\.It Ic (\S+)", MANIFEST_PAGE, re.MULTILINE)
    )


def test_the_manual_has_each_exit_code() -> None:
    """rkcached(1) names every exit code that an error of the program has."""
    told = {int(code) for code in re.findall(r"^\.It (\d+)$", COMMAND_PAGE, re.MULTILINE)}
    raised = {
        thing.exit_code
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, errors.RkcachedError)
    }
    assert raised <= told
    assert {os.EX_OK, 1, 2, 130, 141} <= told


@pytest.mark.parametrize("name", Settings.model_fields)
def test_each_setting_is_documented(name: str) -> None:
    """Each RKCACHED_* variable is in rkcached(1) and, with its default, in etc/default/rkcached."""
    variable = f"RKCACHED_{name.upper()}"
    assert f".It Ev {variable}\n" in COMMAND_PAGE
    assert re.search(
        rf"^#{variable}=\S+$", (ROOT / "etc/default/rkcached").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("page", ["rkcached.1", "rkcached-manifest.5"])
def test_the_manual_is_well_formed(page: str) -> None:
    """Neither groff nor mandoc, whichever there is, has anything to warn of."""
    commands = {
        "groff": ["groff", "-mandoc", "-ww", "-Tutf8", "-z"],
        "mandoc": ["mandoc", "-Tlint", "-Wwarning"],
    }
    here = [command for name, command in commands.items() if shutil.which(name)]
    if not here:
        pytest.skip("needs groff or mandoc")
    for command in here:
        done = subprocess.run(
            [*command, str(ROOT / "man" / page)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_shipped_manifest_parses() -> None:
    """The manifest that is installed has no problem, nor has it with what it shows in comments."""
    file = ROOT / "etc/rkcached/manifest.yaml"
    text = file.read_text(encoding="utf-8")
    assert list(parse(text, file=file).models) == ["qwen3-0.6b"]
    shown = re.sub(r"^    #(prompts:|  )", r"    \1", text, flags=re.MULTILINE)
    assert list(parse(shown, file=file).models["qwen3-0.6b"].prompts) == ["coding_rules"]
    assert [path.stem for path in (file.parent / "prompts").glob("*.md")] == ["assistant"]


@pytest.fixture
def path_with_rkcached(tmp_path: Path) -> str:
    """A PATH on which `rkcached` is this program."""
    program = tmp_path / "rkcached"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m rkcached "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def completed(script: str, shell: str, path: str) -> list[str]:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    arguments = [program, "--no-config"] if shell == "fish" else [program]
    done = subprocess.run(
        [*arguments, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    assert done.stderr == ""
    return [line.partition("\t")[0] for line in done.stdout.split()]


def test_completion_in_bash(path_with_rkcached: str) -> None:
    """`rkcached pl` becomes plan and `rkcached plan --ex` becomes --exit-code."""
    script = f"source {ROOT}/completions/rkcached.bash\n"
    script += (
        "COMP_WORDS=({0}) COMP_CWORD={1}; _rkcached_completion rkcached; printf '%s\\n' "
        '"${{COMPREPLY[@]}}"'
    )
    for line, word, expected in (
        ("rkcached pl", 1, ["plan"]),
        ("rkcached plan --ex", 2, ["--exit-code"]),
    ):
        assert expected == completed(script.format(line, word), "bash", path_with_rkcached)


def test_completion_in_fish(path_with_rkcached: str) -> None:
    """`rkcached pl` becomes plan."""
    script = f"source {ROOT}/completions/rkcached.fish; complete -C 'rkcached pl'"
    assert "plan" in completed(script, "fish", path_with_rkcached)


def test_completion_in_zsh(path_with_rkcached: str) -> None:
    """The script is loaded by name, and binds itself to the command."""
    script = (
        f"fpath=({ROOT}/completions $fpath); autoload -Uz compinit && compinit -D -u; print "
        "$_comps[rkcached]"
    )
    assert completed(script, "zsh", path_with_rkcached) == ["_rkcached"]
