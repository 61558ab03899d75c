"""The composition root: builds every part once, connects them, and takes them down in order.

Each part is made after the parts that it uses. Three things are made first, because those below
tell those above by them: `Events` (what happened), `Published` (the snapshot of the reconciler's
state) and `Wake` (look again). So nothing is bound late: what is called back is a method of a part
that exists, or one with its first arguments filled in.

Start: lock the store, open the sockets or take systemd's, look once, serve, be ready. Stop
(SIGTERM, SIGINT): accept no more, let running answers end within `serving.shutdown_grace_s`, stop
the build, end the workers, remove our sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import functools
import gc
import ipaddress
import itertools
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rkcached import __version__
from rkcached.api.anthropic.routes import AnthropicApi
from rkcached.api.bundle_routes import BundleApi
from rkcached.api.cache_routes import CacheApi
from rkcached.api.inference import Inference
from rkcached.api.listening import ADMIN_MODE, SOCKET_MODE, OwnSocket, open_port
from rkcached.api.llama_server import LlamaServerApi
from rkcached.api.metrics import Metrics
from rkcached.api.ollama.routes import OllamaApi
from rkcached.api.openai_responses.routes import ResponsesApi
from rkcached.api.passed import check_passed, refuse_waiting
from rkcached.api.paths import UsualPaths
from rkcached.api.prepare import Preparation
from rkcached.api.requests import ChatRequest
from rkcached.api.responses import ChatCompletion
from rkcached.api.routes import Api
from rkcached.api.server import HttpServer, OnceLooked
from rkcached.api.status import Recent, status, summary
from rkcached.api.suggest_routes import SuggestApi
from rkcached.errors import ManifestError, SettingsError
from rkcached.host import logs
from rkcached.host.addresses import Address
from rkcached.host.confine import undumpable
from rkcached.host.file_limit import Complaints, raise_file_limit
from rkcached.host.logs import log
from rkcached.host.settings import Settings
from rkcached.host.systemd import Service, listen_fds
from rkcached.host.watch import Watcher
from rkcached.plan.worker_model import max_loaded
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.loop import Reconciler
from rkcached.reconcile.snapshot import Published
from rkcached.reconcile.wake import Wake
from rkcached.serving.conversations import Conversations
from rkcached.serving.dispatcher import Serving
from rkcached.serving.learning import Learning
from rkcached.serving.pooling import PoolingModels
from rkcached.serving.preload import Preloader
from rkcached.serving.resting import Resting
from rkcached.sources.access_keys import AccessKeys
from rkcached.sources.manifest import Manifest, ReadyWhen
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.seal import make_seal
from rkcached.store.store import Store
from rkcached.store.writer import check_place
from rkcached.worker import scratch
from rkcached.worker.gate import Gates
from rkcached.worker.held import NOBODY
from rkcached.worker.pool import Room, Workers, room_in_memory
from rkcached.worker.supervisor import Worker

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# More than what asyncio reads into, 256 KiB: a mapping for each read would cost 0.1 ms for each
# token.
_LARGE_BYTES = 512 << 10

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
    raise_file_limit()
    undumpable()  # a worker of the same user must not read or write our memory
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
            refuse_waiting(listener, error)
        raise
    service.ask_for_time()
    check_place(settings.cache_dir)  # before we make anything
    store = Store(settings.cache_dir, seal=make_seal(settings.state_dir))
    stored = StoredTexts(settings.state_dir)
    store.open()
    scratch.sweep()
    service.ask_for_time()
    try:
        with (
            _listening(passed.get("rkcached", []), settings.socket, SOCKET_MODE) as everyone,
            _listening(passed.get("admin", []), settings.admin_socket, ADMIN_MODE) as admin,
            _ports(settings) as ports,
        ):
            listeners = _Listeners(everyone, admin, ports)
            asyncio.run(_serve(settings, manifest, store, stored, listeners, service=service))
    finally:
        store.close()
    log.info("stopped")


def _tell_rejected(service: Service, error: ManifestError | SettingsError) -> None:
    """Say why the daemon does not start, where systemd shows it.

    At a terminal the command prints it itself.
    """
    if isinstance(error, SettingsError):
        service.status(error.message)
        if service.notified:
            log.error("socket rejected", error=error.message, hint=error.hint)
        return
    service.status(f"manifest rejected: {error.problems[0]}")
    for problem in error.problems if service.notified else ():
        log.error("manifest rejected", file=problem.file, line=problem.line, error=problem.message)


def _give_memory_back() -> None:
    """Have glibc return large blocks, and keep no arena for each thread (mallopt(3)).

    Else the first status of 10,000 prompts stays for good: 20 MB. Arenas are of no use where one
    lock goes round.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another libc has other rules
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


@contextlib.contextmanager
def _ports(settings: Settings) -> Iterator[list[socket.socket]]:
    """The TCP ports that we open ourselves. Errors: SettingsError, SocketError."""
    with contextlib.ExitStack() as closing:
        yield [closing.enter_context(open_port(text)) for text in settings.listen.split()]


class _Listeners(NamedTuple):
    everyone: Listening
    admin: Listening
    ports: list[socket.socket]
    """The TCP ports of our own."""

    def all(self) -> tuple[list[socket.socket], list[socket.socket]]:
        """The sockets for everyone and those for changes."""
        return [*_sockets(self.everyone), *self.ports], _sockets(self.admin)

    @property
    def own(self) -> tuple[OwnSocket | None, OwnSocket | None]:
        """The sockets of our own in the file system."""
        pair = (self.everyone, self.admin)
        everyone, admin = (one if isinstance(one, OwnSocket) else None for one in pair)
        return everyone, admin


def _sockets(listening: Listening) -> list[socket.socket]:
    return [listening.listener] if isinstance(listening, OwnSocket) else listening


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The parts that are run and taken down; they know the others."""

    events: Events
    published: Published
    headline: _Headline
    workers: Workers
    watcher: Watcher
    reconciler: Reconciler
    serving: Serving
    conversations: Conversations
    resting: Resting
    preloader: Preloader
    reloading: _Reloading
    api: Api
    everyone: HttpServer
    admin: HttpServer

    @property
    def servers(self) -> tuple[HttpServer, HttpServer]:
        return self.everyone, self.admin


def _build(
    settings: Settings, manifest: Manifest, store: Store, stored: StoredTexts, service: Service
) -> _Parts:
    """Make every part, each after those that it uses."""
    events = Events()
    published = Published(manifest, store.digests)
    wake = Wake()
    headline = _Headline(events, published, service)

    conversations = Conversations(store.conversations, published)
    workers = Workers(
        on_state=functools.partial(_tell_worker, events),
        room=functools.partial(_room, published),
        keeper=conversations,
        reach=store.reach_of,
    )
    gates = Gates()
    preloader = Preloader(published, workers, gates, events)
    watcher = Watcher(wake.look_again)
    reconciler = Reconciler(
        published=published,
        wake=wake,
        store=store,
        stored=stored,
        workers=workers,
        gates=gates,
        watcher=watcher,
        events=events,
        service=service,
        on_turn=functools.partial(_after_look, headline, preloader, conversations),
    )
    reloading = _Reloading(reconciler, headline, service)

    learning = Learning(reconciler, stored, events)
    resting = Resting(published, workers, gates, conversations)
    serving = Serving(
        reconciler=reconciler,
        workers=workers,
        gates=gates,
        events=events,
        conversations=conversations,
        on_answer=(learning.answered, resting.answered),
    )
    recent = Recent(events)
    preparation = Preparation(published)
    inference = Inference(preparation, serving, PoolingModels(published, workers, gates))
    api = Api(
        reconciler=reconciler,
        preparation=preparation,
        inference=inference,
        caches=CacheApi(reconciler, serving, workers, stored, learning),
        suggestions=SuggestApi(learning),
        bundles=BundleApi(reconciler),
        surfaces=[
            AnthropicApi(inference),
            ResponsesApi(inference),
            OllamaApi(inference, published, workers),
            LlamaServerApi(inference, published),
        ],
        events=events,
        metrics=Metrics(events, published, serving, workers),
        make_status=functools.partial(
            status,
            started=time.time(),
            published=published,
            serving=serving,
            workers=workers,
            store=store,
            conversations=conversations,
            preloader=preloader,
            recent=recent,
            watcher=watcher,
            learning=learning,
        ),
        reload=reloading.reload,
        keys=AccessKeys(settings.state_dir),
        open_loopback=settings.open_loopback,
        serving=serving,
        recent=recent,
        socket=settings.socket,
    )
    for_everyone = UsualPaths(
        OnceLooked(api.app(admin_socket=settings.admin_socket), reconciler.ready)
    )
    for_admin = UsualPaths(OnceLooked(api.app(), reconciler.ready))

    return _Parts(
        events=events,
        published=published,
        headline=headline,
        workers=workers,
        watcher=watcher,
        reconciler=reconciler,
        serving=serving,
        conversations=conversations,
        resting=resting,
        preloader=preloader,
        reloading=reloading,
        api=api,
        everyone=HttpServer(for_everyone, grace_s=1),
        admin=HttpServer(for_admin, grace_s=1),
    )


async def _serve(
    settings: Settings,
    manifest: Manifest,
    store: Store,
    stored: StoredTexts,
    listeners: _Listeners,
    *,
    service: Service,
) -> None:
    parts = _build(settings, manifest, store, stored, service)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(Complaints())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, parts.reloading.hang_up)
    if service.notified:
        parts.events.listen(parts.headline.take)
    parts.headline.show()

    await parts.conversations.open()
    reconciling = asyncio.create_task(parts.reconciler.run())
    preloading = asyncio.create_task(parts.preloader.run(parts.reconciler))
    serving_http = asyncio.create_task(_serve_both(parts.servers, listeners))
    announcing = asyncio.create_task(_announce(parts, _addresses(listeners), service))
    keeping = asyncio.create_task(_keep_sockets(parts.servers, listeners))
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
        log.info("stopping", running=parts.serving.running)
        grace_s = parts.published.now.manifest.serving.shutdown_grace_s
        service.stopping(grace_s=grace_s)
        service.status("stopping")

        keeping.cancel()
        for server in parts.servers:
            server.stop_accepting()
        await asyncio.sleep(LINGER_S)

        parts.watcher.close()
        parts.reloading.close()
        parts.resting.close()
        for task in (reconciling, preloading, announcing, signalled):
            task.cancel()
        parts.events.close()
        parts.api.close()
        await parts.serving.close(grace_s)
        for server in parts.servers:
            server.stop()
        results = await asyncio.gather(
            reconciling, preloading, serving_http, return_exceptions=True
        )
        await parts.workers.stop()
        await parts.conversations.close()

    for result in results:
        if isinstance(result, Exception):
            raise result  # a defect: the service manager sees a failure and starts us again


async def _serve_both(servers: tuple[HttpServer, HttpServer], listeners: _Listeners) -> None:
    pairs = zip(servers, listeners.all(), strict=True)
    await asyncio.gather(*(server.serve(sockets) for server, sockets in pairs))


async def _keep_sockets(servers: tuple[HttpServer, HttpServer], listeners: _Listeners) -> None:
    both = zip(listeners.own, servers, strict=True)
    pairs = [(own, server) for own, server in both if own is not None]
    for _, server in pairs:
        await server.answering.wait()
    await asyncio.gather(*(own.keep(server) for own, server in pairs))


def _after_look(headline: _Headline, preloader: Preloader, conversations: Conversations) -> None:
    headline.tell()
    preloader.look()
    conversations.look()


def _room(published: Published) -> Room:
    return room_in_memory(max_loaded(published.now.manifest.engine))


def _tell_worker(events: Events, worker: Worker) -> None:
    events.publish(
        "worker",
        model=worker.model.name,
        state=worker.state.value,
        pid=worker.pid,
        why=worker.last_failure,
        loaded_ms=worker.load_ms if worker.just_loaded else None,
    )


def _addresses(listeners: _Listeners) -> str:
    """The addresses that clients reach: systemd may pass other sockets than the settings name."""
    for_everyone, _ = listeners.all()
    return ", ".join(map(_shown, for_everyone))


def _shown(listener: socket.socket) -> str:
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return str(name)
    return str(Address(ipaddress.ip_address(name[0].partition("%")[0]), name[1]))


async def _announce(parts: _Parts, addresses: str, service: Service) -> None:
    """Say that the daemon is ready: it answers on both sockets and has a plan.

    With `engine.ready: loaded` the models that have preload are loaded, too, as far as they can
    be. What the plan asks for is built afterwards.
    """
    for server in parts.servers:
        await server.answering.wait()
    await parts.reconciler.ready.wait()
    if parts.published.now.manifest.engine.ready is ReadyWhen.LOADED:
        await parts.preloader.tried.wait()

    parts.headline.show()  # who waited for the start must not read that it goes on
    parts.reloading.announced = True
    service.ready()
    ChatRequest.model_rebuild()  # put off while we started; the first request need not pay for it
    ChatCompletion.model_rebuild()

    snapshot = parts.published.now
    log.info(
        "ready",
        socket=addresses,
        prompts=len(snapshot.assessments),
        fresh=len(snapshot.index),
    )


class _Headline:
    """The daemon's state in one line, for systemd and for the listeners."""

    def __init__(self, events: Events, published: Published, service: Service) -> None:
        self._events = events
        self._published = published
        self._service = service
        self._known = ""
        self._scheduled = False

    def show(self) -> None:
        """Give systemd the line of this moment."""
        self._scheduled = False
        self._service.status(summary(self._published.now.seen_by(NOBODY)))

    def tell(self) -> None:
        """As `show`; the listeners get it, too, if it changed."""
        line = summary(self._published.now.seen_by(NOBODY))
        self._service.status(line)
        if line != self._known:
            self._known = line
            self._events.publish("summary", summary=line)

    def take(self, event: Event) -> None:
        """Show the line anew after changes of artifacts and builds, once for any number of them."""
        if event.kind in ("artifact", "build") and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self.show)


class _Reloading:
    """Looks at everything now, because a client or a signal asks for it."""

    def __init__(self, reconciler: Reconciler, headline: _Headline, service: Service) -> None:
        self._reconciler = reconciler
        self._headline = headline
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self.announced = False
        """Systemd was told that the daemon is ready: a reload must not do that earlier."""

    async def reload(self) -> None:
        """Look at the manifest and everything else.

        Errors: ManifestError; the last good one then stays in force.
        """
        if self.announced:
            self._service.reloading()
        try:
            await self._reconciler.next_look()
        finally:
            self._headline.show()
            if self.announced:
                self._service.ready()

        error = self._reconciler.snapshot.manifest_error
        if error is not None:
            raise ManifestError(error.problems)

    def hang_up(self) -> None:
        """SIGHUP came."""
        task = asyncio.create_task(self._reload_quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload_quietly(self) -> None:
        with contextlib.suppress(ManifestError):  # the log has it
            await self.reload()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
