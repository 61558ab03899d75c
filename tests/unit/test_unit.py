"""What systemd says of the daemon's unit, and what follows.

Whose manifest it is, what it hides, how to look as it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.host.unit import Unit, unit_of

FACTS = {
    "LoadState": "loaded",
    "MainPID": "0",
    "ExecStart": "{ path=/usr/local/bin/rkcached ; argv[]=/usr/local/bin/rkcached run ; "
    "ignore_errors=no ; pid=0 }",
    "Environment": "",
    "EnvironmentFiles": "",
    "User": "root",
    "Group": "daemon",
    "SupplementaryGroups": "games",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "InaccessiblePaths": "",
    "BindPaths": "",
    "BindReadOnlyPaths": "",
    "TemporaryFileSystem": "",
}
OPENED = {"BindReadOnlyPaths": "/home/me/my models:/home/me/my models:rbind /opt/a:/opt/a:rbind"}


def unit(**facts: str) -> Unit:
    found = unit_of({**FACTS, **facts})
    assert found is not None
    return found


def test_without_a_unit_there_is_nothing_to_say() -> None:
    """Nor where it is not loaded."""
    assert unit_of({}) is None
    assert unit_of({**FACTS, "LoadState": "not-found"}) is None
    assert unit_of({**FACTS, "ExecStart": ""}) is None


def test_its_places(tmp_path: Path) -> None:
    """The defaults, an Environment=, a file of it.

    Or the command line, each over the ones before.
    """
    assert unit().uses(
        manifest=Path("/etc/rkcached/manifest.yaml"), cache_dir=Path("/var/cache/rkcached")
    )
    assert not unit().uses(manifest=Path("/home/me/manifest.yaml"))
    moved = unit(Environment='A=b "RKCACHED_MANIFEST=/srv/a b.yaml"')
    assert moved.uses(manifest=Path("/srv/a b.yaml"), state_dir=Path("/var/lib/rkcached"))
    (tmp_path / "defaults").write_text(
        "# RKCACHED_MANIFEST=/no\nRKCACHED_CACHE_DIR='/srv/c'\nRKCACHED_MANIFEST=/srv/f\n"
    )
    files = f"{tmp_path}/nowhere (ignore_errors=yes) {tmp_path}/defaults (ignore_errors=yes)"
    from_file = unit(Environment="RKCACHED_MANIFEST=/srv/e", EnvironmentFiles=files)
    assert from_file.uses(manifest=Path("/srv/f"), cache_dir=Path("/srv/c"))
    line = FACTS["ExecStart"].replace(" run ;", " run --manifest /srv/g --cache-dir=/srv/d ;")
    assert unit(ExecStart=line).uses(manifest=Path("/srv/g"), cache_dir=Path("/srv/d"))


@pytest.mark.parametrize(
    ("facts", "path", "place"),
    [
        ({}, "/home/me/m.gguf", "/home"),
        ({}, "/root/m.gguf", "/root"),
        ({}, "/tmp/m.gguf", "/tmp"),
        ({}, "/var/lib/m.gguf", ""),
        ({"ProtectHome": "read-only", "PrivateTmp": "no"}, "/home/me/m.gguf", ""),
        ({"ProtectHome": "no", "PrivateTmp": "no"}, "/tmp/m.gguf", ""),
        ({"ProtectHome": "tmpfs"}, "/home/me/m.gguf", "/home"),
        ({"ProtectHome": "tmpfs", **OPENED}, "/home/me/my models/m.gguf", ""),
        ({"ProtectHome": "tmpfs", **OPENED}, "/home/me/m.gguf", "/home"),
        (
            {"ProtectHome": "yes", **OPENED},
            "/home/me/my models/m.gguf",
            "/home",
        ),  # systemd mounts nothing there
        ({"InaccessiblePaths": '-/mnt "/a b"'}, "/a b/m.gguf", "/a b"),
        ({"InaccessiblePaths": "-/mnt"}, "/mnt/m.gguf", "/mnt"),
    ],
)
def test_what_it_would_hide(facts: dict[str, str], path: str, place: str) -> None:
    """As the mounts of the running one will be."""
    assert unit(**facts).hides(path) == place


def test_a_command_with_its_eyes() -> None:
    """In the running daemon's place, as its user.

    Else in a unit of its own, in the same sandbox.
    """
    running = unit(MainPID="42").command(["check"])
    assert running[:4] == ["nsenter", "--target=42", "--mount", "--wd=/"]
    assert running[4:7] == ["setpriv", "--reuid=0", "--regid=1"]
    assert running[-2:] == ["/usr/local/bin/rkcached", "check"]
    stopped = unit(**OPENED).command(["explain", "m/a"])
    assert stopped[0] == "systemd-run"
    binds = '"/home/me/my models":"/home/me/my models":rbind "/opt/a":"/opt/a":rbind'
    assert f"--property=BindReadOnlyPaths={binds}" in stopped
    assert "--property=ProtectHome=yes" in stopped
    assert stopped[-3:] == ["/usr/local/bin/rkcached", "explain", "m/a"]
