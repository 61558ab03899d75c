"""The built-in chat templates, by name. Data: `template` renders them, the manifest names them.

Each writes what the model's own template writes, byte for byte, with its BOS token if the model's
own writes that. Where ours departs from that, its comment says so: what the model's own loses
without a word, ours refuses. tests/unit/test_builtin.py compares them with renderings of the
models' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class Format:
    """A chat template, as the files that make it up."""

    models: str
    """Whose format it is."""
    pieces: tuple[str, ...]
    """The files, one after the other. A line that ends in a block tag loses its newline
    (trim_blocks); one that ends in text or a value keeps it."""


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "chatml": Format("ChatML with Hermes tools, for other models that use it", ("chatml",)),
        "qwen2": Format("Qwen1.5, Qwen2", ("qwen2", "_chatml_turns")),
        "qwen2.5": Format("Qwen2.5, Qwen2.5-Coder", ("_hermes", "qwen2.5")),
        "qwen3": Format(
            "Qwen3 of April 2025, such as Qwen3-0.6B",
            ("_hermes", "_qwen3_system", "_qwen3_turns", "qwen3"),
        ),
        "qwen3-instruct-2507": Format(
            "Qwen3-Instruct-2507, Qwen3-Next-Instruct",
            ("_hermes", "_qwen3_system", "qwen3-instruct-2507"),
        ),
        "qwen3-thinking-2507": Format(
            "Qwen3-Thinking-2507, Qwen3-Next-Thinking",
            ("_hermes", "_qwen3_system", "_qwen3_turns", "qwen3-thinking-2507"),
        ),
        "qwen3.5": Format("Qwen3.5 from 4B on", ("_qwen3.5_turns", "qwen3.5")),
        "qwen3.5-small": Format("Qwen3.5 0.8B and 2B", ("_qwen3.5_turns", "qwen3.5-small")),
        "qwen3.6": Format("Qwen3.6", ("_json_values", "_qwen3.5_turns", "qwen3.5")),
        "llama3": Format(
            "Llama 3",
            (
                "_bos",
                "llama3",
            ),
        ),
        "llama3.1": Format("Llama 3.1", ("_bos", "llama3.1", "_llama3.1_turns")),
        "llama3.2": Format("Llama 3.2", ("_bos", "llama3.2", "_llama3.1_turns")),
        "llama3.3": Format("Llama 3.3", ("_bos", "llama3.1", "_llama3.1_turns")),
        "deepseek-r1-distill": Format(
            "DeepSeek-R1-Distill-Qwen and -Llama",
            (
                "_bos",
                "deepseek-r1-distill",
            ),
        ),
        "gemma2": Format(
            "Gemma, Gemma 2",
            (
                "_bos",
                "gemma3",
            ),
        ),
        "gemma3": Format(
            "Gemma 3, Gemma 3n",
            (
                "_bos",
                "gemma3",
            ),
        ),
        "gemma4": Format(
            "Gemma 4 E2B and E4B",
            (
                "_bos",
                "gemma4",
            ),
        ),
        "gemma4-26b": Format("Gemma 4 26B-A4B and 31B", ("_bos", "_empty_thought", "gemma4")),
        "phi3": Format("Phi-3-mini", ("phi3",)),
        "phi3.5": Format("Phi-3.5-mini", ("phi3.5",)),
        "phi4": Format("Phi-4", ("phi4",)),
        "phi4-mini": Format("Phi-4-mini, Phi-4-multimodal", ("phi4-mini",)),
        "minicpm": Format("MiniCPM, MiniCPM 2", ("minicpm",)),
        "minicpm3": Format("MiniCPM3", ("minicpm3",)),
        "minicpm4": Format("MiniCPM4", ("_chatml_turns",)),
        "minicpm4.1": Format("MiniCPM4.1", ("_chatml_turns", "minicpm4.1")),
        "internlm2": Format(
            "InternLM2, InternLM2.5",
            (
                "_bos",
                "_chatml_turns",
            ),
        ),
        "internlm3": Format(
            "InternLM3",
            (
                "_bos",
                "_chatml_turns",
            ),
        ),
        "tinyllama": Format("TinyLlama-Chat", ("zephyr",)),
        "zephyr": Format("Zephyr", ("zephyr",)),
        "chatglm3": Format("ChatGLM3", ("chatglm3",)),
        "glm4": Format("GLM-4-9B-Chat", ("_glm4_turns", "glm4")),
        "glm4-0414": Format("GLM-4-0414", ("_glm4_turns", "glm4-0414")),
        "telechat2": Format("TeleChat2", ("telechat2",)),
        "smollm2": Format("SmolLM2", ("smollm2", "_chatml_turns")),
        "smollm3": Format("SmolLM3", ("_hermes", "smollm3")),
        "exaone3.5": Format("EXAONE 3.0, EXAONE 3.5", ("exaone3.5",)),
        "exaone4": Format("EXAONE 4.0", ("exaone4",)),
        "rwkv": Format(
            "RWKV World",
            (
                "_bos",
                "rwkv",
            ),
        ),
    }
)

OLD_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"deepseek": "deepseek-r1-distill", "gemma": "gemma3", "phi": "phi3"}
)
"""Names that promise more than they keep, with those to write instead. They write the same text as
before: `deepseek` leaves it to the model to begin its reasoning."""


class _Builtin(Mapping[str, str]):
    """Reads a template when it is asked for: few are ever used, and the start must be fast."""

    def __getitem__(self, name: str) -> str:
        if name == "deepseek":
            return _source(("_bos", "deepseek"))
        return _source(FORMATS[OLD_NAMES.get(name, name)].pieces)

    def __contains__(self, name: object) -> bool:
        return name in FORMATS or name in OLD_NAMES

    def __iter__(self) -> Iterator[str]:
        return iter((*FORMATS, *OLD_NAMES))

    def __len__(self) -> int:
        return len(FORMATS) + len(OLD_NAMES)


@cache
def _source(pieces: tuple[str, ...]) -> str:
    folder = Path(__file__).parent
    return "".join((folder / f"{piece}.jinja").read_text("utf-8") for piece in pieces)


BUILTIN: Final[Mapping[str, str]] = _Builtin()
"""The source of each template, under its old names, too."""
