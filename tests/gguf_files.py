"""GGUF files for tests.

Small ones out of nothing, and a real model split as `llama-gguf-split` does it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

UINT16, INT32, UINT32, FLOAT32, BOOL, STRING, ARRAY = 2, 5, 4, 6, 7, 8, 9
ALIGNMENT = 32


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: int) -> bytes:
    return (
        text(key)
        + struct.pack("<I", kind)
        + struct.pack({UINT16: "<H", INT32: "<i", UINT32: "<I"}[kind], value)
    )


def text_pair(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", STRING) + text(value)


def float_pair(key: str, value: float) -> bytes:
    return text(key) + struct.pack("<If", FLOAT32, value)


def flag_pair(key: str, value: bool) -> bytes:
    return text(key) + struct.pack("<I?", BOOL, value)


def texts_pair(key: str, values: Iterable[str]) -> bytes:
    parts = list(map(text, values))
    return text(key) + struct.pack("<IIQ", ARRAY, STRING, len(parts)) + b"".join(parts)


def integers_pair(key: str, values: list[int]) -> bytes:
    head = struct.pack("<IIQ", ARRAY, INT32, len(values))
    return text(key) + head + struct.pack(f"<{len(values)}i", *values)


def vocabulary(tokens: Mapping[str, int], *, model: str = "gpt2", before: str = "") -> list[bytes]:
    """The metadata of a tokenizer: its tokens with their types."""
    pairs = [
        text_pair("tokenizer.ggml.model", model),
        texts_pair("tokenizer.ggml.tokens", tokens),
        integers_pair("tokenizer.ggml.token_type", list(tokens.values())),
    ]
    if before:
        pairs.append(text_pair("tokenizer.ggml.pre", before))
    return pairs


def rewrite(model: Path, path: Path, metadata: Mapping[str, bytes | None]) -> None:
    """Copy a model with other metadata: a pair for each key, or None to leave it out."""
    data = model.read_bytes()
    _, _, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    starts = [*_pair_starts(data, pairs)]
    infos_at = starts.pop()
    kept = []
    for start, end in zip(starts, [*starts[1:], infos_at], strict=True):
        (length,) = struct.unpack_from("<Q", data, start)
        if data[start + 8 : start + 8 + length].decode() not in metadata:
            kept.append(data[start:end])

    kept += [pair for pair in metadata.values() if pair is not None]
    _, end = _tensor_infos(data, infos_at, tensors)
    out = struct.pack("<4sIQQ", b"GGUF", 3, tensors, len(kept)) + b"".join(kept)
    out += data[infos_at:end]
    out += bytes(aligned(len(out)) - len(out))
    path.write_bytes(out + data[aligned(end) :])


def gguf(*pairs: bytes, tensors: int = 0, version: int = 3) -> bytes:
    """A header; of its tensors there is only their number."""
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, len(pairs)) + b"".join(pairs)


def split_pairs(number: int, count: int, tensors: int) -> tuple[bytes, bytes, bytes]:
    """What the header of each file of a split model has; `number` counts from 1."""
    return (
        pair("split.no", UINT16, number - 1),
        pair("split.count", UINT16, count),
        pair("split.tensors.count", INT32, tensors),
    )


def shard(number: int, count: int, *, tensors: int = 2, all_tensors: int | None = None) -> bytes:
    """The header of a file of a split model, each with as many tensors."""
    total = tensors * count if all_tensors is None else all_tensors
    return gguf(*split_pairs(number, count, total), tensors=tensors)


def split(model: Path, prefix: Path, count: int = 2) -> list[Path]:
    """Write a model as files that llama.cpp loads when it is given the first of them."""
    data = model.read_bytes()
    _, _, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    infos_at = _pair_starts(data, pairs)[-1]
    infos, end = _tensor_infos(data, infos_at, tensors)
    metadata, body = data[24:infos_at], data[aligned(end) :]
    ends = [offset for _, offset in infos[1:]] + [len(body)]
    share = -(-tensors // count)

    paths = []
    for number in range(1, count + 1):
        own = range((number - 1) * share, min(number * share, tensors))
        extra = split_pairs(number, count, tensors)
        kept, kept_pairs = (metadata, pairs) if number == 1 else (b"", 0)
        out = (
            struct.pack("<4sIQQ", b"GGUF", 3, len(own), kept_pairs + len(extra))
            + kept
            + b"".join(extra)
        )
        start = infos[own[0]][1]
        for index in own:
            head, offset = infos[index]
            out += head + struct.pack("<Q", offset - start)
        out += bytes(aligned(len(out)) - len(out)) + body[start : ends[own[-1]]]
        path = prefix.with_name(f"{prefix.name}-{number:05}-of-{count:05}.gguf")
        path.write_bytes(out)
        paths.append(path)
    return paths


def aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _pair_starts(data: bytes, pairs: int) -> list[int]:
    """Where each pair begins, and where the last one ends."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def skip(at: int, kind: int) -> int:
        if kind == STRING:
            return at + 8 + int(struct.unpack_from("<Q", data, at)[0])
        if kind != ARRAY:
            return at + sizes[kind]
        element, length = struct.unpack_from("<IQ", data, at)
        at += 12
        for _ in range(length):
            at = skip(at, element)
        return at

    at = 24
    starts = [at]
    for _ in range(pairs):
        at = skip(at, STRING)
        (kind,) = struct.unpack_from("<I", data, at)
        at = skip(at + 4, kind)
        starts.append(at)
    return starts


def _tensor_infos(data: bytes, at: int, tensors: int) -> tuple[list[tuple[bytes, int]], int]:
    """Of each tensor what stands before its offset, and the offset; and where they end."""
    infos = []
    for _ in range(tensors):
        start = at
        at += 8 + int(struct.unpack_from("<Q", data, at)[0])
        (dimensions,) = struct.unpack_from("<I", data, at)
        at += 4 + 8 * dimensions + 4
        infos.append((data[start:at], int(struct.unpack_from("<Q", data, at)[0])))
        at += 8
    return infos, at
