"""Tiny models with random weights, as GGUF files that llama.cpp loads in milliseconds.

One of each kind of state that llama.cpp keeps: a cache of keys and values for every token, one of a
window of the last tokens, a recurrence, and a mixture of them. Their answers mean nothing, but the
same tokens always give the same ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rkcached.messages.builtin import BUILTIN
from tests.gguf_files import (
    ALIGNMENT,
    UINT32,
    aligned,
    flag_pair,
    float_pair,
    integers_pair,
    pair,
    text,
    text_pair,
    texts_pair,
)

CONTEXT_TOKENS = 2048
"""The context that the models state to be trained for."""

WINDOW_TOKENS = 32
"""The window of the layers that have one."""

_FLOAT32 = 0
_RANK = 4
_CONTROL = 3
_NORMAL = 1
_WIDTH = 32
_HEADS = 2
_HEAD_WIDTH = 16
_INNER = 64
_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Two line breaks are one token, so that a text may end inside a token of a longer one.
_MERGES = (("\n", "\n"), ("e", " "), ("t", "h"), ("a", "n"))

_Shapes = dict[str, tuple[int, ...]]


def plain(path: Path) -> Path:
    """A Llama: attention to all tokens."""
    layers = range(2)
    return _write(path, "llama", _attention_facts("llama", 2), _llama(layers))


def sliding_window(path: Path) -> Path:
    """A Gemma 3: five of six layers attend to the last `WINDOW_TOKENS` tokens only."""
    facts = [
        *_attention_facts("gemma3", 6),
        pair("gemma3.attention.key_length", UINT32, _HEAD_WIDTH),
        pair("gemma3.attention.value_length", UINT32, _HEAD_WIDTH),
        pair("gemma3.attention.sliding_window", UINT32, WINDOW_TOKENS),
    ]
    shapes = _llama(range(6))
    for layer in range(6):
        shapes |= {
            f"blk.{layer}.attn_q_norm.weight": (_HEAD_WIDTH,),
            f"blk.{layer}.attn_k_norm.weight": (_HEAD_WIDTH,),
            f"blk.{layer}.post_attention_norm.weight": (_WIDTH,),
            f"blk.{layer}.post_ffw_norm.weight": (_WIDTH,),
        }
    return _write(path, "gemma3", facts, shapes)


def recurrent(path: Path) -> Path:
    """A Mamba: a state of one size, whatever the number of tokens."""
    inner, state, rank, kernel = 2 * _WIDTH, 8, 4, 4
    facts = [
        pair("mamba.context_length", UINT32, CONTEXT_TOKENS),
        pair("mamba.embedding_length", UINT32, _WIDTH),
        pair("mamba.feed_forward_length", UINT32, 0),
        pair("mamba.attention.head_count", UINT32, 0),
        pair("mamba.block_count", UINT32, 2),
        pair("mamba.ssm.conv_kernel", UINT32, kernel),
        pair("mamba.ssm.inner_size", UINT32, inner),
        pair("mamba.ssm.state_size", UINT32, state),
        pair("mamba.ssm.time_step_rank", UINT32, rank),
        float_pair("mamba.attention.layer_norm_rms_epsilon", 1e-5),
    ]
    shapes: _Shapes = {}
    for layer in range(2):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (_WIDTH,),
            f"blk.{layer}.ssm_in.weight": (_WIDTH, 2 * inner),
            f"blk.{layer}.ssm_conv1d.weight": (kernel, inner),
            f"blk.{layer}.ssm_conv1d.bias": (inner,),
            f"blk.{layer}.ssm_x.weight": (inner, rank + 2 * state),
            f"blk.{layer}.ssm_dt.weight": (rank, inner),
            f"blk.{layer}.ssm_dt.bias": (inner,),
            f"blk.{layer}.ssm_a": (state, inner),
            f"blk.{layer}.ssm_d": (inner,),
            f"blk.{layer}.ssm_out.weight": (inner, _WIDTH),
        }
    return _write(path, "mamba", facts, shapes)


def hybrid(path: Path) -> Path:
    """An LFM2: every second layer attends to all tokens, the others have a short convolution."""
    layers = range(4)
    kernel = 3
    facts = _attention_facts("lfm2", len(layers), heads_kv=[0, _HEADS, 0, _HEADS])
    facts.append(pair("lfm2.shortconv.l_cache", UINT32, kernel))
    facts.append(pair("lfm2.vocab_size", UINT32, len(_tokens())))

    shapes = _llama([1, 3]) | {"token_embd_norm.weight": (_WIDTH,)}
    for layer in (1, 3):
        shapes |= {
            f"blk.{layer}.attn_q_norm.weight": (_HEAD_WIDTH,),
            f"blk.{layer}.attn_k_norm.weight": (_HEAD_WIDTH,),
        }
    for layer in (0, 2):
        shapes |= _around(layer) | {
            f"blk.{layer}.shortconv.conv.weight": (kernel, _WIDTH),
            f"blk.{layer}.shortconv.in_proj.weight": (_WIDTH, 3 * _WIDTH),
            f"blk.{layer}.shortconv.out_proj.weight": (_WIDTH, _WIDTH),
        }
    return _write(path, "lfm2", facts, shapes)


def reranker(path: Path) -> Path:
    """A Qwen3 with a head that says how much its last state speaks for `yes` and for `no`."""
    facts = [
        *_attention_facts("qwen3", 2),
        pair("qwen3.attention.key_length", UINT32, _HEAD_WIDTH),
        pair("qwen3.attention.value_length", UINT32, _HEAD_WIDTH),
        pair("qwen3.pooling_type", UINT32, _RANK),
        texts_pair("qwen3.classifier.output_labels", ["yes", "no"]),
        text_pair(
            "tokenizer.chat_template.rerank",
            "<|im_start|>user\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
    ]
    shapes = _llama(range(2)) | {"cls.output.weight": (_WIDTH, 2)}
    for layer in range(2):
        shapes[f"blk.{layer}.attn_q_norm.weight"] = (_HEAD_WIDTH,)
        shapes[f"blk.{layer}.attn_k_norm.weight"] = (_HEAD_WIDTH,)
    return _write(path, "qwen3", facts, shapes)


KINDS: dict[str, Callable[[Path], Path]] = {
    "plain": plain,
    "sliding-window": sliding_window,
    "recurrent": recurrent,
    "hybrid": hybrid,
}
"""How to write a model of each kind."""


def _attention_facts(arch: str, layers: int, *, heads_kv: list[int] | None = None) -> list[bytes]:
    kv_heads = pair(f"{arch}.attention.head_count_kv", UINT32, _HEADS)
    if heads_kv is not None:
        kv_heads = integers_pair(f"{arch}.attention.head_count_kv", heads_kv)
    return [
        pair(f"{arch}.context_length", UINT32, CONTEXT_TOKENS),
        pair(f"{arch}.embedding_length", UINT32, _WIDTH),
        pair(f"{arch}.feed_forward_length", UINT32, _INNER),
        pair(f"{arch}.block_count", UINT32, layers),
        pair(f"{arch}.attention.head_count", UINT32, _HEADS),
        kv_heads,
        float_pair(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        float_pair(f"{arch}.rope.freq_base", 10000.0),
    ]


def _llama(layers: range | list[int]) -> _Shapes:
    """The tensors of layers that attend, with their feed-forward networks."""
    across = _HEADS * _HEAD_WIDTH
    shapes: _Shapes = {}
    for layer in layers:
        shapes |= _around(layer) | {
            f"blk.{layer}.attn_q.weight": (_WIDTH, across),
            f"blk.{layer}.attn_k.weight": (_WIDTH, across),
            f"blk.{layer}.attn_v.weight": (_WIDTH, across),
            f"blk.{layer}.attn_output.weight": (across, _WIDTH),
        }
    return shapes


def _around(layer: int) -> _Shapes:
    """The norms and the feed-forward network of a layer."""
    return {
        f"blk.{layer}.attn_norm.weight": (_WIDTH,),
        f"blk.{layer}.ffn_norm.weight": (_WIDTH,),
        f"blk.{layer}.ffn_gate.weight": (_WIDTH, _INNER),
        f"blk.{layer}.ffn_up.weight": (_WIDTH, _INNER),
        f"blk.{layer}.ffn_down.weight": (_INNER, _WIDTH),
    }


def _write(path: Path, arch: str, facts: list[bytes], shapes: _Shapes) -> Path:
    tokens = _tokens()
    shapes = {"token_embd.weight": (_WIDTH, len(tokens)), **shapes}
    if arch != "lfm2":
        shapes["output_norm.weight"] = (_WIDTH,)
    kinds = [_CONTROL if token in _CONTROL_TOKENS else _NORMAL for token in tokens]
    pairs = [
        text_pair("general.architecture", arch),
        pair("general.alignment", UINT32, ALIGNMENT),
        *facts,
        text_pair("tokenizer.ggml.model", "gpt2"),
        text_pair("tokenizer.ggml.pre", "gpt-2"),
        texts_pair("tokenizer.ggml.tokens", tokens),
        integers_pair("tokenizer.ggml.token_type", kinds),
        texts_pair("tokenizer.ggml.merges", [f"{_shown(a)} {_shown(b)}" for a, b in _MERGES]),
        pair("tokenizer.ggml.bos_token_id", UINT32, tokens.index("<|endoftext|>")),
        pair("tokenizer.ggml.eos_token_id", UINT32, tokens.index("<|im_end|>")),
        flag_pair("tokenizer.ggml.add_bos_token", value=False),
        text_pair("tokenizer.chat_template", BUILTIN["chatml"]),
    ]

    random = np.random.default_rng(7)
    infos = b""
    body = b""
    for name, shape in shapes.items():
        body += bytes(aligned(len(body)) - len(body))
        infos += text(name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}Q", *shape)
        infos += struct.pack("<IQ", _FLOAT32, len(body))
        body += _weights(name, shape, random).tobytes()

    head = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(pairs)) + b"".join(pairs) + infos
    path.write_bytes(head + bytes(aligned(len(head)) - len(head)) + body)
    return path


def _weights(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Random weights that keep the numbers of the state in bounds."""
    values = random.standard_normal(shape[::-1]).astype("<f4")
    if name.endswith("norm.weight"):
        return (1 + 0.1 * values).astype("<f4")
    if name == "token_embd.weight":
        return (0.05 * values).astype("<f4")  # else a token is followed by itself
    if name.endswith("ssm_a"):
        return (-np.abs(values) - 0.1).astype("<f4")
    return (values * (2.0 / shape[0] ** 0.5)).astype("<f4")


def _tokens() -> list[str]:
    """A token for each byte and each merge, and the control tokens of ChatML."""
    tokens = [_shown(chr(byte)) for byte in range(256)]
    tokens += [_shown(first) + _shown(second) for first, second in _MERGES]
    return [*tokens, *_CONTROL_TOKENS]


def _shown(character: str) -> str:
    """A byte as GPT-2's vocabulary writes it: those that cannot be seen are moved up."""
    byte = ord(character)
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in seen:
        return chr(byte)
    unseen = [number for number in range(256) if number not in seen]
    return chr(256 + unseen.index(byte))
