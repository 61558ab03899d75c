"""Who sent a request: the user of a process, or the owner of a key; and what he may see and do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from starlette.requests import Request
from starlette.types import Scope

from rkcached.errors import RequestError
from rkcached.sources.access_keys import AccessKey
from rkcached.worker.held import NOBODY

PEER = "peer"
"""Key of the connection's state for what the log says of who opened it: the uid and pid of the
process, or over TCP the address, and the name of the key that a request brought."""

TCP = "tcp"
"""Key of the connection's state for its `Tcp`; it is not there for a Unix socket."""

ACCESS_KEY = "access_key"
"""Key of the request's state for the `AccessKey` that it brought over TCP, if it did."""


class Tcp(NamedTuple):
    """A connection over TCP."""

    is_loopback: bool
    """Its address on our side is one of the loopback, so that its client is on this machine."""
    take_place: Callable[[int], bool]
    """Notes the owner of the key that came over it. False if that one has too many connections."""


def caller_of(request: Request) -> int:
    """Whose the request is: a user, the owner of a key, or NOBODY.

    The user is that of the process that opened the connection. NOBODY came over TCP without a key.
    """
    return caller_in(request.scope)


def caller_in(scope: Scope) -> int:
    state = scope.get("state", {})
    key: AccessKey | None = state.get(ACCESS_KEY)
    if key is not None:
        return key.owner
    uid: int = state.get(PEER, {}).get("uid", NOBODY)
    return uid


def _key_of(request: Request) -> AccessKey | None:
    key: AccessKey | None = request.scope.get("state", {}).get(ACCESS_KEY)
    return key


def may_change(request: Request) -> bool:
    """Whether the request came over the admin socket, or with an admin key."""
    key = _key_of(request)
    is_admin = getattr(request.app.state, "is_admin", False)
    return is_admin or (key is not None and key.admin)


def viewer_of(request: Request) -> int | None:
    """The caller whose own things the answer may show; None: everybody's, for who may change."""
    return None if may_change(request) else caller_of(request)


def models_of(request: Request) -> tuple[str, ...]:
    """The only models that the request's key is for; all if there are none."""
    key = _key_of(request)
    return () if key is None else key.models


def may_use(request: Request, name: str | None) -> bool:
    """Whether the key of a request is for this model; without a name, whether for all."""
    models = models_of(request)
    return not models or (name is not None and name.partition("/")[0] in models)


def check_model(request: Request, name: str | None) -> None:
    """Refuse a key that is not for this model, or without a name, one that is not for all.

    `name`: MODEL or MODEL/PROMPT. Errors: RequestError.
    """
    if may_use(request, name):
        return
    raise RequestError(
        403,
        f"this key is only for: {', '.join(models_of(request))}",
        code="model_not_allowed",
        param=None if name is None else "model",
        hint="use one of these models, or another key",
    )
