"""Makes the runtime's structures for loading a model and for a run."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from rkcached.engines.base import SAMPLING_PARAMETERS, ModelSpec, Sampling
from rkcached.engines.rkllm.abi import SamplingParam
from rkcached.engines.rkllm.library import Library, zeroed_reserved
from rkcached.host import cpus


def model_param(library: Library, spec: ModelSpec, sampling: Sampling) -> Any:
    """The runtime's defaults, changed by the manifest. Reserved bytes are zero."""
    param = library.call("rkllm_createDefaultParam")
    zeroed_reserved(library.abi, param)
    param.model_path = os.fsencode(spec.path)
    if spec.context_tokens:
        param.max_context_len = spec.context_tokens
    param.max_new_tokens = sampling.max_new_tokens
    param.is_async = False

    sampler = sampling_param(sampling)
    for name in SAMPLING_PARAMETERS:
        if getattr(sampling, name) is not None or name in ("top_k", "top_p", "temperature"):
            setattr(param, name, getattr(sampler, name))

    extend = param.extend_param
    npu = spec.npu
    extend.base_domain_id = npu.base_domain_id
    if library.abi.group == "B":
        return param

    if npu.n_keep is not None:
        param.n_keep = npu.n_keep
    if npu.embed_flash is not None:
        extend.embed_flash = npu.embed_flash

    if npu.enabled_cpus:
        wanted = set(npu.enabled_cpus)
        extend.enabled_cpus_num = len(wanted)
        extend.enabled_cpus_mask = sum(1 << cpu for cpu in wanted)
    elif extend.enabled_cpus_mask.bit_count() != extend.enabled_cpus_num:
        # The mask is unset on some boards: take fast CPUs, of which the last are the fastest.
        fast = sorted(cpus.fast(range(os.cpu_count() or 1)))
        chosen = fast[-extend.enabled_cpus_num :]
        extend.enabled_cpus_mask = sum(1 << cpu for cpu in chosen)
        extend.enabled_cpus_num = len(chosen)

    if library.abi.group == "E":
        param.ignore_eos_token = npu.ignore_eos
    return param


def merged(fixed: Sampling, wanted: Sampling) -> Sampling:
    given = {
        name: value for name in SAMPLING_PARAMETERS if (value := getattr(wanted, name)) is not None
    }
    return msgspec.structs.replace(fixed, **given)


def sampling_param(sampling: Sampling) -> SamplingParam:
    """A run's sampling, with RKLLM's own defaults for what is not given.

    The effect of temperature 0 is unknown, so a greedy run has one candidate instead.
    """

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    param = SamplingParam(
        top_k=int(given(sampling.top_k, 40)),
        top_p=given(sampling.top_p, 0.9),
        temperature=given(sampling.temperature, 0.8),
        repeat_penalty=given(sampling.repeat_penalty, 1.1),
        frequency_penalty=given(sampling.frequency_penalty, 0.0),
        presence_penalty=given(sampling.presence_penalty, 0.0),
        mirostat=0,
        mirostat_tau=5.0,
        mirostat_eta=0.1,
    )
    if is_greedy(sampling):
        param.top_k = 1
        param.top_p = 1.0
        param.temperature = 1.0
    return param


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0 or sampling.top_k == 1
