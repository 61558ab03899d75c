"""Bodies: what a wrong one costs is bounded, and its first fault is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic_core import from_json

from rkcached.api.bodies import parse_body
from rkcached.api.requests import ChatRequest, CompletionRequest, EmbeddingRequest, Record
from rkcached.errors import RequestError
from rkcached.messages.bounds import (
    MAX_ARGUMENTS_CHARACTERS,
    MAX_VALUES,
    ArgumentsBudget,
    ValueCounter,
)

ITEMS = MAX_VALUES // 4
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
USER = {"role": "user", "content": "hello"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], **fields}


def assistant(calls: list[Any]) -> dict[str, Any]:
    return chat(messages=[{"role": "assistant", "tool_calls": calls}])


def arguments(text: str) -> dict[str, Any]:
    return CALL | {"function": {"name": "f", "arguments": text}}


WRONG: list[tuple[type[Record], Any]] = [
    (ChatRequest, [1] * ITEMS),
    (ChatRequest, chat(messages=[1] * ITEMS)),
    (ChatRequest, chat(messages=[{}] * ITEMS)),
    (ChatRequest, chat(messages=[USER] * (ITEMS // 2) + [{"role": "pirate"}] * (ITEMS // 2))),
    (ChatRequest, chat(messages=[{"role": "user", "content": [1] * ITEMS}])),
    (ChatRequest, chat(messages=[{"role": "user", "content": [{"type": "text"}] * ITEMS}])),
    (ChatRequest, chat(messages=[{"role": "assistant", "content": [{"type": "image"}] * ITEMS}])),
    (ChatRequest, assistant([1] * ITEMS)),
    (ChatRequest, assistant([{"function": {}}] * ITEMS)),
    (ChatRequest, assistant([arguments("[" * 100)] * ITEMS)),
    (ChatRequest, chat(tools=[1] * ITEMS)),
    (ChatRequest, chat(tools=[{"type": "function", "function": {"name": "?"}}] * 128)),
    (ChatRequest, chat(stop=[1] * ITEMS)),
    (ChatRequest, {**chat(), **{f"unknown{at}": at for at in range(ITEMS)}}),
    (ChatRequest, chat(messages=[{**USER, **{f"unknown{at}": at for at in range(ITEMS)}}])),
    (
        ChatRequest,
        chat(messages=[{**USER, **{f"unknown{at}": at for at in range(40)}}] * (ITEMS // 40)),
    ),
    (CompletionRequest, {"model": "m", "prompt": [1] * ITEMS}),
    (EmbeddingRequest, {"model": "m", "input": [-1] * ITEMS}),
    (EmbeddingRequest, {"model": "m", "input": [[-1] * 16] * 2048}),
    (EmbeddingRequest, {"model": "m", "input": [1] * ITEMS + ["x"]}),
    (EmbeddingRequest, {"model": "m", "input": [{}] * ITEMS}),
]


@pytest.mark.parametrize(("record", "body"), WRONG)
def test_thousands_of_faults_are_a_handful_of_errors(record: type[Record], body: Any) -> None:
    """Each error costs time.

    Of as many faults as a body can have, only the first few become errors.

    The cause: each of 9,000 errors parsed the body again, which took 9 s, and nobody else was
    answered meanwhile.
    """
    data = json.dumps(body).encode()

    with pytest.raises(RequestError) as refused:
        parse_body(record, data)
    with pytest.raises(ValidationError) as invalid:
        record.model_validate(from_json(data), context=ArgumentsBudget())

    assert refused.value.status == 400
    assert len(refused.value.message) < 1000
    assert invalid.value.error_count() <= 100


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"a": "x" * MAX_ARGUMENTS_CHARACTERS}),
        json.dumps({"a": [1] * MAX_VALUES}),
        "[" * 100_000,
    ],
)
def test_arguments_of_earlier_calls_are_bounded(text: str) -> None:
    """They are JSON inside of JSON, which is counted before it is parsed, and over all calls."""
    parts = 4
    whole = json.loads(text) if text.endswith("}") else None
    calls = [arguments(text)]
    if whole is not None:
        calls += [arguments(json.dumps({"a": whole["a"][: len(whole["a"]) // parts]}))] * parts

    for chosen in (calls[:1], calls[1:]):
        if chosen:
            with pytest.raises(RequestError) as refused:
                parse_body(ChatRequest, json.dumps(assistant(chosen)).encode())
            assert refused.value.status == 400


@pytest.mark.parametrize(
    ("message", "place"),
    [
        (
            {"role": "assistant", "content": [{}, {"type": "x"}], "assistant": []},
            "messages.0.content.0.type",
        ),
        ({"role": "user", "content": 1, "user": {}}, "messages.0.content"),
        ({"role": "tool", "tool": [1]}, "messages.0.tool_call_id"),
    ],
)
def test_a_key_may_have_the_name_of_an_alternative(message: dict[str, Any], place: str) -> None:
    """The place of a fault was looked for within that key: an IndexError, or another place."""
    with pytest.raises(RequestError) as caught:
        parse_body(ChatRequest, json.dumps(chat(messages=[message])).encode())

    assert caught.value.param == place


@pytest.mark.parametrize("number", ["1e999", "-1.5E+400", "1" + "0" * 300 + "e99", "1e309"])
def test_infinity_is_no_json(number: str) -> None:
    """It reached templates and schemas, which then wrote the word Infinity."""
    body = json.dumps(chat(documents=[{"a": [0]}])).replace("[0]", f"[{number}]")
    with pytest.raises(RequestError) as caught:
        parse_body(ChatRequest, body.encode())

    assert (caught.value.code, caught.value.message) == (
        "invalid_json",
        "the body is not JSON: a number is out of range",
    )


@pytest.mark.parametrize("number", ["1e308", "-1.5E+3", "1e-999", "1" + "0" * 400])
def test_large_numbers_are_json(number: str) -> None:
    body = json.dumps(chat(documents=[{"a": [0]}])).replace("[0]", f"[{number}]")
    assert parse_body(ChatRequest, body.encode()).documents == [{"a": [json.loads(number)]}]


def test_errors_repeat_little_of_a_body() -> None:
    """A key, a name or a tag of a megabyte does not come back in the error."""
    long = "x" * (1 << 20)
    for body in (
        {**chat(), long: 1},
        chat(messages=[{"role": long}]),
        chat(model=long),
        chat(cache=long),
        chat(tool_choice={"type": "function", "function": {"name": long}}),
    ):
        with pytest.raises(RequestError) as refused:
            parse_body(ChatRequest, json.dumps(body).encode())
        assert len(refused.value.message) < 1000
        assert len(refused.value.param or "") < 1000


HARMLESS: list[dict[str, Any]] = [
    {"logit_bias": {}},
    {"logit_bias": None},
    {"logit_bias": []},
    {"modalities": ["text"]},
    {"functions": []},
    {"functions": [], "function_call": "auto"},
    {"best_of": 1},
    {"best_of": 1.0},
    {"verbosity": "medium"},
    {"n": 1.0},
    {"echo": False, "suffix": ""},
    {"mirostat": 0, "typical_p": 1.0, "repetition_penalty": 1, "ignore_eos": False},
    {"dry_multiplier": 0.0, "xtc_probability": 0, "dynatemp_range": 0, "min_tokens": 0},
    {"prompt_cache_retention": "24h", "cache_control": {"type": "ephemeral"}},
    {"stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"stream_options": {"include_usage": None, "somewhat": None}},
    {"stream_options": None, "tools": None, "stop": None, "audio": None, "unknown": None},
    {"reasoning_effort": "low"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"keep_alive": "5m"},
    {"keep_alive": 0},
    {"keep_alive": -1},
    {"keep_alive": "1h30m"},
    {"cache_prompt": True},
    {"min_p": 0.05},
]


@pytest.mark.parametrize("fields", HARMLESS)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    """Programs send it with every request: null, a value that is off, a word about the service."""
    request = parse_body(ChatRequest, json.dumps(chat(**fields)).encode())

    assert request.ignored == ()


CHANGING: list[dict[str, Any]] = [
    {"logit_bias": {"5": 1}},
    {"modalities": ["audio"]},
    {"modalities": ["text", "audio"]},
    {"functions": [{}]},
    {"function_call": {"name": "f"}},
    {"best_of": 2},
    {"verbosity": "low"},
    {"echo": True},
    {"suffix": "x"},
    {"mirostat": 2},
    {"repetition_penalty": 1.2},
    {"audio": {}},
    {"unknown": 0},
]


@pytest.mark.parametrize("fields", CHANGING)
def test_what_would_change_the_answer_is_refused_or_noted(fields: dict[str, Any]) -> None:
    """By its name, with the next step; or it is left out, if the manifest wants that."""
    data = json.dumps(chat(**fields, temperature=0.5)).encode()
    (name,) = fields

    with pytest.raises(RequestError) as refused:
        parse_body(ChatRequest, data)
    request = parse_body(ChatRequest, data, ignores_unsupported=True)

    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    assert "serving.unsupported: ignore" in refused.value.hint
    assert request.ignored == (name,)
    assert request.sampling()["temperature"] == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"max_tokens": -2},
        {"max_tokens": 8.5},
        {"seed": 0.5},
        {"n": 2},
        {"min_p": 1.5},
        {"keep_alive": "soon"},
        {"stream_options": {"include": True}},
        {"messages": [USER | {"unknown": 1}]},
    ],
)
def test_what_is_wrong_is_never_ignored(fields: dict[str, Any]) -> None:
    """A value of the wrong kind, or something unknown inside of a message."""
    with pytest.raises(RequestError) as refused:
        parse_body(ChatRequest, json.dumps(chat(**fields)).encode(), ignores_unsupported=True)

    assert refused.value.status == 400


def test_long_names_that_are_ignored_are_cut() -> None:
    """An answer does not carry a megabyte back."""
    data = json.dumps(chat(**{"x" * (1 << 20): 1})).encode()

    (name,) = parse_body(ChatRequest, data, ignores_unsupported=True).ignored

    assert len(name) < 100


def test_whole_numbers_may_have_a_point() -> None:
    """JavaScript's numbers do; 8.0 is 8, and -1 is as much as the context holds."""
    for value, expected in ((8.0, 8), (-1, -1), (-1.0, -1)):
        for name in ("max_tokens", "max_completion_tokens"):
            request = parse_body(ChatRequest, json.dumps(chat(**{name: value})).encode())
            assert request.sampling()["max_new_tokens"] == expected

    body = chat(seed=42.0, top_k=20.0, logprobs=True, top_logprobs=2.0)
    sampling = parse_body(ChatRequest, json.dumps(body).encode()).sampling()
    found = [sampling[name] for name in ("seed", "top_k", "logprobs")]
    assert found == [42, 20, 2]
    assert all(type(value) is int for value in found)


@pytest.mark.parametrize(
    ("fields", "is_cold"),
    [
        ({}, False),
        ({"cache_prompt": True}, False),
        ({"cache_prompt": False}, True),
        ({"cache": False}, True),
        ({"cache": "a", "cache_prompt": False}, True),
    ],
)
def test_an_answer_may_be_cold(fields: dict[str, Any], is_cold: bool) -> None:
    """In our word or in llama.cpp's."""
    request = parse_body(ChatRequest, json.dumps(chat(**fields)).encode())

    assert request.is_cold == is_cold


@pytest.mark.parametrize(
    ("value", "ends"),
    [(0, True), (0.0, True), ("0", True), ("0s", True), ("0m0s", True), (-1, False), ("5m", False)],
)
def test_keep_alive_may_end_the_model(value: Any, ends: bool) -> None:
    request = parse_body(ChatRequest, json.dumps(chat(keep_alive=value)).encode())

    assert request.ends_model == ends


def test_a_byte_order_mark_before_the_body() -> None:
    """Windows' editors and PowerShell write one."""
    data = b"\xef\xbb\xbf" + json.dumps(chat()).encode()

    assert parse_body(ChatRequest, data).model == "m"


json_values = st.recursive(
    st.none() | st.integers() | st.text(alphabet='a,:[{"\\é'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet='k,:[{"\\'), inner),
)


def marks(value: Any) -> int:
    """Commas, colons and opening brackets that its JSON has outside of strings."""
    match value:
        case list():
            return 1 + max(0, len(value) - 1) + sum(map(marks, value))
        case dict():
            return 1 + max(0, len(value) - 1) + len(value) + sum(map(marks, value.values()))
        case _:
            return 0


@given(json_values, st.lists(st.integers(0, 9), min_size=1))
def test_values_are_counted_however_the_body_is_cut(value: Any, sizes: list[int]) -> None:
    """Strings and escapes may go on in the next part."""
    data = json.dumps(value, ensure_ascii=False).encode()
    counter = ValueCounter()
    at = 0
    while at < len(data):
        for size in [*sizes, 1]:
            counter.feed(data[at : at + size])
            at += size
    assert counter.count == marks(value)
