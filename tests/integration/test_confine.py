"""Code in a confined process cannot get out of it: real processes try, on the real kernel."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rkcached.engines.base import EngineInfo, ModelSpec
from rkcached.engines.memory import MemoryEngine
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
child = os.fork()
if not child:
    os._exit(0 if refused(lambda: socket.socket()) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
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
        for name, work in (
            ("program", lambda: os.posix_spawn("/bin/true", ["true"], {})),
            ("signal", lambda: os.kill(os.getppid(), 0)),
            ("socket", socket.socket),
        ):
            with contextlib.suppress(PermissionError):
                work()
                done.append(name)
        return msgspec.structs.replace(super().info, runtime_version=",".join(done))


@pytest.mark.parametrize(("confine", "can"), [(True, ""), (False, "program,signal,socket")])
async def test_a_worker_is_confined(tmp_path: Path, *, confine: bool, can: str) -> None:
    """A real one, before its library is loaded; unless the manifest says otherwise."""
    path = tmp_path / "m.model"
    path.write_text('{"rkcached_memory_model": 1}')
    model = WorkerModel(
        name="m",
        identity="i",
        implementation=f"{__name__}:Escaping",
        spec=ModelSpec(path=str(path), context_tokens=1024),
        idle_unload_s=None,
        confine=confine,
    )
    workers = Workers()
    try:
        assert (await workers.get(model).ensure()).runtime_version == can
    finally:
        await workers.stop()
