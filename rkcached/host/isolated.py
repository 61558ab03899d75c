"""Starts children of this program that run this program's code and nobody else's.

An interpreter looks for modules in the current folder, in PYTHONPATH and in the user's
site-packages. Whoever can write one of these decides what a child runs: `sudo rkcached check` in a
folder with a foreign `msgspec.py` ran it as root. So every child is started with -I and -P and by
the absolute path of this file, which then takes the package that it is a part of. Modules of others
come from the interpreter's own places, and from two more that -I leaves out and the parent names in
the arguments: the folder that the package lies in (`pip install --target`), and the user's
site-packages, where the parent uses it and it belongs to who runs it (`pip install --user`).

As a script this file runs in the child; it imports nothing but Python's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import site
import sys
from pathlib import Path

CWD = "/"
"""For children that need no folder: not the caller's, and nobody but root can write it."""

# Variables that are meant for this process alone, by a person or by systemd.
_NOT_FOR_CHILDREN = ("PYTHON", "NOTIFY_SOCKET", "LISTEN_", "WATCHDOG_")

_HERE = Path(__file__).absolute()
_PACKAGE = _HERE.parents[1]


def command(module: str, *arguments: str) -> list[str]:
    """The command line of a child that calls `main()` of a module of ours.

    `sys.argv` has the arguments.
    """
    flags = ["-I", "-P", "-X", f"utf8={sys.flags.utf8_mode}"]
    if sys.dont_write_bytecode:
        flags.append("-B")
    return [sys.executable, *flags, str(_HERE), os.pathsep.join(folders()), module, *arguments]


def environment() -> dict[str, str]:
    """This process's environment without what is meant for it alone.

    LD_LIBRARY_PATH stays, as a runtime library may need it. Its relative entries mean the child's
    own folder.
    """
    return {
        name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_CHILDREN)
    }


def folders() -> list[str]:
    """Folders that the child may import from, besides the interpreter's own.

    They are looked into last.
    """
    places = [str(_PACKAGE.parent)]
    user_site = site.USER_SITE
    if not site.ENABLE_USER_SITE or user_site is None:
        return places

    if user_site in sys.path and _is_own(user_site):
        places.append(user_site)
    return places


def _is_own(folder: str) -> bool:
    """Whether the folder belongs to who runs this; with sudo, HOME may still be somebody else's."""
    try:
        return Path(folder).stat().st_uid == os.geteuid()
    except OSError:
        return False


def _take_package() -> None:
    """Import the package that this file belongs to, wherever it is, and no other of that name."""
    spec = importlib.util.spec_from_file_location(
        _PACKAGE.name, _PACKAGE / "__init__.py", submodule_search_locations=[str(_PACKAGE)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{_PACKAGE} is no package")

    module = importlib.util.module_from_spec(spec)
    sys.modules[_PACKAGE.name] = module
    spec.loader.exec_module(module)


def _run() -> None:
    """The child: call `main()` of the module that the command line names."""
    given, module, *arguments = sys.argv[1:]
    sys.path += [folder for folder in given.split(os.pathsep) if folder not in sys.path]
    sys.argv = [module, *arguments]
    _take_package()
    importlib.import_module(module).main()


if __name__ == "__main__":
    _run()
