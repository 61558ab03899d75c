"""What a runtime library file is.

Small libraries made by the C compiler, then cut and damaged in every way.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rkcached.engines.rkllm.abi import ABIS
from rkcached.engines.rkllm.identify import LibraryFacts, choose_abi, identify
from rkcached.errors import RuntimeLibraryError

FUNCTIONS = {version: frozenset(abi.functions) for abi in ABIS for version in abi.versions}
Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compile_library(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Makes a shared library that exports `names` and has `text` among its data."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(
            "this test compiles small libraries and found no C compiler: apt-get install gcc"
        )
    folder = tmp_path_factory.mktemp("libraries")

    def build(
        name: str, names: frozenset[str] | set[str], text: str = "", *flags: str, more: str = ""
    ) -> Path:
        source, library = folder / f"{name}.c", folder / f"{name}.so"
        functions = "".join(f"int {each}(void) {{ return 0; }}\n" for each in sorted(names))
        source.write_text(f'{functions}const char banner[] = "{text}";\n{more}')
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), *flags]
        subprocess.run(command, check=True, capture_output=True)
        return library

    return build


@pytest.fixture(scope="module")
def library(compile_library: Compile) -> Path:
    banner = "RKLLM SDK (version: 1.2.3 | target: linux)"
    return compile_library("good", FUNCTIONS["1.2.3"], banner)


@pytest.fixture(scope="module")
def content(library: Path) -> bytes:
    return library.read_bytes()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A name to write a damaged library to."""
    return tmp_path_factory.mktemp("damaged") / "librkllmrt.so"


def facts(version: str | None, symbols: frozenset[str]) -> LibraryFacts:
    return LibraryFacts(path=Path("/l.so"), version=version, symbols=symbols, machine="aarch64")


def refusal(path: Path) -> str:
    """What identify says of a file that it refuses, with its hint."""
    with pytest.raises(RuntimeLibraryError) as caught:
        identify(path)
    assert str(path) in caught.value.message
    assert caught.value.exit_code == os.EX_NOINPUT
    assert caught.value.hint
    return f"{caught.value.message} -- {caught.value.hint}"


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_a_library(compile_library: Compile, style: str) -> None:
    """Version, functions and machine are read from either table of names."""
    banner = "RKLLM SDK (version: 1.2.1b1 | target: linux)"
    flag = f"-Wl,--hash-style={style}"
    path = compile_library(f"style_{style}", FUNCTIONS["1.2.1b1"], banner, flag)
    found = identify(path)
    assert found.path == path
    assert found.version == "1.2.1b1"
    assert found.symbols == FUNCTIONS["1.2.1b1"]
    assert found.machine == platform.machine()
    assert choose_abi(found).name == "1.2.1b1"


def test_many_functions(compile_library: Compile) -> None:
    """Functions are found among thousands of others, and hidden ones are not."""
    others = "".join(f"int other_{n}(void) {{ return {n}; }}\n" for n in range(3000))
    hidden = '__attribute__((visibility("hidden"))) int rkllm_hidden(void) { return 0; }\n'
    found = identify(compile_library("many", {"rkllm_init", "rkllm_run"}, more=others + hidden))
    assert found.symbols == {"rkllm_init", "rkllm_run"}
    assert found.version is None


def test_version_across_pieces(compile_library: Compile) -> None:
    """The version is found wherever it lies, across the pieces in which the file is read."""
    path = compile_library("shifted", {"rkllm_init"})
    data = path.read_bytes()
    text = b"RKLLM SDK (version: 1.2.1b1"
    for piece in (1, 2):
        for shift in range(-2, len(text) + 2):
            at = (piece << 20) - shift
            path.write_bytes(data + bytes(at - len(data)) + text + b" | target: linux)")
            assert identify(path).version == "1.2.1b1"
    path.write_bytes(data + text)
    assert identify(path).version == "1.2.1b1"


def test_wrapper(compile_library: Compile) -> None:
    """A library that calls RKLLM but does not have it is no RKLLM library.

    Though its strings name the functions.
    """
    path = compile_library(
        "wrapper", set(), more="int rkllm_init(void); int go(void) { return rkllm_init(); }\n"
    )
    assert b"rkllm_init" in path.read_bytes()
    assert "exports no function whose name begins with rkllm_" in refusal(path)


def test_no_library_at_all(tmp_path: Path) -> None:
    """A missing file, a directory, a pipe and an empty file are each told as such."""
    assert "there is no runtime library at" in refusal(tmp_path / "gone.so")
    assert "a directory" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.so")
    assert "not a regular file" in refusal(tmp_path / "pipe.so")
    (tmp_path / "empty.so").touch()
    assert "is empty" in refusal(tmp_path / "empty.so")
    (tmp_path / "loop.so").symlink_to("loop.so")
    assert "cannot be read" in refusal(tmp_path / "loop.so")
    with pytest.raises(RuntimeLibraryError, match="no file can be called"):
        identify(Path("a\0b"))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
            "a git-lfs pointer",
        ),
        (b"/* GNU ld script */\nGROUP ( /usr/lib/librkllmrt.so.1 )\n", "a GNU ld script"),
        (b"INPUT(librkllmrt.so.1)\n", "a GNU ld script"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"see the readme\n", "a text file"),
        ("siehe Handbücher\n".encode(), "a text file"),
        (b"x" * 511 + "ü".encode() + b"y", "a text file"),
        (b"!<arch>\nmember/", "a static library"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"PK\x03\x04\0", "a zip archive"),
        (b"GGUF\3\0\0\0", "a model file"),
        (b"\0\1\2\3", "a file of another kind"),
        (b"\x7fEL", "a file of another kind"),
    ],
)
def test_no_elf(tmp_path: Path, head: bytes, words: str) -> None:
    """A file that is no shared library is named for what it looks like."""
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(head)
    assert words in refusal(path)


def test_wrong_elf(content: bytes, damaged: Path) -> None:
    """32-bit, of another machine, big-endian, not a library, without functions.

    Each has its sentence.
    """

    def changed(at: int, new: bytes) -> str:
        damaged.write_bytes(content[:at] + new + content[at + len(new) :])
        return refusal(damaged)

    other = {"x86_64": (183, "aarch64"), "aarch64": (62, "x86_64")}[platform.machine()]
    said = changed(18, other[0].to_bytes(2, "little"))
    assert f"for {other[1]}, this machine is {platform.machine()}" in said
    assert "ELF machine 243" in changed(18, (243).to_bytes(2, "little"))
    assert "32-bit" in changed(4, b"\1")
    assert "big-endian" in changed(5, b"\2")
    assert "makes no sense" in changed(5, b"\7")
    assert "an object file" in changed(16, b"\1\0")
    assert "a program" in changed(16, b"\2\0")
    assert "no dynamic section" in changed(56, b"\0\0")
    damaged.write_bytes(content.replace(b"rkllm_", b"RKLLM_"))
    assert "librknnrt" in refusal(damaged)


def test_truncated(content: bytes, damaged: Path) -> None:
    """A download that was cut off is told as such at any length of its tables."""
    for length in (5, 20, 63, 64, 200, len(content) // 4):
        damaged.write_bytes(content[:length])
        assert "truncated or damaged" in refusal(damaged)


def survives(path: Path, data: bytes) -> None:
    """Anything but facts or a RuntimeLibraryError fails the test."""
    path.write_bytes(data)
    with contextlib.suppress(RuntimeLibraryError):
        assert identify(path).symbols


@settings(max_examples=200, deadline=None)
@given(length=st.integers(min_value=0, max_value=20_000))
def test_any_length(content: bytes, damaged: Path, length: int) -> None:
    """Whatever the length, the outcome is facts or a RuntimeLibraryError."""
    survives(damaged, content[:length])


CHANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 1200), st.integers(0, 20_000)),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"]),
        ),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=800, deadline=None)
@given(changes=CHANGES)
@example(changes=[(32, b"\xff" * 8)])
@example(changes=[(56, b"\xff\xff")])
def test_any_damage(content: bytes, damaged: Path, changes: list[tuple[int, bytes]]) -> None:
    """Whatever bytes are changed, the outcome is facts or a RuntimeLibraryError.

    Soon and without huge reads.
    """
    data = bytearray(content)
    for at, new in changes:
        at %= len(data)  # noqa: PLW2901
        data[at : at + len(new)] = new
    survives(damaged, bytes(data))


@settings(max_examples=400, deadline=None)
@given(
    entry=st.integers(0, 40),
    field=st.sampled_from([0, 8]),
    value=st.integers(0, (1 << 64) - 1) | st.integers(0, 64),
)
def test_damaged_dynamic_section(
    content: bytes, damaged: Path, entry: int, field: int, value: int
) -> None:
    """The same for the entries of the dynamic section.

    Where the sizes and addresses of all tables are.
    """
    headers = (content[at : at + 56] for at in range(64, 64 + 56 * content[56], 56))
    start = next(int.from_bytes(h[8:16], "little") for h in headers if h[:4] == b"\2\0\0\0")
    at = start + 16 * entry + field
    survives(damaged, content[:at] + value.to_bytes(8, "little") + content[at + 8 :])


@pytest.mark.parametrize("version", FUNCTIONS)
def test_known_versions(version: str) -> None:
    """Every version in the table gets the ABI that has it."""
    abi = choose_abi(facts(version, FUNCTIONS[version]))
    assert version in abi.versions
    assert choose_abi(facts(version, FUNCTIONS[version] | {"rkllm_something_new"})) is abi


def abi_refusal(found: LibraryFacts, override: str | None = None) -> str:
    with pytest.raises(RuntimeLibraryError) as caught:
        choose_abi(found, override)
    assert caught.value.hint
    return f"{caught.value.message} -- {caught.value.hint}"


def test_too_old() -> None:
    """RKLLM 1.0 is refused by its version or its functions, also when told to take another."""
    old = frozenset({"rkllm_init", "rkllm_run"})
    for found in (
        facts("1.0.1", old),
        facts(None, old),
        facts("1.0.1", FUNCTIONS["1.1.0"]),
        facts("1.0", old),
    ):
        said = abi_refusal(found)
        assert "RKLLM 1.0.x cannot save prompt caches" in said
        assert "install RKLLM 1.1.0 or newer" in said
    assert "cannot save prompt caches" in abi_refusal(facts("1.0.1", old), "1.1.0")
    assert "it says 1.2.3" in abi_refusal(facts("1.2.3", old))


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ("1.1.4", "1.1.x"),
        ("1.2.0", "1.2.0 or 1.2.1b1"),
        ("1.2.1", "1.2.1 or newer"),
        ("1.3.0", "1.2.1 or newer"),
    ],
)
def test_no_version(like: str, words: str) -> None:
    """Without a version nothing is guessed.

    What the functions suggest is said, and the key that decides.
    """
    said = abi_refusal(facts(None, FUNCTIONS[like]))
    assert "does not say which RKLLM version" in said
    assert f"suggest {words}" in said
    assert "engine.abi" in said


@pytest.mark.parametrize(
    "version", ["1.2.4", "1.3.1", "1.4.0", "1.2.1b2", "2.0.0", "10.0.0", "1.1"]
)
def test_unknown_version(version: str) -> None:
    """A version that the table does not have is refused.

    With the known ones and the key that decides.
    """
    said = abi_refusal(facts(version, FUNCTIONS["1.3.0"]))
    assert f"RKLLM {version}, a version that this program does not know" in said
    assert "1.2.1b1" in said
    assert "engine.abi" in said


def test_contradictions() -> None:
    """Version and functions that do not go together are refused with what was found."""
    chat, size = "rkllm_set_chat_template", "rkllm_get_kv_cache_size"
    assert f"has {chat}, which came with 1.2.0" in abi_refusal(
        facts("1.1.4", FUNCTIONS["1.1.4"] | {chat})
    )
    for version in ("1.1.0", "1.2.0", "1.2.1b1"):
        assert f"has {size}, which came with 1.2.1" in abi_refusal(
            facts(version, FUNCTIONS[version] | {size})
        )
    for version in ("1.2.1", "1.3.0"):
        assert f"does not have {size}" in abi_refusal(facts(version, FUNCTIONS[version] - {size}))
    assert f"does not have {chat}" in abi_refusal(facts("1.2.0", FUNCTIONS["1.1.4"]))


def test_override() -> None:
    """A named ABI is taken whatever the version says.

    As long as the functions it needs are there.
    """
    everything = FUNCTIONS["1.3.0"]
    for found in (facts(None, everything), facts("1.3.1", everything), facts("1.2.3", everything)):
        assert choose_abi(found, "1.3.0").group == "E"
        assert choose_abi(found, "1.2.2").name == "1.2.1"
        assert choose_abi(found, "1.1.3").group == "B"
    said = abi_refusal(facts("1.3.1", everything), "1.3.1")
    assert "engine.abi is '1.3.1'" in said
    assert "1.3.0" in said
    said = abi_refusal(facts(None, FUNCTIONS["1.1.4"]), "1.2.0")
    assert "it lacks rkllm_clear_kv_cache, rkllm_set_chat_template" in said
    assert "suggest 1.1.x" in said
