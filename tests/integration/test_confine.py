"""Code in a confined process cannot get out of it: real processes try, on the real kernel."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from rkcached.engines.base import EngineInfo, ModelSpec
from rkcached.engines.memory import MemoryEngine
from rkcached.host import landlock
from rkcached.sources.records import Key
from rkcached.store.seal import make_seal
from rkcached.store.store import Store
from rkcached.worker.model import WorkerModel
from rkcached.worker.pool import Workers

ROOT = Path(__file__).parents[2]

TRIES = """
import ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading
from pathlib import Path
sys.path.insert(0, {root!r})
from rkcached.host import confine
older = threading.Thread(target=threading.Event().wait, daemon=True)
older.start()
assert confine.confine() == "", "this kernel lacks something"
for status in Path("/proc/self/task").glob("*/status"):
    assert "Seccomp:\t2" in status.read_text(), "every thread, also an older one"
    assert "NoNewPrivs:\t1" in status.read_text()
held = int(Path("/proc/thread-self/status").read_text().split("CapPrm:")[1].split()[0], 16)
assert not held & ~0b110, "capabilities"
libc = ctypes.CDLL(None, use_errno=True)
parent = os.getppid()

def refused(work):
    try:
        work()
    except PermissionError:
        return True
    return False

def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0 and ctypes.get_errno() == 1:
        raise PermissionError

table = confine._TABLES[os.uname().machine]
assert all(refused(lambda: call(number, 0, 0, 0, 0, 0)) for number in table.refused)
assert refused(lambda: subprocess.run(["true"]))
assert refused(lambda: os.posix_spawn("/bin/true", ["true"], {{}}))
assert refused(os.fork)
assert refused(lambda: socket.socket())
assert refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))
assert refused(lambda: os.kill(parent, 0))
assert refused(lambda: os.kill(1, 0))
assert refused(lambda: os.kill(-1, 0))
assert refused(lambda: call(table.clone, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0))
assert refused(lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0))

ours, theirs = socket.socketpair()
for owner in (fcntl.F_SETOWN, fcntl.F_SETSIG):
    assert refused(lambda: fcntl.fcntl(ours, owner, parent))
assert refused(lambda: fcntl.ioctl(ours, 0x8901, parent.to_bytes(4, "little")))
assert refused(lambda: fcntl.ioctl(ours, 0x8902, parent.to_bytes(4, "little")))
assert refused(lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE, (64, 64)))
assert refused(lambda: os.setpriority(os.PRIO_PROCESS, parent, 5))

# An engine needs these.
fcntl.fcntl(ours, fcntl.F_SETFL, os.O_NONBLOCK)
fcntl.ioctl(ours, 0x541B, b"0000")  # FIONREAD
resource.setrlimit(resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))
socket.socketpair()
thread = threading.Thread(target=print)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("signalled"))
signal.raise_signal(signal.SIGUSR1)
print("confined", flush=True)
os.abort()
"""

LOOKS = """
import os, sys, time
sys.path.insert(0, {root!r})
import ctypes
from rkcached.host.confine import undumpable
os.setgroups([])
os.setgid(12001)
os.setuid(12001)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as a process has it that did not change its user
if sys.argv[1] == "closed":
    undumpable()
child = os.fork()
if not child:
    try:
        with open(f"/proc/{{os.getppid()}}/mem", "r+b"):
            os._exit(1)
    except PermissionError:
        os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_no_engine_needs_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRIES.format(root=str(ROOT))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == ["signalled", "confined"], done.stderr
    assert done.returncode == -6, "a process may still end itself"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a user whom it may not look into")
@pytest.mark.parametrize(("way", "refused"), [("open", "1"), ("closed", "0")])
def test_no_process_of_the_same_user_can_look_into_the_daemon(way: str, refused: str) -> None:
    """Its memory is open to them unless it says otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", LOOKS.format(root=str(ROOT)), way],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.strip() == refused, done.stderr


class Escaping(MemoryEngine):
    """Says what it could do, as its version."""

    @property
    def info(self) -> EngineInfo:
        done = []
        tries = dict(self.tries())
        for name, work in tries.items():
            with contextlib.suppress(OSError):
                work()
                done.append(name)
        return msgspec.structs.replace(super().info, runtime_version=",".join(done))

    def tries(self) -> dict[str, Callable[[], object]]:
        return {
            "program": lambda: os.posix_spawn("/bin/true", ["true"], {}),
            "signal": lambda: os.kill(os.getppid(), 0),
            "socket": socket.socket,
        }


SHMGET = {"x86_64": 29, "aarch64": 194}[os.uname().machine]


def by_number(number: int, *arguments: object) -> None:
    """Errors: OSError, also where the kernel has no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    given = [os.fsencode(each) if isinstance(each, Path) else each for each in arguments]
    if libc.syscall(number, *given) < 0:
        raise OSError(ctypes.get_errno(), "refused")


class Reading(Escaping):
    """Tries to get at files; where they are, its tokenizer's file says, which it may read."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._root = Path(Path(spec.tokenizer).read_text())

    def tries(self) -> dict[str, Callable[[], object]]:
        root, store = self._root, self._root / "cache"
        daemon = Path("/proc", str(os.getppid()))
        mine = store / "m"
        staged = mine / ".staging/.stage-p-1"
        hole = b"x" * 10
        return {
            "stage": lambda: staged.write_bytes(hole),
            "read the stage": staged.read_bytes,
            "read its cache": (mine / "p.memory_cache").read_bytes,
            "save a conversation": lambda: (
                store / ".conversations/m/.staging/1.state"
            ).write_bytes(hole),
            "remove the stage": staged.unlink,
            # What follows is nobody's business.
            "read another model's prompt": (store / "other/p.bin").read_bytes,
            "read another model's cache": (store / "other/p.memory_cache").read_bytes,
            "read another model": (root / "other.model").read_bytes,
            "read the key": (root / "state/store.key").read_bytes,
            "read the manifest": (root / "manifest.yaml").read_bytes,
            "read a password": lambda: Path("/etc/passwd").read_bytes(),
            "list the store": lambda: list(store.iterdir()),
            "list a prompts folder": lambda: list(root.iterdir()),
            "read the daemon's descriptors": (daemon / "fd/0").readlink,
            "read the daemon's memory": lambda: (daemon / "mem").open("r+b"),
            "read the daemon's environment": (daemon / "environ").read_bytes,
            "read through the daemon's root": (daemon / f"root{root}/manifest.yaml").read_bytes,
            "overwrite its sidecar": lambda: (mine / "p.json").write_bytes(hole),
            "truncate its cache": lambda: os.truncate(mine / "p.memory_cache", 0),
            "remove its cache": (mine / "p.memory_cache").unlink,
            "make a file beside it": lambda: (mine / "q.json").write_bytes(hole),
            "rename its cache": lambda: (mine / "p.bin").rename(mine / ".staging/p"),
            "link a secret": lambda: (mine / ".staging/key").hardlink_to(root / "state/store.key"),
            "make a link": lambda: (mine / ".staging/link").symlink_to(root),
            "make a folder": (mine / ".staging/folder").mkdir,
            "make a pipe": lambda: os.mkfifo(mine / ".staging/pipe"),
            "write the digests": lambda: (store / ".digests.json").write_bytes(hole),
            "write another model's conversation": lambda: (
                store / ".conversations/other/1.state"
            ).write_bytes(hole),
            "write its saved conversation": lambda: (
                store / ".conversations/m/1.state"
            ).write_bytes(hole),
            "write a stored prompt": lambda: (root / "state/prompt.md").write_bytes(hole),
            "open a file to everybody": lambda: (store / "other/p.bin").chmod(0o666),
            "open it by a later call": lambda: by_number(463, store / "other/p.bin"),
            "read the checkout": (ROOT / "pyproject.toml").read_bytes,
            "share memory": lambda: by_number(SHMGET, 4242, 4096, 0o1666),
            "give a file away": lambda: os.chown(store / "other/p.bin", 12001, 12001),
            "change a time": lambda: os.utime(store / "other/p.bin"),
            "write a temporary file": lambda: (root / "temporary").write_bytes(hole),
            "write to a device": lambda: Path("/dev/kmsg").write_bytes(b""),
            "change the kernel": lambda: Path("/proc/sys/vm/swappiness").write_text("60"),
        }


ALLOWED = 5
"""The first of what it tries."""


@pytest.mark.parametrize(("confine", "can"), [(True, ""), (False, "program,signal,socket")])
async def test_a_worker_is_confined(tmp_path: Path, *, confine: bool, can: str) -> None:
    """A real one, before its library is loaded; unless the manifest says otherwise."""
    model = hostile(tmp_path, Escaping, confine=confine)
    workers = Workers()
    try:
        assert (await workers.get(model).ensure()).runtime_version == can
    finally:
        await workers.stop()


def hostile(root: Path, engine: type[Escaping], *, confine: bool = True) -> WorkerModel:
    path = root / "m.model"
    path.write_text('{"rkcached_memory_model": 1}')
    where = root / "m.tokenizer"
    where.write_text(str(root))
    return WorkerModel(
        name="m",
        identity="i",
        implementation=f"{__name__}:{engine.__name__}",
        spec=ModelSpec(path=str(path), context_tokens=1024, tokenizer=str(where)),
        idle_unload_s=None,
        confine=confine,
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With something of everything."""
    store = Store(tmp_path / "cache", seal=make_seal(tmp_path / "state"))
    store.open()
    for model in ("m", "other"):
        store.staging.make_folders(model)
        store.conversations.make_folders(model)
        for suffix in ("json", "bin", "memory_cache"):
            (store.root / model / f"p.{suffix}").write_text("mine")
        (store.root / ".conversations" / model / "1.state").write_text("mine")
    for name in ("manifest.yaml", "other.model", "state/prompt.md"):
        (tmp_path / name).write_text("mine")
    (store.root / ".digests.json").write_text("{}")
    yield store
    store.close()


def reach_of(store: Store) -> Callable[[str], landlock.Reach]:
    """With the engines of this test, which lie beside the package and not in it."""

    def reach(model: str) -> landlock.Reach:
        own = store.reach_of(model)
        return msgspec.structs.replace(own, read=(*own.read, str(ROOT / "tests")))

    return reach


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mode) for path in files}


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
async def test_a_worker_has_its_files_and_no_others(store: Store, tmp_path: Path) -> None:
    """Not even as root, who may do everything else."""
    before = contents(tmp_path)
    workers = Workers(reach=reach_of(store))
    model = hostile(tmp_path, Reading)
    could = list(Reading.tries(Reading(model.spec)))[:ALLOWED]
    try:
        assert (await workers.get(model).ensure()).runtime_version.split(",") == could
    finally:
        await workers.stop()
    saved = store.root / ".conversations/m/.staging/1.state"
    assert saved.read_bytes()
    saved.unlink()
    for name in ("m.model", "m.tokenizer"):
        (tmp_path / name).unlink()
    assert contents(tmp_path) == before


async def test_a_worker_follows_its_folder(store: Store, tmp_path: Path) -> None:
    """Somebody deletes the store, as anybody may, and the daemon makes it anew."""
    workers = Workers(reach=reach_of(store))
    model = hostile(tmp_path, Reading)
    worker = workers.get(model)
    try:
        await worker.ensure()
        pid = worker.pid
        shutil.rmtree(store.root / "m")
        await worker.ensure()
        assert worker.pid == pid, "there is nothing to follow yet"
        store.staging.make_folders("m")
        await worker.ensure()
        assert worker.pid != pid
        assert worker.restarts == 1
        assert "was created or replaced" in worker.last_failure
        assert (await worker.ensure()).runtime_version.startswith("stage,")
    finally:
        await workers.stop()


async def test_a_worker_keeps_its_folder_while_something_is_in_it(
    store: Store, tmp_path: Path
) -> None:
    """One of two prompts goes.

    Regression: the empty folder for builds was removed, so the next build restarted the worker and
    loaded its model again.
    """
    store.root.joinpath("m/q.json").write_text("mine, too")
    workers = Workers(reach=reach_of(store))
    worker = workers.get(hostile(tmp_path, Reading))
    try:
        await worker.ensure()
        store.remove(Key("m", "p"))
        store.staging.make_folders("m")
        await worker.ensure()
        assert worker.restarts == 0
    finally:
        await workers.stop()


def test_a_renderer_has_no_files(tmp_path: Path) -> None:
    """Nor programs, nor sockets: it gets a template and messages, and gives a text."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    script = f"""
import socket, sys
sys.path.insert(0, {str(ROOT)!r})
from rkcached.messages.sandbox import restrict
restrict()
for work in (lambda: open({str(secret)!r}), lambda: open("/etc/passwd"), socket.socket):
    try:
        work()
    except PermissionError:
        print("refused")
import json.tool
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["refused"] * 3 + ["imported"], done.stderr
