"""Leaves out of a request what its engine cannot do, where the manifest says so. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import msgspec

from rkcached.engines.base import SAMPLING_FIELDS, EngineInfo, Sampling
from rkcached.serving.job import Job

_OFF: Final = {"min_p": 0}
"""Values that an engine without such a parameter has anyway."""


def without_unsupported(job: Job, info: EngineInfo, fixed: Sampling | None) -> Job:
    """The job without the sampling that this engine would refuse; what it ignores is noted.

    `fixed` is the sampling that the model was loaded with.
    """
    wanted = job.sampling
    left_out: dict[str, Any] = {}
    ignored = list(job.ignored)
    for name in SAMPLING_FIELDS:
        value = getattr(wanted, name)
        if value is None or name in info.run_sampling or value == getattr(fixed, name, None):
            continue
        if name == "temperature" and value == 0 and info.greedy:
            continue

        left_out[name] = None
        if value != _OFF.get(name):
            ignored.append(name)

    if wanted.logprobs is not None and not info.gives_logprobs:
        left_out["logprobs"] = None
        ignored.append("logprobs")

    if not left_out:
        return job
    sampling = msgspec.structs.replace(wanted, **left_out)
    return replace(job, sampling=sampling, ignored=tuple(dict.fromkeys(ignored)))
