"""The number of files that a process may open: raised at the start, and said once if it is met.

Each connection is an open file, so whoever may connect can use them up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import resource
from typing import Any

from rkcached.host.logs import log

MAX_FILES = 8192
"""More than two sockets full of connections, workers and watches take."""

SAID_AGAIN_S = 60.0
"""Pause between two lines about the same lack."""

_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def raise_file_limit() -> None:
    """Allow this process as many open files as it may have, but no more than it can need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Complaints:
    """The exception handler of an event loop. That files ran out is said now and then, in a line.

    asyncio reports it up to 128 times a second, with a traceback each, and accepts again after a
    second.
    """

    def __init__(self) -> None:
        # The loop's time.
        self._said_at = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, ValueError) and "_start_serving" in context["message"]:
            return  # it was to accept again, on a socket that has been closed since
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_FILES:
            loop.default_exception_handler(context)
            return

        if loop.time() - self._said_at >= SAID_AGAIN_S:
            self._said_at = loop.time()
            log.warning(
                "out of files",
                error=error.strerror,
                hint="clients wait; if that lasts, raise LimitNOFILE of rkcached.service, "
                "or give the machine more memory",
            )
