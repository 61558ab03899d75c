"""The memory that a model with sliding windows takes for its context, for `doctor` and `explain`.

Its windows are kept in full, as a prompt cache could not be reused otherwise. Other models take
what their kind takes anyway, a small part of the model.
"""

from __future__ import annotations

from rkcached.engines.registry import EngineEntry
from rkcached.sources.manifest import ModelConfig
from rkcached.sources.records import ModelSource


def context_bytes(engine: EngineEntry, config: ModelConfig, source: ModelSource) -> int:
    """The bytes of the context's keys and values; 0 if there are no windows, or if not known.

    Errors: OSError.
    """
    if not source.state.window_tokens or config.pools:
        return 0

    tokens = config.params.max_context_len
    if source.trained_tokens is not None:
        tokens = min(tokens, source.trained_tokens)
    return round((engine.state_bytes_per_token(config.path) or 0) * tokens)
