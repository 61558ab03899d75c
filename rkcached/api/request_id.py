"""The ids of requests: each answer has one, and so has its line in the log."""

from __future__ import annotations

import re
import uuid

# Ids that a client may choose; any other is replaced by ours.
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


def usable_id(given: str) -> str:
    """The client's own id, if it sent a usable one; otherwise a new one."""
    return given if _USABLE.fullmatch(given) else new_request_id()
