"""Starts the program without importing it each time.

Half a second of a slow core goes into the imports of each daemon and command, and the tests start
thousands. So they are forked from a process that has imported all of it: the same code, in a
process of its own, with its own files, environment and signals. What the interpreter does before
the first line of the program is not in it: with RKCACHED_EXEC=1 each one is started as a new Python
interpreter, as those always are that a test starts otherwise than as `python -m rkcached`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from pydantic import BaseModel

from tests.waiting import DEADLINE_S

ROOT = Path(__file__).parents[2]

MESSAGE_BYTES = 1 << 18
"""More than a request has: mostly the environment."""

NUMBER = struct.Struct("<q")


class Process:
    """A process of the program; the methods are those of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], life: int) -> None:
        """`life`: the end of a pipe that its keeper writes its pid to, and then its exit code."""
        self.args = list(args)
        self.returncode: int | None = None
        self._life = life
        self.pid = self._read()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            left_s = None if timeout is None else max(0.0, timeout)
            if not select.select([self._life], [], [], left_s)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._read()
            os.close(self._life)
        return self.returncode

    def _read(self) -> int:
        (number,) = NUMBER.unpack(os.read(self._life, NUMBER.size))
        return int(number)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that others are forked from."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.nursery", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=ROOT,
                start_new_session=True,
            )
        atexit.register(self._close)

    def _close(self) -> None:
        self._socket.close()
        self._process.wait()

    def start(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        files: Sequence[IO[bytes]],
        constants: Mapping[str, object] = MappingProxyType({}),
    ) -> Process:
        """Start `rkcached ARGUMENTS`, with other constants, in a session of its own.

        `files`: its standard input, output and error.
        """
        request = {
            "arguments": list(arguments),
            "constants": dict(constants),
            "env": dict(env),
            "cwd": str(cwd or Path.cwd()),
        }
        reading, writing = os.pipe()
        try:
            fds = [*(file.fileno() for file in files), writing]
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
        finally:
            os.close(writing)
        return Process(["rkcached", *arguments], reading)


_nursery: list[Nursery] = []


def nursery() -> Nursery:
    """That of these tests' process."""
    if not _nursery:
        _nursery.append(Nursery())
    return _nursery[0]


def serves(variables: Mapping[str, str]) -> bool:
    """Whether a process with this environment may be forked: it says nothing to the interpreter."""
    if "RKCACHED_EXEC" in os.environ:
        return False
    return not any(name.startswith(("PYTHON", "LC_", "LANG")) for name in variables)


def run(
    arguments: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdin: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does; at most DEADLINE_S."""
    texts = {name: bytearray() for name in ("out", "err")}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as ready:
        files = [stack.enter_context(os.fdopen(os.memfd_create("stdin"), "w+b"))]
        files[0].write(stdin.encode())
        files[0].seek(0)
        writing = contextlib.ExitStack()
        for text in texts.values():
            ours, theirs = os.pipe()
            ready.register(stack.enter_context(os.fdopen(ours, "rb", 0)), 1, text)
            files.append(writing.enter_context(os.fdopen(theirs, "wb", 0)))
        with writing:
            process = nursery().start(arguments, env=env, cwd=cwd, files=files)

        end = time.monotonic() + DEADLINE_S
        while ready.get_map() and time.monotonic() < end:
            for key, _ in ready.select(end - time.monotonic()):
                if data := os.read(key.fd, 1 << 16):
                    key.data.extend(data)
                else:
                    ready.unregister(key.fileobj)
        try:
            code = process.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    return subprocess.CompletedProcess(
        process.args, code, texts["out"].decode(), texts["err"].decode()
    )


# In the nursery

OTHERS = (
    "rkcached.__main__",
    "rkcached.cli.bench",
    "rkcached.cli.schema",
    "rkcached.engines.llamacpp",
    "rkcached.engines.rkllm",
    "rkcached.worker.child",
)
"""What a daemon or a usual command does not import as a whole."""


def _import_all() -> None:
    gc.disable()
    import rkcached

    for module in pkgutil.walk_packages(rkcached.__path__, "rkcached."):
        if not module.name.startswith(OTHERS):
            importlib.import_module(module.name)
    _complete(BaseModel)
    gc.freeze()


def _complete(model: type[BaseModel]) -> None:
    """Make the validators that are put off until something is validated."""
    for child in model.__subclasses__():
        child.model_rebuild()
        _complete(child)


def _serve(listening: socket.socket) -> dict[str, Any]:
    """Fork a process for each request; returns in each of those, with its request."""
    while True:
        data, fds, _, _ = socket.recv_fds(listening, MESSAGE_BYTES, 4)
        if not data:
            os._exit(0)
        if os.fork() == 0:
            listening.close()
            _keep(fds)
            request: dict[str, Any] = json.loads(data)
            return request

        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(fds: list[int]) -> None:
    """Fork again. Returns in the program; its keeper tells its pid and exit code, and ends."""
    *files, life = fds
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for target, fd in enumerate(files):
            os.dup2(fd, target)
        for fd in fds:
            os.close(fd)
        return

    for fd in files:
        os.close(fd)
    os.write(life, NUMBER.pack(pid))
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(life, NUMBER.pack(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _become(request: Mapping[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    os.chdir(request["cwd"])
    sys.argv = ["rkcached", *request["arguments"]]
    sys.path.remove(str(ROOT))  # as rkcached/__main__.py does
    gc.enable()

    from tests.system.hurried import main

    main(request["constants"])


if __name__ == "__main__":
    _import_all()
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
