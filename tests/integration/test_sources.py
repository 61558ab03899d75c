"""Reading inputs from disk.

Whatever is wrong with one is said in words, and is the trouble of that input alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rkcached.errors import StoreError
from rkcached.host.digests import Digests, signature_of
from rkcached.host.regular import read_regular
from rkcached.messages.builtin import BUILTIN
from rkcached.sources import text_files
from rkcached.sources.manifest_file import inputs
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import (
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    TemplateOrigin,
    TemplateSource,
    Trouble,
)
from rkcached.sources.stored_texts import StoredTexts
from rkcached.sources.text_files import MAX_PROMPT_BYTES
from tests.integration.test_digests import settle

MODEL = b'{"rkcached_memory_model": 1}'
P = Key("m", "p")


@contextlib.contextmanager
def not_root() -> Iterator[None]:
    """As the user nobody, if the tests run as root, who may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(user)


class Folder:
    """A directory with a model, a prompt and a manifest over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = root / "m.json"
        self.model.write_bytes(MODEL)
        self.prompt = root / "p.md"
        self.prompt.write_text("Be brief.\n")
        self.reader = SourceReader(Digests())

    def scan(self, prompts: str = "{p: p.md}", *, more: str = "") -> Sources:
        text = (
            "version: 1\nengine: {kind: memory}\nmodels:\n  m:\n    path: m.json\n"
            f"    prompts: {prompts}\n" + "".join(f"    {line}\n" for line in more.splitlines())
        )
        return self.reader.scan(parse(text, file=self.root / "manifest.yaml"))

    def text(self, prompts: str = "{p: p.md}") -> str:
        source = self.scan(prompts).prompts[P].source
        assert isinstance(source, PromptSource), source
        return source.text

    def trouble(self, prompts: str = "{p: p.md}") -> Trouble:
        source = self.scan(prompts).prompts[P].source
        assert isinstance(source, Trouble), source
        return source

    def found(self, pattern: str = "extra/*.md", prompts: str = "{}") -> dict[str, str]:
        """Name to text, or to what is wrong."""
        declared = self.scan(prompts, more=f"prompts_from: '{pattern}'").prompts
        return {
            key.prompt: d.source.text if isinstance(d.source, PromptSource) else d.source.message
            for key, d in declared.items()
        }


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- prompts ---


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"Be brief.", "Be brief."),
        (b"Be brief.\n", "Be brief."),
        (b"Be brief.\r\n\r\n", "Be brief."),
        (b"\xef\xbb\xbfBe brief.\n", "Be brief."),
        (b"  Be\n\nbrief. \n", "  Be\n\nbrief. "),
        ("Zürich 🎉".encode(), "Zürich 🎉"),
    ],
    ids=["bare", "newline", "windows", "byte-order-mark", "inner-space", "unicode"],
)
def test_the_text_of_a_prompt(folder: Folder, content: bytes, text: str) -> None:
    """The bytes of the file, without its byte order mark and its last newlines."""
    folder.prompt.write_bytes(content)
    assert text == folder.text()


def test_files_are_joined_as_paragraphs(folder: Folder) -> None:
    """In the manifest's order, each without its byte order mark; one file may be named twice."""
    (folder.root / "q.md").write_bytes(b"\xef\xbb\xbfBe kind.\n\n")
    assert folder.text("{p: {files: [q.md, p.md, q.md]}}") == "Be kind.\n\nBe brief.\n\nBe kind."


def test_one_bad_file_of_several_is_told_by_its_name(folder: Folder) -> None:
    """The others are not blamed."""
    assert str(folder.root / "q.md") in folder.trouble("{p: {files: [p.md, q.md]}}").message


def test_one_blank_file_of_several_is_no_trouble(folder: Folder) -> None:
    """Together they have a text."""
    (folder.root / "q.md").write_text("\n")
    assert folder.text("{p: {files: [q.md, p.md]}}") == "\n\nBe brief."


def test_the_hint_converts_from_the_encoding_that_was_detected(folder: Folder) -> None:
    """What it says to run makes a prompt of the file."""
    folder.prompt.write_bytes("Zürich, bitte.".encode("utf-16"))
    command = folder.trouble().hint.partition(": ")[2]
    subprocess.run(["sh", "-c", command], check=True)
    assert folder.text() == "Zürich, bitte."


def test_the_hint_names_no_encoding_that_was_not_detected(folder: Folder) -> None:
    """Bytes that are not UTF-8 may be in any of many encodings."""
    folder.prompt.write_bytes(b"caf\xe9")
    hint = folder.trouble().hint
    assert "UTF-8" in hint
    assert "latin" not in hint.lower()


def write(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def become_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


BAD_INPUTS = {
    "empty": (write(b""), "the prompt is empty"),
    "blank": (write(b" \n\t\n"), "the prompt is empty"),
    "only-byte-order-mark": (write(b"\xef\xbb\xbf"), "the prompt is empty"),
    "latin1": (write(b"caf\xe9"), "is not UTF-8: byte 0xe9 at offset 3"),
    "latin1-after-byte-order-mark": (
        write(b"\xef\xbb\xbfcaf\xe9"),
        "is not UTF-8: byte 0xe9 at offset 6",
    ),
    "utf16": (write("Be brief.".encode("utf-16")), "p.md is UTF-16, not UTF-8"),
    "utf16-big-endian": (write("\ufeffBe brief.".encode("utf-16-be")), "p.md is UTF-16, not UTF-8"),
    "utf32": (write("Be brief.".encode("utf-32")), "p.md is UTF-32, not UTF-8"),
    "utf16-without-a-mark": (
        write("Be brief.".encode("utf-16-le")),
        "contains a NUL byte at offset 1",
    ),
    "nul": (write(b"ab\0c"), "contains a NUL byte at offset 2"),
    "too-large": (
        write(b"x" * (MAX_PROMPT_BYTES + 1)),
        "has 1,048,577 bytes, the limit is 1,048,576",
    ),
    "missing": (Path.unlink, "source missing"),
    "dangling-link": (become_dangling_link, "source missing"),
    "link-to-itself": (become_loop, "cannot be read: "),
    "directory": (become_directory, "is a directory"),
    "fifo": (become_fifo, "is not a regular file"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_what_is_wrong_with_a_prompt_file_is_said_in_words(folder: Folder, case: str) -> None:
    """With its path and a hint; nothing is raised, and nothing is waited for."""
    spoil, words = BAD_INPUTS[case]
    spoil(folder.prompt)
    trouble = folder.trouble()
    assert words in trouble.message
    assert str(folder.prompt) in trouble.message
    assert trouble.hint


def test_a_prompt_of_exactly_the_limit_is_good(folder: Folder) -> None:
    """The limit is the largest allowed."""
    folder.prompt.write_bytes(b"x" * MAX_PROMPT_BYTES)
    assert len(folder.text()) == MAX_PROMPT_BYTES


def test_an_unreadable_prompt_is_said_in_words() -> None:
    """With the command that allows it; the model beside it is read."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o755)
        folder = Folder(Path(place))
        folder.prompt.chmod(0)
        with not_root():
            trouble, model = folder.trouble(), folder.scan().models["m"]
    assert "permission denied" in trouble.message
    assert f"+r {folder.prompt}`" in trouble.hint
    assert not isinstance(model, Trouble)


def test_trouble_is_of_one_prompt_alone_and_passes(folder: Folder) -> None:
    """Its neighbour has its text; when the file is good again, so is the prompt."""
    folder.prompt.write_bytes(b"\xff")
    (folder.root / "q.md").write_text("Be kind.")
    prompts = folder.scan("{p: p.md, q: q.md}").prompts
    assert isinstance(prompts[P].source, Trouble)
    assert isinstance(prompts[Key("m", "q")].source, PromptSource)
    folder.prompt.write_text("Be good.")
    assert folder.text() == "Be good."


def test_a_declaration_knows_its_line_and_description(folder: Folder) -> None:
    """For messages and listings."""
    declared = folder.scan("{p: {files: p.md, description: rules}}").prompts[P]
    assert (declared.line, declared.description) == (6, "rules")


# --- what changed ---


def test_an_unchanged_prompt_is_not_read_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that did not change, no look keeps anything new.

    A file that may still change unseen is read again.
    """
    settle(folder.prompt)
    first = folder.scan().prompts[P]
    read: list[Path] = []

    def noted(path: Path, max_bytes: int, **options: Any) -> bytes:
        read.append(path)
        return read_regular(path, max_bytes, **options)

    monkeypatch.setattr(text_files, "read_regular", noted)
    assert folder.scan().prompts[P] is first
    assert read == []
    folder.prompt.write_text("Be brief.\n")
    assert [folder.scan().prompts[P] is first for _ in range(2)] == [True, True]
    assert read == [folder.prompt] * 2


def test_every_rewrite_is_noticed(folder: Folder) -> None:
    """Also with the same size and mtime."""
    settle(folder.prompt)
    folder.text()
    stat = folder.prompt.stat()
    folder.prompt.write_text("Be bribe.\n")
    os.utime(folder.prompt, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder.text() == "Be bribe."


def test_a_second_change_within_one_tick_of_the_clock_is_noticed(folder: Folder) -> None:
    """Regression: the text of the first was remembered.

    Taken for that of the second once the file had settled.
    """
    for number in range(50):
        folder.prompt.write_text(f"first  {number:04}")
        assert folder.text() == f"first  {number:04}"
        before = signature_of(folder.prompt.stat())
        folder.prompt.write_text(f"second {number:04}")
        if before == signature_of(folder.prompt.stat()):
            break
    settle(folder.prompt)
    assert folder.text() == f"second {number:04}"


# --- tools ---

TOOL = {"type": "function", "function": {"name": "get_weather"}}
WITH_TOOLS = "{p: {files: p.md, tools: extra/tools.json}}"


def write_tools(folder: Folder, content: bytes) -> Path:
    path = folder.root / "extra/tools.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_tools_of_a_prompt(folder: Folder) -> None:
    """They are read from a path beside the manifest, and an edit is seen."""
    path = write_tools(folder, json.dumps([TOOL]).encode())
    source = folder.scan(WITH_TOOLS).prompts[P].source
    assert isinstance(source, PromptSource)
    assert source.tools is not None
    assert source.tools.plain() == [TOOL]
    assert folder.scan().prompts[P].source == replace(source, tools=None)

    settle(path)
    again = folder.scan(WITH_TOOLS).prompts[P].source
    assert again == source
    path.write_text(json.dumps([TOOL]).replace("get_weather", "get_time"))
    changed = folder.scan(WITH_TOOLS).prompts[P].source
    assert isinstance(changed, PromptSource)
    assert changed.tools is not None
    assert changed.tools.names == ("get_time",)


def test_the_file_of_tools_is_followed(folder: Folder) -> None:
    """It is one of the prompt's files, read again when it changes, and no prompt by itself."""
    path = write_tools(folder, json.dumps([TOOL]).encode())
    sources = folder.scan(WITH_TOOLS, more="prompts_from: 'extra/*.json'")
    assert list(sources.prompts) == [P]
    declared = sources.prompts[P]
    assert declared.text_files == (str(folder.prompt),)
    assert declared.files == (str(folder.prompt), str(path))

    path.write_text(json.dumps([TOOL, TOOL]))
    again = folder.reader.read_again(declared).source
    assert isinstance(again, PromptSource)
    assert again.text == "Be brief."
    assert again.tools is not None
    assert len(again.tools.names) == 2

    text = f"version: 1\nmodels: {{m: {{path: m.json, prompts: {WITH_TOOLS}}}}}"
    manifest = parse(text, file=folder.root / "manifest.yaml")
    files, _ = inputs(manifest, StoredTexts(folder.root))
    assert path in files


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (None, "source missing", "put the file there"),
        (b"[", "tools.json:1: not JSON", "write ["),
        (b"{}", "the tools should be an array", "write ["),
        ("[]".encode("utf-16"), "is UTF-16, not UTF-8", "iconv"),
        (b"[" + b" " * MAX_PROMPT_BYTES + b"]", "the limit is 1,048,576", "shorten the file of"),
        (b"\0", "NUL byte at offset 0", "a file of tools is a UTF-8 text file"),
    ],
    ids=["missing", "no-json", "no-array", "utf-16", "large", "binary"],
)
def test_wrong_tools_are_the_trouble_of_their_prompt(
    folder: Folder, content: bytes | None, message: str, hint: str
) -> None:
    """At the manifest's line of the tools; the text is not blamed."""
    if content is not None:
        write_tools(folder, content)
    trouble = folder.trouble(WITH_TOOLS)
    assert message in trouble.message
    assert hint in trouble.hint
    assert "extra/tools.json" in trouble.message
    assert trouble.place == ("tools",)
    assert folder.text() == "Be brief."


def test_a_folder_is_no_file_of_tools(folder: Folder) -> None:
    """Nor is a pattern of use for them."""
    (folder.root / "extra/tools.json").mkdir(parents=True)
    trouble = folder.trouble(WITH_TOOLS)
    assert trouble.message.endswith("is a directory")
    assert trouble.hint == "name a file"


# --- prompts_from ---


@pytest.fixture
def extra(folder: Folder) -> Path:
    path = folder.root / "extra"
    path.mkdir()
    return path


def test_each_file_of_a_folder_is_a_prompt(folder: Folder, extra: Path) -> None:
    """Sorted by name, after the declared ones."""
    for name in ("c", "a", "b"):
        (extra / f"{name}.md").write_text(f"I am {name}.")
    found = folder.found(prompts="{p: p.md}")
    assert list(found.items()) == [
        ("p", "Be brief."),
        ("a", "I am a."),
        ("b", "I am b."),
        ("c", "I am c."),
    ]


def test_hidden_files_backups_and_folders_are_left_out(folder: Folder, extra: Path) -> None:
    """What editors leave behind is no prompt, even if the pattern matches it."""
    for name in (".hidden.md", "a.md~", ".a.md.swp", "a.txt", "a.md"):
        (extra / name).write_text("x")
    (extra / "folder.md").mkdir()
    (extra / ".#a.md").symlink_to("somebody@somewhere")  # how Emacs locks a file
    (extra / "link.md").symlink_to("folder.md")
    os.mkfifo(extra / "fifo.md")
    assert set(folder.found("extra/*.md*")) == {"a"}
    assert set(folder.found()) == {"a"}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "System Prompt.md",
        "a.sync-conflict-20260102-101500-ABCDEF.md",
        "a (conflicted copy).md",
        "caf\xe9.md",
    ],
)
def test_a_file_whose_name_cannot_be_a_prompts_is_skipped(
    folder: Folder, extra: Path, name: str
) -> None:
    """It is no trouble, as nobody meant it to be a prompt.

    It is listed, once for all models, and the others are found.

    The name of one in another encoding is listed so that it can be printed and sent.
    """
    for file in (
        os.fsencode(extra) + b"/" + name.encode("latin-1"),
        os.fsencode(extra / "good.md"),
    ):
        Path(os.fsdecode(file)).write_text("x")
    text = "version: 1\nengine: {kind: memory}\nmodels:\n"
    text += "".join(
        f"  {model}: {{path: m.json, prompts_from: extra/*.md}}\n" for model in ("m", "n")
    )
    sources = folder.reader.scan(parse(text, file=folder.root / "manifest.yaml"))
    assert list(sources.prompts) == [Key("m", "good"), Key("n", "good")]
    shown = name.replace("\xe9", "\\udce9")
    assert sources.skipped_files == (str(extra / shown),)
    assert str(sources.skipped_files).encode()


def test_a_file_is_skipped_by_its_name_of_now(folder: Folder, extra: Path) -> None:
    """Renamed to a name that can be a prompt's it is one, and renamed back it is skipped again."""
    pattern = "prompts_from: 'extra/*.md'"
    (extra / "Rules.md").write_text("Rules.")
    assert folder.scan("{}", more=pattern).prompts == {}
    (extra / "Rules.md").rename(extra / "rules.md")
    sources = folder.scan("{}", more=pattern)
    assert (list(sources.prompts), sources.skipped_files) == ([Key("m", "rules")], ())
    (extra / "rules.md").rename(extra / "Rules.md")
    sources = folder.scan("{}", more=pattern)
    assert (list(sources.prompts), sources.skipped_files) == ([], (str(extra / "Rules.md"),))


def test_a_declared_file_may_have_any_name(folder: Folder, extra: Path) -> None:
    """The manifest gives its prompt a name, so it is not skipped."""
    (extra / "README.md").write_text("Read me.")
    sources = folder.scan("{p: extra/README.md}", more="prompts_from: 'extra/*.md'")
    assert (list(sources.prompts), sources.skipped_files) == ([P], ())


def test_a_second_prompt_of_one_name_is_told(folder: Folder, extra: Path) -> None:
    """Whether by two endings, or by a declared prompt of that name.

    The manifest's is not replaced silently.
    """
    (extra / "a.md").write_text("one")
    (extra / "a.txt").write_text("two")
    assert "makes a second prompt named 'a'" in folder.found("extra/a.*")["a"]
    (extra / "p.md").write_text("other")
    assert "makes a second prompt named 'p'" in folder.found("extra/p.*", "{p: p.md}")["p"]


def test_a_found_prompt_is_named_by_its_stem(folder: Folder, extra: Path) -> None:
    """As Path.stem has it, whatever dots there are."""
    names = ["a.md", "b.c.md", "d", "e.", "f..md", "g.h."]
    for name in names:
        (extra / name).write_text("x")
    assert set(folder.found("extra/*")) == {Path(name).stem for name in names}


def test_a_declared_file_is_not_found_a_second_time(folder: Folder, extra: Path) -> None:
    """It has its name and parameters from the manifest."""
    for name in ("a", "b"):
        (extra / f"{name}.md").write_text(name)
    assert folder.found(prompts="{special: extra/a.md}") == {"special": "a", "b": "b"}


def test_a_folder_that_cannot_be_listed_makes_its_model_unlisted(folder: Folder) -> None:
    """Nothing is found, and nothing is taken for gone; the declared prompts are there."""
    sources = folder.scan(more="prompts_from: 'nowhere/*.md'")
    assert set(sources.prompts) == {P}
    assert (
        "nowhere cannot be listed: No such file or directory"
        in sources.unlisted_models["m"].message
    )
    assert folder.scan(more="prompts_from: 'p.md/*.md'").unlisted_models


def test_an_empty_folder_is_listed(folder: Folder, extra: Path) -> None:
    """There it is known that nothing is declared."""
    assert (
        folder.scan(more="prompts_from: 'extra/*.md'").unlisted_models,
        list(extra.iterdir()),
    ) == ({}, [])


# --- models and the runtime ---


def test_a_model_has_the_digest_of_its_file_and_a_template(folder: Folder) -> None:
    """A built-in one, or the text of a file; the file is read again when it changes."""
    first = folder.scan().models["m"]
    assert isinstance(first, ModelSource)
    assert first.template.text == BUILTIN["chatml"]
    (folder.root / "t.jinja").write_text("{{ 1 }}")
    second = folder.scan(more="chat_template: t.jinja").models["m"]
    assert isinstance(second, ModelSource)
    assert second.digest == first.digest
    assert second.template == TemplateSource(
        text="{{ 1 }}", name=str(folder.root / "t.jinja"), origin=TemplateOrigin.FILE
    )
    folder.model.write_bytes(MODEL + b" ")
    third = folder.scan().models["m"]
    assert isinstance(third, ModelSource)
    assert first.digest != third.digest


def test_the_day_is_an_input(folder: Folder) -> None:
    """As a file's text is, so that what follows from it needs no clock."""
    days = iter([date(2025, 1, 1), date(2025, 1, 2)])
    folder.reader = SourceReader(Digests(), today=lambda: next(days))
    assert folder.scan().today == date(2025, 1, 1)
    assert folder.scan().today == date(2025, 1, 2)


BAD_MODELS = {
    "missing": (Path.unlink, "source missing"),
    "other-format": (write(b"GGUF" + bytes(100)), "is not a memory-engine model"),
    "empty": (write(b""), "is not a memory-engine model"),
    "directory": (become_directory, "is a directory"),
    "fifo": (become_fifo, "is not a regular file"),
    "dangling-link": (become_dangling_link, "source missing"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_what_is_wrong_with_a_model_file_is_said_in_words(folder: Folder, case: str) -> None:
    """Regression for the FIFO: opening it waited for a writer, and the daemon with it."""
    spoil, words = BAD_MODELS[case]
    spoil(folder.model)
    sources = folder.scan()
    model = sources.models["m"]
    assert isinstance(model, Trouble)
    assert words in model.message
    assert str(folder.model) in model.message
    assert model.hint
    assert isinstance(sources.prompts[P].source, PromptSource)


def test_what_is_wrong_with_a_template_file_is_its_models_trouble(folder: Folder) -> None:
    """As with a prompt file."""
    model = folder.scan(more="chat_template: nowhere.jinja").models["m"]
    assert isinstance(model, Trouble)
    assert "source missing" in model.message


def test_a_gguf_model_is_told_by_its_first_bytes(folder: Folder) -> None:
    """The engine of the manifest says what a model file looks like."""
    folder.model.write_bytes(b"GGUF" + bytes(20))
    text = "version: 1\nmodels: {m: {path: m.json}, n: {path: n.gguf}}\n"
    (folder.root / "n.gguf").write_bytes(b"GGUX")
    models = folder.reader.scan(parse(text, file=folder.root / "manifest.yaml")).models
    assert isinstance(models["m"], ModelSource)
    assert isinstance(models["n"], Trouble)
    assert "is not a GGUF model" in models["n"].message


def test_the_runtime_is_known_by_its_files(folder: Folder) -> None:
    """Version and digest."""
    runtime = folder.scan().runtime
    assert isinstance(runtime, RuntimeSource)
    assert (runtime.version, len(runtime.digest)) == ("1", 64)


@pytest.mark.parametrize(
    ("target", "trouble"),
    [
        ("x" * 300, "cannot be read"),  # no file system takes that name, also from root
        ("link.md", "cannot be read"),
        ("nowhere", "source missing"),
    ],
    ids=["impossible", "loop", "dangling"],
)
def test_a_link_that_cannot_be_followed_blocks_its_own_prompt_only(
    folder: Folder, target: str, trouble: str
) -> None:
    """Found by an administrator.

    A link into a closed directory took away every prompt of the folder.

    One that leads nowhere was no prompt, so that what it had been made into was removed as
    nobody's.
    """
    extra = folder.root / "extra"
    extra.mkdir()
    (extra / "link.md").symlink_to(target)
    (extra / "open.md").write_text("Open.")
    sources = folder.scan("{}", more="prompts_from: 'extra/*.md'")
    found = {key.prompt: declared.source for key, declared in sources.prompts.items()}
    assert isinstance(found["link"], Trouble)
    assert trouble in found["link"].message
    assert isinstance(found["open"], PromptSource)
    assert not sources.unlisted_models


def test_no_text_is_stored_or_deleted_through_a_link(tmp_path: Path) -> None:
    """A model's folder in the state directory that leads to a user's.

    His file of that name stays.
    """
    home = tmp_path / "home"
    home.mkdir()
    (home / "f1.md").write_text("mine")
    stored = StoredTexts(tmp_path / "state")
    stored.write(Key("n", "f1"), "ours")
    (tmp_path / "state/prompts/m").symlink_to(home)
    with pytest.raises(StoreError, match="is a link"):
        stored.write(Key("m", "f1"), "another text")
    with pytest.raises(StoreError, match="is a link"):
        stored.delete(Key("m", "f1"))
    assert (home / "f1.md").read_text() == "mine"
    assert stored.delete(Key("n", "f1"))
