"""Prompt caches that one daemon built and another one imports, by the commands."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, need, tmpfs

from rkcached.store import signatures
from tests.waiting import wait_until

PROMPTS = "{a: prompts/a.md, b: prompts/b.md}"
MEMBERS = ["bundle.json", "bundle.json.minisig", "m/a.bin", "m/a.json", "m/a.memory_cache"]


class Boards:
    """The files of a machine that built, and of those that import."""

    def __init__(self, builder: Workspace) -> None:
        self.builder = builder
        self.signed = builder.root / "signed.tar"
        self.unsigned = builder.root / "unsigned.tar"
        made = builder.cli("bundle-key", "key", "--json")
        self.key = json.loads(made.stdout)
        self.answer = builder.ask("m/a")


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Boards:
    """A daemon built the prompts a and b; their bundle, with a signature and without."""
    builder = Workspace(tmp_path_factory.mktemp("builder"))
    declare(builder)
    builder.start()
    builder.wait_settled()
    boards = Boards(builder)
    builder.cli("export", "-o", "signed.tar", "--sign", "key")
    assert builder.stop() == 0
    builder.cli("export", "-o", "unsigned.tar")  # it needs no daemon
    return boards


def declare(space: Workspace, prompts: str = PROMPTS, trust: str = "") -> None:
    """Builds begin half a day from now, so what is fresh was imported."""
    space.memory_model(prefill_us_per_token=2000)
    space.write("prompts/a.md", "You are prompt A.\n")
    space.write("prompts/b.md", "You are prompt B.\n")
    hour = time.localtime().tm_hour
    later = f"{(hour + 12) % 24:02}:00-{(hour + 13) % 24:02}:00"
    build = f'build: {{window: "{later}"}}, ' if trust else ""
    space.declare(prompts, top=f"cache: {{{build}trust: [{trust}]}}")


@pytest.fixture
def importer(workspace: Workspace, boards: Boards) -> Workspace:
    """A daemon that trusts the builder and has built nothing."""
    declare(workspace, trust=f"{boards.key['key']} build-farm")
    workspace.start()
    return workspace


def outcomes(space: Workspace, bundle: Path, *options: str, code: int = 0) -> dict[str, str]:
    """By prompt: what became of it, and why."""
    done = space.cli("import", str(bundle), "--json", *options, code=code)
    prompts = json.loads(done.stdout)["prompts"]
    return {one["prompt"]: f"{one['result']}: {one['reason']}" for one in prompts}


def nothing_is_left(space: Workspace) -> None:
    assert {one["state"] for one in space.status()["prompts"]} == {"missing"}
    assert [path for path in space.cache.glob("m/**/*") if path.is_file()] == []


def test_a_round_trip(importer: Workspace, boards: Boards) -> None:
    """The importing daemon is fresh without a build, answers alike, and says whose caches it has.

    After a restart they are what they were; what is fresh is not imported again.
    """
    done = importer.cli("import", str(boards.signed))
    assert done.stdout == "imported  m/a\nimported  m/b\n2 imported, 0 skipped, 0 failed\n"
    status = importer.status()
    assert status["reconcile"]["builds"] == 0
    assert importer.built() == []
    for one in status["prompts"]:
        assert one["state"] == "fresh"
        assert one["artifact"]["imported"]["signed_by"] == "build-farm"
        assert time.time() - one["artifact"]["imported"]["at"] < 60
        assert one["artifact"]["verified"] == "exact"
    answer = importer.ask("m/a")
    assert answer["rkcached"]["state"] == "hit"
    assert answer["choices"] == boards.answer["choices"]

    importer.stop()
    importer.start()
    assert importer.prompt("a")["state"] == "fresh"
    assert outcomes(importer, boards.signed) == dict.fromkeys("ab", "skipped: fresh already")
    shown = importer.cli("explain", "m/a").stdout
    assert "imported" in shown
    assert "build-farm" in shown
    assert "1 of 1 good" in importer.cli("verify", "--prove", "m/a").stdout


@pytest.mark.long
def test_an_import_goes_before_builds(workspace: Workspace, boards: Boards) -> None:
    """Builds may begin at any time here. One that runs is stopped, and goes on afterwards.

    It is not stopped for a bundle that has nothing to import.
    """
    declare(workspace, PROMPTS.replace("{", "{long: long.md, "))
    workspace.write("long.md", "Be brief. " * 400)  # its build takes 8 s
    workspace.start()
    workspace.wait_state("long", "building")
    found = outcomes(workspace, boards.unsigned, "--prove")
    assert found == dict.fromkeys("ab", "imported: ")
    assert workspace.built() == []

    workspace.wait_state("long", "building")
    found = outcomes(workspace, boards.unsigned, "--prove")
    assert found == dict.fromkeys("ab", "skipped: fresh already")
    started = "build started model=m prompt=long"
    assert workspace.log_text().count(started) == 2


@pytest.mark.long
def test_what_is_not_declared_is_skipped_with_the_reason(
    importer: Workspace, boards: Boards
) -> None:
    importer.write("prompts/a.md", "You are another prompt A.\n")
    manifest = importer.manifest.read_text()
    importer.write("manifest.yaml", manifest.replace(", b: prompts/b.md", ", c: prompts/b.md"))
    found = outcomes(importer, boards.signed)
    assert found["a"] == (
        "skipped: built from something else than is declared here: its text changed"
    )
    assert found["b"] == "imported: as m/c"  # by what it is, not by its name


def test_without_trust_nothing_is_imported(importer: Workspace, boards: Boards) -> None:
    """Unless each prompt cache is compared with a prefill."""

    def refused(bundle: Path) -> str:
        done = importer.cli("import", str(bundle), code=65)
        nothing_is_left(importer)
        return done.stderr

    assert "the bundle is not signed" in refused(boards.unsigned)

    other = boards.builder.root / "other.tar"
    boards.builder.cli("bundle-key", "other", "--json")
    boards.builder.cli("export", "m/a", "-o", str(other), "--sign", "other")
    said = refused(other)
    assert "which is not in cache.trust" in said
    assert "--prove" in said

    importer.manifest.chmod(0o666)
    assert f"others than its owner can write to {importer.manifest}" in refused(boards.signed)
    importer.manifest.chmod(0o644)
    over_everyone = importer.request("POST", "/v1/import", content=b"")
    assert over_everyone.status_code == 403

    assert outcomes(importer, other, "--prove") == {"a": "imported: "}
    artifact = importer.prompt("a")["artifact"]
    assert artifact["imported"]["signed_by"] == ""
    assert artifact["cold_ttft_ms"] > 0


Change = Callable[[dict[str, bytes]], None]


def rebuilt(bundle: Path, target: Path, change: Change) -> Path:
    """A bundle with other contents under the names of its members."""
    members = {}
    with tarfile.open(bundle) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            members[member.name] = stream.read()
    change(members)
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return target


def listed(members: dict[str, bytes]) -> Any:
    return json.loads(members["bundle.json"])


def put(members: dict[str, bytes], name: str, data: bytes) -> None:
    """Replace a member, and say so in the list, as who signs it can."""
    contents = listed(members)
    for prompt in contents["prompts"]:
        for kind in ("text", "sidecar", "cache"):
            if prompt[kind]["name"] == name:
                prompt[kind]["size_bytes"] = len(data)
                prompt[kind]["sha256"] = hashlib.sha256(data).hexdigest()
    members[name] = data
    members["bundle.json"] = json.dumps(contents).encode()


def sign(members: dict[str, bytes], boards: Boards) -> None:
    key = signatures.read_secret_key(boards.builder.root / "key")
    members["bundle.json.minisig"] = signatures.sign(key, members["bundle.json"], "of a test")


def test_hostile_bundles(importer: Workspace, boards: Boards, tmp_path: Path) -> None:
    """Whoever wrote them, also somebody who is trusted: nothing wrong is published or left."""
    target = tmp_path / "hostile.tar"

    def another_prompts_state(members: dict[str, bytes]) -> None:
        put(members, "m/a.memory_cache", members["m/b.memory_cache"])
        sign(members, boards)

    def another_models_state(members: dict[str, bytes]) -> None:
        """It is of the right text, and its numbers are of another model."""
        state = bytearray(members["m/a.memory_cache"])
        state[-8:] = bytes(8)
        put(members, "m/a.memory_cache", bytes(state))
        sign(members, boards)

    def noise(members: dict[str, bytes]) -> None:
        put(members, "m/a.memory_cache", b"no state at all" * 100)
        sign(members, boards)

    def forged_sidecar(members: dict[str, bytes]) -> None:
        """It is not believed, whatever it says: the daemon writes its own."""
        forged = members["m/a.json"].replace(b'"tokens": ', b'"tokens": 9')
        assert forged != members["m/a.json"]
        put(members, "m/a.json", forged)
        sign(members, boards)

    rebuilt(boards.signed, target, another_prompts_state)
    assert "it is the cache of another text" in outcomes(importer, target, code=65)["a"]
    assert importer.prompt("a")["state"] == "missing"
    assert importer.prompt("b")["state"] == "fresh"  # the fault of one blames no other

    rebuilt(boards.signed, target, another_models_state)
    assert "answers otherwise" in outcomes(importer, target, code=65)["a"]
    assert "answers otherwise" in outcomes(importer, target, "--prove", code=65)["a"]
    rebuilt(boards.signed, target, noise)
    assert outcomes(importer, target, code=65)["a"].startswith("failed: ")

    def refused(change: Change, why: str) -> None:
        rebuilt(boards.signed, target, change)
        assert why in importer.cli("import", str(target), code=65).stderr

    def changed_byte(members: dict[str, bytes]) -> None:
        state = bytearray(members["m/a.memory_cache"])
        state[100] ^= 1
        members["m/a.memory_cache"] = bytes(state)

    rebuilt(boards.signed, target, changed_byte)
    assert "is not what the bundle lists" in outcomes(importer, target, code=65)["a"]
    refused(
        lambda members: members.update({"bundle.json": members["bundle.json"] + b" "}),
        "does not fit the bundle",
    )
    assert importer.prompt("a")["state"] == "missing"
    assert not list(importer.cache.glob("m/a.*"))

    rebuilt(boards.signed, target, forged_sidecar)
    assert outcomes(importer, target)["a"] == "imported: "
    assert importer.prompt("a")["artifact"]["tokens"] < 1000
    assert importer.prompt("a")["state"] == "fresh"


@pytest.mark.long
def test_two_imports_and_one_that_breaks_off(importer: Workspace, boards: Boards) -> None:
    """The first one ends without a trace when its client goes; the next one waits and is whole."""
    data = boards.signed.read_bytes()
    half = data[: data.index(b"m/a.memory_cache\0") + 600]  # within a's prompt cache
    client = subprocess.Popen(
        importer.command("import", "-"),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=importer.environment,
        cwd=importer.root,
    )
    assert client.stdin is not None
    client.stdin.write(half)
    client.stdin.flush()
    staged = importer.cache / "m" / ".staging"
    wait_until(lambda: staged.is_dir() and list(staged.iterdir()), "a prompt cache is staged")
    assert "builds wait for an import" in importer.status()["summary"]
    other = importer.popen("import", str(boards.signed), stdout=subprocess.PIPE, text=True)
    client.send_signal(signal.SIGINT)
    assert client.wait(30) == 130
    client.stdin.close()
    said, _ = other.communicate(timeout=60)
    assert said.endswith("2 imported, 0 skipped, 0 failed\n")
    assert list(staged.iterdir()) == []
    assert "import" not in importer.status()["summary"]


@pytest.mark.long
def test_the_daemon_stops_in_the_middle(importer: Workspace, boards: Boards) -> None:
    """Nothing is left, and the client is told."""
    data = boards.signed.read_bytes()
    client = importer.popen(
        "import", "-", stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    client.stdin.write(data[: data.index(b"m/a.memory_cache\0") + 600])
    client.stdin.flush()
    staged = importer.cache / "m" / ".staging"
    wait_until(lambda: staged.is_dir() and list(staged.iterdir()), "a prompt cache is staged")
    assert importer.stop() == 0
    assert list(importer.cache.glob("m/**/.stage-*")) == []
    assert list(importer.cache.glob("m/a.*")) == []
    _, said = client.communicate(timeout=60)
    assert b"the daemon" in said
    assert client.returncode == 69


@pytest.fixture
def full_disk(workspace: Workspace) -> Iterator[Workspace]:
    with tmpfs(workspace.cache, "size=256k"):
        yield workspace
        if workspace.process is not None:
            workspace.stop()


@pytest.mark.long
def test_a_disk_without_room(full_disk: Workspace, boards: Boards, tmp_path: Path) -> None:
    """It is refused by the size that the list names, before anything is written."""
    declare(full_disk, trust=boards.key["key"])
    full_disk.start()

    def large(members: dict[str, bytes]) -> None:
        put(members, "m/a.memory_cache", bytes(1 << 20))
        sign(members, boards)

    target = rebuilt(boards.signed, tmp_path / "large.tar", large)
    found = outcomes(full_disk, target, code=65)
    assert "are free on" in found["a"]
    assert found["b"] == "imported: "


def test_an_export_takes_what_is_fresh_and_overwrites_nothing(
    boards: Boards, tmp_path: Path
) -> None:
    builder = boards.builder
    before = boards.signed.read_bytes()
    assert "exists" in builder.cli("export", "-o", "signed.tar", code=73).stderr
    assert boards.signed.read_bytes() == before
    with tarfile.open(boards.signed) as archive:
        assert [member.name for member in archive][:5] == MEMBERS
    assert boards.signed.stat().st_mode & 0o777 == 0o600

    stale = Workspace(tmp_path / "stale")
    shutil.copytree(builder.root, stale.root)
    stale.write("prompts/a.md", "Edited.\n")
    said = stale.cli("export", "m/a", "-o", "stale.tar", code=65).stderr
    assert "m/a cannot be exported: it is stale: its text changed" in said
    done = stale.cli("export", "-o", "some.tar", "--json")
    assert json.loads(done.stdout)["prompts"] == ["m/b"]
    assert list(json.loads(done.stdout)["left_out"]) == ["m/a"]
    assert "no-such" in stale.cli("export", "no-such", "-o", "x.tar", code=66).stderr
    assert "exists" in stale.cli("bundle-key", "key", code=73).stderr
    key = (builder.root / "key").read_bytes()
    for name in ("key", "prompts/b.md"):
        done = builder.cli("export", "--force", "-o", name, "--sign", "key", code=73)
        assert "is not a bundle, so it is not replaced" in done.stderr
    assert (builder.root / "key").read_bytes() == key
    assert "File name too long" in builder.cli("bundle-key", "n" * 253, code=73).stderr
    (stale.root / "key").chmod(0o644)
    assert "chmod 600" in stale.cli("export", "-o", "x.tar", "--sign", "key", code=66).stderr
    leftovers = [path.name for path in stale.root.iterdir() if path.name.endswith(".tmp")]
    assert leftovers == []


@pytest.mark.long
def test_others_can_check_the_signature(boards: Boards, tmp_path: Path) -> None:
    minisign = need("minisign")
    with tarfile.open(boards.signed) as archive:
        archive.extractall(tmp_path, filter="data")
    check = [minisign, "-V", "-m", tmp_path / "bundle.json", "-P", boards.key["key"]]
    done = subprocess.run(check, check=True, capture_output=True, text=True)
    assert "Signature and comment signature verified" in done.stdout
