"""The files of a GGUF model, and the facts that their headers state of it.

llama.cpp is given one file. If its header states that the model is split, it opens the other
files by their names as well (`llama-model-loader.cpp`). It opens nothing else for a model; `strace`
shows that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rkcached.engines.llamacpp.header import Header, ReadHeader, is_cut_off, read_header
from rkcached.engines.states import StateFacts, StateKind
from rkcached.errors import SourceError
from rkcached.messages.tokenizer_facts import TokenizerFacts

# llama.cpp keeps keys and values in 16 bits each.
_BYTES_PER_VALUE: Final = 2

# The ends of the keys by which files describe layers with a recurrent state: state space models,
# RWKV, short convolutions, linear attention. llama.cpp's list of such architectures is in its code.
_RECURRENCES: Final = (
    ".ssm.conv_kernel",
    ".ssm.state_size",
    ".wkv.head_size",
    ".shortconv.l_cache",
    ".kda.head_dim",
)

# llama.cpp's names for the files of a split model, counted from 1.
_SHARD: Final = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about a model, from its files."""

    files: tuple[Path, ...]
    """Every file that the engine opens for the model; the one that the manifest names comes first.
    """
    trained_tokens: int | None = None
    """The context that the model was trained for, if the file states it. llama.cpp's server gives
    it none larger."""
    tokenizer: TokenizerFacts = field(default_factory=TokenizerFacts)
    """The facts that the files state of the chat template and the special tokens."""
    state: StateFacts = field(default_factory=StateFacts)


def state_bytes_per_token(path: Path) -> float | None:
    """The bytes of a token's keys and values in memory, by the layers that the header describes.

    A prompt cache has as many, or fewer if there are windows. None if the layers are not all of one
    kind, or not described. Errors: OSError.
    """
    header = read_header(path)
    if header is None:
        return None

    integers = header.integers
    if _state(header).kind is StateKind.RECURRENT:
        return None

    def of(name: str) -> int:
        return next((value for key, value in integers.items() if key.endswith(name)), 0)

    heads = of(".attention.head_count")
    heads_kv = of(".attention.head_count_kv")
    if not heads or not heads_kv:
        return None

    width = of(".embedding_length") // heads
    widths = (of(".attention.key_length") or width) + (of(".attention.value_length") or width)
    return of(".block_count") * heads_kv * widths * _BYTES_PER_VALUE


def shards(path: Path) -> tuple[Path, ...]:
    """The files of a split model, if `path` is named like the first of them; else `path` alone."""
    name = _SHARD.fullmatch(path.name)
    if name is None or int(name["number"]) != 1:
        return (path,)

    count = int(name["count"])
    return tuple(_shard(path, number, count) for number in range(1, max(1, count) + 1))


def inspect(path: Path, read: ReadHeader = read_header) -> ModelFacts:
    """Find the files that the engine would open for `path`, and check that they are one model.

    Errors: SourceError if files are missing, damaged or do not belong together; OSError if one
    cannot be read.
    """
    header = read(path)
    name = _SHARD.fullmatch(path.name)
    if header is None:
        if name is not None or is_cut_off(path):
            raise _damaged(path)
        return ModelFacts(files=(path,))  # the engine explains what is wrong when it loads it

    _check_length(path, header)
    count = header.integers.get("split.count", 0)
    facts = ModelFacts(
        files=(path,),
        trained_tokens=_trained_tokens(header),
        tokenizer=header.tokenizer,
        state=_state(header),
    )
    if count <= 1:
        return facts

    if (number := header.integers.get("split.no", 0) + 1) != 1:
        first = f"the file that ends with -00001-of-{count:05}.gguf"
        if name is not None:
            first = _shard(path, 1, count).name
        message = f"{path} is file {number} of {count} of a split model"
        raise SourceError(message, hint=f"name the first: path: {first}")

    if name is None or (int(name["number"]), int(name["count"])) != (1, count):
        raise SourceError(
            f"{path} is the first of the {count} files of a split model, but its name does not say "
            "so",
            hint=f"give all {count} files their original names, which end with "
            f"-00001-of-{count:05}.gguf and so on",
        )

    files = shards(path)
    _check_shards(files, header, read)
    return replace(facts, files=files)


def _check_shards(files: tuple[Path, ...], first: Header, read: ReadHeader) -> None:
    """Check that the files are one split model. Errors: SourceError, OSError."""
    path = files[0]
    count = len(files)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = ""
        if len(missing) > 1:
            more = f" and {len(missing) - 1} more"
        raise SourceError(
            f"{path} is the first of the {count} files of a split model, and {missing[0]}{more} "
            "cannot be found",
            hint=f"put all {count} files into {path.parent}",
        )

    tensors = first.tensors
    for number, file in enumerate(files[1:], 2):
        if not file.is_file():  # opening a FIFO would wait for its writer
            raise SourceError(
                f"{file} is not a regular file", hint="put the file of the split model there"
            )
        if (header := read(file)) is None:
            raise _damaged(file)

        _check_length(file, header)
        stated = header.integers.get("split.no", -1) + 1, header.integers.get("split.count", 0)
        if stated != (number, count):
            raise SourceError(
                f"{file} is not file {number} of {count} of a split model, as its name says, "
                f"but {stated[0]} of {stated[1]}",
                hint=f"copy the {count} files again, from one place",
            )

        tensors += header.tensors

    expected = first.integers.get("split.tensors.count", tensors)
    if tensors != expected:
        raise SourceError(
            f"the {count} files of the split model {path} do not belong together: they have "
            f"{tensors:,} tensors, the first says {expected:,}",
            hint=f"copy the {count} files again, from one place",
        )


def _shard(path: Path, number: int, count: int) -> Path:
    prefix = _SHARD.sub(r"\g<prefix>", path.name)
    return path.with_name(f"{prefix}-{number:05}-of-{count:05}.gguf")


def _check_length(path: Path, header: Header) -> None:
    """Check that no weights are missing, by the header. Errors: SourceError, OSError."""
    size_bytes = path.stat().st_size
    if size_bytes < header.weights_at:
        raise SourceError(
            f"{path} is cut off: it has {size_bytes:,} bytes, and its header says that weights "
            f"begin at byte {header.weights_at:,}",
            hint=_GET_IT_AGAIN,
        )


_GET_IT_AGAIN: Final = "its download or copy was not completed: get the file again"


def _damaged(path: Path) -> SourceError:
    return SourceError(f"the header of {path} is damaged or cut off", hint=_GET_IT_AGAIN)


def _trained_tokens(header: Header) -> int | None:
    stated = (
        value
        for key, value in header.integers.items()
        if key.endswith(".context_length") and value > 0
    )
    return next(stated, None)


def _state(header: Header) -> StateFacts:
    """The kind of the model's state, by the layers that its metadata describe."""
    kind = StateKind.UNKNOWN
    window_tokens = 0
    is_recurrent = False
    for key, value in header.integers.items():
        if key.endswith(".attention.sliding_window"):
            window_tokens = max(window_tokens, value)
        elif key.endswith(".attention.head_count") and value:
            kind = StateKind.ATTENTION
        elif key.endswith(_RECURRENCES) and value:
            is_recurrent = True

    if is_recurrent:
        kind = StateKind.RECURRENT
    elif window_tokens:
        kind = StateKind.WINDOW
    return StateFacts(kind=kind, window_tokens=window_tokens)
