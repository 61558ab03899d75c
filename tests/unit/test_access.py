"""Why a file may not be read, and what lets it.

By the mounts of a sandbox, and by modes with another user's eyes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkcached.host import access
from rkcached.host.access import Refusal, advising, hidden, hiding, mounts_in, refusal

# As the kernel shows it to a process of a unit with systemd 252.
ROOT = "439 1 0:40 / / ro,relatime shared:1 - overlay overlay rw"
CLOSED = """\
488 439 0:47 /systemd/inaccessible/dir /home ro,nosuid,nodev,noexec shared:185 master:6 \
- tmpfs tmpfs rw,mode=755
489 439 0:47 /systemd/inaccessible/dir /root ro,nosuid,nodev,noexec shared:186 master:6 \
- tmpfs tmpfs rw,mode=755
473 464 0:47 /systemd/inaccessible/dir /run/user ro,nosuid shared:171 master:6 \
- tmpfs tmpfs rw,mode=755"""
IN_A_CONTAINER = (
    "488 439 0:47 /host/inaccessible/dir /home ro,nosuid,nodev,noexec - tmpfs tmpfs rw,mode=755"
)
EMPTIED = """\
488 439 0:62 / /home rw,relatime shared:185 - tmpfs tmpfs rw
490 439 0:63 / /root rw,relatime shared:187 - tmpfs tmpfs rw
473 464 0:64 / /run/user rw,relatime shared:171 - tmpfs tmpfs rw"""
OPENED = (
    "489 488 0:40 /home/me/my\\040models /home/me/my\\040models ro,relatime shared:186 - "
    "ext4 /dev/sda1 rw"
)
OWN_TMP = """\
474 440 0:43 /systemd-private-ea2c-rkcached.service-8CP9zJ/tmp /tmp rw,nosuid shared:139 \
- tmpfs tmpfs rw
490 439 0:40 /var/tmp/systemd-private-ea2c-rkcached.service-8eWmWM/tmp /var/tmp rw \
- ext4 /dev/sda1 rw"""


@pytest.mark.parametrize(
    ("mounts", "path", "place"),
    [
        ([CLOSED], "/home/me/m.gguf", "/home"),
        ([CLOSED], "/root", "/root"),
        ([CLOSED], "/run/user/1000/m", "/run/user"),
        ([CLOSED], "/homeless/m.gguf", ""),
        ([CLOSED], "/var/lib/m.gguf", ""),
        ([IN_A_CONTAINER], "/home/me/m.gguf", "/home"),
        ([EMPTIED], "/home/me/m.gguf", "/home"),
        ([EMPTIED, OPENED], "/home/me/my models/m.gguf", ""),
        ([EMPTIED, OPENED], "/home/me/others/m.gguf", "/home"),
        ([EMPTIED.splitlines()[0]], "/home/me/m.gguf", ""),  # a machine whose /home is in memory
        ([OWN_TMP], "/tmp/m.gguf", "/tmp"),
        ([OWN_TMP], "/var/tmp/m.gguf", "/var/tmp"),
        (["474 440 0:43 / /tmp rw,nosuid - tmpfs tmpfs rw"], "/tmp/m.gguf", ""),
        ([], "/home/me/m.gguf", ""),
    ],
)
def test_what_a_sandbox_hides(mounts: list[str], path: str, place: str) -> None:
    """Each way that systemd has, what a drop-in opens below it, and what only looks alike."""
    assert hiding(path, mounts_in("\n".join([ROOT, *mounts]))) == place


def test_the_words_name_the_place_and_the_drop_in() -> None:
    """The folder is quoted as systemd reads it."""
    said = hidden("/home", Path("/home/me/models"))
    assert said.reason == "/home is hidden from the service"
    for words in (
        "systemctl edit rkcached",
        "ProtectHome=tmpfs",
        "BindReadOnlyPaths=/home/me/models,",
        "restart",
    ):
        assert words in said.hint
    assert (
        'BindReadOnlyPaths="/home/me/50%% more",' in hidden("/home", Path("/home/me/50% more")).hint
    )
    assert "BindReadOnlyPaths" not in hidden("/tmp", Path("/tmp/x")).hint
    assert "InaccessiblePaths=" in hidden("/srv/secret", Path("/srv/secret/x")).hint


# Modes, as another user sees them


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, whatever TMPDIR is."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    (folder / "in").mkdir()
    (folder / "in/p.md").write_text("Be brief.")
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def daemon(number: int = 1, others: tuple[int, ...] = ()) -> Iterator[None]:
    """As the user daemon, in its group alone. Every Debian has both; 2 is the user bin."""
    if os.geteuid() != 0:
        pytest.skip("only root can look as another user")
    groups = os.getgroups()
    os.setgroups(others)
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def refused(path: Path, *, folder: bool = False) -> Refusal | None:
    with daemon():
        try:
            sorted(path.iterdir()) if folder else path.read_bytes()
        except OSError as error:
            return refusal(path, error, folder=folder)
    return None


def test_a_file_of_root_alone(place: Path) -> None:
    """The command makes it readable: whoever does what the hint says is rid of the trouble."""
    file = place / "in/p.md"
    file.chmod(0o600)
    assert refused(file) == (
        "permission denied",
        f"`sudo chgrp daemon {file} && sudo chmod 640 {file}`",
    )
    os.chown(file, 0, 1)
    file.chmod(0o640)
    assert refused(file) is None


def test_a_file_of_the_group_without_its_rights(place: Path) -> None:
    """Only the right is missing."""
    file = place / "in/p.md"
    os.chown(file, 0, 1)
    file.chmod(0o600)
    assert refused(file) == ("permission denied", f"`sudo chmod g+r {file}`")


def test_the_folder_that_refuses_is_named(place: Path) -> None:
    """Also where the file itself is for everyone, and behind a link."""
    (place / "in").chmod(0o700)
    link = place / "link.md"
    link.symlink_to("in/p.md")
    for path in (place / "in/p.md", link):
        assert refused(path) == (
            f"permission denied by the folder {place}/in",
            f"`sudo chmod o+x {place}/in`",
        )
    os.chown(place / "in", 0, 1)
    assert refused(link) == (
        f"permission denied by the folder {place}/in",
        f"`sudo chmod g+x {place}/in`",
    )


def test_a_folder_that_may_not_be_listed(place: Path) -> None:
    """It needs one right more than a file."""
    (place / "in").chmod(0o711)
    hint = f"`sudo chgrp daemon {place}/in && sudo chmod g+rx {place}/in`"
    assert refused(place / "in", folder=True) == ("permission denied", hint)


# The service's files, as a person sees them


@pytest.fixture
def of_daemon(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The group daemon is that of the service, and its configuration is in the place."""
    monkeypatch.setattr(access, "GROUP", "daemon")
    monkeypatch.setattr(access, "_CONFIGURATION", str(place))
    return place


def refused_to_bin(path: Path, *others: int) -> Refusal | None:
    with daemon(2, others):
        try:
            path.read_bytes()
        except OSError as error:
            return refusal(path, error)
    return None


def test_nobody_takes_a_file_from_the_service(of_daemon: Path) -> None:
    """A person was told to give it to his own group, and to open the folder for everybody."""
    file = of_daemon / "in/p.md"
    join = "`sudo adduser bin daemon`, then log in again"
    os.chown(file, 0, 1)
    file.chmod(0o640)
    assert refused_to_bin(file) == ("permission denied", join)
    os.chown(of_daemon / "in", 0, 1)
    (of_daemon / "in").chmod(0o750)
    assert refused_to_bin(file) == (f"permission denied by the folder {of_daemon}/in", join)
    assert refused_to_bin(file, 1) is None


def test_a_member_asks_what_the_service_sees(of_daemon: Path) -> None:
    """The service may not read it either, or it is the service's own."""
    file = of_daemon / "in/p.md"
    file.chmod(0o640)
    hint = "`sudo rkcached check` says what the service sees"
    assert refused_to_bin(file, 1) == ("permission denied", hint)
    assert refused(file) == (
        "permission denied",
        f"`sudo chgrp daemon {file} && sudo chmod 640 {file}`",
    )


def test_the_advice_of_a_command_comes_first(place: Path) -> None:
    """It is asked for at a refusal only."""
    asked = []

    def advice() -> str:
        asked.append(True)
        return "use sudo"

    with advising(advice):
        assert refused(place / "in/p.md") is None
        assert asked == []
        (place / "in/p.md").chmod(0o600)
        assert refused(place / "in/p.md") == ("permission denied", "use sudo")
    assert "chgrp" in str(refused(place / "in/p.md"))


def test_what_is_not_there_is_refused_by_nobody(place: Path) -> None:
    """The caller says that it is missing."""
    assert refused(place / "nowhere") is None
    assert refused(place / "nowhere/p.md") is None
    assert refusal(place, OSError(5, "Input/output error")) is None
