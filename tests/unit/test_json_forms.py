"""What commands print with --json has a form, and a form keeps what programs rely on."""

from __future__ import annotations

import copy
import json
import re
import runpy
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from rkcached.cli import exit_codes, schema
from rkcached.cli.completion import with_json
from rkcached.cli.main import cli
from rkcached.errors import ManifestError, Problem, RequestError
from tests import json_documents
from tests.documents import DOCS, ROOT

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "json_formats.py"))
LEAVES = dict(runpy.run_path(str(ROOT / "packaging" / "generate.py"))["leaves"](cli))
"""The commands by their whole names."""
KEPT: dict[str, Any] = json.loads(SCRIPT["FILE"].read_text())


@pytest.fixture(scope="module")
def now() -> dict[str, Any]:
    """The formats as they are."""
    formats: dict[str, Any] = SCRIPT["formats"]()
    return formats


def test_every_command_with_json_has_a_form() -> None:
    """And every form but that of errors has its command, of the same name."""
    commands = {" ".join(words) for words in with_json(cli)}
    assert commands == set(schema.FORMS) - {schema.ERROR}
    assert len(commands) >= 27


def test_a_command_without_json_has_its_reason() -> None:
    """The page for scripts names it."""
    reasons = (
        (DOCS / "scripting.md").read_text().partition("\nThese commands have no `--json`:\n")[2]
    )
    named = re.findall(r"^\* `rkcached ([a-z -]+)`", reasons, re.MULTILINE)
    assert set(named) == set(LEAVES) - set(schema.FORMS)


@pytest.mark.parametrize("name", schema.FORMS)
def test_every_form_begins_with_its_number(name: str) -> None:
    """Its schema is one, by the draft that it names, and has `format` first in each variant."""
    form = schema.schema_of(name)
    assert form["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(form)
    assert '"additionalProperties": false' not in json.dumps(form)
    for variant in SCRIPT["_options"](form, form):
        first, number = next(iter(variant["properties"].items()))
        assert first == "format"
        assert "format" in variant["required"]
        assert number.get("const", number.get("enum")) in (
            schema.format_of(name),
            [schema.format_of(name)],
        )


def test_a_form_loses_nothing_while_its_number_is_the_same(now: dict[str, Any]) -> None:
    """A failure here breaks programs: raise the number where the form is declared."""
    assert list(SCRIPT["broken"](KEPT, now)) == []


def test_the_kept_forms_are_those_of_now(now: dict[str, Any]) -> None:
    """With what was added since, as the next change is compared with that."""
    assert now == KEPT, "run python scripts/json_formats.py"


def test_what_breaks_a_form_is_noticed() -> None:
    """A field that goes, that is nullable now, or that is not always there; not a new one."""
    form = schema.schema_of("check")

    def losses(number: int, change: Any) -> list[str]:
        changed = copy.deepcopy(form)
        change(changed)
        before = {"check": {"format": 1, "facts": SCRIPT["facts"](form)}}
        now = {"check": {"format": number, "facts": SCRIPT["facts"](changed)}}
        return list(SCRIPT["broken"](before, now))

    def drop(changed: dict[str, Any]) -> None:
        del changed["properties"]["warnings"]

    def nullable(changed: dict[str, Any]) -> None:
        line = changed["$defs"]["Problem"]["properties"]["line"]
        changed["$defs"]["Problem"]["properties"]["line"] = {"anyOf": [line, {"type": "null"}]}

    def optional(changed: dict[str, Any]) -> None:
        changed["required"].remove("problems")

    def add(changed: dict[str, Any]) -> None:
        changed["properties"]["summary"] = {"type": "string"}

    assert losses(1, drop) == [
        "check: no longer so: .warnings: array",
        "check: no longer so: .warnings[]: string",
    ]
    assert losses(1, nullable) == ["check: no longer so: .problems[].line: integer"]
    assert losses(1, optional) == ["check: no longer so: .problems: array"]
    assert losses(2, drop) == losses(1, add) == []


def test_the_documents_of_tests_are_held_to_their_forms() -> None:
    """A field that the form does not have, and a number that is not its own, are refused."""
    good: dict[str, Any] = {"format": 1, "problems": [], "warnings": [], "skipped_files": []}
    json_documents.check(["check", "--json"], code=0, stdout=json.dumps(good), stderr="")
    for bad in ({**good, "more": 1}, {**good, "format": 2}, {"format": 1}):
        with pytest.raises(ValidationError):
            json_documents.check_document("check", bad)
    with pytest.raises(AssertionError):
        json_documents.check_document("check", dict(reversed(good.items())))


@pytest.mark.parametrize(
    ("error", "code", "refused"),
    [
        (ManifestError((Problem(file="m.yaml", line=3, message="no\x1b[2J"),)), 78, None),
        (RequestError(404, "there is no model 'x'", code="model_not_found", hint="a"), 66, 404),
    ],
)
def test_an_error_is_one_line_of_json(
    error: Any, code: int, refused: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error, with --json before `--`; else it is said in words."""
    exit_codes.report(error, ["check", "--json"])
    written = capsys.readouterr()
    assert written.err.count("\n") == 1
    assert written.err.rstrip("\n").isprintable()
    json_documents.check(["check"], code=code, stdout=written.out, stderr=written.err)
    failure = json.loads(written.err)["error"]
    assert failure["code"] == ("model_not_found" if refused else None)
    assert len(failure["problems"]) == (0 if refused else 1)

    exit_codes.report(error, ["chat", "--", "--json"])
    assert "format" not in capsys.readouterr().err
