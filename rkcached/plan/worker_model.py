"""From what is declared to the workers: one place for builds, requests and commands.

Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rkcached.engines.base import ModelSpec, NpuOptions, Sampling
from rkcached.engines.registry import ENGINES
from rkcached.engines.states import StateKind
from rkcached.sources.manifest import EngineConfig
from rkcached.worker.model import WorkerModel

if TYPE_CHECKING:  # it has remarks on how many models fit
    from rkcached.plan.desired import DesiredModel


def max_loaded(engine: EngineConfig) -> int | None:
    """How many models may be loaded at once; None for as many as the memory holds.

    An NPU runs one model at a time: one is loaded, unless the manifest says otherwise.
    """
    if engine.max_loaded is None and ENGINES[engine.kind].on_npu and not engine.concurrent:
        return 1
    return engine.max_loaded


def worker_model(engine: EngineConfig, model: DesiredModel) -> WorkerModel:
    """Everything that a worker needs to know to host this model."""
    config = model.config
    return WorkerModel(
        name=model.name,
        identity=model.identity,
        implementation=ENGINES[engine.kind].implementation,
        spec=ModelSpec(
            path=str(config.path),
            context_tokens=config.params.max_context_len,
            threads=engine.threads,
            library=str(engine.library),
            abi=engine.abi or "",
            # The manifest checked each by its name.
            sampling=Sampling(**config.sampling(None)),  # type: ignore[arg-type]
            tokenizer=model.source.tokenizer_file,
            lora=str(config.lora or ""),
            lora_scale=config.lora_scale,
            thinking=bool(config.thinks),
            window_tokens=model.source.state.window_tokens,
            recurrent=model.source.state.kind is StateKind.RECURRENT,
            pooling=config.pools,
            npu=NpuOptions(**config.npu.model_dump()),
        ),
        idle_unload_s=config.idle_unload_s,
        timeout_s=engine.timeout_s,
        max_memory_bytes=None if engine.max_memory_bytes is None else int(engine.max_memory_bytes),
        confine=engine.confine,
        devices=ENGINES[engine.kind].devices,
        trained_tokens=model.source.trained_tokens,
        signatures=model.source.signatures,
    )
