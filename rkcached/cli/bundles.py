"""`rkcached export`, `import` and `bundle-key`: proven prompt caches for other machines.

An export reads the store, and needs no daemon. An import sends the file to the daemon, which is the
only one that writes to its store.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from rkcached import __version__
from rkcached.api import words
from rkcached.cli import looks, names, output
from rkcached.cli.client import Client
from rkcached.engines.kinds import VerifyMode
from rkcached.errors import NotFresh, NotPermitted, SourceError, counted, printable
from rkcached.host.regular import open_regular
from rkcached.host.settings import Settings
from rkcached.plan.probe import PROBE_QUESTION
from rkcached.plan.records import State
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key
from rkcached.sources.trusted_keys import id_of
from rkcached.store.bundles import PIECE_BYTES, Packed, pack, write_bundle
from rkcached.store.seal import read_seal
from rkcached.store.signatures import make_key, read_secret_key, sign

if TYPE_CHECKING:
    from rkcached.cli import forms

_STDIN = "-"


def export(
    settings: Settings,
    prompts: Sequence[str],
    file: Path,
    *,
    key_file: Path | None,
    replace: bool,
    want_json: bool,
) -> int:
    """Write a bundle of these prompts, which must be fresh; without names, of all that are."""
    key = read_secret_key(key_file) if key_file is not None else None
    looks.need_store(settings)
    if read_seal(settings.state_dir) is None:
        raise NotPermitted(
            "the key that signs this store cannot be read, so nobody knows what is good in it",
            hint="export as root, or as the user of the daemon",
        )

    look = looks.look_as_service(settings)
    chosen, left_out = _choose(look, prompts)
    packed = [_packed(look, name) for name in chosen]
    made_at = time.time()

    def signature(data: bytes) -> bytes:
        when = datetime.fromtimestamp(made_at, UTC)
        return sign(key, data, f"rkcached bundle of {when:%Y-%m-%d %H:%M} UTC") if key else b""

    with output.progress_line() as line:
        size_bytes = write_bundle(
            file,
            packed,
            made_by=f"rkcached {__version__}",
            made_at=made_at,
            sign=signature if key is not None else None,
            replace=replace,
            on_cache=lambda prompt: line(f"{prompt} {words.size(prompt.cache.size_bytes)}"),
        )

    signed_by = id_of(key.number) if key is not None else ""
    if want_json:
        exported: forms.Exported = {
            "format": 1,
            "file": str(file),
            "size_bytes": size_bytes,
            "signed_by": signed_by,
            "prompts": [str(name) for name in chosen],
            "left_out": {str(name): why for name, why in left_out.items()},
        }
        output.print_json(exported)
        return os.EX_OK

    for name, why in left_out.items():
        click.echo(printable(f"left out {name}: {why}"), err=True)
    by = f"signed by the key {signed_by}" if signed_by else "not signed"
    what = counted(len(packed), "prompt cache")
    click.echo(printable(f"{file}: {what}, {words.size(size_bytes)}, {by}"))
    return os.EX_OK


def _choose(look: Observation, prompts: Sequence[str]) -> tuple[list[Key], dict[Key, str]]:
    """The prompts to export, and why others are not; one that was named must be fit.

    Errors: SourceError for a name that is not declared; NotFresh.
    """
    declared = list(look.desired.prompts)
    named = names.matching(prompts, declared) if prompts else declared

    unfit: dict[Key, tuple[str, str]] = {}
    for name in named:
        if trouble := _unfit(look, name):
            unfit[name] = trouble
    fit = [name for name in named if name not in unfit]

    if unfit and (prompts or not fit):
        name, (why, hint) = next(iter(unfit.items()))
        raise NotFresh(f"{name} cannot be exported: {why}", hint=hint)
    if not fit:
        raise NotFresh("no prompt is declared", hint="`rkcached add` declares one")
    return fit, {name: why for name, (why, _) in unfit.items()}


def _unfit(look: Observation, name: Key) -> tuple[str, str] | None:
    """Why a prompt's cache cannot be exported, and the next step; None if it can."""
    if name in look.desired.learned:
        return "it was learned from the requests of one user", "leave it out"
    assessment = next(one for one in look.assessments if one.key == name and not one.retired)
    if assessment.state is State.MISSING:
        return "it has no prompt cache yet", f"`rkcached wait {name}` returns when it has"
    if assessment.state is not State.FRESH:
        hint = assessment.hint or f"`rkcached wait {name}` returns when it is fresh"
        return f"it is {assessment.state.value}: {assessment.reason}", hint
    if look.inventory.artifacts[name].sidecar.figures.verified == VerifyMode.OFF:
        hint = f"set cache.verify to exact, then type `rkcached regenerate {name}`"
        return "it was built with cache.verify: off, so nothing proves it", hint
    return None


def _packed(look: Observation, name: Key) -> Packed:
    """Errors: SourceError."""
    try:
        return pack(look.inventory.artifacts[name], PROBE_QUESTION)
    except OSError as error:
        raise SourceError(
            f"the prompt cache of {name} cannot be read: {error.strerror}", hint="try again"
        ) from error


def import_(settings: Settings, file: Path, *, prove: bool, want_json: bool) -> int:
    """Send a bundle to the daemon, and say what became of each prompt cache in it."""
    with (
        output.progress_line() as line,
        _opened(file) as stream,
        Client(settings.admin_socket) as client,
    ):
        answer = client.import_bundle(_pieces(stream, file, line), prove=prove)

    results = Counter(prompt["result"] for prompt in answer["prompts"])
    if want_json:
        imported: forms.BundleImported = {"format": 1, "prompts": answer["prompts"]}
        output.print_json(imported)
    else:
        for prompt in answer["prompts"]:
            _print_outcome(prompt)
        done = ("imported", "skipped", "failed")
        click.echo(", ".join(f"{results[result]} {result}" for result in done))

    if results["failed"]:
        return os.EX_DATAERR
    return os.EX_OK


def _print_outcome(prompt: dict[str, Any]) -> None:
    result = prompt["result"]
    mark = "FAILED" if result == "failed" else result
    reason = f"  {prompt['reason']}" if prompt["reason"] else ""
    click.echo(printable(f"{mark:<8}  {prompt['model']}/{prompt['prompt']}{reason}"))


def _opened(file: Path) -> BinaryIO:
    """Errors: SourceError."""
    if str(file) == _STDIN:
        if sys.stdin is None:
            raise SourceError("standard input is closed", hint="name the bundle's file")
        return sys.stdin.buffer
    try:
        return open_regular(file)
    except OSError as error:
        raise _unreadable(file, error) from error


def _pieces(stream: BinaryIO, file: Path, tell: Callable[[str], None]) -> Iterator[bytes]:
    """Errors: SourceError."""
    total = ""
    if str(file) != _STDIN:
        total = f" of {words.size(os.fstat(stream.fileno()).st_size)}"
    sent_bytes = 0
    while True:
        try:
            piece = os.read(stream.fileno(), PIECE_BYTES)  # a pipe may have less, for a while
        except OSError as error:
            raise _unreadable(file, error) from error
        if not piece:
            tell(f"{words.size(sent_bytes)} sent, the daemon proves the rest")
            return
        yield piece
        sent_bytes += len(piece)
        tell(f"{words.size(sent_bytes)}{total} read by the daemon")


def _unreadable(file: Path, error: OSError) -> SourceError:
    return SourceError(
        f"the bundle {file} cannot be read: {error.strerror}",
        hint="name a file that `rkcached export` made, or - for standard input",
    )


def bundle_key(file: Path, *, want_json: bool) -> int:
    """Make a key pair, and print the line by which other machines trust it."""
    key = make_key(file)
    public_file = f"{file}.pub"
    if want_json:
        made: forms.BundleKey = {
            "format": 1,
            "file": str(file),
            "public_file": public_file,
            "id": id_of(key.number),
            "key": key.public_line,
        }
        output.print_json(made)
        return os.EX_OK

    click.echo(printable(f"{file} signs bundles: rkcached export --sign {file} -o FILE"))
    click.echo(
        "Keep it secret. Add these lines to the manifest of each board that imports; if it has"
    )
    click.echo("`cache:` or `trust:` already, add below that what is missing:\n")
    click.echo(f"cache:\n  trust:\n    - {key.public_line}")
    return os.EX_OK
