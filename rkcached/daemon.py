"""The composition root: builds every part once, connects them, and takes them down in order.

Start: lock the store, open the socket, look once, serve. Stop (SIGTERM, SIGINT): refuse new requests, let running
answers end within `serving.shutdown_grace_s`, stop the build, end the workers, remove the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from rkcached import __version__, logs
from rkcached.api import Api
from rkcached.cache_api import CacheApi
from rkcached.embeddings import Embeddings
from rkcached.events import Events
from rkcached.manifest import EngineKind, Manifest
from rkcached.metrics import Metrics
from rkcached.observe import read_manifest
from rkcached.reconcile import Reconciler
from rkcached.server import ADMIN_MODE, SOCKET_MODE, HttpServer, open_socket, remove_socket
from rkcached.serving import Serving
from rkcached.settings import Settings
from rkcached.status import status
from rkcached.store import Store
from rkcached.stored import StoredTexts
from rkcached.watch import Watcher
from rkcached.worker.gate import Gates
from rkcached.worker.pool import Room, Workers, room_in_memory, sweep_scratch
from rkcached.worker.supervisor import Worker

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Run the daemon until a signal ends it.

    Errors: ManifestError when the manifest never was good; StoreError, SocketError when a place is not to be had.
    """
    logs.configure(settings.log_level)
    os.umask(0o027)
    manifest = read_manifest(settings.manifest)
    store = Store(settings.cache_dir)
    stored = StoredTexts(settings.state_dir)
    store.open()
    sweep_scratch()
    try:
        with (
            _listening(settings.socket, SOCKET_MODE) as everyone,
            _listening(settings.admin_socket, ADMIN_MODE) as admin,
        ):
            asyncio.run(_serve(settings, manifest, store, stored, (everyone, admin)))
    finally:
        store.close()
    log.info("stopped")


@contextlib.contextmanager
def _listening(path: Path, mode: int) -> Iterator[socket.socket]:
    listener = open_socket(path, mode)
    inode = path.stat().st_ino
    try:
        yield listener
    finally:
        listener.close()
        remove_socket(path, inode)


async def _serve(
    settings: Settings,
    manifest: Manifest,
    store: Store,
    stored: StoredTexts,
    listeners: tuple[socket.socket, socket.socket],
) -> None:
    started = time.time()
    loop = asyncio.get_running_loop()
    events = Events()
    workers = Workers(
        on_state=lambda worker: _tell_worker(events, worker), room=lambda: _room(reconciler.view.manifest)
    )
    gates = Gates()
    watcher = Watcher(lambda: _post(loop, reconciler.look_again))
    reconciler = Reconciler(
        manifest_path=settings.manifest,
        manifest=manifest,
        store=store,
        stored=stored,
        workers=workers,
        gates=gates,
        watcher=watcher,
        events=events,
    )
    serving = Serving(reconciler, workers, gates, events)
    api = Api(
        reconciler=reconciler,
        serving=serving,
        caches=CacheApi(reconciler, serving, workers, stored),
        embeddings=Embeddings(reconciler, serving.preparation, workers, gates),
        events=events,
        metrics=Metrics(events, reconciler),
        make_status=lambda: status(
            started=started,
            reconciler=reconciler,
            serving=serving,
            workers=workers,
            store=store,
            polling=watcher.polling,
        ),
    )
    everyone = HttpServer(api.app(admin_socket=settings.admin_socket), grace_s=1)
    admin = HttpServer(api.app(), grace_s=1)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: reconciler.look_again(now=True))
    watcher.start()
    reconciling = asyncio.create_task(reconciler.run())
    serving_http = asyncio.create_task(_serve_both((everyone, admin), listeners))
    announcing = asyncio.create_task(_announce(reconciler, settings.socket))
    signalled = asyncio.create_task(stopping.wait())
    log.info("starting", version=__version__, manifest=str(settings.manifest), cache_dir=str(settings.cache_dir))
    try:
        # A signal ends us; so does a part that ends, which none should.
        await asyncio.wait({reconciling, serving_http, signalled}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        log.info("stopping", running=serving.running)
        watcher.close()
        for task in (reconciling, announcing, signalled):
            task.cancel()
        events.close()
        await serving.close(reconciler.view.manifest.serving.shutdown_grace_s)
        everyone.stop()
        admin.stop()
        results = await asyncio.gather(reconciling, serving_http, return_exceptions=True)
        await workers.stop()
    for result in results:
        if isinstance(result, Exception):
            raise result  # a defect: the service manager sees a failure and starts us again


async def _serve_both(servers: tuple[HttpServer, HttpServer], listeners: tuple[socket.socket, socket.socket]) -> None:
    await asyncio.gather(*(server.serve([listener]) for server, listener in zip(servers, listeners, strict=True)))


def _room(manifest: Manifest) -> Room:
    """An NPU has little memory of its own to share: one model, unless the manifest says otherwise."""
    engine = manifest.engine
    return room_in_memory(1 if engine.max_loaded is None and engine.kind is EngineKind.RKLLM else engine.max_loaded)


def _tell_worker(events: Events, worker: Worker) -> None:
    events.publish("worker", model=worker.model.name, state=worker.state.value, pid=worker.pid, why=worker.last_failure)


async def _announce(reconciler: Reconciler, socket_path: Path) -> None:
    await reconciler.looked.wait()
    log.info(
        "ready", socket=str(socket_path), prompts=len(reconciler.view.assessments), fresh=len(reconciler.view.index)
    )


def _post(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From another thread; the loop may be closing."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
