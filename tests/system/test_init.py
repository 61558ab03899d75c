"""The first steps: `init`, `run`, and a warm answer; then `add` and `edit`."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Workspace
from terminal import Terminal

from tests import tiny_models
from tests.documents import ROOT
from tests.waiting import DEADLINE_S, wait_until

TEXT = "You are the keeper of a lighthouse. You answer in one short sentence.\n"


def initialise(space: Workspace, *arguments: str, code: int = 0) -> str:
    done = space.cli("init", *arguments, code=code)
    return done.stdout if code == 0 else done.stderr


def manifest(space: Workspace) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(space.manifest.read_text())
    return data


@pytest.fixture
def folder(workspace: Workspace) -> Workspace:
    """Two tiny models, prompts in a folder, and files that are neither."""
    workspace.manifest.unlink(missing_ok=True)
    tiny_models.plain(workspace.root / "Tiny-Llama-Instruct-Q4_K_M.gguf")
    workspace.write("prompts/Keeper of the Light.md", TEXT)
    workspace.write("prompts/cook.txt", TEXT)
    workspace.write("prompts/README.md", "Prompts for the ship.")
    workspace.write("prompts/nothing.md", "")
    workspace.write("docs/about.md", "No prompt.")
    return workspace


# init


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A user's runtime directory, with a name that leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="rk-") as name:
        yield Path(name)


@pytest.mark.model
def test_three_steps_lead_to_a_warm_answer(
    workspace: Workspace, small_model: Path, runtime: Path
) -> None:
    """In a folder with a model and a prompt, without root, systemd, or anything exported."""
    home = workspace.root / "ship"
    (home / "prompts").mkdir(parents=True)
    (home / small_model.name).symlink_to(small_model)
    (home / "prompts/keeper.md").write_text(TEXT * 8)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RKCACHED_")
    } | {"XDG_RUNTIME_DIR": str(runtime)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rkcached", *words],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )

    steps = run("init").stdout.partition("next:\n")[2].splitlines()
    assert [line.split("#")[0].strip() for line in steps] == [
        "rkcached run",
        'rkcached chat smollm2-135m-instruct/keeper "hello"',
    ]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "rkcached", "run"],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        run("wait", "--timeout", "100")
        shown = run("chat", "smollm2-135m-instruct/keeper", "hello").stderr
        assert "[hit on keeper: first token after" in shown
        assert "1 fresh" in run("status").stdout
    finally:
        daemon.terminate()
        daemon.wait(DEADLINE_S)


def test_what_a_folder_has_becomes_a_manifest(folder: Workspace) -> None:
    """With its comments, the schema for editors, and nothing that `check` complains of."""
    said = initialise(folder)
    text = folder.manifest.read_text()
    assert text.startswith("# yaml-language-server: $schema=manifest.schema.json\n")
    assert json.loads((folder.root / "manifest.schema.json").read_text())["properties"]["models"]
    assert manifest(folder) == {
        "version": 1,
        "engine": {"kind": "llamacpp"},
        "models": {
            "tiny-llama-instruct": {
                "path": "Tiny-Llama-Instruct-Q4_K_M.gguf",
                "params": {"max_context_len": 2048, "max_new_tokens": 512},
                "prompts": {
                    "cook": "prompts/cook.txt",
                    "keeper-of-the-light": "prompts/Keeper of the Light.md",
                },
            }
        },
    }
    assert "left out: prompts/nothing.md: it is empty" in said
    assert "ok, 1 model, 2 prompts" in folder.cli("check").stdout


def test_a_sample_is_written_where_there_is_no_prompt(workspace: Workspace) -> None:
    workspace.manifest.unlink(missing_ok=True)
    tiny_models.plain(workspace.root / "m.gguf")
    assert "prompts/assistant.md (a sample" in initialise(workspace)
    assert (workspace.root / "prompts/assistant.md").read_text()
    assert manifest(workspace)["models"]["m"]["prompts"] == {"assistant": "prompts/assistant.md"}
    assert "1 prompt" in workspace.cli("check").stdout


def test_nothing_is_overwritten(folder: Workspace) -> None:
    initialise(folder)
    before = folder.manifest.read_text()
    refused = initialise(folder, code=os.EX_CANTCREAT)
    assert "exists already, and is not overwritten" in refused
    assert "`rkcached add FILE`" in refused
    assert folder.manifest.read_text() == before


def test_the_sample_of_the_installation_is_replaced(folder: Workspace) -> None:
    """Nobody has written it, so nothing is lost. It keeps owner and mode; an edited one stays."""
    place = folder.root / "etc/manifest.yaml"
    place.parent.mkdir()
    sample = (ROOT / "etc/rkcached/manifest.yaml").read_bytes()
    place.write_bytes(sample + b"# mine\n")
    place.chmod(0o640)
    refused = initialise(folder, ".", "--manifest", str(place), code=os.EX_CANTCREAT)
    assert "is not overwritten" in refused
    assert place.read_bytes() == sample + b"# mine\n"

    place.write_bytes(sample)
    initialise(folder, ".", "--manifest", str(place))
    assert list(yaml.safe_load(place.read_text())["models"]) == ["tiny-llama-instruct"]
    assert stat.S_IMODE(place.stat().st_mode) == 0o640


def test_a_folder_without_a_model(workspace: Workspace) -> None:
    workspace.manifest.unlink(missing_ok=True)
    refused = initialise(workspace, code=os.EX_NOINPUT)
    assert "has no model" in refused
    assert "docs/models.md says where to get one" in refused
    assert not workspace.manifest.exists()
    assert "cannot be read" in initialise(workspace, "nowhere", code=os.EX_NOINPUT)


def test_a_manifest_elsewhere(folder: Workspace) -> None:
    """Paths that lie beside it are relative, others whole; the next steps name it."""
    said = initialise(folder, ".", "--manifest", "etc/ship.yaml")
    data = yaml.safe_load((folder.root / "etc/ship.yaml").read_text())
    path = data["models"]["tiny-llama-instruct"]["path"]
    assert path == str(folder.root / "Tiny-Llama-Instruct-Q4_K_M.gguf")
    assert f"cd {folder.root / 'etc'} && rkcached run -m ship.yaml" in said


def test_models_of_an_npu(workspace: Workspace) -> None:
    """Their format comes from the tokenizer's files beside them, or from their name."""
    workspace.manifest.unlink(missing_ok=True)
    workspace.write("Qwen3-0.6B-rk3588-w8a8.rkllm", "x" * 100)
    workspace.write("own/Fable-1B_w8a8_g128_rk3576.rkllm", "x" * 100)
    workspace.write("own/tokenizer_config.json", "{}")
    workspace.write("strange.rkllm", "x" * 100)
    llama = "Llama-3.2-1B-Instruct-rk3588-w8a8_g128-opt-1-hybrid-ratio-0.5"
    workspace.write(f"{llama}.rkllm", "x" * 100)
    workspace.write(f"{llama}/tokenizer.json", "{}")
    workspace.write("Qwen3-Embedding-0.6B-rk3588.rkllm", "x" * 100)
    said = initialise(workspace)
    models = manifest(workspace)["models"]
    assert models["qwen3-0.6b"]["chat_template"] == "qwen3"
    assert models["fable-1b"]["tokenizer"] == "own"
    assert models["llama-3.2-1b-instruct"]["tokenizer"] == llama
    assert "chat_template" not in models["strange"]
    assert "Nothing tells the model's format" in workspace.manifest.read_text()
    assert models["qwen3-embedding-0.6b"]["embedding"] is True
    assert manifest(workspace)["engine"] == {"kind": "rkllm"}
    assert "before you start it:" in said  # no runtime is here


def test_what_is_left_out_is_said(folder: Workspace) -> None:
    folder.write("mmproj-tiny.gguf", "GGUF")
    folder.write("broken.gguf", "GGUF....")
    folder.write("other.rkllm", "x")
    (folder.root / os.fsdecode(b"prompts/\xff.md")).write_text("x")
    data = json.loads(initialise(folder, "--json"))
    reasons = {Path(item["file"]).name: item["reason"] for item in data["skipped"]}
    assert "text only" in reasons["mmproj-tiny.gguf"]
    assert "damaged" in reasons["broken.gguf"]
    assert "its name is not UTF-8" in reasons.values()
    assert reasons["other.rkllm"] == "it is for the engine rkllm"
    assert data["engine"] == "llamacpp"
    assert {prompt["prompt"] for prompt in data["prompts"]} == {"cook", "keeper-of-the-light"}
    assert data["problems"] == []


def test_it_asks_what_it_must(folder: Workspace) -> None:
    """At a terminal: the engine, where models of both are there; and whose the prompts are."""
    folder.write("qwen3-0.6b.rkllm", "x")
    tiny_models.plain(folder.root / "other.gguf")
    terminal = Terminal(folder, "init", shows_output=True)
    try:
        terminal.wait_shown("Which engine?", "[llamacpp]")
        terminal.type("\r")
        terminal.wait_shown("Which model shall have the 2 prompts?")
        terminal.type("other\r")
        assert terminal.process.wait(DEADLINE_S) == 0
    finally:
        terminal.close()
    models = manifest(folder)["models"]
    assert list(models) == ["tiny-llama-instruct", "other"]
    assert "prompts" in models["other"]
    assert "prompts" not in models["tiny-llama-instruct"]


def test_what_is_no_file_is_left_out_and_named(folder: Workspace) -> None:
    """It was passed over in silence: links that lead nowhere or to folders, and pipes."""
    root = folder.root
    (root / "lost.gguf").symlink_to("nowhere.gguf")
    (root / "linked").symlink_to("prompts")
    (root / "other").symlink_to("nowhere")
    os.mkfifo(root / "pipe.md")
    left_out = initialise(folder, "--yes")
    assert "left out: lost.gguf: it is a link that leads nowhere" in left_out
    assert "left out: linked: it is a link to a folder; name that folder to init" in left_out
    assert "left out: pipe.md: it is a pipe, a socket or a device, and no file" in left_out
    assert "left out: other" not in left_out


def test_an_error_names_the_file_that_was_to_be_written(folder: Workspace) -> None:
    """It named a temporary file, which nobody knows."""
    error = initialise(folder, "-m", "/proc/manifest.yaml", code=os.EX_CANTCREAT)
    assert "/proc/manifest.schema.json cannot be written" in error


# add


COMMENTED = """\
# My ship.
version: 1
engine: {kind: memory}   # no NPU here

models:
  m:
    path: m.model   # the old one
    prompts:
      # The first.
      a: "a.md"
"""


@pytest.fixture
def declared(workspace: Workspace) -> Workspace:
    workspace.memory_model()
    for name in ("a", "b"):
        workspace.write(f"{name}.md", f"You are {name}. " * 9)
    workspace.write("manifest.yaml", COMMENTED)
    return workspace


def test_a_prompt_is_added_and_nothing_else_changes(declared: Workspace) -> None:
    declared.manifest.chmod(0o640)
    declared.start()
    declared.wait_settled()
    said = declared.cli("add", "b.md").stdout
    assert "added the prompt m/b" in said
    assert declared.manifest.read_text() == COMMENTED + "      b: b.md\n"
    assert stat.S_IMODE(declared.manifest.stat().st_mode) == 0o640
    declared.wait_state("b", "fresh")


def test_a_prompt_is_added_to_a_flow_mapping_and_to_none(declared: Workspace) -> None:
    text = "version: 1\nengine: {kind: memory}\nmodels:\n  m: {path: m.model, prompts: {a: a.md}}\n"
    declared.write("manifest.yaml", text)
    declared.cli("add", "b.md", "--name", "second")
    assert manifest(declared)["models"]["m"]["prompts"] == {"a": "a.md", "second": "b.md"}
    declared.write(
        "manifest.yaml", "version: 1\nengine: {kind: memory}\nmodels:\n  m: {path: m.model}\n"
    )
    declared.cli("add", "b.md")
    assert manifest(declared)["models"]["m"]["prompts"] == {"b": "b.md"}


def test_a_prompt_is_added_where_all_are_comments(declared: Workspace) -> None:
    """Such a manifest was refused, by `check`, too: nobody deletes the key with its last prompt."""
    head = "version: 1\nengine: {kind: memory}\nmodels:\n  m:\n    path: m.model\n    prompts:\n"
    comments = "      # One day:\n      #   c: c.md\n"
    declared.write("manifest.yaml", head + comments)
    declared.cli("check")
    declared.cli("add", "b.md")
    assert declared.manifest.read_text() == f"{head}      b: b.md\n{comments}"


def test_comments_keep_their_places(declared: Workspace) -> None:
    """Those below a section are not its own; one that would be lost keeps the file as it is."""
    below = "\n# another model, one day:\n#  k:\n#    path: x\n"
    declared.write("manifest.yaml", COMMENTED + below)
    declared.cli("add", "b.md")
    assert declared.manifest.read_text() == f"{COMMENTED}      b: b.md\n{below}"

    flow = "version: 1\nengine: {kind: memory}\nmodels:\n  m:\n    path: m.model\n"
    for text in (
        f"{flow}    prompts: {{  # why\n      a: a.md,  # kept\n    }}\n",
        f"{flow}  n: {{path: m.model,  # secret\n    rerank: true}}\n",
        flow.replace("\n", "\r\n"),
    ):
        declared.write("manifest.yaml", text)
        refused = declared.cli("add", "b.md", "--model", "m", code=os.EX_USAGE).stderr
        assert "by hand" in refused
        assert declared.manifest.read_bytes() == text.encode()


def test_a_strange_file_in_the_schemas_place_stays(folder: Workspace) -> None:
    """Regression: it was overwritten, whatever it was."""
    path = folder.write("manifest.schema.json", "mine")
    assert "is not a manifest's schema" in folder.cli("init", "--yes", code=73).stderr
    assert path.read_text() == "mine"
    assert not (folder.root / "manifest.yaml").exists()


@pytest.mark.long
def test_several_that_add_at_once_lose_nothing(declared: Workspace) -> None:
    for number in range(6):
        declared.write(f"k{number}.md", "x")
    adding = [declared.popen("add", f"k{number}.md") for number in range(6)]
    assert [process.wait(DEADLINE_S) for process in adding] == [0] * 6
    assert len(manifest(declared)["models"]["m"]["prompts"]) == 7


def test_a_model_is_added(declared: Workspace) -> None:
    model = tiny_models.plain(declared.root / "Tiny-Q8_0.gguf")
    declared.write("manifest.yaml", COMMENTED.replace("memory", "llamacpp"))
    declared.cli("add", model.name)
    assert manifest(declared)["models"]["tiny"] == {"path": "Tiny-Q8_0.gguf"}
    declared.cli("add", "b.md", "--model", "tiny")
    assert manifest(declared)["models"]["tiny"]["prompts"] == {"b": "b.md"}


def test_what_cannot_be_added(declared: Workspace) -> None:
    """The manifest stays as it is, and the message says what can be done."""
    declared.write("Großer Name.md", "x")
    declared.write("nothing.md", "")
    declared.write("v.gguf", "x")
    anchored = (
        "version: 1\nengine: {kind: memory}\nx-p: &p {a: a.md}\nmodels:\n"
        "  m: {path: m.model, prompts: *p}\n  n: {path: m.model, prompts: *p}\n"
    )
    for arguments, code, words in (
        (("a.md",), os.EX_USAGE, "the manifest has the prompt m/a already"),
        (("nowhere.md",), os.EX_NOINPUT, "is no file"),
        (("nothing.md",), os.EX_NOINPUT, "is empty"),
        (("v.gguf",), os.EX_USAGE, "the manifest's engine is memory"),
        (("Großer Name.md",), os.EX_USAGE, "--name"),
        (("b.md", "--model", "zzz"), os.EX_USAGE, "models that could: m"),
        (("v.gguf", "--model", "m"), os.EX_USAGE, "leave out --model"),
        (("b.md", "-m", "nowhere.yaml"), os.EX_CONFIG, "cannot be read"),
    ):
        assert words in declared.cli("add", *arguments, code=code).stderr
        assert declared.manifest.read_text() == COMMENTED
    declared.write("manifest.yaml", anchored)
    refused = declared.cli("add", "b.md", "--model", "m", code=os.EX_USAGE).stderr
    assert "by hand" in refused
    assert declared.manifest.read_text() == anchored
    assert "name one with --model: m, n" in declared.cli("add", "b.md", code=os.EX_USAGE).stderr


# edit


def editor(space: Workspace, code: str) -> dict[str, str]:
    """An editor that does this to each of its files (`path`)."""
    script = space.write(
        "editor.py",
        "import sys, pathlib\nfor name in sys.argv[1:]:\n"
        f"    path = pathlib.Path(name)\n    {code}\n",
    )
    return {"EDITOR": f"{sys.executable} {script}", "VISUAL": ""}


def test_a_prompt_is_edited_and_fresh(declared: Workspace) -> None:
    """It shows what changed, and returns when the new cache is there."""
    declared.start()
    declared.wait_settled()
    appends = editor(declared, 'path.write_text(path.read_text() + "You like tea. ")')
    done = declared.cli("edit", "m/a", **appends)
    assert "m/a: prefix.digest: " in done.stdout
    assert "m/a is fresh, after" in done.stdout
    assert "You like tea." in (declared.root / "a.md").read_text()
    assert declared.ask("m/a")["rkcached"]["state"] == "hit"

    assert declared.cli("edit", "m/a", **editor(declared, "pass")).stdout == "nothing was changed\n"


def test_a_stored_prompt_is_edited(declared: Workspace) -> None:
    declared.start()
    body = {"cache_name": "kept", "content": TEXT}
    assert declared.request("POST", "/v1/cache/m", admin=True, json=body).is_success
    appends = editor(declared, 'path.write_text(path.read_text() + "You like tea. ")')
    assert "m/kept is fresh" in declared.cli("edit", "m/kept", **appends).stdout


def test_an_edit_that_cannot_be_built(declared: Workspace) -> None:
    """The reason is told at once, with what to do; the file stays as the user left it."""
    declared.start()
    declared.wait_settled()
    done = declared.cli(
        "edit", "m/a", code=os.EX_DATAERR, **editor(declared, 'path.write_bytes(b"caf\\xe9")')
    )
    assert "not UTF-8" in done.stdout + done.stderr
    assert (declared.root / "a.md").read_bytes() == b"caf\xe9"


def test_an_edit_without_a_daemon(declared: Workspace) -> None:
    done = declared.cli("edit", "m/a", **editor(declared, 'path.write_text("You are new. " * 9)'))
    assert "no daemon runs here; the prompt cache is built when you start one" in done.stdout


def test_what_cannot_be_edited(declared: Workspace) -> None:
    nothing = editor(declared, "pass")
    assert "known: m/a" in declared.cli("edit", "m/z", code=os.EX_NOINPUT, **nothing).stderr
    assert "names no prompt" in declared.cli("edit", "m", code=os.EX_USAGE, **nothing).stderr
    absent = {"EDITOR": "no-such-editor", "VISUAL": ""}
    assert "which EDITOR names" in declared.cli("edit", "m/a", code=os.EX_USAGE, **absent).stderr
    for command, words in (
        ('"unclosed', "EDITOR is not a command"),
        ("./broken", "cannot be started"),
    ):
        declared.write("broken", "#!/nonexistent\n").chmod(0o755)
        wrong = {"EDITOR": command, "VISUAL": ""}
        assert words in declared.cli("edit", "m/a", code=os.EX_USAGE, **wrong).stderr
    failing = editor(declared, "sys.exit(3)")
    assert "ended with 3" in declared.cli("edit", "m/a", code=os.EX_USAGE, **failing).stderr


# load, unload, ps


def test_models_are_loaded_and_unloaded(declared: Workspace) -> None:
    declared.start()
    declared.wait_settled()
    assert "m is loaded, after" in declared.cli("load", "m").stdout
    shown = declared.cli("ps").stdout
    assert "memory" in shown
    (row,) = json.loads(declared.cli("ps", "--json").stdout)["models"]
    assert row["name"] == "m"
    assert 10e6 < row["memory_bytes"] < 1e9
    assert row["cpu_s"] > 0
    assert "m is unloaded" in declared.cli("unload", "m").stdout
    wait_until(lambda: "no model is loaded" in declared.cli("ps").stdout, "it is gone")
    assert "known models: m" in declared.cli("load", "zzz", code=os.EX_NOINPUT).stderr


def test_logs_without_a_service(declared: Workspace) -> None:
    refused = declared.cli("logs", "m/a", code=os.EX_NOINPUT).stderr
    assert "the service is not installed here" in refused
    assert "rkcached run" in refused


# Completion


@pytest.mark.parametrize("runs", [True, False], ids=["daemon", "manifest"])
def test_names_are_completed(declared: Workspace, *, runs: bool) -> None:
    """By the daemon, or where none runs by the manifest; a mistake in that shows nothing."""
    if runs:
        declared.start()

    def complete(*words: str) -> list[str]:
        done = subprocess.run(
            declared.command(),
            env={
                **declared.environment,
                "_RKCACHED_COMPLETE": "bash_complete",
                "COMP_WORDS": " ".join(("rkcached", *words)),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.split()]

    assert complete("chat", "m") == ["m", "m/a"]
    assert complete("edit", "m") == ["m/a"]
    assert complete("load", "") == ["m"]
    if not runs:
        declared.write("manifest.yaml", "models: [broken")
        assert complete("chat", "m") == []
