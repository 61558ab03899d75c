"""The composition root: builds every part once, connects them, and takes them down in order.

Start: lock the store, open the sockets or take systemd's, look once, serve, be ready. Stop
(SIGTERM, SIGINT): accept no more, let running answers end within `serving.shutdown_grace_s`, stop
the build, end the workers, remove our sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from rkcached import __version__
from rkcached.api.cache_routes import CacheApi
from rkcached.api.metrics import Metrics
from rkcached.api.prepare import Preparation
from rkcached.api.requests import ChatRequest
from rkcached.api.responses import ChatCompletion
from rkcached.api.routes import Api
from rkcached.api.server import (
    ADMIN_MODE,
    SOCKET_MODE,
    HttpServer,
    OnceLooked,
    OwnSocket,
    check_passed,
    refuse_waiting,
)
from rkcached.api.status import Recent, status, summary
from rkcached.engines.registry import ENGINES
from rkcached.errors import ManifestError, SettingsError
from rkcached.host import logs
from rkcached.host.settings import Settings
from rkcached.host.systemd import Service, listen_fds
from rkcached.host.watch import Watcher
from rkcached.reconcile.events import Events
from rkcached.reconcile.loop import Reconciler
from rkcached.serving.dispatcher import Serving
from rkcached.serving.embeddings import Embeddings
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.store import Store
from rkcached.worker import scratch
from rkcached.worker.gate import Gates
from rkcached.worker.pool import Room, Workers, room_in_memory
from rkcached.worker.supervisor import Worker

log = structlog.get_logger()

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 512 << 10
"""More than what asyncio reads into, 256 KiB: a mapping for each read would cost 0.1 ms for each
token."""

Listening = OwnSocket | list[socket.socket]
"""A socket of our own, or all that systemd passes by one name."""

LINGER_S = 0.05
"""Who was accepted just before has sent its request by then, and gets an answer instead of a closed
connection."""


def run(settings: Settings) -> None:
    """Run the daemon until a signal ends it.

    Errors: ManifestError when the manifest never was good; SettingsError for a socket of systemd
    that is none of ours; StoreError, SocketError when a place is not to be had.
    """
    logs.configure(settings.log_level)
    os.umask(0o027)
    gc.freeze()  # the modules; cli.py put the collector off while it imported them
    gc.enable()
    _give_memory_back()
    service = Service()
    if service.notified:
        faulthandler.enable()  # whom the watchdog aborts says where it was stuck
    passed = listen_fds()
    try:
        check_passed(passed)
        manifest = read_manifest(settings.manifest)
    except (ManifestError, SettingsError) as error:
        _tell_rejected(service, error)
        for listener in itertools.chain.from_iterable(passed.values()):
            refuse_waiting(listener, error.message)
        raise
    store = Store(settings.cache_dir)
    stored = StoredTexts(settings.state_dir)
    store.open()
    scratch.sweep()
    try:
        with (
            _listening(passed.get("rkcached", []), settings.socket, SOCKET_MODE) as everyone,
            _listening(passed.get("admin", []), settings.admin_socket, ADMIN_MODE) as admin,
        ):
            asyncio.run(
                _serve(settings, manifest, store, stored, (everyone, admin), service=service)
            )
    finally:
        store.close()
    log.info("stopped")


def _tell_rejected(service: Service, error: ManifestError | SettingsError) -> None:
    """Say why there is no start, where systemd shows it; at a terminal the command says it itself."""
    if isinstance(error, SettingsError):
        service.status(error.message)
        if service.notified:
            log.error("socket rejected", error=error.message, hint=error.hint)
        return
    service.status(f"manifest rejected: {error.problems[0]}")
    for problem in error.problems if service.notified else ():
        log.error("manifest rejected", file=problem.file, line=problem.line, error=problem.message)


def _give_memory_back() -> None:
    """Keep glibc from learning that large blocks are to stay, and from an arena for each thread (mallopt(3)).

    Else the first status of 10,000 prompts stays for good: 20 MB. Arenas are of no use where one lock goes round.
    """
    if (
        mallopt := getattr(ctypes.CDLL(None), "mallopt", None)
    ) is not None:  # another libc has other rules
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, 1)


@contextlib.contextmanager
def _listening(passed: list[socket.socket], path: Path, mode: int) -> Iterator[Listening]:
    """The sockets that systemd opened and keeps, or one of our own."""
    if passed:
        with contextlib.ExitStack() as closing:
            for listener in passed:
                closing.enter_context(listener)
            yield passed
        return
    own = OwnSocket(path, mode)
    try:
        yield own
    finally:
        own.close()


async def _serve(
    settings: Settings,
    manifest: Manifest,
    store: Store,
    stored: StoredTexts,
    listeners: tuple[Listening, Listening],
    *,
    service: Service,
) -> None:
    started = time.time()
    loop = asyncio.get_running_loop()
    events = Events()
    workers = Workers(
        on_state=lambda worker: _tell_worker(events, worker),
        room=lambda: _room(reconciler.snapshot.manifest),
    )
    gates = Gates()
    watcher = Watcher(lambda changed: reconciler.look_again(changed))  # noqa: PLW0108 - which is made below
    headline = _Headline(events, service)
    reconciler = Reconciler(
        manifest_path=settings.manifest,
        manifest=manifest,
        store=store,
        stored=stored,
        workers=workers,
        gates=gates,
        watcher=watcher,
        events=events,
        service=service,
        on_turn=lambda: headline.tell(summary(reconciler.snapshot)),
    )
    serving = Serving(reconciler, workers, gates, events)
    recent = Recent(events)
    api = Api(
        reconciler=reconciler,
        serving=serving,
        preparation=Preparation(reconciler),
        caches=CacheApi(reconciler, serving, workers, stored),
        embeddings=Embeddings(reconciler, workers, gates),
        events=events,
        metrics=Metrics(events, reconciler, serving, workers),
        make_status=lambda urgent_first=False: status(
            started=started,
            snapshot=reconciler.snapshot,
            serving=serving,
            workers=workers,
            store=store,
            recent=recent,
            polling=watcher.polling,
            urgent_first=urgent_first,
        ),
        reload=lambda: _reload(reconciler, service),
    )
    everyone = HttpServer(
        OnceLooked(api.app(admin_socket=settings.admin_socket), reconciler.ready), grace_s=1
    )
    admin = HttpServer(OnceLooked(api.app(), reconciler.ready), grace_s=1)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    reloads: set[asyncio.Task[None]] = set()
    loop.add_signal_handler(signal.SIGHUP, lambda: _hang_up(reloads, reconciler, service))
    if service.notified:
        status_line = _Soon(lambda: service.status(summary(reconciler.snapshot)))
        events.listen(
            lambda event: status_line.call() if event.kind in ("artifact", "build") else None
        )
    service.status(summary(reconciler.snapshot))
    reconciling = asyncio.create_task(reconciler.run())
    serving_http = asyncio.create_task(_serve_both((everyone, admin), listeners))
    announcing = asyncio.create_task(
        _announce(reconciler, (everyone, admin), settings.socket, service)
    )
    keeping = asyncio.create_task(_keep_sockets((everyone, admin), listeners))
    signalled = asyncio.create_task(stopping.wait())
    log.info(
        "starting",
        version=__version__,
        manifest=str(settings.manifest),
        cache_dir=str(settings.cache_dir),
    )
    try:
        # A signal ends us; so does a part that ends, which none should.
        await asyncio.wait(
            {reconciling, serving_http, signalled}, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        log.info("stopping", running=serving.running)
        grace_s = reconciler.snapshot.manifest.serving.shutdown_grace_s
        service.stopping(grace_s=grace_s)
        service.status("stopping")
        keeping.cancel()
        everyone.stop_accepting()
        admin.stop_accepting()
        await asyncio.sleep(LINGER_S)
        watcher.close()
        for task in (reconciling, announcing, signalled, *reloads):
            task.cancel()
        events.close()
        api.close()
        await serving.close(grace_s)
        everyone.stop()
        admin.stop()
        results = await asyncio.gather(reconciling, serving_http, return_exceptions=True)
        await workers.stop()
    for result in results:
        if isinstance(result, Exception):
            raise result  # a defect: the service manager sees a failure and starts us again


async def _serve_both(
    servers: tuple[HttpServer, HttpServer], listeners: tuple[Listening, Listening]
) -> None:
    sockets = [[one.listener] if isinstance(one, OwnSocket) else one for one in listeners]
    await asyncio.gather(
        *(server.serve(some) for server, some in zip(servers, sockets, strict=True))
    )


async def _keep_sockets(
    servers: tuple[HttpServer, HttpServer], listeners: tuple[Listening, Listening]
) -> None:
    pairs = [
        (own, server)
        for own, server in zip(listeners, servers, strict=True)
        if isinstance(own, OwnSocket)
    ]
    for _, server in pairs:
        await server.answering.wait()
    await asyncio.gather(*(own.keep(server) for own, server in pairs))


def _room(manifest: Manifest) -> Room:
    """An NPU runs one model at a time: one is loaded, unless the manifest says otherwise."""
    engine = manifest.engine
    one = ENGINES[engine.kind].on_npu and not engine.concurrent
    return room_in_memory(1 if engine.max_loaded is None and one else engine.max_loaded)


def _tell_worker(events: Events, worker: Worker) -> None:
    events.publish(
        "worker",
        model=worker.model.name,
        state=worker.state.value,
        pid=worker.pid,
        why=worker.last_failure,
    )


async def _announce(
    reconciler: Reconciler,
    servers: tuple[HttpServer, HttpServer],
    socket_path: Path,
    service: Service,
) -> None:
    """Ready is who answers on both sockets and has a plan; what the plan asks for is built afterwards."""
    for server in servers:
        await server.answering.wait()
    await reconciler.ready.wait()
    service.status(
        summary(reconciler.snapshot)
    )  # who waited for the start must not read that it goes on
    service.ready()
    ChatRequest.model_rebuild()  # put off while we started; the first request need not pay for it
    ChatCompletion.model_rebuild()
    log.info(
        "ready",
        socket=str(socket_path),
        prompts=len(reconciler.snapshot.assessments),
        fresh=len(reconciler.snapshot.index),
    )


async def _reload(reconciler: Reconciler, service: Service) -> None:
    """Look at the manifest and everything else now.

    Errors: ManifestError; the last good one then stays in force.
    """
    service.reloading()
    try:
        await reconciler.next_look()
    finally:
        service.status(summary(reconciler.snapshot))
        service.ready()
    if reconciler.snapshot.manifest_error is not None:
        raise ManifestError(reconciler.snapshot.manifest_error.problems)


def _hang_up(reloads: set[asyncio.Task[None]], reconciler: Reconciler, service: Service) -> None:
    async def reload() -> None:
        with contextlib.suppress(ManifestError):  # the log has it
            await _reload(reconciler, service)

    task = asyncio.create_task(reload())
    reloads.add(task)
    task.add_done_callback(reloads.discard)


class _Headline:
    """Tells systemd and the listeners what the daemon says of itself in one line, when that changed."""

    def __init__(self, events: Events, service: Service) -> None:
        self._events = events
        self._service = service
        self._told = ""

    def tell(self, line: str) -> None:
        self._service.status(line)
        if line != self._told:
            self._told = line
            self._events.publish("summary", summary=line)


class _Soon:
    """Calls once after any number of wishes, when the present step of the loop is over."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._scheduled = False

    def call(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._now)

    def _now(self) -> None:
        self._scheduled = False
        self._action()
