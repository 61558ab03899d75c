"""The forms of what commands print with `--json`.

They are for mypy, which holds the code that fills a form to it, and for `schema`, which makes JSON
Schema of them: a command that only prints imports nothing from here. `format` comes first. It is
raised when a field goes, is renamed, or means something else; a new field leaves it.
`bench` and `compare` have theirs in `bench`, where results are read, too, and the daemon's records
are those of the HTTP API.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, with_config
from pydantic_core import CoreSchema
from typing_extensions import TypedDict  # before 3.12, pydantic reads only this one

from rkcached.api import responses


@dataclass(frozen=True, slots=True)
class _Sent:
    """Marks an object that the daemon sent, in a form of the HTTP API."""

    form: type[BaseModel]

    def __get_pydantic_core_schema__(
        self, _source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return handler.generate_schema(self.form)


Built: TypeAlias = Annotated[dict[str, Any], _Sent(responses.BinaryCacheCreated)]
ChatAnswer: TypeAlias = Annotated[dict[str, Any], _Sent(responses.ChatCompletion)]
Collectable: TypeAlias = Annotated[dict[str, Any], _Sent(responses.Collectable)]
Figures: TypeAlias = Annotated[dict[str, Any], _Sent(responses.ArtifactFigures)]
ModelAction: TypeAlias = Annotated[dict[str, Any], _Sent(responses.ModelAction)]
ModelStatus: TypeAlias = Annotated[dict[str, Any], _Sent(responses.ModelStatus)]
PromptStatus: TypeAlias = Annotated[dict[str, Any], _Sent(responses.PromptStatus)]
SentPrompt: TypeAlias = Annotated[dict[str, Any], _Sent(responses.ImportedPrompt)]
Suggestion: TypeAlias = Annotated[dict[str, Any], _Sent(responses.SuggestedPrompt)]


# Docstrings of fields become descriptions, also in the forms within a form.
@with_config(ConfigDict(use_attribute_docstrings=True))
class _Format1(TypedDict):
    format: Literal[1]


# Errors


class Problem(TypedDict):
    """One thing wrong in a file."""

    file: str
    line: int
    """From 1; 0 for the file as a whole."""
    message: str
    hint: str
    """The next thing to do; it may be empty."""


class Complaint(TypedDict):
    message: str
    hint: str
    """The next thing to do; it may be empty."""


class Failure(Complaint):
    exit_code: int
    code: str | None
    """The HTTP API's, where the daemon refused the request."""
    problems: list[Problem]
    """Of a manifest; empty for any other error."""


class Failed(_Format1):
    """A command that failed, on standard error."""

    error: Failure


# The manifest


class Added(_Format1):
    manifest: str
    model: str
    prompt: str | None
    """null: FILE is the model itself."""
    file: str


class Checked(_Format1):
    problems: list[Problem]
    """In the order of their lines."""
    warnings: list[str]
    """Of things that work, but cost more or give less than one may know; each begins with
    FILE:LINE."""
    skipped_files: list[str]
    """Of prompts_from: their names cannot be a prompt's."""


class InitialModel(TypedDict):
    name: str
    path: str
    context_tokens: int
    chat_template: str | None
    """The place or the name of the template; null: nothing states one."""


class InitialPrompt(TypedDict):
    model: str
    prompt: str
    file: str


class LeftOut(TypedDict):
    file: str
    reason: str


class Initialised(_Format1):
    manifest: str
    engine: str
    models: list[InitialModel]
    prompts: list[InitialPrompt]
    skipped: list[LeftOut]
    problems: list[Problem]
    """Of the new manifest, as `check` finds them."""


class SchemaName(TypedDict):
    name: str
    format: int


class SchemaList(_Format1):
    schemas: list[SchemaName]


# Prompt caches


class Gone(_Format1):
    """A line of `status --watch`: no daemon answers any more; the next line comes from the next."""

    gone: Literal[True]


class Waited(_Format1):
    outcome: Literal["fresh", "never", "timeout"]
    waited_s: float
    """Seconds."""
    errors: list[Complaint]
    """The reasons why not all are fresh."""
    prompts: list[PromptStatus]
    """Those that were asked for; empty where no daemon answered."""


class Whose(TypedDict):
    model: str
    prompt: str
    reason: str


class ToBuild(Whose):
    action: Literal["build"]
    fingerprint: str


class ToAdopt(Whose):
    action: Literal["adopt"]
    fingerprint: str
    source: str | None
    """The artifact that is taken; null for a retired one."""
    renames: bool
    """The text is the same, and no other prompt has it any more."""


class ToRetire(Whose):
    action: Literal["retire"]


class ToRemove(Whose):
    action: Literal["remove"]
    retired: str | None
    """The fingerprint of a retired artifact; null for any other."""


class IsBlocked(Whose):
    action: Literal["blocked"]
    hint: str
    retry_at: float | None
    """Unix seconds of the next attempt; null where time alone does not help."""


Step: TypeAlias = ToBuild | ToAdopt | ToRetire | ToRemove | IsBlocked


class Planned(_Format1):
    store: str
    actions: list[Step]
    fresh: int
    """Prompts with which nothing has to be done."""
    skipped_files: list[str]
    """Of prompts_from: their names cannot be a prompt's."""


class Change(TypedDict):
    component: str
    """Of the fingerprint."""
    old: str | None
    new: str | None


class TextDiff(TypedDict):
    of: Literal["text", "rendered", ""]
    """The texts that were compared: the prompt's own, or with the words of the template; empty if
    nothing was."""
    why: str
    """A sentence in place of lines, where there are none."""
    lines: list[str]
    """As `diff -u` writes them, without its two lines of names."""
    left_out: int
    """So many more lines differ, or stand beside lines that do."""


class ExplainedPrompt(_Format1):
    """`explain MODEL/PROMPT`."""

    store: str
    model: str
    prompt: str
    state: str
    learned: bool
    reason: str
    hint: str
    description: str
    tools: list[str]
    changes: list[Change]
    """Between the artifact and what is declared."""
    action: Step | None
    next_step: str
    """The daemon's, in words; empty where it has nothing to do."""
    wanted: dict[str, str] | None
    """The components of the fingerprint; null where it has none."""
    artifact: Figures | None
    lines: list[str]
    """The changes in words."""
    diff: NotRequired[TextDiff]
    """With --diff: how the text differs from the artifact's."""


class Template(TypedDict):
    name: str
    origin: str
    digest: str
    date: str | None
    variables: dict[str, Any]


class SpecialTokens(TypedDict):
    bos: str
    eos: str
    ends: list[str]
    """Tokens that end an answer."""
    engine_adds_bos: bool
    control_tokens: int | None
    """How many there are; null where nothing states them."""
    control_tokens_of: str


class ModelState(TypedDict):
    """The state that a prompt cache of the model saves."""

    kind: str
    window_tokens: int
    context_bytes: int
    explanation: str


class PromptVariables(TypedDict):
    variables: dict[str, Any]


class ExplainedModel(_Format1):
    """`explain MODEL`."""

    model: str
    engine: str
    path: str
    trouble: str | None
    hint: str
    template: Template | None
    special_tokens: SpecialTokens | None
    recommended_sampling: dict[str, float]
    state: ModelState
    prompts: dict[str, PromptVariables]
    """The prompts whose chat template has variables of their own."""


class Regenerated(_Format1):
    built: list[Built]
    errors: list[Complaint]
    """Of the prompts that could not be built."""


class VerifiedArtifact(TypedDict):
    model: str
    prompt: str
    state: str
    learned: bool
    ok: bool
    detail: str


class Verified(_Format1):
    store: str
    signatures_checked: bool
    """Only root and the daemon can read the key that they are checked with."""
    artifacts: list[VerifiedArtifact]


class Collected(_Format1):
    store: str
    removed: bool
    """false: with --dry-run."""
    size_bytes: int
    """All items together."""
    items: list[Collectable]
    strangers: list[Collectable]
    """Files and folders that are not the store's; they stay."""
    failed: list[Collectable]
    """Prompt caches that should have gone and could not be removed."""


# Bundles


class Exported(_Format1):
    file: str
    size_bytes: int
    signed_by: str
    """The id of a key; empty without a signature."""
    prompts: list[str]
    left_out: dict[str, str]
    """Those that cannot be exported, each with the reason."""


class BundleImported(_Format1):
    prompts: list[SentPrompt]


class BundleKey(_Format1):
    file: str
    public_file: str
    id: str
    key: str
    """The public key: a line for `cache.trust`."""


class Tokens(TypedDict):
    count: int
    first: list[int]
    last: list[int]


class Matches(TypedDict):
    size: bool
    sha256: bool
    tokens: bool | None
    text: bool | None
    """null where the text is not beside it."""


class InspectedSidecar(TypedDict):
    file: str
    model: str
    prompt: str
    fingerprint: str
    built_at: float
    """Unix seconds."""
    matches: Matches


class Inspected(_Format1):
    file: str
    given: str
    """The file as it was named: it may be the sidecar or the text."""
    engine: str
    file_format: str
    size_bytes: int
    tokens: Tokens | None
    """null where they are packed in a way that is not known."""
    sidecar: InspectedSidecar | None
    problem: str
    """Empty where the file and its sidecar are whole and belong together."""


class ImportedPrompt(TypedDict):
    model: str
    name: str
    requests: int
    characters: int
    tools: list[str]
    text_file: str
    tools_file: str | None


class SkippedLine(TypedDict):
    line: int
    reason: str


class Imported(_Format1):
    requests: int
    served: int
    """Of the requests, those that the prompts would have served."""
    prompts: list[ImportedPrompt]
    skipped: list[SkippedLine]
    manifest: str
    """The lines for the manifest, in YAML."""


class Suggested(_Format1):
    suggestions: list[Suggestion]


# Models


class Answered(_Format1):
    answer: ChatAnswer


class ModelChanged(_Format1):
    model: ModelAction


class LoadedModels(_Format1):
    models: list[ModelStatus]


# The service


class Reloaded(_Format1):
    summary: str


class Finding(TypedDict):
    name: str
    outcome: Literal["ok", "warn", "fail", "skip"]
    finding: str
    next_step: str


class Examined(_Format1):
    ready: bool
    """No check failed."""
    npu: bool
    checks: list[Finding]


class Key(TypedDict):
    name: str
    admin: bool
    models: list[str]
    """The only models that it may use; all if there are none."""
    owner: int
    created: str
    """Date and time, in UTC."""


class AddedKey(_Format1, Key):
    key: str
    """The key itself, which is shown only now."""


class KeyList(_Format1):
    keys: list[Key]


class RevokedKey(_Format1, Key):
    pass


class PortKey(Key):
    key: str | None
    """The key itself; null for one that was there before."""


class OpenedPort(_Format1):
    changed: bool
    addresses: list[str]
    base_urls: list[str]
    key: PortKey | None
    """null where none is needed."""


class ClosedPort(_Format1):
    changed: bool
    keys: list[str]
    """The names of those that remain."""
