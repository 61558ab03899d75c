"""llama.cpp on the CPU, through the server that xllamacpp embeds in this process.

Runs go through `Server.handle_completions`, which calls back on the thread that started them.
Saving, loading and erasing the KV states go through llama.cpp's own HTTP endpoints (`slots`,
`endpoints`); an engine that finds itself listening on TCP closes at once. A truncated file makes
llama.cpp abort the process: callers check size and digest before `load`.
"""

from __future__ import annotations

import contextlib
import http
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rkcached.engines.base import (
    SAMPLING_PARAMETERS,
    Embedding,
    EngineInfo,
    FinishReason,
    ModelSpec,
    OnProgress,
    OnToken,
    Relevance,
    RunStats,
    Sampling,
)
from rkcached.engines.llamacpp.endpoints import Endpoints, RefusedError
from rkcached.engines.llamacpp.header import MAGIC
from rkcached.engines.llamacpp.run import Grammar, Run
from rkcached.engines.llamacpp.slots import Slots
from rkcached.errors import (
    Aborted,
    ArtifactLoadError,
    ContextExceeded,
    EngineError,
    InputInvalid,
    ModelLoadError,
    Uncacheable,
)
from rkcached.host import cpus
from rkcached.messages.special_tokens import PLAIN_START, pieces

# Prompt tokens per call into the model. A run can be stopped between two of them only, so a small
# one stops sooner. A prompt of 1,179 tokens, SmolLM2-135M Q4_1 on two x86 cores, best of six,
# interleaved:
#   n_batch    64    128    256    512
#   seconds   7.1    6.5    5.6    5.9
# A stopped run ends after one or two batches, as the server may begin one before it hears of the
# stop. 128 costs 16 % of the best prefill, and halves the time that a request waits for a build to
# step aside (1.5 to 3.2 s with 256).
_BATCH_TOKENS = 128

# How often an OpenMP thread without work looks for some before it sleeps (libgomp). libgomp's own
# 300,000 take some milliseconds of x86's slow `pause`, longer than the time between two batches:
# all cores then look busy, and a token waits for the scheduler's next tick on its way to its
# reader. SmolLM2-135M, two EPYC cores at 250 Hz, prompt of 256 tokens in memory, medians of 40, 72
# and 32 answers over 5, 9 and 4 launches: time to first token less the prefill is 8.9 ms with
# 300,000, 4.7 ms with 3,000, 4.9 ms with 1,000. Prefill and decode of the bare engine did not
# change. On ARM a spin is one cheap `yield`, so the same number is short already.
_SPIN_COUNT = "3000"

# A recurrent state cannot be taken back to an earlier token. For such models, and for no others,
# llama.cpp keeps checkpoints: copies of the state as it was four tokens before the end of a prompt.
# A slot's file has them, too. So a run goes on from the whole state, or from a checkpoint where the
# prompt's last token joins the next one. One is enough, as a prompt cache is loaded again for each
# request that does not go on from the one before.
_CHECKPOINTS = 1

# The conversations and programs that asked last, of which one may be a build. Together they have at
# most the tokens of a context. One is in the context; the others are copies in memory (`Slots`).
_STATES = 4

_IDLE_TIMEOUT_S = 60.0


class LlamaCppEngine:
    """See `Engine` for what each method promises."""

    def __init__(self, spec: ModelSpec) -> None:
        library = _import_library()
        _check_model_file(Path(spec.path))
        scratch = Path(spec.scratch_dir)
        self._endpoints = Endpoints(scratch)
        self._slots = Slots(self._endpoints, scratch, _states(spec))
        self._abort = threading.Event()
        self._window_tokens = spec.window_tokens
        # The KV state has all layers from this token on; 0 if it was not loaded from a file.
        self._whole_from = 0
        try:
            self._server = library.Server(_params(library, spec, self._endpoints.socket))
        except RuntimeError as error:
            raise ModelLoadError(
                f"llama.cpp cannot load the model {spec.path}: it is truncated, or of an unknown "
                "kind",
                hint="the lines above in the log say more",
            ) from error

        address = str(self._server.listening_address)
        if not address.startswith("unix://"):
            self.close()
            raise EngineError(
                f"llama.cpp listens on {address} instead of a Unix socket, so it was closed"
            )

        # The server's own thread answers this, so it runs from here on. A server that was closed at
        # once was once seen to wait for that thread for ever, with xllamacpp 2026.10: the thread
        # had started after the request to end.
        self._endpoints.ask("GET", "/slots")
        settings = self._endpoints.ask("GET", "/props")["default_generation_settings"]
        self._context_tokens = int(settings["n_ctx"])
        rewinds = bool(spec.pooling) or self._rewinds()
        self._info = EngineInfo(
            runtime_version=importlib.metadata.version("xllamacpp"),
            context_tokens=self._context_tokens,
            measures_prefill=True,
            aborts_prefill=True,
            rewinds=rewinds,
            states=len(self._slots) if rewinds else 1,
            constrains_json=True,
            gives_logprobs=True,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def choose(self, state: int, /) -> None:
        self._slots.choose(state)

    def state_tokens(self, state: int, /) -> int:
        return self._slots.tokens(state)

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        self._abort.clear()
        if not keep_state:
            self.clear()
        # llama.cpp refuses a prompt that leaves no room for one token, also when none is asked for.
        run = self._run(
            Run(self._abort, on_progress=on_progress), prompt, {"n_predict": 0, "temperature": 0}
        )
        if run.finish is FinishReason.ABORT:
            raise Aborted("the prefill was stopped on request")

        saved = self.save(save_to)
        if saved != run.prompt_tokens:
            raise EngineError(f"llama.cpp saved {saved} tokens of a prompt of {run.prompt_tokens}")
        return run.stats(count_decoded=False)

    def save(self, path: Path) -> int:
        try:
            return self._slots.save(path)
        except RefusedError as error:
            if error.status == http.HTTPStatus.NOT_IMPLEMENTED:
                raise Uncacheable(
                    f"llama.cpp cannot save the KV state of this model: {error.message}"
                ) from error

            raise EngineError(
                f"llama.cpp cannot write the prompt cache {path}: {error.message}",
                hint="check that the disk has room",
            ) from error

    def load(self, path: Path) -> int:
        try:
            tokens = self._slots.restore(path)
        except RefusedError as error:
            self.clear()
            raise ArtifactLoadError(
                f"llama.cpp cannot load the prompt cache {path}: {error.message}"
            ) from error

        self._whole_from = 0
        if 0 < self._window_tokens < tokens:
            self._whole_from = tokens - 1  # whose window ends where the file's begins
        return tokens

    def rest(self) -> None:
        self._slots.rest()

    def clear(self) -> None:
        self._slots.erase(self._slots.chosen)
        self._whole_from = 0

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        self._abort.clear()
        if sampling.max_new_tokens < 0:
            raise EngineError(f"max_new_tokens is {sampling.max_new_tokens}, which is below 0")

        # With n_predict 0 llama.cpp still samples one piece of text, which nobody asked for.
        decodes = sampling.max_new_tokens > 0
        options = _sampling_options(sampling)
        if trace:
            options["logprobs"] = 1

        take = on_token if decodes else None
        run = Run(self._abort, on_token=take, on_progress=on_progress, likeliest=sampling.logprobs)
        if sampling.json_schema:
            with Grammar() as grammar:
                run.before_each = grammar.check
                self._run(run, prompt, options)
        else:
            self._run(run, prompt, options)

        return run.stats(count_decoded=decodes)

    def embed(self, content: str | tuple[int, ...]) -> Embedding:
        import numpy as np  # noqa: PLC0415 - 100 ms that only embeddings need

        if self._server is None:
            raise EngineError("the engine is closed")

        given = content if isinstance(content, str) else [list(content)]
        answer = self._server.handle_embeddings({"input": given})
        _raise_refusal(answer)
        vector = np.array(answer["data"][0]["embedding"], np.float32)
        return Embedding(vector=vector, tokens=answer["usage"]["prompt_tokens"])

    def rank(self, query: str, document: str) -> Relevance:
        if self._server is None:
            raise EngineError("the engine is closed")

        answer = self._server.handle_rerank({"query": query, "documents": [document]})
        _raise_refusal(answer)
        score = answer["results"][0]["relevance_score"]
        return Relevance(score=score, tokens=answer["usage"]["prompt_tokens"])

    def abort(self) -> None:
        self._abort.set()  # every run clears it first, so an abort without a run does nothing

    def close(self) -> None:
        self._endpoints.closed = True
        self._slots.close()
        self._server = None  # its destructor stops the threads and frees the model

    def _rewinds(self) -> bool:
        """Find out whether a state of two tokens can be taken back to the first of them."""
        if self._window_tokens:
            return False  # those from files cannot

        cached_tokens = 0
        with contextlib.suppress(EngineError):  # a model that only makes embeddings
            for second in (1, 2):
                run = self._run(Run(self._abort), [0, second], {"n_predict": 0})
                cached_tokens = run.stats(count_decoded=False).cached_tokens or 0

        self.clear()
        return cached_tokens > 0

    def tokenize(self, text: str) -> Sequence[int]:
        """A part that is plain text gets no control tokens."""
        tokens: list[int] = []
        for part, has_control_tokens in pieces(text):
            question = {
                "content": part,
                "add_special": not tokens,
                "parse_special": has_control_tokens,
            }
            tokens += self._endpoints.ask("POST", "/tokenize", question)["tokens"]

        return tokens

    def _run(self, run: Run, prompt: str | list[int], options: dict[str, Any]) -> Run:
        """Start a run on the slot with a text or its tokens, and return when it has ended."""
        if self._server is None:
            raise EngineError("the engine is closed")
        if not prompt:
            raise EngineError("the prompt is empty")  # llama.cpp would give an empty answer

        # llama.cpp tokenizes a text faster than we can ask for its tokens.
        if isinstance(prompt, str) and PLAIN_START in prompt:
            prompt = list(self.tokenize(prompt))
        request = {
            "prompt": prompt,
            "id_slot": self._slots.chosen,
            "cache_prompt": True,
            "stream": True,
            # Without it, nothing calls back during a prefill and no abort gets through.
            "return_progress": True,
            **options,
        }

        self._slots.gather()
        run.least_cached = self._whole_from
        left = self._complete(request, run)
        if run.lacks_tokens:
            self.clear()
            run.least_cached = 0
            left = self._complete(request, run)

        if left:
            self._slots.note_run(left)
        run.raise_failure()
        return run

    def _complete(self, request: dict[str, Any], run: Run) -> int:
        """Returns the tokens that the run has left in its KV state; 0 if it was refused."""
        try:
            self._server.handle_completions(request, run)
        except RuntimeError as error:
            raise EngineError(f"llama.cpp refused the request: {error}") from error

        # The server decodes on until it hears of a stop.
        return self._wait_idle() if run.stopped else run.state_tokens

    def _wait_idle(self) -> int:
        """Wait for the batch that was under way when a run was stopped.

        Returns the tokens that the run has left.
        """
        deadline = time.monotonic() + _IDLE_TIMEOUT_S
        while (tokens := self._slots.tokens_when_idle()) is None:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"llama.cpp is still busy {_IDLE_TIMEOUT_S:.0f} s after a run was stopped"
                )
            time.sleep(0.001)
        return tokens


def _raise_refusal(answer: dict[str, Any]) -> None:
    """Errors: ContextExceeded, InputInvalid, EngineError."""
    error = answer.get("error")
    if error is None:
        return
    if error.get("type") == "exceed_context_size_error":
        raise ContextExceeded(int(error["n_prompt_tokens"]), int(error["n_ctx"]))

    message = f"llama.cpp refused the text: {error.get('message')}"
    if error.get("code") == http.HTTPStatus.BAD_REQUEST:
        raise InputInvalid(message)
    raise EngineError(message)


def _import_library() -> Any:
    if platform.machine() == "x86_64":
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)

    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        raise EngineError(
            f"the llama.cpp engine needs the package xllamacpp: {error}",
            hint=f"{sys.executable} -m pip install xllamacpp",
        ) from error


def _check_model_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ModelLoadError(
            f"cannot read the model {path}: {error.strerror}", hint="check the path"
        ) from error

    if magic != MAGIC:
        raise ModelLoadError(
            f"{path} is not a GGUF file", hint="the llama.cpp engine loads GGUF models only"
        )


def _states(spec: ModelSpec) -> int:
    """How many KV states are kept of a model.

    One of a model with sliding windows or recurrent layers: these need memory for each state,
    besides the cells of the context.
    """
    return 1 if spec.window_tokens or spec.recurrent or spec.pooling else _STATES


def _params(library: Any, spec: ModelSpec, socket_path: str) -> Any:
    params = library.CommonParams()
    params.model.path = spec.path
    params.n_ctx = spec.context_tokens
    # This saves 0.3 s, and keeps llama.cpp from changing the context by the memory it finds.
    params.fit_params = False
    params.n_parallel = _states(spec)
    params.kv_unified = True
    params.n_batch = _BATCH_TOKENS

    if spec.pooling:
        params.embedding = True
        params.pooling_type = getattr(
            library.llama_pooling_type, f"LLAMA_POOLING_TYPE_{spec.pooling.upper()}"
        )
        params.n_batch = params.n_ubatch = spec.context_tokens  # a text is read in one batch

    threads = spec.threads or _take_fast_cpus()
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.warmup = True  # 0.1 s here, or in the first run
    params.cache_ram_mib = 0  # no second cache of old prompts behind our back
    params.n_ctx_checkpoints = _CHECKPOINTS
    # Without it llama.cpp does not even continue a state from a file, as it counts one token more
    # than the window needs.
    params.swa_full = spec.window_tokens > 0
    params.slot_save_path = f"{spec.scratch_dir.rstrip('/')}/"
    params.hostnames = [socket_path]
    params.ui = False
    params.verbosity = 1  # errors only, on stderr

    return params


def _take_fast_cpus() -> int:
    """Run on the fast CPUs only, as each token is computed as fast as the slowest thread.

    Returns how many there are.
    """
    usable = cpus.usable()
    fast = cpus.fast(usable)
    if fast != usable:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, fast)
    return len(fast)


def _sampling_options(sampling: Sampling) -> dict[str, Any]:
    options: dict[str, Any] = {"n_predict": sampling.max_new_tokens, "stop": list(sampling.stop)}
    for name in (*SAMPLING_PARAMETERS, "min_p"):
        if (value := getattr(sampling, name)) is not None:
            options[name] = value
    if sampling.json_schema:
        options["json_schema"] = json.loads(sampling.json_schema)
    if sampling.shown_tokens:
        options["preserved_tokens"] = list(sampling.shown_tokens)
    if sampling.logprobs is not None:
        options["logprobs"] = max(1, sampling.logprobs)
    if sampling.seed is not None:
        options["seed"] = sampling.seed % 0xFFFFFFFF  # 32 bits, and the last value means random
    return options
