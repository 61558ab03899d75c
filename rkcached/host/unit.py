"""The daemon's installed unit: what it runs as, and how to run a command with its eyes.

Facts come from systemd itself, so an administrator's drop-ins count. Where there is no systemd, no
unit, or no answer, nothing is known, and a command looks with the eyes of who runs it.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkcached.host import isolated, places
from rkcached.host.access import GROUP, HOMES, Mount, hiding, how_to_join

NAME: Final = "rkcached.service"
MARK: Final = "RKCACHED_AS_SERVICE"
"""Set for a command that looks with the service's eyes: the daemon's pid, 0 if it does not run."""

_FOLDERS: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
_SANDBOX: Final = (
    *("User", "Group", "SupplementaryGroups", "ProtectHome", "PrivateTmp", "InaccessiblePaths"),
    *("BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem"),
)
_FACTS: Final = ("LoadState", "MainPID", "ExecStart", "Environment", "EnvironmentFiles", *_SANDBOX)
_BIND: Final = re.compile(r"(-?/.*?):(/.*?):(rbind|norbind)(?: |$)")
_ANSWER_S: Final = 5.0
_OF_TERMINALS: Final = (
    "TERM",
    "COLORTERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "LANG",
    "LC_ALL",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Its properties, by systemd."""

    program: str
    pid: int
    """The daemon's process; 0 while it does not run."""
    places: Mapping[str, Path]
    """The places that its command line names: manifest, cache_dir, state_dir."""
    sandbox: Mapping[str, str]
    """The properties that decide what it sees, as systemd writes them."""

    def uses(self, **places: Path) -> bool:
        """Whether these are its manifest and its store."""
        return all(self.places[name] == path for name, path in places.items())

    def hides(self, path: Path | str) -> str:
        """The place that would hide `path` from it; empty if nothing does.

        Modes are not looked at.
        """
        return hiding(os.path.realpath(path), _mounts(self.sandbox))

    def command(self, words: Sequence[str]) -> list[str]:
        """The command with which root runs `rkcached WORDS` as its user, in its sandbox."""
        if self.pid:
            return [
                "nsenter",
                f"--target={self.pid}",
                "--mount",
                "--wd=/",
                *self._as_user(),
                self.program,
                *words,
            ]

        settings = [
            f"--property={name}={_as_written(name, value)}"
            for name, value in self.sandbox.items()
            if value
        ]

        variables = [
            f"--setenv={name}={os.environ[name]}" for name in _OF_TERMINALS if name in os.environ
        ]
        run = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *settings, *variables]
        return [*run, f"--setenv={MARK}=0", self.program, *words]

    def _as_user(self) -> list[str]:
        """Errors: KeyError for a user or group that is not there."""
        user = pwd.getpwnam(self.sandbox.get("User") or "root")
        group = user.pw_gid
        if named := self.sandbox.get("Group"):
            group = grp.getgrnam(named).gr_gid

        more = [
            grp.getgrnam(name).gr_gid
            for name in self.sandbox.get("SupplementaryGroups", "").split()
        ]
        groups = ",".join(map(str, dict.fromkeys([*os.getgrouplist(user.pw_name, group), *more])))
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={group}", f"--groups={groups}"]


def become_it(words: Sequence[str], **places: Path) -> None:
    """For root and the unit's places: run `rkcached WORDS` with its eyes, and do not return.

    It returns if that is not wanted or not possible: then the caller looks with its own eyes.
    """
    if os.geteuid() != 0:
        return

    unit = installed()
    if unit is None or not unit.uses(**places):
        return

    with contextlib.suppress(KeyError, OSError):
        command = unit.command(words)
        environment = {**isolated.environment(), MARK: str(unit.pid)}
        os.execvpe(command[0], command, environment)  # noqa: S606 - a list, no shell


def advice(manifest: Path, command: str) -> str:
    """The next step of a person whose `command` may not read the files of the unit's manifest.

    Empty for another manifest, for root and for who looks with the service's eyes.
    """
    if os.geteuid() == 0:
        return ""

    unit = installed()
    if unit is None or not unit.uses(manifest=manifest):
        return ""

    with_sudo = f"run it with sudo: `sudo {command}`"
    if joining := how_to_join(unit.sandbox.get("Group") or GROUP):
        return f"{with_sudo}; or {joining}"
    return with_sudo


def installed() -> Unit | None:
    """The installed unit; None if there is none, or no systemd. Blocks for 10 to 20 ms."""
    if os.environ.get(MARK) or not Path("/run/systemd/system").is_dir():
        return None
    if not any(Path(folder, "systemd/system", NAME).exists() for folder in _FOLDERS):
        return None

    command = ["systemctl", "show", NAME, "--property", ",".join(_FACTS)]
    try:
        shown = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=True,
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None

    return unit_of(dict(line.partition("=")[::2] for line in shown.splitlines()))


def unit_of(facts: Mapping[str, str]) -> Unit | None:
    """The unit with the properties that systemd shows; None if it is not loaded."""
    match = re.match(r"\{ path=(.+?) ; argv\[\]=(.*?) ;", facts.get("ExecStart", ""))
    if facts.get("LoadState") != "loaded" or match is None:
        return None

    variables = _variables(facts)
    for name, value in re.findall(r" --(manifest|cache-dir|state-dir)[ =](\S+)", match[2]):
        variables[f"RKCACHED_{name.replace('-', '_').upper()}"] = value
    defaults = {
        "manifest": places.SYSTEM_MANIFEST,
        "cache_dir": places.SYSTEM_CACHE,
        "state_dir": places.SYSTEM_STATE,
    }
    named = {
        name: Path(variables.get(f"RKCACHED_{name.upper()}") or place)
        for name, place in defaults.items()
    }
    sandbox = {name: facts.get(name, "") for name in _SANDBOX}

    return Unit(program=match[1], pid=int(facts.get("MainPID") or 0), places=named, sandbox=sandbox)


def _variables(facts: Mapping[str, str]) -> dict[str, str]:
    """The variables of its environment; files come after, as with systemd.

    A file that cannot be read is skipped.
    """
    words = _words(facts.get("Environment", ""))
    for name in re.findall(r"(/.*?) \(ignore_errors=\w+\)", facts.get("EnvironmentFiles", "")):
        try:
            lines = Path(name).read_text(errors="replace").splitlines()
        except OSError:
            continue

        for line in lines:
            if not line.lstrip().startswith(("#", ";")):
                words += _words(line)

    return dict(word.partition("=")[::2] for word in words)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an open quote
        return []


def _mounts(sandbox: Mapping[str, str]) -> list[Mount]:
    """The mounts in its sandbox: what is hidden, and what is shown below that."""
    closed: list[str] = []
    if sandbox["ProtectHome"] in ("yes", "tmpfs"):
        closed += HOMES
    if sandbox["PrivateTmp"] not in ("", "no"):
        closed += ["/tmp", "/var/tmp"]  # noqa: S108 - compared only

    shown = [bind[1] for bind in _BIND.findall(sandbox["BindPaths"])]
    shown += [bind[1] for bind in _BIND.findall(sandbox["BindReadOnlyPaths"])]
    if sandbox["ProtectHome"] == "yes":
        homes = list(map(_closed, HOMES))
        shown = [path for path in shown if not hiding(path, homes)]

    paths = [path.lstrip("-+") for path in _words(sandbox["InaccessiblePaths"])]
    return [*map(_closed, closed), *(Mount(path, path, "") for path in shown), *map(_closed, paths)]


def _as_written(name: str, value: str) -> str:
    """A property as a unit file has it; systemd shows paths of binds without their quotes."""
    if name not in ("BindPaths", "BindReadOnlyPaths"):
        return value
    return " ".join(f'"{source}":"{place}":{kind}' for source, place, kind in _BIND.findall(value))


def _closed(place: str) -> Mount:
    return Mount("/systemd/inaccessible/dir", place, "")
