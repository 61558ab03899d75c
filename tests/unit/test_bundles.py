"""The form of bundles: what is written is read again, and everything else is refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rkcached.errors import FormatError, NotTrusted, SourceError
from rkcached.plan.desired import Desired
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import Assessment, DesiredPrompt, State
from rkcached.reconcile.importer import by_fingerprint, target
from rkcached.reconcile.snapshot import Snapshot
from rkcached.sources.records import Key, Trouble
from rkcached.sources.trusted_keys import TrustedKey, parse_trusted_key
from rkcached.store.bundles import (
    LIST,
    BundledFile,
    BundledPrompt,
    BundleReader,
    Contents,
    Proof,
    parse_contents,
)
from rkcached.store.sidecar import Figures
from rkcached.store.signatures import make_key, read_secret_key, sign, signer
from tests.unit.test_snapshot import MANIFEST, stored

FILES = {"m/a.bin": b"text", "m/a.json": b"{}", "m/a.memory_cache": b"state" * 300}

# By minisign 0.11: `minisign -G -W`, `minisign -S -W -t "trusted words"` of '{"a":1}\n'.
KEY = "RWRVLKps5xvsJsKYq+UbBqceePp5Jjm5vbYWAeYo05D34ZRNWBK4DjPI"
DATA = b'{"a":1}\n'
SIGNATURE = b"""untrusted comment: signature from minisign secret key
RURVLKps5xvsJsZVWdTHb/8rAQKiJ5EAxZiKX7A9EGwYFgCZph58OBS4puUNpaoxMLtBRbRnpXsWwRDKD7V7CiMVr0Xaqy4cyQg=
trusted comment: trusted words
Wz3dVpeK5+daRisGuUcTOLErDKSYeV2WJ+vkDFEbgHXLvvVIeG8VdcWhvrjV2nJRbx4KhnTYG0pQqRLM7qLvCg==
"""


def contents_of(files: dict[str, bytes], **changes: Any) -> Contents:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    listed = [
        BundledFile(name=name, size_bytes=len(data), sha256=digests[name])
        for name, data in files.items()
    ]
    components = {"engine": "memory", "prefix.digest": listed[0].sha256}
    prompt = BundledPrompt(
        model="m",
        prompt="a",
        fingerprint=fingerprint(components).digest,
        components=components,
        tokens=4,
        figures=Figures(
            prefill_ms=1.0, load_ms=1.0, cold_ttft_ms=1.0, warm_ttft_ms=1.0, verified="exact"
        ),
        proof=Proof(question="?", verified="exact", answer_sha256="00"),
        text=listed[0],
        sidecar=listed[1],
        cache=listed[2],
    )
    prompt = msgspec.structs.replace(prompt, **changes)
    return Contents(made_by="a test", made_at=0.0, prompts=[prompt])


def archived(members: list[tuple[str | tarfile.TarInfo, bytes]]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            header = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not header.size:
                header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return data.getvalue()


def bundle() -> list[tuple[str | tarfile.TarInfo, bytes]]:
    return [(LIST, msgspec.json.encode(contents_of(FILES))), *FILES.items()]


def read(data: bytes, *, piece_bytes: int = 100) -> dict[str, bytes]:
    """Everything that a reader gives of a bundle."""
    stream = io.BytesIO(data)

    async def some(most_bytes: int) -> bytes:
        return stream.read(min(most_bytes, piece_bytes))

    async def whole() -> dict[str, bytes]:
        reader = BundleReader(some)
        listed, _ = await reader.begin()
        found = {}
        for prompt in parse_contents(listed).prompts:
            for file in prompt.files:
                await reader.expect(file)
                found[file.name] = b"".join([piece async for piece in reader.pieces()])
        await reader.end()
        return found

    return asyncio.run(whole())


def test_what_is_written_is_read_again() -> None:
    assert read(archived(bundle())) == FILES
    assert read(archived(bundle()), piece_bytes=1 << 20) == FILES


def test_every_truncated_bundle_is_refused() -> None:
    data = archived(bundle())
    end = data.rindex(b"state") + 5
    for size in range(0, end, 97):
        with pytest.raises(FormatError):
            read(data[:size])


def odd(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type = kind
    header.linkname = link
    return header


@pytest.mark.parametrize(
    "member",
    [
        ("../../etc/passwd", b"text"),
        ("/m/a.bin", b"text"),
        ("m/a.bin/", b"text"),
        ("m/a.bin", b"text and more"),
        ("m/a.bin", b""),
        (LIST, b"text"),
        (odd("m/a.bin", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (odd("m/a.bin", tarfile.LNKTYPE, "m/a.json"), b""),
        (odd("m/a.bin", tarfile.CHRTYPE), b""),
        (odd("m/a.bin", tarfile.FIFOTYPE), b""),
        (odd("m/a.bin", tarfile.DIRTYPE), b""),
        (odd("m/a.bin", tarfile.GNUTYPE_SPARSE), b""),
        (odd("m/a.bin", tarfile.XHDTYPE), b"20 path=../../x\n"),
    ],
)
def test_a_member_that_is_not_the_one_that_is_listed(
    member: tuple[str | tarfile.TarInfo, bytes],
) -> None:
    """Links, devices, other names and sizes: the reader asks for one member, and takes no other."""
    members = bundle()
    members[1] = member
    with pytest.raises(FormatError):
        read(archived(members))


def test_members_twice_or_in_another_order() -> None:
    members = bundle()
    for wrong in (
        [*members[:2], members[1], *members[2:]],
        [members[0], members[2], members[1], members[3]],
        [*members, members[3]],
        members[1:],
        members[:-1],
        [],
    ):
        with pytest.raises(FormatError):
            read(archived(wrong))
    with pytest.raises(FormatError, match="something follows"):
        read(archived(members) + b"more")
    with pytest.raises(FormatError, match="something follows"):
        read(archived(members) + bytes(1 << 20))


def test_a_header_that_promises_a_large_list_takes_no_memory() -> None:
    header = tarfile.TarInfo(LIST)
    header.size = 1 << 32
    with pytest.raises(FormatError, match="longer than"):
        read(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "../m"},
        {"prompt": "a/b"},
        {"model": "M"},
        {"fingerprint": "0" * 64},
        {"components": {"engine": "other"}},
        {"text": BundledFile(name="m/b.bin", size_bytes=4, sha256="0" * 64)},
        {"text": BundledFile(name="m/a.bin", size_bytes=4, sha256="0" * 64)},
        {"sidecar": BundledFile(name="m/a.json", size_bytes=1 << 30, sha256="0" * 64)},
        {"cache": BundledFile(name="m/a.sh", size_bytes=4, sha256="0" * 64)},
        {"cache": BundledFile(name="/m/a.memory_cache", size_bytes=4, sha256="0" * 64)},
        {"cache": BundledFile(name="m/a.memory_cache", size_bytes=1 << 40, sha256="0" * 64)},
        {"cache": BundledFile(name="m/a.memory_cache", size_bytes=-1, sha256="0" * 64)},
        {"cache": BundledFile(name="m/a.memory_cache", size_bytes=1, sha256="0" * 63)},
        {"components": {"engine": "x" * (1 << 17)}},
        {
            "figures": Figures(
                prefill_ms=-1.0, load_ms=0.0, cold_ttft_ms=0.0, warm_ttft_ms=0.0, verified="exact"
            )
        },
    ],
)
def test_a_list_that_does_not_agree_with_itself(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        parse_contents(msgspec.json.encode(contents_of(FILES, **changes)))


def snapshot(**changes: Any) -> Snapshot:
    """The prompt m/a is declared as the bundle has it, and is missing."""
    sent = contents_of(FILES).prompts[0]
    key, other = Key("m", "a"), fingerprint({**sent.components, "params.top_k": "4"})
    prompts = {
        "same": DesiredPrompt(key=key, fingerprint=fingerprint(sent.components)),
        "differs": DesiredPrompt(key=key, fingerprint=other),
        "blocked": DesiredPrompt(key=key, trouble=Trouble(message="it is empty")),
    }
    kind = changes.get("kind", "same")
    name = changes.get("name", key)
    state = changes.get("state", State.MISSING)
    desired = Desired(models={}, prompts={name: prompts[kind]} if kind in prompts else {}, texts={})
    assessment = Assessment(key=name, state=state, reason="too short")
    return Snapshot(manifest=MANIFEST, desired=desired, assessments={name: assessment})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Key("m", "a")),
        ({"name": Key("m", "z")}, Key("m", "z")),
        ({"state": State.STALE}, Key("m", "a")),
        ({"state": State.BLOCKED}, Key("m", "a")),  # its build may have failed for want of time
        ({"state": State.FRESH}, "fresh already"),
        ({"state": State.UNCACHED}, "too short"),
        ({"state": State.QUARANTINED}, "too short"),
        ({"kind": "none"}, "not declared here"),
        ({"kind": "blocked"}, "it is empty"),
        (
            {"kind": "differs"},
            "built from something else than is declared here: params.top_k: absent -> 4",
        ),
    ],
)
def test_the_declared_prompt_that_a_prompt_cache_is_for(
    changes: dict[str, Any], expected: Key | str
) -> None:
    """Its fingerprint decides. What is for none is skipped, with the reason."""
    seen = snapshot(**changes)
    assert target(contents_of(FILES).prompts[0], seen, by_fingerprint(seen)) == expected


def test_a_sidecar_of_an_earlier_version_keeps_its_code() -> None:
    """The field for imports is not there in what was built here, so its signature is the same."""
    sidecar = stored(Key("m", "a")).sidecar
    assert b"imported" not in msgspec.json.encode(sidecar, enc_hook=dict)


def test_other_lists() -> None:
    good = contents_of(FILES)
    later = msgspec.structs.replace(good, format=2)
    twice = msgspec.structs.replace(good, prompts=[*good.prompts, *good.prompts])
    for contents, why in ((later, "has format 2"), (twice, "twice")):
        with pytest.raises(FormatError, match=why):
            parse_contents(msgspec.json.encode(contents))
    for data in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1e999}'):
        with pytest.raises(FormatError):
            parse_contents(data)


# Signatures


def test_a_signature_of_minisign() -> None:
    key = parse_trusted_key(f"{KEY} build-farm")
    assert str(key) == "build-farm"
    assert key.id == "26EC1BE76CAA2C55"
    assert str(parse_trusted_key(KEY)) == key.id
    assert signer(SIGNATURE, DATA, [key]) is key


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def another_key(key: TrustedKey) -> TrustedKey:
    """Of the same id, which anybody can give to a key of his own."""
    return TrustedKey(id=key.id, key=flipped(key.key, 5))


@pytest.mark.parametrize(
    ("signature", "data", "trust"),
    [
        (SIGNATURE, DATA + b" ", lambda key: [key]),
        (SIGNATURE.replace(b"trusted words", b"trusted lies!"), DATA, lambda key: [key]),
        (SIGNATURE, DATA, lambda _: []),
        (SIGNATURE, DATA, lambda key: [another_key(key)]),
    ],
)
def test_a_signature_that_does_not_fit(
    signature: bytes, data: bytes, trust: Callable[[TrustedKey], list[TrustedKey]]
) -> None:
    with pytest.raises(NotTrusted) as refused:
        signer(signature, data, trust(parse_trusted_key(KEY)))
    assert "26EC1BE76CAA2C55" in refused.value.message
    assert refused.value.hint


def test_two_keys_of_one_id() -> None:
    key = parse_trusted_key(KEY)
    assert signer(SIGNATURE, DATA, [another_key(key), key]) is key


def test_no_changed_bit_of_a_signature_is_taken() -> None:
    key = parse_trusted_key(KEY)
    lines = SIGNATURE.splitlines()
    for number in (1, 3):
        raw = base64.b64decode(lines[number])
        for at in range(0, len(raw), 7):
            changed = [*lines]
            changed[number] = base64.b64encode(flipped(raw, at))
            with pytest.raises(FormatError):
                signer(b"\n".join(changed), DATA, [key])
    for broken in (b"", b"\n\n\n\n", SIGNATURE[:100], b"\xff" * 300):
        with pytest.raises(FormatError):
            signer(broken, DATA, [key])


@pytest.mark.parametrize("text", ["", "RW", KEY[:-4], f"{KEY}AAAA", KEY.replace("R", "S", 1), "é"])
def test_what_is_no_public_key(text: str) -> None:
    with pytest.raises(ValueError, match="not a public key"):
        parse_trusted_key(text)


def test_a_secret_key_of_minisign_signs(tmp_path: Path) -> None:
    made = make_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    key = read_secret_key(tmp_path / "key")
    assert key == made
    trusted = parse_trusted_key((tmp_path / "key.pub").read_text().splitlines()[1])
    assert signer(sign(key, DATA, "of a test"), DATA, [trusted]) is trusted

    locked = bytearray(base64.b64decode((tmp_path / "key").read_text().splitlines()[1]))
    locked[2:4] = b"Sc"  # minisign's own keys have a password, unless -W is given
    (tmp_path / "key").write_bytes(b"untrusted comment: x\n" + base64.b64encode(locked))
    with pytest.raises(SourceError, match="has a password"):
        read_secret_key(tmp_path / "key")
    (tmp_path / "key").write_text("no key")
    with pytest.raises(SourceError, match="not a secret key"):
        read_secret_key(tmp_path / "key")
