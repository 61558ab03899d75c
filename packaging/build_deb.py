"""Builds the Debian packages: `rkcached`, and `rkcached-cpu` with llama.cpp, for each architecture.

make deb

One package serves every Python from 3.11 to 3.13, and so Debian 12, Debian 13 and Ubuntu 24.04: it
carries the wheels for each, and on installation `make-venv` makes an environment from those that
fit. Nothing is compiled, so every architecture is built anywhere. Files in `packaging/deb/` say
what a package is; this says what goes where.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from packaging.requirements import Requirement
from pins import read_pins, select
from wheels import Target, Wheel, build_own, collect_all, needed, sha256

ROOT = Path(__file__).parents[1]
DEB = ROOT / "packaging" / "deb"
PYTHONS = ("3.11", "3.12", "3.13")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
HOME = Path("usr/lib/rkcached")
MAIN = [Requirement("rkcached[rkllm]"), Requirement("pip")]
EVERYTHING = [Requirement("rkcached[rkllm,cpu]"), Requirement("pip")]
"""tokenizers is what a board needs besides; llama.cpp, a third of all bytes, is for machines
without an NPU. With a pip of its own, the package asks for Python alone, and what installs the
wheels is what was tested."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package in the making: the directory that becomes its content."""

    name: str
    version: str
    architecture: str
    maintainer: str
    date: float
    tree: Path

    def install(
        self, source: Path, target: Path | str, *, mode: int = 0o644, compress: bool = False
    ) -> None:
        data = source.read_bytes()
        self.write(target, gzip.compress(data, mtime=0) if compress else data, mode=mode)

    def write(self, target: Path | str, content: bytes | str, *, mode: int = 0o644) -> None:
        path = self.tree / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    def write_documents(self, wheels: Iterable[Wheel]) -> None:
        folder = Path("usr/share/doc") / self.name
        self.install(DEB / "copyright", folder / "copyright")
        overrides = (
            (DEB / "lintian-overrides").read_text(encoding="utf-8").replace("@NAME@", self.name)
        )
        self.write(f"usr/share/lintian/overrides/{self.name}", overrides)
        self.install(ROOT / "CHANGELOG.md", folder / "changelog.gz", compress=True)
        entry = (
            f"{self.name} ({self.version}) unstable; urgency=medium\n\n  * What is new is in "
            "changelog.gz.\n\n"
            f" -- {self.maintainer}  {formatdate(self.date)}\n"
        )
        self.write(folder / "changelog.Debian.gz", gzip.compress(entry.encode(), mtime=0))
        lines = sorted({f"{wheel.name} {wheel.version}: {wheel.licence}\n" for wheel in wheels})
        self.write(folder / "wheels.txt", "".join(lines))

    def write_wheels(self, wheels: Iterable[Wheel]) -> None:
        for wheel in wheels:
            self.install(wheel.file, HOME / "wheels" / wheel.file.name)

    def build(self, control: str, folder: Path) -> Path:
        files = sorted(
            path for path in self.tree.rglob("*") if path.is_file() and path.parent.name != "DEBIAN"
        )
        size = sum(-(-path.stat().st_size // 1024) for path in files)
        text = (DEB / control).read_text(encoding="utf-8")
        for mark, value in (
            ("@VERSION@", self.version),
            ("@ARCHITECTURE@", self.architecture),
            ("@MAINTAINER@", self.maintainer),
            ("@SIZE@", str(size)),
        ):
            text = text.replace(mark, value)
        names = [(path, path.relative_to(self.tree)) for path in files]
        self.write("DEBIAN/control", text)
        self.write("DEBIAN/md5sums", "".join(f"{_md5(path)}  {name}\n" for path, name in names))
        conffiles = [f"/{name}\n" for _, name in names if name.parts[0] == "etc"]
        if conffiles:
            self.write("DEBIAN/conffiles", "".join(conffiles))
        for path in self.tree.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
            os.utime(path, (self.date, self.date))
        file = folder / f"{self.name}_{self.version}_{self.architecture}.deb"
        command = [
            "dpkg-deb",
            "--root-owner-group",
            "-Zgzip",
            "-z1",
            "--build",
            str(self.tree),
            str(file),
        ]
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(int(self.date))}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return file


def _md5(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def fill_main(package: Package, wheels: set[Wheel]) -> None:
    """Everything but llama.cpp."""
    package.write_wheels(wheels)
    package.write_documents(wheels)
    package.install(DEB / "make-venv", HOME / "make-venv", mode=0o755)
    package.install(DEB / "rkcached.sh", "usr/bin/rkcached", mode=0o755)
    for script in ("postinst", "prerm", "postrm"):
        package.install(DEB / script, f"DEBIAN/{script}", mode=0o755)
    package.install(DEB / "triggers", "DEBIAN/triggers")

    package.install(ROOT / "etc/default/rkcached", "etc/default/rkcached")
    # No conffiles, as every administrator changes them: dpkg would ask at each upgrade. postinst
    # copies them once.
    for file in (
        "manifest.yaml",
        *(f"prompts/{prompt.name}" for prompt in (ROOT / "etc/rkcached/prompts").iterdir()),
    ):
        package.install(ROOT / "etc/rkcached" / file, f"usr/share/rkcached/{file}")
    documents = Path("usr/share/doc/rkcached")
    package.install(
        ROOT / "etc/rkcached/manifest.example.yaml", documents / "examples/manifest.example.yaml"
    )
    for document in (
        ROOT / "README.md",
        *sorted(path for path in (ROOT / "docs").rglob("*") if path.is_file()),
    ):
        package.install(document, documents / document.relative_to(ROOT))

    for rule in (ROOT / "etc/udev/rules.d").glob("*.rules"):
        package.install(rule, f"usr/lib/udev/rules.d/{rule.name}")
    for page in (ROOT / "man").glob("*.[0-9]"):
        package.install(page, f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz", compress=True)
    for name, folder in {
        "rkcached.bash": "bash-completion/completions/rkcached",
        "_rkcached": "zsh/vendor-completions/_rkcached",
        "rkcached.fish": "fish/vendor_completions.d/rkcached.fish",
    }.items():
        package.install(ROOT / "completions" / name, f"usr/share/{folder}")

    for unit in [*(ROOT / "systemd").glob("*.service"), *(ROOT / "systemd").glob("*.socket")]:
        text = unit.read_text(encoding="utf-8").replace("@BIN@", "/usr/bin")
        package.write(f"usr/lib/systemd/system/{unit.name}", text)
    package.install(ROOT / "systemd/backoff.conf", "usr/share/rkcached/backoff.conf")
    package.install(ROOT / "systemd/rkcached.sysusers", "usr/lib/sysusers.d/rkcached.conf")
    package.install(ROOT / "systemd/rkcached.tmpfiles", "usr/lib/tmpfiles.d/rkcached.conf")


def fill_cpu(package: Package, wheels: set[Wheel]) -> None:
    """Packages that llama.cpp needs besides."""
    package.write_wheels(wheels)
    package.write_documents(wheels)


def build(architectures: Iterable[str], work: Path, out: Path) -> list[Path]:
    pins = read_pins("base", "rkllm", "cpu")
    pins += select(read_pins("build"), ["pip"])
    own = build_own(ROOT, work / "own", pins)
    version = next(wheel.version for wheel in own if wheel.name == "rkcached")
    targets = [
        Target(machine=MACHINES[name], python=python)
        for name in architectures
        for python in PYTHONS
    ]
    collected = collect_all(EVERYTHING, own, targets, work / "wheels", pins)
    maintainer = f"{os.environ.get('DEBFULLNAME', 'The rkcached developers')} "
    maintainer += f"<{os.environ.get('DEBEMAIL', 'rkcached@example.org')}>"
    made = []
    for architecture in architectures:
        everything: dict[str, Wheel] = {}
        main: set[str] = set()
        for target, wheels in collected.items():
            if target.machine == MACHINES[architecture]:
                everything |= {wheel.file.name: wheel for wheel in wheels}
                main |= {wheel.file.name for wheel in needed(MAIN, list(wheels), target)[0]}
        for name, fill, control, files in (
            ("rkcached", fill_main, "control", main),
            ("rkcached-cpu", fill_cpu, "control-cpu", everything.keys() - main),
        ):
            tree = work / f"{name}-{architecture}"
            shutil.rmtree(tree, ignore_errors=True)
            package = Package(
                name=name,
                version=f"{version}-1",
                architecture=architecture,
                maintainer=maintainer,
                date=float(os.environ.get("SOURCE_DATE_EPOCH") or time.time()),
                tree=tree,
            )
            fill(package, {everything[file] for file in files})
            made.append(package.build(control, out))
            shutil.rmtree(tree)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=MACHINES, help="default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "build", help="wheels are kept here")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for file in build(arguments.arch or list(MACHINES), arguments.work, arguments.out):
        print(f"{sha256(file)}  {file.stat().st_size / 1e6:5.1f} MB  {file}")


if __name__ == "__main__":
    main()
