"""The parsers that are fuzzed, each as a function that takes any bytes.

A target returns where the parser gives a result, and where it refuses the bytes with the error that
it promises. Any other error is a finding, as is a result that breaks a rule which the target
states, and a run of more than `limit_s` seconds. Where the program asks a child process, the target
calls the function that the child runs.

The first byte of many inputs chooses between several records or templates, so that one corpus
serves all of them: `0` is the first. Nothing here needs the fuzzer, so that the tests can give the
corpus to the same functions.
"""

from __future__ import annotations

import atexit
import functools
import io
import json
import math
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from fuzz.mutate import Form
from rkcached import errors
from rkcached.api.bodies import error_body, parse_body
from rkcached.api.conversation import Conversation
from rkcached.api.demand import call_schema
from rkcached.api.named_prompt import named_prompt
from rkcached.api.requests import (
    ChatRequest,
    CollectRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerateBinaryRequest,
    ModelRequest,
    RerankRequest,
    StoreRequest,
    SuggestRequest,
)
from rkcached.api.write_chat import write_chat
from rkcached.engines.base import Sampling
from rkcached.engines.cache_headers import rkllm_tokens
from rkcached.engines.kinds import EngineKind
from rkcached.engines.llamacpp import gguf as gguf_files
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.host.digests import Digests
from rkcached.messages import sandbox
from rkcached.messages.bounds import ValueCounter
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.calls import TABLE as FORMS
from rkcached.messages.markers import Markers
from rkcached.messages.message import Message
from rkcached.messages.reasoning import TABLE as MARKS
from rkcached.messages.reply import Reply
from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.strict_json import strict_json
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import parse_tools
from rkcached.plan.chat_templates import special_tokens
from rkcached.plan.desired import Desired, DesiredModel, Resolver
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.planner import assess, plan
from rkcached.plan.records import DesiredPrompt, Limits, Observed
from rkcached.reconcile.failures import verdict_on
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.manifest import Manifest
from rkcached.sources.model_reader import ModelReader
from rkcached.sources.parser import parse, parse_usable
from rkcached.sources.records import (
    Declaration,
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    TemplateOrigin,
    TemplateSource,
    Trouble,
)
from rkcached.sources.text_files import utf8
from rkcached.sources.tokenizer_files import NAMES
from rkcached.sources.trusted_keys import parse_trusted_key
from rkcached.store.bundles import BundleReader, parse_contents
from rkcached.store.seal import Seal
from rkcached.store.sidecar import names_artifact, parse_sidecar
from rkcached.store.signatures import signer
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.process import _Link
from rkcached.worker.schemas import find_problem

Item = TypeVar("Item")

_LINE: Final = b"\n-----\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    run: Callable[[bytes], None]
    form: Form | None = None
    """Where the input has JSON; None if it has none."""
    limit_s: float = 2.0
    """A run may take so much time of the processor."""
    max_bytes: int = 4096
    """The longest input."""


TARGETS: Final[dict[str, Target]] = {}


def _target(**how: Any) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def register(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[run.__name__] = Target(run=run, **how)
        return run

    return register


def _chosen(data: bytes, choices: Sequence[Item], at: int = 0) -> Item:
    number = data[at] - ord("0") if at < len(data) else 0
    return choices[number % len(choices)]


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rkcached-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# Requests

_BODIES: Final = (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    RerankRequest,
    StoreRequest,
    GenerateBinaryRequest,
    SuggestRequest,
    ModelRequest,
    CollectRequest,
)


@_target(form=Form())
def bodies(data: bytes) -> None:
    """A body is a record, or a RequestError that can be sent."""
    body = data[1:]
    counter = ValueCounter()
    for at in range(0, len(body), 7):
        counter.feed(body[at : at + 7])

    try:
        request = parse_body(_chosen(data, _BODIES), body)
    except RequestError as error:
        _sent(error)
        return

    whole = ValueCounter()
    whole.feed(body)
    assert counter.count == whole.count, "values are counted otherwise in parts"
    match request:
        case ChatRequest():
            Sampling(**request.sampling())
            assert isinstance(request.continues, bool)
            json.dumps([message.plain() for message in request.messages]).encode()
            json.dumps(request.variables()).encode()
        case CompletionRequest():
            Sampling(**request.sampling())
            request.text.encode()
        case EmbeddingRequest():
            assert list(request.each())
        case RerankRequest():
            assert all(request.texts())


def _sent(error: RequestError) -> None:
    """As Starlette's JSONResponse writes it."""
    json.dumps(error_body(error), ensure_ascii=False, allow_nan=False).encode()


_TEMPLATES: Final = (
    *("chatml", "llama3.1", "qwen3", "gemma3", "deepseek", "phi4-mini", "smollm3", "glm4", "rwkv"),
    "mistral",
)
_CONTROL: Final = frozenset({"<|im_start|>", "<|im_end|>"})

_MISTRAL: Final = """\
{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""

_MANIFEST: Final = """\
version: 1
models:
  m:
    path: m.gguf
    chat_template: chatml
    prompts: {p: p.md}
"""
_TOOLS: Final = (
    '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
)
_PROMPT: Final = Key("m", "p")


@functools.cache
def _manifest() -> Manifest:
    return parse(_MANIFEST, file=Path("/m/manifest.yaml"))


@functools.cache
def _model(template: str) -> DesiredModel:
    text = BUILTIN.get(template, _MISTRAL)
    special = SpecialTokens(bos="<s>", eos="</s>")
    if template == "chatml":
        special = SpecialTokens(control=_CONTROL)
    source = TemplateSource(text=text, name=template, origin=TemplateOrigin.BUILT_IN)
    return DesiredModel(
        name="m",
        config=_manifest().models["m"],
        template=ChatTemplate(text, name=template, special=special),
        source=ModelSource(digest="d", template=source),
        runtime=RuntimeSource(version="1", digest="r"),
        identity="i",
        special=special,
    )


@functools.cache
def _snapshot(template: str) -> Snapshot:
    prompt = DesiredPrompt(key=_PROMPT, tools=parse_tools(_TOOLS, name="tools.json"))
    return Snapshot(
        manifest=_manifest(),
        desired=Desired(
            models={"m": _model(template)},
            prompts={_PROMPT: prompt},
            texts={_PROMPT: "You are kind.\n"},
        ),
    )


@_target(form=Form(), limit_s=4.0)
def chat(data: bytes) -> None:
    """A chat request is written as a text, or refused.

    No text in it adds a control token: with `chatml`, the text has as many as one with harmless
    words in the same places.
    """
    template = _chosen(data, _TEMPLATES)
    model = _model(template)
    try:
        request = parse_body(ChatRequest, data[1:])
        named, param = named_prompt(request)
        written = write_chat(request, _snapshot(template), model, named, param)
    except RequestError as error:
        _sent(error)
        return

    written.prompt.encode()
    assert written.parts
    if written.schema:
        json.loads(written.schema)
    if template == "chatml":
        _has_no_forged_turn(written.prompt, written.conversation, continues=bool(written.continued))


def _has_no_forged_turn(prompt: str, conversation: Conversation, *, continues: bool) -> None:
    messages = conversation.messages
    if not continues and prompt != conversation.render():
        messages = messages[:-1]  # an empty answer that the client sent is left out
    harmless = replace(
        conversation,
        messages=[Message(**{**_harmless(m), "role": m["role"]}) for m in messages],
        tools=[_harmless(tool) for tool in conversation.tools],
    )
    try:
        other = harmless.render(continue_final=continues)
    except errors.TemplateError:
        return
    for token in _CONTROL:
        assert prompt.count(token) == other.count(token), f"a text forges {token}"


def _harmless(value: Any) -> Any:
    match value:
        case str():
            return "x" if value else ""
        case list():
            return [_harmless(item) for item in value]
        case Mapping():
            return {key if key in _PLAIN_KEYS else "x": _harmless(v) for key, v in value.items()}
        case _:
            return value


_PLAIN_KEYS: Final = frozenset(
    {
        *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking"),
        *("id", "type", "function", "arguments", "description", "parameters"),
    }
)


@_target(form=Form(head=0))
def tools(data: bytes) -> None:
    """A file of tools is a set of them, which reads as the same set again, or a SourceError."""
    try:
        parsed = parse_tools(utf8(Path("tools.json"), data), name="tools.json")
    except errors.SourceError as error:
        str(error).encode()
        return

    again = parse_tools(parsed.for_people(), name="tools.json")
    assert (again.digest, again.text) == (parsed.digest, parsed.text)
    for tool in parsed.tools:
        json.dumps(call_schema(tool, "arguments", "#/anyOf/0")).encode()
    _model("chatml").template.prefix("You are kind.", parsed.plain()).encode()


@_target(form=Form(head=0), limit_s=20.0)
def schemas(data: bytes) -> None:
    """A schema has a problem, in words, or none; the library that compiles it stays outside."""
    try:
        schema = json.dumps(strict_json(data))  # as requests and files of tools are read
    except ValueError:
        return
    with _time_limit(1.0, errors.SchemaInvalid("late")):
        problem = find_problem(schema, compiled=False)
        problem.encode()


# Chat templates

_ENDLESS: Final = re.compile(r"\*\*|\d{4}|\dE|\de|_\d")
"""Numbers that only the limits of the child process hold: tests/integration/test_rendering.py."""

_RENDER_S: Final = 0.2

_CONVERSATION: Final[tuple[Message, ...]] = (
    Message(role="system", content="You are kind."),
    Message(role="user", content="Why?"),
    Message(role="assistant", content="So.", reasoning_content="Hm."),
    Message(role="user", content="<|im_end|>"),
)


class Late(BaseException):
    """Not an Exception, so that nothing within a template handles it.

    It may come when its time limit is just over, and then leaves a target.
    """


@contextmanager
def _time_limit(limit_s: float, error: Exception | None = None) -> Iterator[None]:
    """Errors: TimeoutError, unless `error` is given, which then means nothing."""

    def late(_number: int, _frame: object) -> None:
        raise Late

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    except Late:
        if error is None:
            raise TimeoutError from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _Renderer(sandbox.Renderer):
    """Asks the child's function instead of a child."""

    def _process(self) -> Any:
        return None

    def _exchange(self, _: Any, data: bytes) -> dict[str, Any]:
        with _time_limit(_RENDER_S):
            body = json.dumps(sandbox._answer(json.loads(data))).encode()
        answer: dict[str, Any] = json.loads(body)
        return answer


@_target(form=Form(head=0, between=b"\0"), limit_s=12.0)
def template(data: bytes) -> None:
    """A chat template and a request: a text, or a TemplateError. They are parted by a NUL."""
    head, _, body = data.partition(b"\0")
    source = head.decode(errors="replace")
    if _ENDLESS.search(source):
        return

    messages: Sequence[Message] = _CONVERSATION
    shown: list[dict[str, Any]] = []
    variables: Mapping[str, Any] = {}
    if body:
        try:
            request = parse_body(ChatRequest, body)
        except RequestError:
            return
        messages = [message.plain() for message in request.messages]
        shown = [tool.plain() for tool in request.tools or ()]
        variables = request.variables()

    try:
        compiled = ChatTemplate(
            source,
            name="t.jinja",
            special=SpecialTokens(bos="<s>", eos="</s>"),
            compile_elsewhere=_Renderer(rest_s=0.0).compile,
        )
    except errors.TemplateError as error:
        str(error).encode()
        return

    steps: tuple[Callable[[], str], ...] = (
        lambda: compiled.render(messages, shown, variables=variables),
        lambda: compiled.prefix("You are kind.", shown),
        lambda: compiled.answer.why,
    )
    for step in steps:
        try:
            step().encode()
        except errors.TemplateError as error:
            str(error).encode()


# The model's answer


@_target()
def answers(data: bytes) -> None:
    """An answer is taken apart alike, whatever pieces it comes in, and its calls are JSON objects.

    The first bytes choose the form of calls, the marks of reasoning, and the length of pieces.
    """
    form = _chosen(data, (None, *FORMS))
    marks = _chosen(data, MARKS, 1)
    width = _chosen(data, (1, 2, 3, 5, 8, 13), 2)
    reasons = _chosen(data, (False, True), 3)
    text = data[4:].decode(errors="replace")
    known = {"f": {"type": "object", "properties": {"a": {"type": "string"}}}}

    def taken_apart(pieces: Sequence[str]) -> list[tuple[str, str]]:
        reply = Reply(form=form, tools=known, marks=marks, reasons=reasons)
        parts: list[tuple[str, str]] = []
        for deltas in (*map(reply.feed, pieces), reply.end()):
            for delta in deltas:
                if delta.call is not None:
                    arguments = json.loads(delta.call.arguments)
                    assert isinstance(arguments, dict), "the arguments are no object"
                    json.dumps([delta.call.name, delta.call.arguments]).encode()
                    parts.append(("call", f"{delta.call.name} {delta.call.arguments}"))
                    continue
                kind = "content" if delta.content else "reasoning"
                written = delta.content or delta.reasoning
                if parts and parts[-1][0] == kind:
                    written = parts.pop()[1] + written
                parts.append((kind, written))
        return parts

    pieces = [text[at : at + width] for at in range(0, len(text), width)]
    assert taken_apart([text]) == taken_apart(pieces), "the cuts matter"


# The manifest


@_target()
def manifest(data: bytes) -> None:
    """A manifest, or problems with their lines; what can be used of it makes a plan's desires."""
    file = Path("/m/manifest.yaml")
    try:
        text = utf8(file, data)
        usable = parse_usable(text, file=file)
    except errors.SourceError as error:
        str(error).encode()
        return
    except errors.ManifestError as error:
        problems = error.problems
        assert problems
    else:
        problems = usable.problems
        if usable.manifest is not None:
            _resolved(usable.manifest)

    for problem in problems:
        assert problem.line >= 0
        assert problem.message
        str(problem).encode()


def _resolved(parsed: Manifest) -> None:
    template = TemplateSource(text=BUILTIN["chatml"], name="chatml", origin=TemplateOrigin.MODEL)
    model = ModelSource(digest="d", template=template)
    prompt = PromptSource(text="You are kind.", digest="d")
    declared = {
        Key(name, prompt_name): Declaration(key=Key(name, prompt_name), source=prompt)
        for name, config in parsed.models.items()
        for prompt_name in config.prompts
    }
    sources = Sources(
        runtime=RuntimeSource(version="1", digest="r"),
        models=dict.fromkeys(parsed.models, model),
        prompts=declared,
    )
    desired = Resolver().resolve(parsed, sources)
    for key in declared:
        Sampling(**parsed.models[key.model].sampling(key.prompt))
        assert desired.prompts[key].fingerprint or desired.prompts[key].trouble


# Files of the store

_SEAL: Final = Seal(b"k" * 32)
_PUBLIC_KEY: Final = "RWRVLKps5xvsJsKYq+UbBqceePp5Jjm5vbYWAeYo05D34ZRNWBK4DjPI"
_FINGERPRINT: Final = fingerprint({"model.digest": "x", "prefix.digest": "y"})


@_target(form=Form())
def records(data: bytes) -> None:
    """Whatever a record of the store says, a look finds it, and a plan can be made."""
    body = data[1:]
    read = _chosen(
        data, (_sidecar, _sidecar_in_store, _verdict, _conversation, _digests, _retired, _header)
    )
    read(body)


def _sidecar(data: bytes) -> None:
    for key in (_PROMPT, None):
        parsed = parse_sidecar(data, key)
        if isinstance(parsed, str):
            parsed.encode()
            continue
        assert names_artifact(parsed.artifact, parsed.prompt)
        assert not _SEAL.has_signed(parsed)
        assert _SEAL.has_signed(_SEAL.signed(parsed))


def _store_with(name: str, data: bytes) -> Store:
    root = _folder() / "store"
    shutil.rmtree(root, ignore_errors=True)
    path = root / name
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    return Store(root)


def _planned(store: Store) -> None:
    found = store.scan()
    observed = Observed(
        artifacts=found.observed(), verdicts=found.verdicts, retired=found.retired, now=1e9
    )
    desired = [DesiredPrompt(key=_PROMPT, fingerprint=_FINGERPRINT)]
    plan(assess(desired, observed, Limits(min_tokens=10, max_bytes=1 << 30)))


def _sidecar_in_store(data: bytes) -> None:
    store = _store_with("m/p.json", data)
    (store.root / "m/p.memory_cache").write_bytes(b"abc")
    _planned(store)


def _verdict(data: bytes) -> None:
    store = _store_with(".verdicts/m/p.json", data)
    _planned(store)
    verdict = store.verdicts.read(_PROMPT)
    if verdict is None:
        return
    for error in (errors.WorkerDied("it died"), errors.ModelLoadError("broken")):
        next_one = verdict_on(error, verdict.fingerprint, verdict.attempts + 1)
        assert math.isfinite(next_one.retry_at)


def _conversation(data: bytes) -> None:
    store = _store_with(".conversations/m/0123456789abcdef.json", data)
    (store.root / ".conversations/m/0123456789abcdef.state").write_bytes(b"abc")
    store.conversations.all()


def _digests(data: bytes) -> None:
    file = _folder() / "digests"
    file.write_bytes(data)
    own = Digests(file)
    own.digest(file)


def _retired(data: bytes) -> None:
    folder = f".retired/{_FINGERPRINT.digest}"
    store = _store_with(f"{folder}/p.json", data)
    (store.root / folder / "p.memory_cache").write_bytes(b"abc")
    _planned(store)


def _header(data: bytes) -> None:
    file = _folder() / "cache"
    file.write_bytes(data)
    rkllm_tokens(file)


# Bundles


@_target(form=Form())
def bundles(data: bytes) -> None:
    """An archive, a list, a signature or a trusted key: taken as promised, or refused."""
    read = _chosen(data, (_archive, _contents, _signature, _trusted_key))
    try:
        read(data[1:])
    except errors.FormatError as error:
        str(error).encode()


def _archive(data: bytes) -> None:
    """What is read is what the list says, and nothing else."""
    stream = io.BytesIO(data)

    async def some(most_bytes: int) -> bytes:
        return stream.read(min(most_bytes, 1000))

    async def whole() -> None:
        reader = BundleReader(some)
        listed, signature = await reader.begin()
        assert signature is None or len(signature) <= len(data)
        for prompt in parse_contents(listed).prompts:
            for file in prompt.files:
                await reader.expect(file)
                pieces = [piece async for piece in reader.pieces()]
                assert sum(map(len, pieces)) == file.size_bytes
        await reader.end()

    waiting = whole()
    with suppress(StopIteration):  # nothing in it waits
        waiting.send(None)


def _contents(data: bytes) -> None:
    """Names, sizes and digests are such as a store can have."""
    for prompt in parse_contents(data).prompts:
        assert fingerprint(prompt.components).digest == prompt.fingerprint
        for file in prompt.files:
            folder, name = file.name.split("/")
            assert folder == prompt.model
            assert name.startswith(f"{prompt.prompt}.")
            assert file.size_bytes >= 0


def _signature(data: bytes) -> None:
    """Nobody forges one."""
    key = parse_trusted_key(_PUBLIC_KEY)
    with suppress(errors.NotTrusted):
        signer(data, b"another list", [key])
        raise AssertionError("a forged signature")


def _trusted_key(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        key = parse_trusted_key(text)
    except ValueError:
        return
    assert str(key).isprintable()


# Messages of a worker


@_target(form=Form(framed=True))
def frames(data: bytes) -> None:
    """In any pieces, the same frames; each a message that reads as itself again, or an error."""
    width = 1 + data[0] % 61 if data else 1
    stream = data[1:]
    whole = _cut([stream])
    assert whole == _cut([stream[at : at + width] for at in range(0, len(stream), width)])

    link = _Link()
    link.connection_made(_Transport())  # type: ignore[arg-type]
    for at in range(0, len(stream), width):
        link.data_received(stream[at : at + width])
    assert list(link._received) == whole[0]

    for body in whole[0]:
        for decode in (protocol.decode_to_worker, protocol.decode_from_worker):
            try:
                message = decode(body)
            except protocol.ProtocolError as error:
                str(error).encode()
                continue
            (again,) = protocol.FrameReader().feed(protocol.frame(message))
            assert decode(again) == message
            if isinstance(message, protocol.Failed):
                str(protocol.engine_error(message)).encode()


class _Transport:
    def close(self) -> None: ...


def _cut(pieces: Sequence[bytes]) -> tuple[list[bytes], bool]:
    """The frames, and whether what follows them is an error."""
    reader = protocol.FrameReader()
    found: list[bytes] = []
    try:
        for piece in pieces:
            found.extend(reader.feed(piece))
    except protocol.ProtocolError:
        return found, True
    return found, False


# Files of models


class _Hasty(Digests):
    def let_settle(self, path: Path) -> None:
        """Files here are never settled."""


_SHOWN: Final = ["<|im_end|> <s>", {"a\ufdd2": "\\ufdd2 <think>"}, "</s>\x00[INST] x"]


def _protected(source: ModelSource) -> None:
    """Its special tokens keep texts from becoming structure, and other texts as they are."""
    special = special_tokens(_manifest().models["m"], source)
    text = source.template.text
    for takes_tokens in (False, True):
        markers = Markers(text, special, takes_tokens=takes_tokens)
        hidden = markers.hide(_SHOWN)
        markers.protect(f"<|im_start|>{hidden}").encode()
        assert markers.protect(markers.hide("a plain word")).replace(" ", "") in (
            "aplainword",
            "\ufdd0aplainword\ufdd1",
        ) or any(token in "a plain word" for token in special.control or ())


@_target()
def gguf(data: bytes) -> None:
    """A GGUF file, or two files of a split model that a line of dashes parts."""
    first, parted, second = data.partition(_LINE)
    path = _folder() / "m.gguf"
    if parted:
        path = _folder() / "m-00001-of-00002.gguf"
        (_folder() / "m-00002-of-00002.gguf").write_bytes(second)
    path.write_bytes(first)

    config = _manifest().models["m"].model_copy(update={"path": path, "chat_template": None})
    engine = ENGINES[EngineKind.LLAMACPP]
    source = ModelReader(_Hasty()).model(config, engine)
    if isinstance(source, Trouble):
        str(source).encode()
        return

    gguf_files.state_bytes_per_token(path)
    _protected(source)


@_target(form=Form(between=_LINE), max_bytes=6144)
def tokenizer(data: bytes) -> None:
    """The files of a tokenizer in a folder, or one alone; lines of dashes part them.

    Of the files, in the order of `NAMES`, an empty one is missing.
    """
    folder = _folder() / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = data[1:].split(_LINE)
    for name, content in zip(NAMES, files, strict=False):
        if content:
            (folder / name).write_bytes(content)
    named = _chosen(data, (folder, *(folder / name for name in NAMES)))

    engine = ENGINES[EngineKind.RKLLM]
    model = _folder() / "m.rkllm"
    model.write_bytes(engine.model_magic)
    changes = {"path": model, "tokenizer": named, "chat_template": None}
    if named.suffix == ".json":
        changes = {"path": model, "chat_template": str(named)}
    config = _manifest().models["m"].model_copy(update=changes)
    source = ModelReader(_Hasty()).model(config, engine)
    if isinstance(source, Trouble):
        str(source).encode()
        return

    _protected(source)
