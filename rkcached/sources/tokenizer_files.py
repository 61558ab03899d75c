"""Reads the files of a Hugging Face repository that describe a model's tokenizer.

They are written by transformers, by tokenizers and by hand, so each value may be missing or of
another kind. What is not understood counts as not stated; what is no JSON is an error. Files are
read as a whole, within bounds; of `tokenizer.json`, which has the vocabulary, little is kept.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from rkcached.errors import SourceError
from rkcached.host.regular import open_regular
from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.tokenizer_facts import (
    MAX_CONTROL_TOKENS,
    MAX_TOKEN_CHARACTERS,
    TokenizerFacts,
    combined,
)
from rkcached.sources.text_files import read_text

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
_TEMPLATE_JSON: Final = "chat_template.json"
_SPECIAL_MAP: Final = "special_tokens_map.json"
_GENERATION: Final = "generation_config.json"
NAMES: Final = (TOKENIZER, CONFIG, TEMPLATE, _TEMPLATE_JSON, _SPECIAL_MAP, _GENERATION)
"""The names of the files in such a repository that are read."""

# Gemma 3's tokenizer.json has 33 MB, the largest of the others 1.2 MB.
_MAX_BYTES: Final = 64 << 20

_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

# More than the number of any token has.
_MAX_DIGITS: Final = 18

_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int = -1
    special: bool = False


class _Tokenizer(msgspec.Struct, frozen=True):
    """The part of `tokenizer.json` that matters; the vocabulary is skipped."""

    model: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    post_processor: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The files that are there, as they were read."""

    tokenizer: _Tokenizer | None
    """The vocabulary's file."""
    objects: Mapping[str, Mapping[str, Any]]
    """The other files, by name."""
    template: str | None
    """The text of `chat_template.jinja`."""


def candidates(path: Path) -> tuple[Path, ...]:
    """The files that `path` may stand for: itself, or those of a folder, whether there or not."""
    if not os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where it may not look
        return (path,)
    return tuple(path / name for name in NAMES)


def present(path: Path) -> tuple[Path, ...]:
    """The files that `path` stands for.

    Errors: SourceError if there is none, or if one of these names is not that of a file; OSError.
    """
    if not stat.S_ISDIR(path.stat().st_mode):
        return (path,)

    files = tuple(filter(_is_there, candidates(path)))
    if not {TOKENIZER, CONFIG, TEMPLATE} & {file.name for file in files}:
        raise SourceError(
            f"{path} has none of {TOKENIZER}, {CONFIG} and {TEMPLATE}",
            hint="put those of the model's Hugging Face repository there",
        )
    return files


def _is_there(file: Path) -> bool:
    """Whether a folder has this file.

    A name that leads to no file is not taken for an absent one, as the model would then be read
    otherwise without a word. Errors: SourceError, OSError.
    """
    try:
        is_link = stat.S_ISLNK(file.lstat().st_mode)
    except FileNotFoundError:
        return False

    try:
        mode = file.stat().st_mode
    except OSError as error:
        if not is_link or error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise SourceError(
            f"{file} is a link that leads to no file",
            hint="copy the folder again with the files that its links lead to (cp -rL), "
            "or remove the link",
        ) from error

    if stat.S_ISDIR(mode):
        raise SourceError(
            f"{file} is a directory",
            hint="remove it, or put the file of that name in its place",
        )
    if not stat.S_ISREG(mode):
        raise SourceError(
            f"{file} is not a regular file",
            hint="remove it, or put the file of that name in its place",
        )
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """The facts that the files of a tokenizer state."""

    facts: TokenizerFacts
    file: str = ""
    """The `tokenizer.json` among them; empty if there is none."""
    digest: str = ""
    """Of all of them."""


NONE: Final = TokenizerFacts(special=SpecialTokens(adds_bos=True), place="tokenizer")
"""The facts of a model without such files: RKLLM's runtime adds BOS to a text."""


def facts(files: tuple[Path, ...]) -> TokenizerFiles:
    """The facts that these files state. Errors: SourceError, OSError."""
    found = _read(files)
    file = ""
    if found.tokenizer is not None:
        file = str(next(file for file in files if file.name == TOKENIZER or len(files) == 1))
    return TokenizerFiles(facts=_facts(files, found), file=file)


def _facts(files: tuple[Path, ...], found: _Found) -> TokenizerFacts:
    config = found.objects.get(CONFIG, {})
    places = {file.name: str(file) for file in files}
    if len(files) == 1:  # it may have any name
        places = dict.fromkeys(NAMES, str(files[0]))

    template, name = _template(found)
    control, added, told_by = _tokens(found)
    refusal = ""
    if control is not None and len(control) > MAX_CONTROL_TOKENS:
        refusal = (
            f"{places[told_by]} states {len(control):,} control tokens, the limit is "
            f"{MAX_CONTROL_TOKENS:,}"
        )

    bos = _named_token("bos_token", config, found.objects.get(_SPECIAL_MAP, {}))
    eos = _named_token("eos_token", config, found.objects.get(_SPECIAL_MAP, {}))
    generation = found.objects.get(_GENERATION, {})
    ends = tuple(_tokens_of(generation.get("eos_token_id"), found))
    if not eos and ends:
        eos = ends[0]

    origin = ""
    if template:
        origin = places[name]
        if name != TEMPLATE:
            origin = f"chat_template of {origin}"
    return TokenizerFacts(
        template=template,
        template_bytes=len(template.encode(errors="surrogatepass")),
        template_origin=origin,
        place="tokenizer",
        special=SpecialTokens(
            control=control, bos=bos, eos=eos, adds_bos=_adds_bos(found.tokenizer, bos)
        ),
        special_origin=places[told_by] if told_by else "",
        added=added,
        ends=ends,
        sampling=_sampling(generation),
        refusal=refusal,
    )


def _read(files: tuple[Path, ...]) -> _Found:
    tokenizer = None
    template = None
    objects: dict[str, Mapping[str, Any]] = {}

    for file in files:
        alone = len(files) == 1
        if file.name == TEMPLATE:
            template = read_text(file)
            continue

        data = _bytes(file)
        if file.name == TOKENIZER or (alone and _is_tokenizer(data)):
            tokenizer = _decoded(file, data, _Tokenizer)
        else:
            name = CONFIG if alone else file.name
            objects[name] = _decoded(file, data, dict[str, Any])

    return _Found(tokenizer=tokenizer, objects=objects, template=template)


def _bytes(file: Path) -> bytes:
    if not file.is_file():  # reading a FIFO would wait for its writer
        file.stat()
        raise SourceError(f"{file} is not a regular file", hint="name a file, or a folder")

    with open_regular(file) as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise SourceError(
            f"{file} has more than {_MAX_BYTES:,} bytes, too many for a tokenizer's file",
            hint="copy the file again, or name the right one",
        )
    return data


Content = TypeVar("Content")


def _is_tokenizer(data: bytes) -> bool:
    try:
        msgspec.json.decode(data, type=_Tokenizer)
    except _UNREADABLE:
        return False
    return True


def _decoded(file: Path, data: bytes, kind: type[Content]) -> Content:
    """Decode JSON. Errors: SourceError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except _UNREADABLE as error:
        raise SourceError(
            f"{file} is no file of a tokenizer: {error}",
            hint=f"name a {TOKENIZER} or {CONFIG}, or the folder that has them",
        ) from error


def _template(found: _Found) -> tuple[str, str]:
    """The chat template, and the name of the file that has it."""
    if found.template is not None:
        return found.template, TEMPLATE

    for name in (CONFIG, _TEMPLATE_JSON):
        if template := _template_of(found.objects.get(name, {}).get("chat_template")):
            return template, name
    return "", ""


def _template_of(value: object) -> str:
    """A template, or a list of named ones."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return ""

    named: dict[str, str] = {
        one["name"]: one["template"]
        for one in value
        if isinstance(one, dict)
        and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
    }
    default: str = named.get("default", "")
    if default and "tool_use" in named:
        return combined(default, named["tool_use"])
    return default


def _tokens(found: _Found) -> tuple[frozenset[str] | None, frozenset[str], str]:
    """The control tokens, the other added ones, and the name of the file that states them."""
    tokens: list[_AddedToken] | None = None
    told_by = ""
    if found.tokenizer is not None:
        tokens = found.tokenizer.added_tokens
        told_by = TOKENIZER
    else:
        decoder = found.objects.get(CONFIG, {}).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            tokens = list(_decoder_tokens(decoder))
            told_by = CONFIG

    if tokens is None:
        return None, frozenset(), ""
    usable = [token for token in tokens if 0 < len(token.content) <= MAX_TOKEN_CHARACTERS]
    control = frozenset(token.content for token in usable if token.special)
    added = frozenset(token.content for token in usable if not token.special)
    return control, added, told_by


def _decoder_tokens(decoder: Mapping[str, Any]) -> Iterator[_AddedToken]:
    for number, value in decoder.items():
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            yield _AddedToken(
                content=value["content"],
                id=_number_of(number),
                special=value.get("special") is True,
            )


def _number_of(text: str) -> int:
    """The number of a token; -1 for a text that is none."""
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        return -1
    return int(text)


def _named_token(name: str, *places: Mapping[str, Any]) -> str:
    """A token that is a text, or an object with its content, from the first place that has it."""
    place = next((place for place in places if name in place), {})
    value: object = place.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str) or len(value) > MAX_TOKEN_CHARACTERS:
        return ""
    return value


def _tokens_of(numbers: object, found: _Found) -> Iterator[str]:
    """The texts of tokens that are given by one number or by several."""
    tokens: list[_AddedToken] = []
    if found.tokenizer is not None:
        tokens = found.tokenizer.added_tokens
    else:
        decoder = found.objects.get(CONFIG, {}).get("added_tokens_decoder")
        if isinstance(decoder, dict):
            tokens = list(_decoder_tokens(decoder))

    by_number = {token.id: token.content for token in tokens}
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if isinstance(number, int) and number in by_number:
            yield by_number[number]


def _adds_bos(tokenizer: _Tokenizer | None, bos: str) -> bool:
    """Whether BOS is put in front of a prompt.

    With a `tokenizer.json` we do so, if its post-processor does (see `engines/rkllm/tokenizer`).
    Without one, RKLLM's runtime gets text, and adds the token itself.
    """
    if tokenizer is None:
        return True
    first = _first_added(tokenizer.post_processor)
    return first != "" and bos in ("", first)


def _first_added(processor: object) -> str:
    """The token that a post-processor of the package tokenizers puts before a text."""
    match processor:
        case {"type": "Sequence", "processors": [*processors]}:
            return next(filter(None, map(_first_added, processors)), "")
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, *_]}:
            return token
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [str(token), *_]}:
            return token
        case _:
            return ""


def _sampling(generation: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The sampling that the model's makers recommend."""
    stated = ((name, _float(generation.get(name))) for name in _SAMPLING)
    return tuple((name, value) for name, value in stated if value is not None)


def _float(value: object) -> float | None:
    """None for what is no number, or one that a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
