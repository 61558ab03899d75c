"""A connection of a client that is not trusted.

One that does not finish its request in time, and one that comes when too many are connected, gets
an error and is closed; one that does not take its answer is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import operator
import os
import re
import resource
import select
import socket
import struct
import time
from collections import deque
from ipaddress import IPv4Address, IPv6Address

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rkcached.api.callers import PEER, TCP, Tcp
from rkcached.api.passed import refusal
from rkcached.host.logs import log
from rkcached.worker.held import NOBODY

HEAD_TIMEOUT_S = 10.0
"""From the connection, or the first byte of a later request, to the end of its headers."""

BODY_SILENCE_S = 30.0
"""A body may be slow, but no longer silent than this."""

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers."""

HANGUP_CHECK_S = 1.0
"""A client that has ended its side, and then goes away, is noticed after this time."""

PROBE_S = 0.1
"""In this time a network tells that a client over TCP, which seemed to end its side, is gone."""

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
"""Clients pass over it, also those that did not ask for it (RFC 9110, 15.2)."""

STALLED_S = 30.0
"""A client that does not take its answer for this long is closed, which frees its place."""

TOO_MANY_AGAIN_S = 10.0
"""Pause between two warnings of too many connections."""

MAX_CONNECTIONS = 400
"""At each socket; fewer where the process may open few files. One user may have three quarters; so
may all connections over TCP together, and one key a half of these."""

SLICE_BYTES = 8 << 10
"""Of what a client sends, between two turns of the event loop."""

OTHER_FILES = 96
"""Files that are left for everything else: workers, watches, builds."""


class Connection(H11Protocol):
    """A connection with deadlines, and with the uid and pid of its client, or its address.

    The kernel noted these when the connection was made (unix(7), SO_PEERCRED). uvicorn waits
    without end for the rest of a request. Here a request has a deadline: otherwise a thousand
    clients that each send half of one would keep everybody else out.
    """

    uid = NOBODY
    """Over TCP the owner of the key that came last."""
    is_tcp = False
    _is_taking = False
    _deadline: asyncio.TimerHandle | None = None
    _in_head = False
    _stalled: asyncio.TimerHandle | None = None
    _has_ended = False
    _hangup_check: asyncio.TimerHandle | None = None

    # asyncio declares a BaseTransport; that of a socket is a Transport, as uvicorn says, too.
    def connection_made(  # type: ignore[override]  # see above
        self, transport: asyncio.Transport
    ) -> None:
        super().connection_made(transport)
        self._slices = deque[bytes]()
        peer = transport.get_extra_info("socket")
        if peer.family == socket.AF_UNIX:
            pid = self._note_process(peer)
            if pid is not None and _may_be_ours(pid):
                log.warning(
                    "connection refused", reason="a worker of ours may have opened it", pid=pid
                )
                transport.abort()
                return
        else:
            _send_at_once(peer)
            self._note_address(transport)

        if not self._has_a_place():
            self._close_longest_idle()
        if not self._has_a_place():
            _log_refused(len(self.connections))
            why = "too many connections; try again"
            transport.write(refusal("503 Service Unavailable", why, "too_many_connections"))
            transport.close()
            return
        self._await_more()

    def _note_process(self, peer: socket.socket) -> int | None:
        """The pid of the process that opened the connection, if it is known."""
        try:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError:
            return None

        pid: int
        pid, self.uid, _ = struct.unpack("3i", credentials)
        self.app_state = {**self.app_state, PEER: {"uid": self.uid, "pid": pid}}
        return pid

    def _note_address(self, transport: asyncio.Transport) -> None:
        theirs = _address(transport.get_extra_info("peername"))
        ours = _address(transport.get_extra_info("sockname"))
        is_loopback = ours is not None and ours.is_loopback
        self.is_tcp = True
        tcp = Tcp(is_loopback=is_loopback, take_place=self._take_place)
        self.app_state = {**self.app_state, PEER: {"peer": str(theirs)}, TCP: tcp}

    def _has_a_place(self) -> bool:
        most = _max_connections()
        own = sum(map(self._is_alike, self._others()))
        return len(self.connections) <= most and own <= most * 3 // 4

    def _close_longest_idle(self) -> None:
        """Close the connection that has waited for a next request for the longest.

        It is one of this user's, unless all users together have too many.
        """
        is_full = len(self.connections) > _max_connections()
        idle: list[tuple[float, Connection]] = []
        for other in self._others():
            timer = other.timeout_keep_alive_task
            if timer is None or other.transport.is_closing():
                continue
            if is_full or self._is_alike(other):
                idle.append((timer.when(), other))

        if idle:
            _, longest = min(idle, key=operator.itemgetter(0))
            longest.timeout_keep_alive_handler()
            self.connections.discard(longest)

    def _others(self) -> list[Connection]:
        """All connections to this server, with this one."""
        return [other for other in self.connections if isinstance(other, Connection)]

    def _is_alike(self, other: Connection) -> bool:
        """Whether the connections have their places together."""
        if self.is_tcp or other.is_tcp:
            return self.is_tcp and other.is_tcp
        return self.uid == other.uid

    def _take_place(self, owner: int) -> bool:
        """Count the connection as one of this key. False if that has too many."""
        if self.uid == owner:
            return True
        own = sum(other.uid == owner for other in self._others())
        if own >= _max_connections() * 3 // 8:
            return False
        self.uid = owner
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        self._clear_stalled()
        if self._hangup_check is not None:
            self._hangup_check.cancel()
        super().connection_lost(exc)

    # A client that ends its side

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's always closes
        """Whether the connection stays open: a client may end its side after its request.

        `socat` and `nc -N` do so, and wait for the answer.
        """
        if not self._owes_an_answer() or self._is_hung_up() or not self._can_be_probed():
            return False
        if not self._has_ended:
            self._has_ended = True
            self._probe()
            after_s = PROBE_S if self.is_tcp else HANGUP_CHECK_S
            self._hangup_check = self.loop.call_later(after_s, self._look_for_hangup)
        return True

    def _owes_an_answer(self) -> bool:
        if self._slices:
            return True
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.cycle is not None and not self.cycle.response_complete and is_whole

    def _can_be_probed(self) -> bool:
        """Whether it would be known that the client is gone.

        HTTP/1.0 has no interim responses, so before its answer has begun nothing can be sent.
        """
        has_interim = self.conn.their_http_version != b"1.0"
        return not self.is_tcp or has_interim or self._has_begun()

    def _has_begun(self) -> bool:
        return self.cycle is not None and self.cycle.response_started

    def _probe(self) -> None:
        """Send what a client over TCP passes over, unless its answer has begun.

        A client that has closed both sides looks like one that ended its own, until it is sent
        something: its kernel then answers that nobody is there. A stream has its comments for that.
        """
        if self.is_tcp and not self._has_begun():
            self.transport.write(INTERIM)

    def _is_hung_up(self) -> bool:
        """Whether the client has closed both sides, as far as the kernel knows."""
        peer = self.transport.get_extra_info("socket")
        if peer is None:
            return True
        poll = select.poll()
        poll.register(peer.fileno(), 0)
        return bool(poll.poll(0))

    def _look_for_hangup(self) -> None:
        """Nothing more can be read, so asyncio does not tell when the client goes away."""
        if self.transport.is_closing():
            return
        if self._is_hung_up():
            self.transport.abort()
            return
        self._probe()  # again: one that has read the last one may go since
        self._hangup_check = self.loop.call_later(HANGUP_CHECK_S, self._look_for_hangup)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._has_ended and not self._owes_an_answer():
            self.transport.close()

    def pause_writing(self) -> None:
        """Called when the client takes less than we have for it."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._clear_stalled()
        super().resume_writing()

    def _clear_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def data_received(self, data: bytes) -> None:
        """Take a large part in slices, with a turn of the loop after each.

        It may have tens of thousands of chunks of a byte, each of which is an event of its own.
        """
        if self._slices:
            self.transport.pause_reading()
        self._slices.extend(data[at : at + SLICE_BYTES] for at in range(0, len(data), SLICE_BYTES))
        if not self._is_taking:
            self._take_slice()

    def _take_slice(self) -> None:
        self._is_taking = False
        if not self._slices or self.transport.is_closing():
            self._slices.clear()
            return

        super().data_received(_with_host(self._slices.popleft(), self.conn))
        self._await_more()
        if self._slices:
            self._is_taking = True
            self.transport.pause_reading()
            self.loop.call_soon(self._take_slice)
        elif not self.flow.read_paused and not self.transport.is_closing():
            self.transport.resume_reading()

    def _await_more(self) -> None:
        """Set the deadline for the part that the client has to send now.

        While it sends headers, the deadline stays where it was.
        """
        state = self.conn.their_state
        in_head = state is h11.IDLE
        if in_head and self._in_head:
            return

        self._clear_deadline()
        if not self.transport.is_closing() and (in_head or state is h11.SEND_BODY):
            after_s = HEAD_TIMEOUT_S if in_head else BODY_SILENCE_S
            self._in_head = in_head
            self._deadline = self.loop.call_later(after_s, self._too_late)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long headers. uvicorn calls this."""
        del msg
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            status = "400 Bad Request"
            why = "this is not a request of HTTP/1.1; see RFC 9112 for how it begins and ends"
            if len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
                status = "431 Request Header Fields Too Large"
                why = f"the request's path and headers have more than {MAX_HEAD_BYTES:,} bytes"
            self.transport.write(refusal(status, why, "invalid_request"))
        self.transport.close()

    def _clear_deadline(self) -> None:
        self._in_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        in_head = self._in_head
        self._clear_deadline()
        if self.flow.read_paused:  # we do not read: no fault of the client
            self._await_more()
            return

        if in_head or (self.cycle is not None and not self.cycle.response_started):
            why = f"the request's body did not go on within {BODY_SILENCE_S:g} s"
            if in_head:
                why = f"the request's headers did not end within {HEAD_TIMEOUT_S:g} s"
            self.transport.write(refusal("408 Request Timeout", why, "request_incomplete"))
        self.transport.close()


_HEAD_END = re.compile(rb"\r?\n\r?\n")
_HOST = re.compile(rb"\nhost:", re.IGNORECASE)


def _with_host(data: bytes, connection: h11.Connection) -> bytes:
    """The bytes of a client, with a Host header where they begin a request without one.

    HTTP/1.1 demands it, and on a socket of ours it says nothing.
    """
    is_begin = connection.their_state is h11.IDLE and not connection.trailing_data[0]
    if not is_begin:
        return data

    end = _HEAD_END.search(data)
    if end is None or _HOST.search(data, 0, end.end()) is not None:
        return data
    line, newline, rest = data.partition(b"\n")
    return line + newline + b"Host: localhost\r\n" + rest


def _address(name: tuple[str, int] | None) -> IPv4Address | IPv6Address | None:
    """The address of a socket's name; one of IPv4 that came through IPv6 is itself."""
    if not name:  # it was closed already
        return None

    address = ipaddress.ip_address(name[0].partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _send_at_once(connection: socket.socket) -> None:
    """Otherwise the second of two small writes waits for the client's acknowledgement, for 40 ms.

    asyncio does this only where it knows that the protocol is TCP, and an accepted socket has the
    number that its listener was made with, which may be 0.
    """
    with contextlib.suppress(OSError):  # it was closed already
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _may_be_ours(pid: int) -> bool:
    """Whether a child of ours opened a connection: it has our user, and nothing to ask or change.

    Of a process that has ended, nobody knows whose it was, and it waits for no answer. 0 is one of
    another PID namespace, as of a container.
    """
    if pid <= 0:
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:
        return not _is_alive(pid)
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


_logged_refused = 0.0  # monotonic seconds of the last warning of too many connections


def _log_refused(connections: int) -> None:
    """Warn once in a while: a client that opens a thousand connections must not fill the log."""
    global _logged_refused  # noqa: PLW0603 - one log, however many sockets
    if not _logged_refused or time.monotonic() - _logged_refused >= TOO_MANY_AGAIN_S:
        _logged_refused = time.monotonic()
        log.warning(
            "connections refused",
            status=503,
            reason="too many connections",
            connections=connections,
        )


def _max_connections() -> int:
    """At each of two sockets."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, (limit - OTHER_FILES) // 2))
