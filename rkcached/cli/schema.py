"""`rkcached schema`: JSON Schema of what commands print with `--json`, and of the manifest."""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any, Final

import click
import msgspec
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from rkcached.api.responses import Status
from rkcached.cli import forms, output
from rkcached.cli.bench.compare import Comparison
from rkcached.cli.bench.results import Results
from rkcached.errors import SourceError
from rkcached.sources.manifest import json_schema
from rkcached.sources.names import hint_for

MANIFEST: Final = "manifest"
ERROR: Final = "error"

FORMS: Final[Mapping[str, Any]] = {
    "init": forms.Initialised,
    "check": forms.Checked,
    "add": forms.Added,
    "schema": forms.SchemaList,
    "status": Status | forms.Gone,
    "wait": forms.Waited,
    "plan": forms.Planned,
    "explain": forms.ExplainedPrompt | forms.ExplainedModel,
    "regenerate": forms.Regenerated,
    "verify": forms.Verified,
    "gc": forms.Collected,
    "inspect": forms.Inspected,
    "export": forms.Exported,
    "import": forms.BundleImported,
    "bundle-key": forms.BundleKey,
    "prompts import": forms.Imported,
    "suggest": forms.Suggested,
    "chat": forms.Answered,
    "load": forms.ModelChanged,
    "unload": forms.ModelChanged,
    "ps": forms.LoadedModels,
    "bench": Results,
    "compare": Comparison,
    "reload": forms.Reloaded,
    "doctor": forms.Examined,
    "key add": forms.AddedKey,
    "key list": forms.KeyList,
    "key revoke": forms.RevokedKey,
    "port enable": forms.OpenedPort,
    "port disable": forms.ClosedPort,
    ERROR: forms.Failed,
}
"""By the name of the command; ERROR is what any command prints on standard error."""


def run(name: str, *, want_json: bool) -> int:
    """Print one schema, or without a name the list. Errors: SourceError for an unknown name."""
    if name:
        # Our own text: nothing in it to escape.
        click.echo(json.dumps(schema_of(name), indent=2))
        return os.EX_OK

    listed: forms.SchemaList = {
        "format": 1,
        "schemas": [{"name": form, "format": format_of(form)} for form in FORMS],
    }
    if want_json:
        output.print_json(listed)
        return os.EX_OK

    for schema in listed["schemas"]:
        click.echo(f"{schema['name']:<16}format {schema['format']}")
    click.echo(f"{MANIFEST:<16}for editors that complete and check YAML")
    return os.EX_OK


def format_of(name: str) -> int:
    """The format number of a command's JSON."""
    form = FORMS[name]
    if isinstance(form, UnionType):
        form = typing.get_args(form)[0]

    (number,) = typing.get_args(typing.get_type_hints(form)["format"])
    return int(number)


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a command's JSON, or of the manifest. Errors: SourceError."""
    if name == MANIFEST:
        return json_schema()
    if name not in FORMS:
        raise SourceError(f"there is no schema {name!r}", hint=hint_for(name, [*FORMS, MANIFEST]))

    form = FORMS[name]
    title = f"rkcached {name} --json"
    if name == ERROR:
        title = "rkcached COMMAND --json, on standard error"

    if isinstance(form, type) and issubclass(form, msgspec.Struct):
        made = msgspec.json.schema(form)
    else:
        made = _open(TypeAdapter(form).json_schema(mode="serialization"))
    return {"$schema": GenerateJsonSchema.schema_dialect, **made, "title": title}


def _open(schema: Any) -> Any:
    """The schema, without that a form has no further fields: a later version may add some."""
    if isinstance(schema, list):
        return [_open(part) for part in schema]
    if not isinstance(schema, dict):
        return schema

    return {
        key: _open(value)
        for key, value in schema.items()
        if (key, value) != ("additionalProperties", False)
    }
