"""The RKLLM runtime behind the engine port: one model on the NPU, in a worker process.

The library is closed, so nothing is taken on trust: the ABI is checked (`library`), a cache is
proved by its effect, and every string, array and callback outlives the call that got it. One object
owns the handle and destroys it once, after the last run has returned (`handle`). The callback may
come on any thread; it copies what it needs, never raises into C and never calls back into the
library: a thread of our own does the aborting.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rkcached.engines.base import (
    SAMPLING_PARAMETERS,
    Embedding,
    EngineInfo,
    ModelSpec,
    OnProgress,
    OnToken,
    Relevance,
    RunStats,
    Sampling,
)
from rkcached.engines.cache_headers import rkllm_tokens
from rkcached.engines.kinds import Pooling
from rkcached.engines.rkllm.abi import (
    Abi,
    InferMode,
    InputType,
    LoraAdapter,
    LoraParam,
    PromptCacheParam,
    TokenInput,
)
from rkcached.engines.rkllm.handle import Current, OwnedHandle, Stopper
from rkcached.engines.rkllm.library import CallError, Library
from rkcached.engines.rkllm.params import is_greedy, merged, model_param, sampling_param
from rkcached.engines.rkllm.run import Run
from rkcached.engines.rkllm.tokenizer import load_tokenizer
from rkcached.errors import (
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    ModelLoadError,
    SamplingFixed,
)
from rkcached.host import cpus

if TYPE_CHECKING:
    import numpy as np

# rkllm_run returns after FINISH; if another thread brings the callback, it may be a moment late.
_FINISH_TIMEOUT_S = 2.0

_LORA_NAME = b"rkcached"
_MAX_BATCH = 8


class RkllmEngine:
    """See `Engine` for what each method promises."""

    def __init__(self, spec: ModelSpec) -> None:
        _check_model_file(Path(spec.path))
        self._spec = spec
        self._tokenizer = load_tokenizer(spec.tokenizer)
        self._library = Library(Path(spec.library), spec.abi)
        abi = self._library.abi
        # The parameters that the model is loaded with.
        self._fixed = spec.sampling or Sampling()
        self._current = Current()
        param = model_param(self._library, spec, self._fixed)

        try:
            self._handle = OwnedHandle(self._library, param, self._current)
        except CallError as error:
            hint = (
                "the model must be converted for this board, by a toolkit that is not newer than "
                "the runtime"
            )
            if absent := cpus.absent(spec.npu.enabled_cpus):
                hint = f"correct npu.enabled_cpus of the model: {absent}"
            if spec.abi and not self._library.fits:
                hint = (
                    f"the library says it is {self._library.version}: remove engine.abi {spec.abi} "
                    "from the manifest"
                )
            raise ModelLoadError(
                f"RKLLM {self._library.version} cannot load the model {spec.path}", hint=hint
            ) from error

        # Whether a prompt cache is loaded and was not released.
        self._loaded = False
        # Whether the KV state is known to be empty.
        self._empty = True
        # rkllm_get_kv_cache_size minus the tokens read and generated, by the last cold run.
        self._kv_surplus = 0
        self._stopper = Stopper(self._library, self._handle, self._current)

        try:
            if self._library.has("rkllm_set_chat_template"):
                # Prompts come rendered; since 1.2.0 the runtime would wrap them once more.
                self._call("rkllm_set_chat_template", b"", b"", b"")

            if spec.lora:
                adapter = LoraAdapter(os.fsencode(spec.lora), _LORA_NAME, spec.lora_scale)
                self._call("rkllm_load_lora", ctypes.byref(adapter))
        except CallError as error:
            self.close()
            what = "a raw chat template"
            if spec.lora:
                what = f"the LoRA adapter {spec.lora}"
            raise ModelLoadError(
                f"RKLLM {self._library.version} refused {what}: {error.message}"
            ) from error

        self._info = EngineInfo(
            runtime_version=self._library.version,
            context_tokens=int(param.max_context_len),
            measures_prefill=abi.measures,
            aborts_prefill=False,  # load or run after an aborted save-run is reported to crash
            saves_continued=False,  # nobody says what a save-run makes of a loaded prompt cache
            keeps_state=abi.keeps_state,
            run_sampling=SAMPLING_PARAMETERS if abi.samples_per_run else (),
            greedy=abi.samples_per_run or is_greedy(self._fixed),
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def abi(self) -> Abi:
        return self._library.abi

    def choose(self, _: int, /) -> None:
        pass  # there is one

    def state_tokens(self, _: int, /) -> int:
        return 0  # it is not known

    def tokenize(self, text: str) -> Sequence[int] | None:
        return None if self._tokenizer is None else self._tokenizer(text)

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        """Run and save the state.

        Until 1.2.3 this also generates a whole answer, as nothing but an abort would end it.
        """
        del on_progress  # the runtime reports nothing during a prefill
        if not save_to.parent.is_dir():
            raise EngineError(f"cannot write the prompt cache {save_to}: its directory is missing")

        if not keep_state:
            self.clear()
        was_empty = self._empty
        run = Run(Sampling(max_new_tokens=1), limit=1, saves=True)
        self._run(run, prompt, save_to=save_to)

        cached = 0
        if was_empty:
            tokens = run.prompt_ids or run.prefill_tokens
            if not self.abi.measures and not tokens:
                tokens = rkllm_tokens(save_to) or 0
        else:
            tokens, cached = self._count_continued(run, save_to)

        return RunStats(
            finish=run.finish(self._info.context_tokens),
            prompt_tokens=tokens,
            cached_tokens=cached,
            prefill_ms=run.prefill_ms,
            decode_tokens=0,
            decode_ms=0.0,
        )

    def save(self, path: Path) -> int:
        raise EngineError(f"RKLLM writes {path} in a run only", hint="build the prompt cache anew")

    def load(self, path: Path) -> int:
        self.clear()
        tokens = rkllm_tokens(path)
        if tokens is None:
            raise ArtifactLoadError(f"{path} is missing, empty or too short to be a prompt cache")

        try:
            self._call("rkllm_load_prompt_cache", os.fsencode(path))
        except CallError as error:
            self.clear()
            raise ArtifactLoadError(
                f"RKLLM cannot load the prompt cache {path}: {error.message}"
            ) from error

        self._loaded = True
        self._empty = False
        return tokens

    def rest(self) -> None:
        """There is one state."""

    def clear(self) -> None:
        if self._empty and not self._loaded:
            return  # it is not documented what the runtime does when there is nothing to clear

        if self._loaded:
            self._loaded = False
            self._call("rkllm_release_prompt_cache")

        if self.abi.group in ("D", "E"):
            self._call("rkllm_clear_kv_cache", 0, None, None)
        elif self.abi.group == "C":
            self._call("rkllm_clear_kv_cache", 0)

        self._empty = True

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        del on_progress  # the library reports none
        if sampling.max_new_tokens < 0:
            raise EngineError(f"max_new_tokens is {sampling.max_new_tokens}, which is below 0")

        self._refuse_fixed(sampling)
        was_empty = self._empty
        limit = sampling.max_new_tokens
        natural = True
        if not self.abi.samples_per_run:
            natural = limit >= self._fixed.max_new_tokens
            limit = min(limit, self._fixed.max_new_tokens)
        limit = min(limit, self._info.context_tokens)  # more never fits, and C takes 32 bits

        run = Run(
            sampling, limit=limit, on_token=on_token, trace=trace, ends_itself=natural and limit > 0
        )
        self._run(run, prompt)
        run.deliver_rest()
        prompt_tokens, cached = self._count(run, was_empty=was_empty)
        return RunStats(
            finish=run.finish(self._info.context_tokens, prompt_tokens),
            prompt_tokens=prompt_tokens,
            cached_tokens=cached,
            prefill_ms=run.prefill_ms,
            decode_tokens=run.wanted_tokens,
            decode_ms=run.decode_ms,
        )

    def embed(self, content: str | tuple[int, ...]) -> Embedding:
        if not self._spec.pooling:
            raise EngineError(
                "the model was not loaded for embeddings",
                hint="set embedding: true in the manifest",
            )

        vector = self.last_hidden_layer(content, Pooling(self._spec.pooling))
        if isinstance(content, tuple):
            return Embedding(vector=vector, tokens=len(content))
        return Embedding(vector=vector, tokens=len(self.tokenize(content) or ()))

    def rank(self, query: str, document: str) -> Relevance:  # noqa: ARG002 - see Engine
        """Nothing public says how RKLLM would score a document, so nothing loads a model for it."""
        raise EngineError("RKLLM gives no relevance scores", hint="use engine.kind: llamacpp")

    def last_hidden_layer(
        self, prompt: str | tuple[int, ...], pooling: Pooling | None = Pooling.MEAN
    ) -> np.ndarray[Any, Any]:
        """The last layer's states: (n_tokens, embd_size) float32, or (embd_size,) when pooled."""
        run = Run(Sampling(max_new_tokens=1), limit=1, wants_hidden=True)
        self.clear()
        self._run(run, prompt, mode=InferMode.GET_LAST_HIDDEN_LAYER)
        hidden = run.hidden
        if hidden is None:
            raise EngineError(
                "the runtime gave no hidden layer for this model", hint="is it an embedding model?"
            )

        # numpy leaves the types of a reduction and of an index open.
        match pooling:
            case Pooling.MEAN:
                return hidden.mean(axis=0)  # type: ignore[no-any-return]
            case Pooling.LAST:
                return hidden[-1]  # type: ignore[no-any-return]
            case None:
                return hidden

    def abort(self) -> None:
        run = self._current.run
        if run is not None and not run.saves:
            run.aborted = True
            self._stopper.stop(run)

    def close(self) -> None:
        self._stopper.close()
        self._handle.destroy()

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._library.call(name, self._handle.value, *arguments)

    def _run(
        self,
        run: Run,
        prompt: str | tuple[int, ...],
        *,
        save_to: Path | None = None,
        mode: InferMode = InferMode.GENERATE,
    ) -> None:
        """Run and wait for the end.

        Whatever the library gets a pointer to lives in this frame until the run returns.
        """
        if self._handle.destroyed:
            raise EngineError("the engine is closed")

        data = _encode(prompt) if isinstance(prompt, str) else b""
        ids = self._ids_of(prompt)
        abi = self.abi
        run_input = abi.input()
        if abi.group in ("D", "E"):
            run_input.role = b"user"
            run_input.enable_thinking = self._spec.thinking

        if ids is not None:
            run.prompt_ids = len(ids)
            if len(ids) >= self._info.context_tokens:
                raise ContextExceeded(len(ids), self._info.context_tokens)

            array = (ctypes.c_int32 * len(ids))(*ids)
            run_input.input_type = InputType.TOKEN
            run_input.token_input = TokenInput(
                ctypes.cast(array, ctypes.POINTER(ctypes.c_int32)), len(ids)
            )
        else:
            run_input.input_type = InputType.PROMPT
            run_input.prompt_input = data

        infer = abi.infer_param()
        infer.mode = mode
        if save_to is not None:
            cache = PromptCacheParam(1, os.fsencode(save_to))
            infer.prompt_cache_params = ctypes.pointer(cache)
        if self._spec.lora:
            lora = LoraParam(_LORA_NAME)
            infer.lora_params = ctypes.pointer(lora)
        if abi.samples_per_run:
            sampler = sampling_param(merged(self._fixed, run.sampling))
            infer.sampling_params = ctypes.pointer(sampler)
            infer.max_new_tokens = max(1, run.limit)  # 0 would mean the model's own

        self._empty = False
        run.started = time.perf_counter()
        self._current.begin(run, self._stopper)
        try:
            self._call("rkllm_run", ctypes.byref(run_input), ctypes.byref(infer), None)
            run.finished.wait(_FINISH_TIMEOUT_S)
        except CallError as error:
            run.raise_failure()
            raise EngineError(f"RKLLM refused the run: {error.message}", hint=error.hint) from error
        finally:
            self._current.end()
            if not abi.keeps_state:
                self._empty = True

        run.raise_failure()

    def _ids_of(self, prompt: str | tuple[int, ...]) -> list[int] | None:
        """The prompt's tokens; None if the runtime has to make them."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            return None
        return self._tokenizer(prompt)

    def _refuse_fixed(self, sampling: Sampling) -> None:
        """Errors: SamplingFixed for a value that this runtime cannot change in a run."""
        if sampling.seed is not None:
            raise SamplingFixed("RKLLM takes no seed", param="seed", hint="leave seed out")
        if sampling.min_p:
            raise SamplingFixed("RKLLM has no min_p", param="min_p", hint="leave min_p out")
        if self.abi.samples_per_run:
            return

        for name in SAMPLING_PARAMETERS:
            wanted = getattr(sampling, name)
            fixed = getattr(self._fixed, name)
            if wanted is None or wanted == fixed:
                continue
            if name == "temperature" and wanted == 0 and self._info.greedy:
                continue

            raise SamplingFixed(
                f"RKLLM {self._library.version} fixes {name} when the model is loaded: "
                f"it is {_shown(fixed)}, this run asks for {wanted:g}",
                param=name,
                hint=f"leave {name} out, set it in the model's params, or use runtime 1.3.0 or "
                "newer",
            )

    def _count(self, run: Run, *, was_empty: bool) -> tuple[int, int | None]:
        """The number of the prompt's tokens, and how many of them came from the KV state."""
        if not self.abi.measures:
            return run.prompt_ids, (0 if was_empty else None)

        prefilled = run.prefill_tokens
        if run.prompt_ids:
            return run.prompt_ids, max(0, run.prompt_ids - prefilled)

        positions = self._kv_positions()
        if was_empty:
            if positions is not None:
                self._kv_surplus = positions - prefilled - run.new_tokens
            return prefilled, 0

        if positions is None:
            return prefilled, None

        prompt_tokens = max(prefilled, positions - run.new_tokens - self._kv_surplus)
        return prompt_tokens, prompt_tokens - prefilled

    def _count_continued(self, run: Run, saved: Path) -> tuple[int, int]:
        """The figures of a save-run on a state that was not empty, as `_count` has them.

        They count only if the file says the same. Errors: EngineError.
        """
        tokens, cached = self._count(run, was_empty=False)
        in_file = rkllm_tokens(saved)
        if cached is None or tokens != in_file:
            raise EngineError(
                f"RKLLM read {tokens} tokens and saved {in_file} after a prompt cache was loaded"
            )
        return tokens, cached

    def _kv_positions(self) -> int | None:
        sizes = (ctypes.c_int * _MAX_BATCH)()
        with contextlib.suppress(CallError):
            self._call("rkllm_get_kv_cache_size", sizes)
            return int(sizes[0])
        return None


def _shown(value: float | None) -> str:
    if value is None:
        return "the runtime's default"
    return f"{value:g}"


def _encode(prompt: str) -> bytes:
    """Errors: EngineError for text that a C string cannot hold."""
    if not prompt:
        raise EngineError("the prompt is empty")

    try:
        data = prompt.encode()
    except UnicodeEncodeError as error:
        raise EngineError(
            f"the text is not valid Unicode: {error.reason} at {error.start}"
        ) from error

    if b"\0" in data:
        raise EngineError(
            f"the text has a NUL byte at {data.index(0)}",
            hint="remove it: the runtime would stop reading there",
        )
    return data


def _check_model_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise ModelLoadError(
            f"cannot read the model {path}: {error.strerror}", hint="check the path"
        ) from error

    if not first:
        raise ModelLoadError(f"the model {path} is empty", hint="copy it again")
