"""Keys and signatures of bundles, in the form of minisign, so that others can check and make them.

A signature is by Ed25519 over the BLAKE2b-512 of the data; a second one is over the first and a
comment, which can so be trusted, too. minisign keeps its secret key under a password; ours has
none (`minisign -G -W`), as whoever exports by a timer has nobody to ask.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rkcached.errors import FormatError, NotTrusted, SourceError, StoreError
from rkcached.host import disk
from rkcached.host.regular import read_regular
from rkcached.sources.trusted_keys import ALGORITHM, ID_BYTES, KEY_BYTES, TrustedKey, id_of
from rkcached.store.result_file import place_for

_PREHASHED: Final = b"ED"  # the signature is over the data's BLAKE2b-512
_NO_PASSWORD: Final = b"\0\0"
_CHECKSUM: Final = b"B2"
_SECRET_MODE: Final = 0o600
_SECRET_BYTES: Final = 64  # the seed, and the public key
_SIGNATURE_BYTES: Final = 64
_MAX_FILE_BYTES: Final = 4096

# Of a secret key's file: algorithm, password, checksum, and what a password would need.
_SECRET_HEAD: Final = ALGORITHM + _NO_PASSWORD + _CHECKSUM + bytes(48)

_TRUSTED: Final = b"trusted comment: "
_UNTRUSTED: Final = b"untrusted comment: "


class SecretKey(NamedTuple):
    number: bytes
    """The id, as it stands in files."""
    secret: bytes

    @property
    def public_line(self) -> str:
        """The second line of the file of the public key: a value for `cache.trust`."""
        return base64.b64encode(ALGORITHM + self.number + self.secret[-KEY_BYTES:]).decode()


def make_key(path: Path) -> SecretKey:
    """Write a new key to `path`, with mode 0600, and its public half beside it, with `.pub`.

    Errors: StoreError, also where one of the two exists.
    """
    from nacl import bindings  # noqa: PLC0415 - 40 ms and 3 MB that only bundles need

    _, secret = bindings.crypto_sign_seed_keypair(secrets.token_bytes(KEY_BYTES))
    key = SecretKey(number=secrets.token_bytes(ID_BYTES), secret=secret)
    body = _SECRET_HEAD + key.number + secret + bytes(KEY_BYTES)
    of_secret = b"untrusted comment: rkcached secret key, without a password\n"
    of_public = f"untrusted comment: minisign public key {id_of(key.number)}\n".encode()

    remedy = "keys are never overwritten: name another file for the new key, or move this away"
    public_path = path.with_name(f"{path.name}.pub") if path.name else path
    for file in (path, public_path):
        place_for(file, replace=False, remedy=remedy)
    try:
        disk.write_new(public_path, of_public + key.public_line.encode() + b"\n", 0o644)
        try:
            disk.write_new(path, of_secret + base64.b64encode(body) + b"\n", _SECRET_MODE)
        except OSError:
            with contextlib.suppress(OSError):
                public_path.unlink()
            raise
    except FileExistsError as error:
        raise StoreError(f"{error.filename} exists", hint=remedy) from error
    except OSError as error:
        why, hint = disk.refusal(error, path)
        raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error
    return key


def read_secret_key(path: Path) -> SecretKey:
    """Errors: SourceError for a file that cannot be read, that others can, or that has no key."""
    try:
        info = path.stat()
        lines = read_regular(path, _MAX_FILE_BYTES).splitlines()
    except OSError as error:
        raise SourceError(
            f"the key {path} cannot be read: {error.strerror}",
            hint="`rkcached bundle-key FILE` makes one",
        ) from error
    if info.st_mode & 0o077:
        raise SourceError(f"others can read the key {path}", hint=f"chmod 600 {path}")

    body = _decoded(lines[1] if len(lines) > 1 else b"")
    if len(body) != len(_SECRET_HEAD) + ID_BYTES + _SECRET_BYTES + KEY_BYTES:
        raise SourceError(
            f"{path} is not a secret key", hint="`rkcached bundle-key FILE` makes one"
        )
    if body[:4] != ALGORITHM + _NO_PASSWORD:
        raise SourceError(
            f"the key {path} has a password",
            hint="sign with one that has none: `rkcached bundle-key FILE`, or `minisign -G -W`",
        )
    rest = body[len(_SECRET_HEAD) :]
    return SecretKey(number=rest[:ID_BYTES], secret=rest[ID_BYTES:][:_SECRET_BYTES])


def sign(key: SecretKey, data: bytes, comment: str) -> bytes:
    """The text of a signature file. `comment`: one line, which is signed, too."""
    signature = _signed(key.secret, hashlib.blake2b(data).digest())
    of_comment = _signed(key.secret, signature + comment.encode())
    lines = (
        _UNTRUSTED + b"signature of rkcached by the key " + id_of(key.number).encode(),
        base64.b64encode(_PREHASHED + key.number + signature),
        _TRUSTED + comment.encode(),
        base64.b64encode(of_comment),
    )
    return b"\n".join(lines) + b"\n"


def signer(signature_file: bytes, data: bytes, trusted: Sequence[TrustedKey]) -> TrustedKey:
    """The trusted key that signed the data.

    Errors: NotTrusted for one that is unknown, or whose signature does not fit; FormatError.
    """
    lines = signature_file.splitlines()
    head = _decoded(lines[1] if len(lines) > 1 else b"")
    of_comment = _decoded(lines[3] if len(lines) > 3 else b"")
    if (
        not head.startswith(_PREHASHED)
        or len(head) != len(_PREHASHED) + ID_BYTES + _SIGNATURE_BYTES
        or len(of_comment) != _SIGNATURE_BYTES
        or not lines[2].startswith(_TRUSTED)
    ):
        raise FormatError(
            "the bundle's signature is not one of minisign", hint="export the bundle again"
        )

    number = head[len(_PREHASHED) :][:ID_BYTES]
    signature = head[-_SIGNATURE_BYTES:]
    signers = [key for key in trusted if key.id == id_of(number)]
    if not signers:
        raise NotTrusted(
            f"the bundle is signed by the key {id_of(number)}, which is not in cache.trust",
            hint="if you know whose it is, add the line in its .pub file to cache.trust; or "
            "import with --prove",
        )

    digest = hashlib.blake2b(data).digest()
    comment = lines[2].removeprefix(_TRUSTED)
    for key in signers:  # anybody can give a key the id of another one
        if _fits(key.key, signature, digest) and _fits(key.key, of_comment, signature + comment):
            return key
    raise NotTrusted(
        f"the signature by the key {signers[0]} does not fit the bundle: it was changed since",
        hint="get the bundle again",
    )


def _signed(secret: bytes, data: bytes) -> bytes:
    from nacl import bindings  # noqa: PLC0415 - see above

    return bindings.crypto_sign(data, secret)[:_SIGNATURE_BYTES]


def _fits(public: bytes, signature: bytes, data: bytes) -> bool:
    from nacl import bindings, exceptions  # noqa: PLC0415 - see above

    try:
        bindings.crypto_sign_open(signature + data, public)
    except exceptions.BadSignatureError:
        return False
    return True


def _decoded(line: bytes) -> bytes:
    """The bytes of a line of base64; none if it is none."""
    try:
        return base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return b""
