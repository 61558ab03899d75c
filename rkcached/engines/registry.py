"""The table of engines: the facts that the program needs without loading any native code.

`locate_runtime` finds the library on disk, so that its digest becomes part of every fingerprint;
the class itself is imported by name, and only inside a worker.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rkcached.engines.kinds import EngineKind
from rkcached.engines.llamacpp import gguf
from rkcached.engines.llamacpp.gguf import ModelFacts
from rkcached.engines.llamacpp.header import MAGIC as GGUF_MAGIC
from rkcached.engines.llamacpp.header import ReadHeader
from rkcached.engines.rkllm.identify import choose_abi, identify
from rkcached.errors import SourceError
from rkcached.host.digests import Signature, settled, signature_of
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.tokenizer_facts import TokenizerFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeFiles:
    """A runtime library on disk: the version it states, and the files that are its code."""

    version: str
    files: tuple[Path, ...]
    samples_per_run: bool = True
    """Whether sampling can differ from run to run; else it is fixed when a model is loaded."""


def _alone(path: Path) -> tuple[Path, ...]:
    return (path,)


def _inspect_nothing(path: Path, _: ReadHeader) -> ModelFacts:
    return ModelFacts(files=(path,))


def _inspect_memory(path: Path, _: ReadHeader) -> ModelFacts:
    """The memory engine reads any text; ChatML is the form that it is given."""
    own = TokenizerFacts(template=BUILTIN["chatml"], template_origin="chatml of the memory engine")
    return ModelFacts(files=(path,), tokenizer=own)


def _unknown(_: Path) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEntry:
    artifact_suffix: str
    """The end of a prompt cache's file name, with the dot."""
    implementation: str
    """`module:class`, imported by the worker only."""
    model_magic: bytes
    """The first bytes of every model file."""
    model_format: str
    """The name of such a model file in messages."""
    locate_runtime: Callable[[Path, str | None], RuntimeFiles]
    """Takes `engine.library` and `engine.abi` of the manifest. Errors: RkcachedError."""
    on_npu: bool = False
    """Whether it runs on the board's NPU, which holds one model at a time."""
    devices: tuple[str, ...] = ()
    """The device nodes that it opens, or folders of them."""
    names_library: bool = False
    """Whether the manifest names its runtime library and the library's ABI."""
    takes_tokenizer: bool = False
    """Whether the manifest names the files of the model's tokenizer."""
    thread_per_core: bool = False
    """Whether it takes a thread for each fast core if the manifest names no number of threads."""
    reads_plain_text: bool = False
    """Whether it can read a part of a prompt without control tokens (`messages.special_tokens`).
    Every engine can that is given a tokenizer."""
    saves_at_once: bool = False
    """Whether it saves its KV state without running the model (`Engine.save`)."""
    ranks: bool = False
    """Whether it scores documents (`Engine.rank`)."""
    compiles_schemas: bool = False
    """Whether llguidance compiles a JSON schema to a grammar."""
    prints_control_tokens: bool = True
    """Whether it prints the control tokens that a request names (`Sampling.shown_tokens`)."""
    model_files: Callable[[Path], tuple[Path, ...]] = _alone
    """The files that may belong to a model, by the name of the one that the manifest names. It
    reads nothing."""
    inspect_model: Callable[[Path, ReadHeader], ModelFacts] = _inspect_nothing
    """The files that the engine opens for a model.

    Errors: SourceError if it would not load these files; OSError.
    """
    state_bytes_per_token: Callable[[Path], float | None] = _unknown
    """The bytes of a prompt cache for each token, by the model's file; None if not known. Errors:
    OSError."""


def _locate_rkllm(library: Path, abi: str | None) -> RuntimeFiles:
    facts = _rkllm_facts.__wrapped__
    signature = None
    with contextlib.suppress(OSError):  # `identify` raises an error that explains it
        info = library.stat()
        if settled(info):
            facts = _rkllm_facts
            signature = signature_of(info)

    version, samples_per_run = facts(library, signature, abi)
    return RuntimeFiles(version=version, files=(library,), samples_per_run=samples_per_run)


@functools.lru_cache(maxsize=4)
def _rkllm_facts(library: Path, _: Signature | None, abi: str | None) -> tuple[str, bool]:
    """Read the file once for each signature. Errors: RuntimeLibraryError."""
    facts = identify(library)
    chosen = choose_abi(facts, abi)
    return facts.version or chosen.name, chosen.samples_per_run


def _locate_xllamacpp(_library: Path, _abi: str | None) -> RuntimeFiles:
    spec = importlib.util.find_spec("xllamacpp")  # finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(
            "the package xllamacpp is not installed",
            hint=f"install the Debian package rkcached-cpu, or run {sys.executable} -m pip install "
            "xllamacpp",
        )

    folder = Path(spec.submodule_search_locations[0])
    return RuntimeFiles(
        version=importlib.metadata.version("xllamacpp"), files=tuple(sorted(folder.glob("*.so")))
    )


def _locate_memory(_library: Path, _abi: str | None) -> RuntimeFiles:
    return RuntimeFiles(version="1", files=(Path(__file__).with_name("memory.py"),))


ENGINES: dict[EngineKind, EngineEntry] = {
    EngineKind.RKLLM: EngineEntry(
        artifact_suffix=".rkllm_cache",
        implementation="rkcached.engines.rkllm.engine:RkllmEngine",
        model_magic=b"",  # undocumented
        model_format="RKLLM model",
        locate_runtime=_locate_rkllm,
        on_npu=True,
        devices=("/dev/dri", "/dev/rknpu", "/dev/dma_heap"),
        takes_tokenizer=True,
        names_library=True,
        prints_control_tokens=False,  # RKLLM decides about them when it loads a model
    ),
    EngineKind.LLAMACPP: EngineEntry(
        artifact_suffix=".llama_cache",
        implementation="rkcached.engines.llamacpp.engine:LlamaCppEngine",
        model_magic=GGUF_MAGIC,
        model_format="GGUF model",
        locate_runtime=_locate_xllamacpp,
        model_files=gguf.shards,
        inspect_model=gguf.inspect,
        state_bytes_per_token=gguf.state_bytes_per_token,
        thread_per_core=True,
        reads_plain_text=True,
        saves_at_once=True,
        ranks=True,
        compiles_schemas=True,
    ),
    EngineKind.MEMORY: EngineEntry(
        artifact_suffix=".memory_cache",
        implementation="rkcached.engines.memory:MemoryEngine",
        model_magic=b'{"rkcached_memory_model"',
        model_format="memory-engine model",
        inspect_model=_inspect_memory,
        locate_runtime=_locate_memory,
        saves_at_once=True,
        ranks=True,
    ),
}
