"""Prompt caches on disk. Owns everything below the cache directory; nobody else writes there.

    {model}/{name}.llama_cache    the prompt cache        {model}/{name}.bin    the prefix it was made from, UTF-8
    {model}/{name}.json           the sidecar: the commit record, with size and SHA-256 of the other two
    .verdicts/{model}/{name}.json the outcome of attempts that gave no artifact
    .quarantine/                  artifacts that failed when they were used       .lock  .digests.json

Invariant: an artifact is what its sidecar says, or it is reported as corrupt and rebuilt. The sidecar is renamed into
place last, so a crash at any step leaves the old state, a mismatch, or the new state. Names that start with a dot are
the store's own; models and prompts cannot have such names.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from rkcached import disk, durable
from rkcached.digests import Digests, signature_of
from rkcached.engines.registry import ENGINES
from rkcached.errors import StoreError, StoreLocked
from rkcached.manifest import NAME
from rkcached.plan import Key, Verdict
from rkcached.scan import MAX_RECORD_BYTES, STAGING, Scan, foreign, inspect, read_sidecar
from rkcached.sidecar import Inventory, Sidecar, StoredArtifact

DIRECTORY_MODE = 0o750
MAX_QUARANTINED = 8
"""Artifacts kept for a post-mortem; the oldest goes first."""

_OWN = (".lock", ".digests.json", ".digests.json.tmp")
_HALF = ".tmp"


class Store:
    """The cache directory. Reading needs no lock; `open` takes the lock that writing needs."""

    def __init__(self, root: Path, digests: Digests | None = None) -> None:
        self.root = root
        self.digests = digests or Digests(root / ".digests.json")
        self._opened = False
        self._lock_fd = -1
        self._taking = threading.Lock()
        self._staged: set[Path] = set()
        """What is being built now; whatever else is staged was left behind."""
        self._folders = threading.Lock()
        """Held where a model's folder comes or goes."""
        self._scan = Scan(self.digests)

    # Life

    def open(self) -> None:
        """Create the directory, lock it, and clear away what a crash left behind.

        Errors: StoreError when it cannot be created or written; StoreLocked when another daemon has it.
        """
        self._take()
        self._opened = True
        with self._writing(self.root):
            self._sweep()

    def _take(self) -> None:
        """Create and lock the directory. The descriptor only reads, so that its disk can be remounted read-only."""
        try:
            self.root.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            fd = os.open(self.root / ".lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, durable.FILE_MODE)
        except OSError as error:
            why, hint = disk.refusal(error, self.root)
            if isinstance(error, FileExistsError | NotADirectoryError | PermissionError):
                hint = "create it for this user, or name another one with --cache-dir or RKCACHED_CACHE_DIR"
            raise StoreError(f"the cache directory {self.root} cannot be written: {why}", hint=hint) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(fd, 32, 0).decode(errors="replace").strip()
            os.close(fd)
            raise StoreLocked(
                f"the cache directory {self.root} belongs to another daemon (pid {owner or 'unknown'})",
                hint="stop that daemon, or use another cache directory",
            ) from error
        self._release()
        self._lock_fd = fd
        with contextlib.suppress(OSError):  # who owns it is said to whom it is refused; a full disk may not take it
            (self.root / ".lock").write_text(f"{os.getpid()}\n")

    def _release(self) -> None:
        if self._lock_fd >= 0:
            fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # a child that is just being forked still has the descriptor
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
        for path in (*self.root.glob(".verdicts/*/.*.tmp"), *self.root.glob(".digests.json.tmp")):
            path.unlink(missing_ok=True)
        for folder in self._model_folders():
            for path in folder.glob(f"{STAGING}*"):
                path.unlink(missing_ok=True)

    # Reading

    def scan(self) -> Inventory:
        """Look at every artifact and verdict. Files that did not change since the last look are not read again.

        Errors: StoreError when a directory cannot be listed; whatever is wrong with a file is part of the inventory.
        """
        try:
            return self._look()
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be read: {error.strerror}", hint="check the directory's permissions"
            ) from error

    def _look(self) -> Inventory:
        inventory = Inventory()
        self._scan.turn()
        for folder in self._model_folders():
            self._scan.folder(folder, inventory)
        with contextlib.suppress(FileNotFoundError):
            others = [name for name in sorted(os.listdir(self.root)) if name not in _OWN and name[-4:] != _HALF]  # noqa: PTH208
            inventory.foreign.update(foreign(self.root / name for name in others))
        inventory.quarantined.update((path, size_of(path)) for path in self._kept())
        for path in self.root.glob(".verdicts/*/*.json"):
            key = Key(path.parent.name, path.stem)
            if (verdict := self.read_verdict(key)) is not None:
                inventory.verdicts[key] = verdict
        return inventory

    def verify(self, key: Key) -> str:
        """Read an artifact's files again, whatever is remembered of them; returns why it is corrupt, or nothing."""
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
            names = sorted(e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
            yield from (self.root / name for name in names)

    # Writing

    def stage(self, key: Key) -> Path:
        """A name in the target directory for a prompt cache to be written to. Errors: StoreError."""
        folder = self.root / key.model
        staged = folder / f"{STAGING}{key.prompt}-{secrets.token_hex(4)}"
        with self._writing(folder), self._folders:
            folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            staged.touch(mode=durable.FILE_MODE)  # a folder that takes no file says so before the prefill
            staged.unlink()
            self._staged.add(staged)
        return staged

    def discard(self, staged: Path) -> None:
        """Forget a staged file. Idempotent."""
        self._staged.discard(staged)
        with contextlib.suppress(OSError):
            staged.unlink()

    def tidy(self, inventory: Inventory, quarantine_bytes: float) -> None:
        """Remove what builds left that could not clear up after themselves, and what the quarantine has beyond that.

        Errors: StoreError.
        """
        for path in inventory.staged:
            if not any(path.name.startswith(staged.name) for staged in tuple(self._staged)):
                with self._writing(path):
                    path.unlink(missing_ok=True)
        excess = sum(inventory.quarantined.values()) - quarantine_bytes
        for path, size_bytes in inventory.quarantined.items():
            if excess > 0:
                with self._writing(path):
                    shutil.rmtree(path, ignore_errors=True)
                excess -= size_bytes

    def seal(self, staged: Path) -> tuple[int, str]:
        """Make a staged file durable and private; returns its size in bytes and SHA-256. Errors: StoreError."""
        with self._writing(staged):
            staged.chmod(durable.FILE_MODE)
            with staged.open("rb") as stream:
                os.fsync(stream.fileno())
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                return os.fstat(stream.fileno()).st_size, digest

    def commit(self, key: Key, staged: Path, sidecar: Sidecar, prefix: bytes) -> StoredArtifact:
        """Publish a sealed file, its text and its sidecar, in this order, each step durable before the next.

        If it fails, the staged file is gone and the artifact is the old one or reported as corrupt. Errors: StoreError.
        """
        folder = self.root / key.model
        path = folder / sidecar.artifact
        text, record = folder / f"{staged.name}.bin", folder / f"{staged.name}.json"
        try:
            with self._writing(folder):
                durable.write_new(text, prefix)
                durable.write_new(record, msgspec.json.format(msgspec.json.encode(sidecar, enc_hook=dict)))
                self._make_way(key, sidecar.artifact)
                staged.replace(path)
                text.replace(folder / f"{key.prompt}.bin")
                durable.sync_directory(folder)
                record.replace(folder / f"{key.prompt}.json")
                durable.sync_directory(folder)
                for other in _artifacts_of(folder, key.prompt):  # one that another engine wrote
                    if other.name != sidecar.artifact:
                        other.unlink(missing_ok=True)
                info = path.stat()
        finally:
            for leftover in (text, record, staged):
                self.discard(leftover)
        self.digests.trust(path, info, sidecar.sha256)
        self.clear_verdict(key)
        return StoredArtifact(folder=folder, sidecar=sidecar, signature=signature_of(info))

    def remove(self, key: Key) -> None:
        """Delete an artifact, its sidecar first, and its folder if nothing is in it or will be. Errors: StoreError."""
        folder = self.root / key.model
        with self._writing(folder):
            self._make_way(key)
            (folder / f"{key.prompt}.json").unlink(missing_ok=True)
            (folder / f"{key.prompt}.bin").unlink(missing_ok=True)
            for path in _artifacts_of(folder, key.prompt):
                path.unlink(missing_ok=True)
            with self._folders, contextlib.suppress(OSError):
                if all(staged.parent != folder for staged in tuple(self._staged)):  # a build's file comes late
                    folder.rmdir()

    def quarantine(self, key: Key) -> None:
        """Take an artifact out of use but keep it for a post-mortem. Errors: StoreError."""
        folder = self.root / key.model
        self._keep(
            key, (folder / f"{key.prompt}.json", folder / f"{key.prompt}.bin", *_artifacts_of(folder, key.prompt))
        )

    def _make_way(self, key: Key, artifact: str = "") -> None:
        """Nobody but us puts anything where our files go: a directory there is moved away. Errors: StoreError."""
        folder = self.root / key.model
        names = {f"{key.prompt}.json", f"{key.prompt}.bin", artifact or f"{key.prompt}.json"}
        places = {folder / name for name in names} | set(_artifacts_of(folder, key.prompt))
        if in_the_way := sorted(path for path in places if path.is_dir() and not path.is_symlink()):
            self._keep(key, in_the_way)

    def _keep(self, key: Key, paths: Iterable[Path]) -> None:
        """Move these into a new folder of the quarantine, where the oldest make room. Errors: StoreError."""
        kept = self.root / ".quarantine"
        with self._writing(kept):
            kept.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            target = kept / f"{key.model}--{key.prompt}--{secrets.token_hex(4)}"
            target.mkdir(mode=DIRECTORY_MODE)
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    path.rename(target / path.name)
            for old in self._kept()[:-MAX_QUARANTINED]:
                shutil.rmtree(old, ignore_errors=True)

    def _kept(self) -> list[Path]:
        """What is in the quarantine, the oldest first."""
        try:
            return sorted((self.root / ".quarantine").iterdir(), key=lambda path: path.lstat().st_mtime_ns)
        except FileNotFoundError:
            return []

    def write_verdict(self, key: Key, verdict: Verdict) -> None:
        """Remember why a fingerprint has no artifact. Errors: StoreError."""
        path = self._verdict_path(key)
        with self._writing(path):
            for folder in (path.parent.parent, path.parent):
                folder.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.unlink(missing_ok=True)
            durable.write_new(temporary, msgspec.json.encode(verdict))
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
            self._verdict_path(key).unlink(missing_ok=True)

    def _verdict_path(self, key: Key) -> Path:
        return self.root / ".verdicts" / key.model / f"{key.prompt}.json"

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Only the lock's owner writes, and a refusal of the file system becomes a StoreError."""
        if not self._opened:
            raise StoreError(f"the store {self.root} is not open for writing")
        with self._taking:
            if not self._has_lock_file():  # the directory was deleted or replaced under us: start anew in what is there
                self._take()
        try:
            yield
        except OSError as error:
            why, hint = disk.refusal(error, path)
            raise StoreError(f"{path} cannot be written: {why}", hint=hint) from error


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; nothing is followed."""
    inside = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    size_bytes = 0
    for one in inside:
        with contextlib.suppress(FileNotFoundError):
            info = one.lstat()
            size_bytes += 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return size_bytes


def _artifacts_of(folder: Path, prompt: str) -> list[Path]:
    """The prompt caches of one prompt, whichever engine wrote them. Lists no folder, which may hold thousands."""
    names = (prompt + engine.artifact_suffix for engine in ENGINES.values())
    return [path for path in (folder / name for name in names) if os.path.lexists(path)]
