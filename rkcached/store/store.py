"""Prompt caches on disk. Owns everything below the cache directory; nobody else writes there.

    {model}/{name}.llama_cache    the prompt cache
    {model}/{name}.bin            the prefix it was made from, UTF-8
    {model}/{name}.json           the sidecar: the commit record, with size and SHA-256 of both
    .verdicts/{model}/{name}.json the outcome of attempts that gave no artifact
    .retired/{fingerprint}/       artifacts that no prompt uses now; their texts may come back
    .quarantine/                  artifacts that failed when they were used
    .lock  .digests.json          and CACHEDIR.TAG, which marks the folder as a store

Invariant: an artifact is what its sidecar says, or it is reported as corrupt and rebuilt. The
sidecar is renamed into place last, so a crash at any step leaves the old state, a mismatch, or the
new state. Names that start with a dot are the store's own; models and prompts cannot have such
names. Nothing is removed through a symbolic link beneath the directory, and what is not the store's
by name and kind stays.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from rkcached.engines.registry import ENGINES
from rkcached.errors import StoreError, StoreLocked
from rkcached.host import beneath, disk
from rkcached.host.digests import Digests, signature_of
from rkcached.plan.records import Verdict
from rkcached.sources.problems import NAME
from rkcached.sources.records import Key
from rkcached.store import marks
from rkcached.store.scan import (
    MAX_RECORD_BYTES,
    STAGING,
    Scan,
    foreign,
    inspect,
    look_at_retired,
    prompt_of,
    read_sidecar,
    retired_sidecar,
    strangers,
)
from rkcached.store.sidecar import Inventory, Sidecar, StoredArtifact

DIRECTORY_MODE = 0o750
MAX_QUARANTINED = 8
"""Artifacts kept for a post-mortem; the oldest goes first."""

_LOCK_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_AGAIN = "it is planned again at the next check"


class Store:
    """The cache directory. Reading needs no lock; `open` takes the lock that writing needs."""

    def __init__(self, root: Path, digests: Digests | None = None) -> None:
        self.root = root
        self.digests = digests or Digests(root / ".digests.json")
        self._opened = False
        self._lock_fd = -1
        # Of the file system that the store is on while it is open.
        self._device = -1
        self._taking = threading.Lock()
        # What is being built now; whatever else is staged was left behind.
        self._staged: set[Path] = set()
        # Held where a folder of a model or of a retired artifact comes or goes.
        self._folders = threading.RLock()
        self._scan = Scan(self.digests)
        # Files in the store's place that the manifest names: they stay, whatever their name is.
        self._spared: frozenset[Path] = frozenset()

    def spare(self, files: Iterable[Path | str]) -> None:
        """From now on, none of these is removed or taken for an artifact.

        Absolute paths; the whole list each time.
        """
        tops = tuple({f"{self.root}{os.sep}", f"{os.path.realpath(self.root)}{os.sep}"})
        inside = {str(path) for path in files if str(path).startswith(tops)}
        self._spared = frozenset(
            self.root / path.removeprefix(top) for path in inside for top in tops
        )

    # Life

    def open(self) -> None:
        """Create the directory or take one that is a store, lock it, and clear away leftovers.

        Errors: StoreError when it cannot be created or written, or is somebody else's folder;
        StoreLocked when another daemon has it.
        """
        self._take()
        self._opened = True
        with self._writing(self.root):
            self._sweep()

    def _take(self) -> None:
        """Create and lock the directory.

        The descriptor only reads, so that its disk can be remounted read-only.
        """
        try:
            self.root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            if why := marks.why_not_ours(self.root):
                hint = "name an empty or a new folder with --cache-dir, "
                hint += "or move what is not the store's out of this one"
                raise StoreError(f"{self.root} is not taken as a store: {why}", hint=hint)

            # Of the folder: on an overlay, its files have other numbers.
            device = self.root.stat().st_dev
            fd = os.open(self.root / marks.LOCK, _LOCK_FLAGS, disk.FILE_MODE)
        except OSError as error:
            why, hint = disk.refusal(error, self.root)
            if isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
                hint = "create it for this user, "
                hint += "or name another one with --cache-dir or RKCACHED_CACHE_DIR"
            elif error.errno == errno.ELOOP:
                why, hint = f"{marks.LOCK} in it is a link", "remove the link"

            raise StoreError(
                f"the cache directory {self.root} cannot be written: {why}", hint=hint
            ) from error

        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise StoreLocked(
                f"the cache directory {self.root} belongs to another daemon "
                f"(pid {owner or 'unknown'})",
                hint="stop that daemon, or use another cache directory",
            ) from error

        self._release()
        self._lock_fd = fd
        self._device = device

        # The refusal of another daemon names the owner. A full disk may not take that.
        with contextlib.suppress(OSError):
            writing = os.open(
                self.root / marks.LOCK, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            )
            with os.fdopen(writing, "w") as stream:
                stream.write(f"{os.getpid()}\n")

        marks.tag(self.root)

    def _check_device(self) -> None:
        """Errors: StoreError where another file system, without a store, is in the store's place.

        Some have another device number after each mount, so a store that is there is taken.
        """
        with contextlib.suppress(FileNotFoundError):
            if self.root.stat().st_dev != self._device and marks.why_no_store(self.root):
                raise StoreError(
                    f"{self.root} is on another file system than when the store was opened",
                    hint="mount it again; to begin a new store there, restart the daemon",
                )

    def _release(self) -> None:
        if self._lock_fd >= 0:
            # A child that is just being forked still has the descriptor.
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._opened:
            with contextlib.suppress(OSError):
                self.digests.save()
        self._opened = False
        self._release()

    def _has_lock_file(self) -> bool:
        """Whether the file that we hold the lock on is still the one in the directory."""
        try:
            return os.path.samestat(os.fstat(self._lock_fd), (self.root / ".lock").stat())
        except OSError:
            return False

    def _sweep(self) -> None:
        """Remove what an interrupted commit staged."""
        for name in beneath.names_in(self.root):
            if marks.is_temporary(name):
                self._unlink(name)

        for model in beneath.names_in(self.root, marks.VERDICTS):
            for name in beneath.names_in(self.root, marks.VERDICTS, model):
                if name.startswith(".") and name.endswith(".tmp"):
                    self._unlink(marks.VERDICTS, model, name)

        for folder in self._model_folders():
            for name in beneath.names_in(self.root, folder.name):
                if name.startswith(STAGING):
                    self._unlink(folder.name, name)

    def _unlink(self, *names: str) -> None:
        """Remove a file, or a link itself.

        Folders stay, and what the manifest names. Errors: OSError.
        """
        *folders, name = names
        if self.root.joinpath(*names) in self._spared:
            return
        with contextlib.suppress(FileNotFoundError), beneath.opened(self.root, folders) as parent:
            if not beneath.is_folder_in(parent, name):
                os.unlink(name, dir_fd=parent)

    # Reading

    def scan(self) -> Inventory:
        """Look at every artifact and verdict.

        Files that did not change since the last look are not read again.

        Errors: StoreError when a directory cannot be listed; whatever is wrong with a file is part
        of the inventory.
        """
        try:
            if self._opened:
                self._check_device()
            return self._look()
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be read: {error.strerror}",
                hint="check the directory's permissions",
            ) from error

    def _look(self) -> Inventory:
        inventory = Inventory()
        self._scan.turn()
        for folder in self._model_folders():
            self._scan.folder(folder, inventory)

        self._scan.retired(self._retired(), inventory)
        with contextlib.suppress(FileNotFoundError):
            names = sorted(os.listdir(self.root))  # noqa: PTH208 - names
            others = [name for name in names if not marks.is_own(name)]
            inventory.foreign.update(foreign(self.root / name for name in others))

        self._leave_out_spared(inventory)
        inventory.quarantined.update((path, size_of(path)) for path in self._kept())
        for path in self.root.glob(".verdicts/*/*.json"):
            key = Key(path.parent.name, path.stem)
            if (verdict := self.read_verdict(key)) is not None:
                inventory.verdicts[key] = verdict

        return inventory

    def _leave_out_spared(self, inventory: Inventory) -> None:
        """A file that the manifest names is no artifact, though it may have the name of one."""
        for path in self._spared:
            prompt = prompt_of(path.name)
            if path.parent.parent != self.root or not prompt:
                continue
            key = Key(path.parent.name, prompt)
            inventory.artifacts.pop(key, None)
            inventory.unreadable.pop(key, None)
            inventory.foreign.update(foreign([path]))

    def verify(self, key: Key) -> str:
        """Read an artifact's files again; returns why it is corrupt, or nothing."""
        folder = self.root / key.model
        try:
            sidecar = read_sidecar(folder / f"{key.prompt}.json", key)
        except OSError as error:
            return f"the sidecar cannot be read: {error.strerror}"

        if isinstance(sidecar, str):
            return sidecar
        return inspect(folder, sidecar, Digests()).corrupt

    def _model_folders(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            names = sorted(
                e.name
                for e in entries
                if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)
            )
            yield from (self.root / name for name in names)

    # Writing

    def stage(self, key: Key) -> Path:
        """A name in the target directory for a prompt cache to be written to.

        Errors: StoreError.
        """
        folder = self.root / key.model
        if named := sorted(
            path
            for path in self._spared
            if path.parent == folder and prompt_of(path.name) == key.prompt
        ):
            raise StoreError(
                f"{named[0]} is named by the manifest, and would be overwritten",
                hint="move it out of the store, or give the prompt another name",
            )

        if in_the_way := strangers(folder, key):
            raise StoreError(
                f"{in_the_way[0]} is not the store's, and would be overwritten",
                hint="move it out of the store, or let `rkcached gc --strangers` remove it",
            )

        staged = folder / f"{STAGING}{key.prompt}-{secrets.token_hex(4)}"

        with self._writing(folder), self._folders:
            _make_folder(folder)
            staged.touch(
                mode=disk.FILE_MODE
            )  # a folder that takes no file says so before the prefill
            staged.unlink()
            self._staged.add(staged)

        return staged

    def discard(self, staged: Path) -> None:
        """Forget a staged file. Idempotent."""
        self._staged.discard(staged)
        with contextlib.suppress(OSError):
            staged.unlink()

    def tidy(self, inventory: Inventory, quarantine_bytes: float) -> None:
        """Remove leftovers of builds, and what the quarantine has beyond `quarantine_bytes`.

        The inventory is what the store holds afterwards. Errors: StoreError.
        """
        for folder in inventory.incomplete:
            with self._writing(folder), self._folders:
                if look_at_retired(folder) is None:  # else it was completed meanwhile
                    beneath.remove(self.root, marks.RETIRED, folder.name)

        for path in inventory.staged:
            if not any(path.name.startswith(staged.name) for staged in tuple(self._staged)):
                with self._writing(path):
                    self._unlink(path.parent.name, path.name)

        excess = sum(inventory.quarantined.values()) - quarantine_bytes

        for path, size_bytes in tuple(inventory.quarantined.items()):
            if excess > 0:
                with self._writing(path):
                    self._drop(path)

                del inventory.quarantined[path]
                excess -= size_bytes

    def seal(self, staged: Path) -> tuple[int, str]:
        """Make a staged file durable and private; returns its size in bytes and SHA-256.

        Errors: StoreError.
        """
        with self._writing(staged):
            staged.chmod(disk.FILE_MODE)
            with staged.open("rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                return os.fstat(stream.fileno()).st_size, digest

    def commit(
        self, key: Key, staged: Path, sidecar: Sidecar, prefix: bytes, *, retire: bool = False
    ) -> StoredArtifact:
        """Publish a sealed file, its text, its sidecar; each step is durable before the next.

        `retire`: put the artifact that it replaces aside, if that is of another fingerprint. Where
        that fails, the old one is overwritten.

        If it fails, the staged file is gone and the artifact is the old one, missing, or reported
        as corrupt. Errors: StoreError.
        """
        folder = self.root / key.model
        path = folder / sidecar.artifact
        text, record = folder / f"{staged.name}.bin", folder / f"{staged.name}.json"

        try:
            with self._writing(folder):
                disk.write_new(text, prefix)
                disk.write_new(
                    record, msgspec.json.format(msgspec.json.encode(sidecar, enc_hook=dict))
                )
                self._make_way(key, sidecar.artifact)
                if retire:
                    with contextlib.suppress(OSError, StoreError):
                        self._put_aside(key, unless=sidecar.fingerprint, move=_link_or_rename)

                staged.replace(path)
                text.replace(folder / f"{key.prompt}.bin")
                disk.sync_directory(folder)
                record.replace(folder / f"{key.prompt}.json")
                disk.sync_directory(folder)
                for other in _artifacts_of(folder, key.prompt):  # one that another engine wrote
                    if other.name != sidecar.artifact:
                        self._unlink(key.model, other.name)

                info = path.stat()
        finally:
            for leftover in (text, record, staged):
                self.discard(leftover)

        self.digests.trust(path, info, sidecar.sha256)
        self.clear_verdict(key)
        return StoredArtifact(folder=folder, sidecar=sidecar, signature=signature_of(info))

    def retire(self, key: Key) -> None:
        """Put an artifact aside that no prompt uses now.

        One without a sidecar is removed. Errors: StoreError.

        A crash leaves the artifact in one of the two places, or it has to be built again.
        """
        folder = self.root / key.model

        with self._writing(folder):
            if not self._put_aside(key):
                self.remove(key)
                return

            self._drop_folder(folder)

    def _put_aside(
        self, key: Key, *, unless: str = "", move: Callable[[Path, Path], object] = Path.rename
    ) -> bool:
        """Move an artifact to the retired ones, its sidecar last; whether there was one to move.

        Errors: OSError, StoreError. `unless`: a fingerprint that is not put aside.
        """
        folder = self.root / key.model
        record = folder / f"{key.prompt}.json"
        try:
            sidecar = read_sidecar(record, key)
        except FileNotFoundError:
            return False

        if (
            isinstance(sidecar, str)
            or sidecar.fingerprint == unless
            or not (folder / sidecar.artifact).is_file()
        ):
            return False

        files = (folder / sidecar.artifact, folder / f"{key.prompt}.bin", record)
        if not self._spared.isdisjoint(files):
            return False

        target = self.root / marks.RETIRED / sidecar.fingerprint

        with self._folders:
            _make_folder(target.parent)
            beneath.remove(
                self.root, marks.RETIRED, target.name
            )  # an older one of the same fingerprint
            _make_folder(target)
            for path in files:
                move(path, target / path.name)

        self._scan.forget(key)
        return True

    def adopt(
        self, key: Key, fingerprint: str, *, source: Key | None, take: bool, retire: bool = False
    ) -> StoredArtifact:
        """Publish under `key` an artifact that another prompt has, or that was put aside (None).

        Its content is compared with its sidecar first. `take`: nothing of it is left where it was,
        and where the file system has hard links nothing is copied. `retire` as for `commit`.

        If it fails, what `key` had is as it was. A source that is not what its sidecar says is
        taken out of use: a retired one is removed, another one is reported as corrupt. Errors:
        StoreError.
        """
        folder = (
            self.root / marks.RETIRED / fingerprint if source is None else self.root / source.model
        )
        staged = self.stage(key)

        try:
            with self._writing(folder):
                old = (
                    retired_sidecar(folder)
                    if source is None
                    else read_sidecar(folder / f"{source.prompt}.json", source)
                )
                if isinstance(old, str) or old.fingerprint != fingerprint:
                    why = old if isinstance(old, str) else "it has another fingerprint by now"
                    raise StoreError(f"{folder} cannot be adopted by {key}: {why}", hint=_AGAIN)

                text = (folder / f"{old.prompt}.bin").read_bytes()
                _place(folder / old.artifact, staged, link=take)

            size_bytes, sha256 = self.seal(staged)
            if (size_bytes, sha256, hashlib.sha256(text).hexdigest()) != (
                old.size_bytes,
                old.sha256,
                old.text_sha256,
            ):
                self._disown(folder, source, old)
                raise StoreError(
                    f"{folder / old.artifact} is not what its sidecar says", hint=_AGAIN
                )

            _, suffix = os.path.splitext(old.artifact)  # noqa: PTH122 - a name and no path
            sidecar = msgspec.structs.replace(
                old, model=key.model, prompt=key.prompt, artifact=key.prompt + suffix
            )
            artifact = self.commit(key, staged, sidecar, text, retire=retire)
        finally:
            self.discard(staged)

        if not take:
            return artifact
        with contextlib.suppress(StoreError):
            if source is None:
                self.remove_retired(fingerprint)
            else:
                self.remove(source)

        # Its file has lost a name, which is a change to its signature, though none to its content.
        with self._writing(artifact.path):
            info = artifact.path.stat()

        self.digests.trust(artifact.path, info, artifact.sidecar.sha256)
        return replace(artifact, signature=signature_of(info))

    def _disown(self, folder: Path, source: Key | None, sidecar: Sidecar) -> None:
        """The content of this artifact is not what its sidecar says: take it out of use."""
        if source is None:
            self.remove_retired(sidecar.fingerprint)
            return
        for path in (folder / sidecar.artifact, folder / f"{sidecar.prompt}.bin"):
            self.digests.forget(path)
        self._scan.forget(source)

    def remove_retired(self, fingerprint: str) -> None:
        """Delete a retired artifact, its sidecar first. Idempotent. Errors: StoreError."""
        if not marks.is_retired(fingerprint):
            raise ValueError(fingerprint)
        folder = self.root / marks.RETIRED / fingerprint

        with self._writing(folder), self._folders:
            for name in beneath.names_in(self.root, marks.RETIRED, fingerprint):
                if name.endswith(".json"):
                    self._unlink(marks.RETIRED, fingerprint, name)

            beneath.remove(self.root, marks.RETIRED, fingerprint)

    def remove_retired_of(self, key: Key) -> None:
        """Delete all retired artifacts that were built for this prompt. Errors: StoreError."""
        for folder in self._retired():
            sidecar = retired_sidecar(folder)
            if not isinstance(sidecar, str) and (sidecar.model, sidecar.prompt) == key:
                self.remove_retired(folder.name)

    def release(self, needed_bytes: int) -> None:
        """Delete retired artifacts, the oldest first, until so many bytes are free or none is left.

        Errors: StoreError.
        """
        released_bytes = 0

        for folder in sorted(self._retired(), key=lambda path: path.lstat().st_mtime_ns):
            if released_bytes >= needed_bytes:
                return
            released_bytes += size_of(folder)
            self.remove_retired(folder.name)

    def _retired(self) -> list[Path]:
        """The folders of retired artifacts."""
        names = beneath.names_in(self.root, marks.RETIRED)
        folders = (self.root / marks.RETIRED / name for name in names if marks.is_retired(name))
        return [folder for folder in folders if beneath.is_folder(folder)]

    def remove(self, key: Key) -> None:
        """Delete an artifact, its sidecar first, and its folder if nothing is in it or will be.

        Errors: StoreError.
        """
        folder = self.root / key.model

        with self._writing(folder):
            self._make_way(key)
            self._unlink(key.model, f"{key.prompt}.json")
            self._unlink(key.model, f"{key.prompt}.bin")
            for path in _artifacts_of(folder, key.prompt):
                self._unlink(key.model, path.name)

            self._drop_folder(folder)

    def _drop_folder(self, folder: Path) -> None:
        """Remove a model's folder, if nothing is in it or will be."""
        with self._folders, contextlib.suppress(OSError):
            if all(
                staged.parent != folder for staged in tuple(self._staged)
            ):  # a build's file comes late
                folder.rmdir()

    def quarantine(self, key: Key) -> None:
        """Take an artifact out of use but keep it for a post-mortem. Errors: StoreError."""
        folder = self.root / key.model
        self._keep(
            key,
            (
                folder / f"{key.prompt}.json",
                folder / f"{key.prompt}.bin",
                *_artifacts_of(folder, key.prompt),
            ),
        )

    def _make_way(self, key: Key, artifact: str = "") -> None:
        """Nobody but us puts anything where our files go: a directory there is moved away.

        Errors: StoreError.
        """
        folder = self.root / key.model
        if not beneath.is_folder(folder):
            return
        names = {f"{key.prompt}.json", f"{key.prompt}.bin", artifact or f"{key.prompt}.json"}
        places = {folder / name for name in names} | set(_artifacts_of(folder, key.prompt))
        for path in places:
            with contextlib.suppress(OSError):  # an empty folder holds nothing of anybody's
                path.rmdir()

        if in_the_way := sorted(path for path in places if path.is_dir() and not path.is_symlink()):
            self._keep(key, in_the_way, prefix=marks.ASIDE)

    def _keep(self, key: Key, paths: Iterable[Path], prefix: str = "") -> None:
        """Move these into a new folder of the quarantine, where the oldest make room.

        Errors: StoreError.
        """
        kept = self.root / marks.QUARANTINE

        with self._writing(kept):
            _make_folder(kept)
            target = kept / f"{prefix}{key.model}--{key.prompt}--{secrets.token_hex(4)}"
            target.mkdir(mode=DIRECTORY_MODE)
            for path in paths:
                if path not in self._spared and beneath.is_folder(path.parent):
                    with contextlib.suppress(FileNotFoundError):
                        path.rename(target / path.name)

            for old in self._kept()[:-MAX_QUARANTINED]:
                self._drop(old)

    def _drop(self, kept: Path) -> None:
        """Remove a folder of the quarantine; what cannot be removed stays, and is tried again."""
        with contextlib.suppress(OSError):
            beneath.remove(self.root, marks.QUARANTINE, kept.name)

    def _kept(self) -> list[Path]:
        """The folders that the store put into the quarantine, the oldest first."""
        kept = self.root / marks.QUARANTINE
        ages = []

        for name in beneath.names_in(self.root, marks.QUARANTINE):
            with contextlib.suppress(FileNotFoundError):
                info = (kept / name).lstat()
                if marks.is_quarantined(name) and stat.S_ISDIR(info.st_mode):
                    ages.append((info.st_mtime_ns, kept / name))

        return [path for _, path in sorted(ages)]

    def write_verdict(self, key: Key, verdict: Verdict) -> None:
        """Remember why a fingerprint has no artifact. Errors: StoreError."""
        path = self._verdict_path(key)

        with self._writing(path):
            for folder in (path.parent.parent, path.parent):
                _make_folder(folder)

            temporary = path.with_name(f".{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            disk.write_new(temporary, msgspec.json.encode(verdict))
            temporary.replace(path)

    def read_verdict(self, key: Key) -> Verdict | None:
        """The verdict on a prompt. A damaged one only costs one more attempt."""
        path = self._verdict_path(key)

        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_RECORD_BYTES:
                return None
            return msgspec.json.decode(path.read_bytes(), type=Verdict)
        except (OSError, ValueError, RecursionError):
            return None

    def clear_verdict(self, key: Key) -> None:
        with contextlib.suppress(OSError):
            self._unlink(marks.VERDICTS, key.model, f"{key.prompt}.json")

    def _verdict_path(self, key: Key) -> Path:
        return self.root / marks.VERDICTS / key.model / f"{key.prompt}.json"

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Only the lock's owner writes, and a refusal of the file system becomes a StoreError."""
        if not self._opened:
            raise StoreError(f"the store {self.root} is not open for writing")
        with self._taking:
            self._check_device()
            if (
                not self._has_lock_file()
            ):  # the directory was deleted or replaced under us: start anew in what is there
                self._take()

        try:
            yield
        except OSError as error:
            why, hint = disk.refusal(error, path)
            raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error


def _link_or_rename(source: Path, target: Path) -> None:
    """Give a file a second name, so that it is never without one. On FAT, rename it."""
    try:
        os.link(source, target)
    except OSError:
        source.rename(target)


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Give the content of `source` to a new file.

    `link`: as a second name of the same file, where that is possible.
    """
    if link:
        with contextlib.suppress(OSError):  # FAT has no links
            os.link(source, target)
            return

    shutil.copyfile(source, target)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; nothing is followed."""
    size_bytes = 0
    with contextlib.suppress(OSError), beneath.opened(path.parent) as parent:
        for entry in beneath.walk(parent, path.name):
            size_bytes += 0 if entry.is_folder else entry.info.st_size
    return size_bytes


def _make_folder(path: Path) -> None:
    """Make a folder, unless a link is in its place: writes there would leave the store.

    Errors: OSError; StoreError.
    """
    path.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    if not beneath.is_folder(path):
        raise StoreError(
            f"{path} is a link, and the store does not write through links",
            hint="remove the link; to keep a model's caches on another disk, mount it there",
        )


def _artifacts_of(folder: Path, prompt: str) -> list[Path]:
    """The prompt caches of one prompt, whichever engine wrote them.

    Lists no folder, which may hold thousands.
    """
    names = (prompt + engine.artifact_suffix for engine in ENGINES.values())
    return [path for path in (folder / name for name in names) if os.path.lexists(path)]
