"""Remembers which requests ended their worker, and refuses one that did so twice.

A request may be too much for a library: a crash costs everybody the loaded model. Whoever sends it
again and again would keep the model from all others. On the event loop.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass

import msgspec

from rkcached.errors import RequestError, counted
from rkcached.serving.job import Job

DEATHS = 2
REFUSED_S = 600.0
"""The cause may be another by then: a worker is ended for want of memory, too."""

MAX_REMEMBERED = 256


@dataclass(slots=True)
class _Deaths:
    times: int
    last: float
    why: str


class DeadlyRequests:
    def __init__(self) -> None:
        # By the digest of the request.
        self._deaths: dict[bytes, _Deaths] = {}

    def refuse(self, job: Job) -> None:
        """Errors: RequestError, if this request ended its worker twice, and not long ago."""
        deaths = self._deaths.get(_digest(job)) if self._deaths else None
        if deaths is None or deaths.times < DEATHS:
            return

        left_s = deaths.last + REFUSED_S - time.monotonic()
        if left_s <= 0:
            self.answered(job)
            return
        raise RequestError(
            422,
            f"this request ended the worker of the model {deaths.times} times: {deaths.why}",
            code="request_ends_worker",
            hint=f"change it; it is accepted again in {counted(math.ceil(left_s / 60), 'minute')}",
        )

    def ended_its_worker(self, job: Job, why: str) -> None:
        digest = _digest(job)
        deaths = self._deaths.pop(digest, None)
        if deaths is None or time.monotonic() - deaths.last > REFUSED_S:
            deaths = _Deaths(0, 0.0, "")
        deaths.times += 1
        deaths.last = time.monotonic()
        deaths.why = why
        self._deaths[digest] = deaths
        while len(self._deaths) > MAX_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]

    def answered(self, job: Job) -> None:
        """It ends no worker, whatever happened before."""
        if self._deaths:
            self._deaths.pop(_digest(job), None)


def _digest(job: Job) -> bytes:
    """Of all that an engine is told, and of who asks: nobody learns that another asked the same."""
    whose = f"{job.owner} {job.model.name}".encode()
    sampling = msgspec.json.encode(job.sampling)
    return hashlib.sha256(b"\0".join((whose, sampling, job.prompt.encode()))).digest()
