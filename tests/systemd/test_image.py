"""`make install DESTDIR=...`.

An image that is made while it does not run starts by itself, whatever made it.

The image is this machine's root, or the one that RKCACHED_IMAGE_ROOT names, as mmdebstrap makes
them with systemd, Python and curl.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import UNIT, Machine

from tests.systemd.conftest import REPOSITORY, lack_of_machine
from tests.waiting import wait_until

# Wheels are downloaded, and a machine boots.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.long]

ROOT = Path(os.environ.get("RKCACHED_IMAGE_ROOT", "/"))
MANIFEST = """\
version: 1
engine: {kind: memory}
models:
  m:
    path: /srv/models/m.model
    prompts_from: prompts/*.md
"""


@pytest.fixture(scope="module")
def image(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Not booted.

    Made with a Python that is not the image's, and with a systemctl that claims to be of the
    future.
    """
    if lack := lack_of_machine():
        pytest.skip(lack)
    tools = tmp_path_factory.mktemp("tools")
    (tools / "systemctl").write_text("#!/bin/sh\necho systemd 999\n")
    (tools / "systemctl").chmod(0o755)
    for forbidden in ("chown", "systemd-sysusers", "systemd-tmpfiles", "udevadm"):
        (tools / forbidden).write_text(f"#!/bin/sh\necho {forbidden} must not run >&2\nexit 1\n")
        (tools / forbidden).chmod(0o755)
    machine = Machine(tmp_path_factory.mktemp("image"), {}, lower=ROOT)
    try:
        machine.mount()
        # A root of its own kind needs wheels of its own kind.
        own = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)} if Path("/") == ROOT else {}
        path = f"{tools}:{os.environ['PATH']}"
        done = subprocess.run(
            [
                "make",
                "-C",
                str(REPOSITORY),
                "install",
                f"DESTDIR={machine.root}",
                f"PYTHON={sys.executable}",
            ],
            env={**os.environ, **own, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"systemctl --root={machine.root} enable rkcached" in done.stdout
        yield machine
    finally:
        machine.close()


def test_nothing_in_the_image_is_of_the_machine_that_made_it(image: Machine) -> None:
    """Its Python is the image's, no path of the maker is in it.

    The unit has what the image's systemd knows.
    """
    home = image.root / "usr/local/lib/rkcached"
    (packages,) = home.glob("lib/python3.*/site-packages")
    version = packages.parent.name
    assert (home / "bin/python").readlink() == Path("/usr/bin") / version
    assert (image.root / "usr/bin" / version).is_file()
    traces = [str(image.root).encode(), str(REPOSITORY).encode()]
    small = [
        file
        for file in home.rglob("*")
        if file.suffix in (".py", ".cfg", ".json", ".pyc", "") and file.is_file()
    ]
    assert [file for file in small if any(trace in file.read_bytes() for trace in traces)] == []
    (library,) = image.root.glob("usr/lib/*/systemd/libsystemd-shared-*.so")
    found = re.search(r"shared-(\d+)", library.name)
    assert found is not None
    unit = image.root / f"etc/systemd/system/{UNIT}.d/backoff.conf"
    assert unit.exists() is (int(found[1]) >= 254)


def test_the_image_starts(image: Machine) -> None:
    """At its first boot the user comes, may read what root configured.

    The prompt becomes fresh.
    """
    etc, models = image.root / "etc/rkcached", image.root / "srv/models"
    (etc / "manifest.yaml").write_text(MANIFEST)
    (etc / "prompts/mine.md").write_text("You are the appliance.\n" * 20)
    (etc / "prompts/mine.md").chmod(0o640)
    models.mkdir(parents=True)
    (models / "m.model").write_text(json.dumps({"rkcached_memory_model": 1}))
    models.chmod(0o755)
    assert "rkcached" not in (image.root / "etc/passwd").read_text()
    subprocess.run(
        ["systemctl", f"--root={image.root}", "enable", UNIT], check=True, capture_output=True
    )
    image.boot()
    wait_until(
        lambda: image.systemctl("is-active", UNIT, code=None).strip() == "active",
        lambda: str(image.journal()),
    )
    wait_until(
        lambda: image.states() == {"assistant": "fresh", "mine": "fresh"},
        lambda: str(image.status()),
    )
    assert image.ask("m/mine")["rkcached"]["state"] == "hit"
    files = ["/etc/rkcached", "/etc/rkcached/manifest.yaml", "/etc/rkcached/prompts/mine.md"]
    shown = image.run("stat", "-c", "%A %U:%G", *files).stdout.splitlines()
    assert shown == [
        "drwxr-x--- root:rkcached",
        "-rw-r----- root:rkcached",
        "-rw-r----- root:rkcached",
    ]
    assert "Unknown key" not in image.run("journalctl", "-b", "--no-pager").stdout
