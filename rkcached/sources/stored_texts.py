"""The texts of stored prompts: those that clients stored over the socket.

Each is a file, `prompts/{model}/{name}.md` in the state directory, and a source like any other.
What the manifest declares goes before a stored prompt of the same name. Blocking.
"""

from __future__ import annotations

from pathlib import Path

from rkcached.errors import StoreError
from rkcached.host import disk
from rkcached.sources.learned_texts import LearnedTexts
from rkcached.sources.records import Key

_SUFFIX = ".md"
_DIRECTORY_MODE = 0o750


class StoredTexts:
    def __init__(self, state_dir: Path) -> None:
        self._root = state_dir / "prompts"
        self.learned = LearnedTexts(state_dir)

    def folder(self, model: str) -> Path:
        return self._root / model

    def path(self, key: Key) -> Path:
        """Both names must be such as the manifest allows: nothing else reaches a path."""
        return self.folder(key.model) / (key.prompt + _SUFFIX)

    def keys(self, model: str) -> list[Key]:
        """Sorted. Errors: OSError, but for a folder that is not there."""
        try:
            names = sorted(path.name for path in self.folder(model).iterdir())
        except FileNotFoundError:
            return []

        return [
            Key(model, name.removesuffix(_SUFFIX))
            for name in names
            if name.endswith(_SUFFIX) and name[0] != "."
        ]

    def write(self, key: Key, text: str) -> None:
        """Errors: StoreError; the text is then what it was."""
        path = self.path(key)
        self._refuse_link(path.parent)

        try:
            path.parent.mkdir(mode=_DIRECTORY_MODE, parents=True, exist_ok=True)
            disk.replace(path, text.encode())
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error.strerror}", hint="check the state directory"
            ) from error

    def create(self, key: Key, text: str) -> None:
        """As `write`, for a text that is not there yet. Errors: StoreError, also if it is."""
        path = self.path(key)
        if path.exists():
            raise StoreError(f"there is a stored prompt {key} already", hint="choose another name")
        self.write(key, text)

    def delete(self, key: Key) -> bool:
        """Whether there was such a text. Errors: StoreError."""
        path = self.path(key)
        self._refuse_link(path.parent)

        try:
            path.unlink()
            disk.sync_directory(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            hint = "check the state directory"
            raise StoreError(f"{path} cannot be removed: {error.strerror}", hint=hint) from error

        return True

    def _refuse_link(self, folder: Path) -> None:
        """Errors: StoreError where the folder of a model leads to somebody else's files."""
        if folder.is_symlink():
            raise StoreError(
                f"{folder} is a link, so no text is stored or deleted in it", hint="remove the link"
            )
