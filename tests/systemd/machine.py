"""A machine with a real systemd: a container on an overlay of a root, booted by systemd-nspawn.

The root is this machine's, unless another is named.

It has no network and its own processes, users and units; nothing of it touches the machine below.
Whoever makes one closes it: then its processes are ended, by their recorded ids, and what was
mounted is unmounted.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import DEADLINE_S, wait_until

BOOT_DEADLINE_S = 180.0
SOCKET = "/run/rkcached/rkcached.sock"
ADMIN_SOCKET = "/run/rkcached/admin.sock"
STORE = "/var/cache/rkcached"
UNIT = "rkcached.service"


class Machine:
    """A container with its own systemd. Its disk survives a power cut."""

    def __init__(self, base: Path, binds: dict[Path, str], lower: Path = Path("/")) -> None:
        self._base = base
        self._binds = binds
        self._lower = lower
        self._mounts = contextlib.ExitStack()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._init: psutil.Process | None = None
        self.root = base / "root"

    # Life

    def mount(self) -> None:
        self._mount("tmpfs", "tmpfs", self._base)
        for name in ("upper", "work", "root"):
            (self._base / name).mkdir()
        layers = f"lowerdir={self._lower},upperdir={self._base}/upper,workdir={self._base}/work"
        self._mount("overlay", "overlay", self.root, "-o", layers)

    def _mount(self, kind: str, what: str, where: Path, *options: str) -> None:
        subprocess.run(["mount", "-t", kind, *options, what, str(where)], check=True)
        self._mounts.callback(subprocess.run, ["umount", "--lazy", str(where)], check=False)

    def boot(self) -> None:
        console = (self._base / "console").open("ab")
        command = [
            "systemd-nspawn",
            "-q",
            "-D",
            str(self.root),
            "--boot",
            "--register=no",
            "--keep-unit",
        ]
        command += ["--private-network", "--console=pipe"]
        # Its own list of system calls is older than these.
        landlock = ("create_ruleset", "add_rule", "restrict_self")
        command += [f"--system-call-filter=landlock_{name}" for name in landlock]
        command += [f"--bind-ro={source}:{target}" for source, target in self._binds.items()]
        with console:
            self._nspawn = subprocess.Popen(
                [*command, "systemd.unit=multi-user.target"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        nspawn = psutil.Process(self._nspawn.pid)

        def init() -> psutil.Process | None:
            with contextlib.suppress(
                psutil.NoSuchProcess
            ):  # the first child only prepares the container
                return next(
                    (child for child in nspawn.children() if child.name() == "systemd"), None
                )
            return None

        self._init = wait_until(init, "the container has an init")
        up = ("running", "degraded")
        wait_until(
            lambda: self.run("systemctl", "is-system-running", code=None).stdout.strip() in up,
            lambda: (
                "systemd is up; its console:\n"
                f"{(self._base / 'console').read_text(errors='replace')}"
            ),
            BOOT_DEADLINE_S,
        )

    def cut_power(self) -> None:
        """End every process of the machine at once."""
        assert self._init is not None
        self._init.kill()
        self._ended()

    def close(self) -> None:
        """Power off and unmount."""
        if self._init is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._init.send_signal(signal.SIGRTMIN + 4)  # systemd(1): poweroff.target
            try:
                self._ended()
            except subprocess.TimeoutExpired:
                with contextlib.suppress(psutil.NoSuchProcess):
                    self._init.kill()
                self._ended()
        self._mounts.close()

    def _ended(self) -> None:
        assert self._nspawn is not None
        try:
            self._nspawn.wait(DEADLINE_S)
        finally:
            if self._nspawn.poll() is None:
                self._nspawn.kill()
                self._nspawn.wait()
        self._init = None

    # Commands

    def run(
        self,
        *command: str,
        code: int | None = 0,
        stdin: str | None = None,
        user: str = "",
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine; `code` is what it must exit with (None: anything)."""
        assert self._init is not None
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        as_user = ["runuser", "-u", user, "--"] if user else []
        variables = [
            f"{name}={value}"
            for name, value in {"PATH": path, "LANG": "C.UTF-8", **environment}.items()
        ]
        done = subprocess.run(
            [
                "nsenter",
                "-t",
                str(self._init.pid),
                "-a",
                "env",
                "--chdir=/",
                "-i",
                *variables,
                *as_user,
                *command,
            ],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=900,  # an installation on a busy machine
            check=False,
        )
        if code is not None and done.returncode != code:
            pytest.fail(
                f"{' '.join(command)} exited with {done.returncode}, not {code}:\n{done.stdout}\n"
                f"{done.stderr}"
            )
        return done

    def systemctl(self, *arguments: str, code: int | None = 0) -> str:
        return self.run("systemctl", "--no-pager", *arguments, code=code).stdout

    def show(self, name: str, unit: str = UNIT) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    @property
    def main_pid(self) -> int:
        """Of the daemon, as the machine counts; 0 while there is none."""
        return int(self.show("MainPID"))

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """The daemon's entries of this boot, oldest first."""
        self.run("journalctl", "--sync")
        lines = self.run(
            "journalctl", "-b", "-u", UNIT, "-o", "json", "--all", *matches, code=None
        ).stdout
        return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]

    # Files

    def write(self, path: str, text: str | bytes) -> None:
        """Write a file in place, as its owner's editor would, keeping owner and mode."""
        content = text.encode() if isinstance(text, str) else text
        mode = "u=rw,g=r,o=r"
        self.run("mkdir", "-p", str(Path(path).parent))
        with (self._base / "outbox").open("wb") as out:
            out.write(content)
        # Written from inside: a watch in the container must see it, and the overlay is the
        # container's own.
        assert self._init is not None
        command = [
            "nsenter",
            "-t",
            str(self._init.pid),
            "-a",
            "sh",
            "-c",
            'cat >"$0" && chmod "$1" "$0"',
        ]
        with (self._base / "outbox").open("rb") as source:
            subprocess.run([*command, path, mode], stdin=source, check=True, timeout=60)

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout

    def drop_in(self, name: str, text: str) -> None:
        """Settings of the unit that differ for a test; gone again with `tidy`."""
        self.write(f"/etc/systemd/system/{UNIT}.d/{name}.conf", text)
        self.systemctl("daemon-reload")

    # The daemon

    def declare(
        self,
        prompts: dict[str, str],
        *,
        engine: str = "{kind: memory}",
        params: str = "",
        **model: Any,
    ) -> None:
        """Write a manifest with these prompts as files.

        Its model `m` is of the memory engine; `model` has its keys.
        """
        self.write(
            "/var/lib/rkcached-models/m.model", json.dumps({"rkcached_memory_model": 1, **model})
        )
        for name, text in prompts.items():
            self.write(f"/etc/rkcached/prompts/{name}.md", text)
        names = ", ".join(f"{name}: prompts/{name}.md" for name in prompts)
        self.write(
            "/etc/rkcached/manifest.yaml",
            f"version: 1\nengine: {engine}\nmodels:\n  m:\n"
            "    path: /var/lib/rkcached-models/m.model\n"
            f"    params: {{max_context_len: 4096{params}}}\n    prompts: {{{names}}}\n",
        )

    def curl(
        self, path: str, body: Any = None, *, user: str = "", admin: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """Status and answer of one request through the socket.

        Status 0 if curl could not connect.
        """
        command = ["curl", "-sS", "--max-time", "50", "-w", "\n%{http_code}"]
        command += ["--unix-socket", ADMIN_SOCKET if admin else SOCKET]
        if body is not None:
            command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
        done = self.run(*command, f"http://localhost{path}", user=user, code=None)
        if done.returncode:
            return 0, {"curl": done.stderr.strip()}
        answer, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(answer)

    def ask(
        self, model: str, question: str = "hello", *, user: str = "", **more: Any
    ) -> dict[str, Any]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8,
            **more,
        }
        status, answer = self.curl("/v1/chat/completions", body, user=user)
        assert status == 200, answer
        return answer

    def status(self) -> dict[str, Any]:
        status, answer = self.curl("/v1/status")
        assert status == 200, answer
        return answer

    def states(self) -> dict[str, str]:
        return {p["prompt"]: p["state"] for p in self.status()["prompts"]}

    def wait_line(self, wanted: str, deadline_s: float = DEADLINE_S) -> str:
        """Wait until the line that `systemctl status` shows has this in it."""

        def there() -> str | None:
            line = self.show("StatusText")
            return line if wanted in line else None

        found: str = wait_until(
            there, lambda: f"{wanted!r} in {self.systemctl('status', UNIT, code=None)}", deadline_s
        )
        return found

    def tidy(self) -> None:
        """As after a fresh installation, with the sockets listening and nothing in the store."""
        self.systemctl("stop", UNIT, "rkcached.socket", "rkcached-admin.socket", code=None)
        self.run("rm", "-rf", f"/etc/systemd/system/{UNIT}.d")
        self.run(
            "sh",
            "-c",
            f"rm -rf {STORE}/* {STORE}/.[!.]* /var/lib/rkcached/* /etc/rkcached/prompts/*",
        )
        self.systemctl("daemon-reload")
        self.systemctl("reset-failed", code=None)
        self.systemctl("start", "rkcached.socket")

    def worker_pids(self) -> list[int]:
        listed = self.run("pgrep", "-P", str(self.main_pid), code=None).stdout
        return [int(pid) for pid in listed.split()]


def make(machine: Machine, goal: str, **variables: str) -> str:
    """`make install` or `make uninstall` in the machine.

    Without a network, packages come from /wheels.
    """
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
    given = [
        f"{name}={value}" for name, value in {"PYTHON": "/usr/bin/python3", **variables}.items()
    ]
    return machine.run("make", "-C", "/src", goal, *given, **pip).stdout
