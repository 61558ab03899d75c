"""The command line as a person uses it: output, exit codes, and what it says about bad input."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import yaml
from conftest import Workspace
from test_serving import content, right_answer

from rkcached import __version__
from rkcached.store.seal import read_seal
from rkcached.store.sidecar import Sidecar
from tests.waiting import BEFORE_RESCAN_S, DEADLINE_S, wait_until


def test_version_and_help(workspace: Workspace) -> None:
    """--version and --help of every command work; help shows examples."""
    assert workspace.cli("--version").stdout == f"rkcached {__version__}\n"
    text = workspace.cli("--help").stdout
    assert "\n    rkcached demo    " in text
    for command in (
        "run",
        "check",
        "plan",
        "explain",
        "status",
        "regenerate",
        "verify",
        "chat",
        "schema",
        "demo",
    ):
        assert command in text
        assert "Usage:" in workspace.cli(command, "--help").stdout


def test_help_imports_little(workspace: Workspace) -> None:
    """Help does not import what only the daemon needs."""
    code = (
        "import sys; from rkcached.cli.main import cli; print(sorted(m for m in sys.modules if "
        "'.' not in m))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for heavy in (
        "starlette",
        "uvicorn",
        "httpx",
        "pydantic",
        "rich",
        "watchdog",
        "numpy",
        "jinja2",
        "asyncio",
    ):
        assert f"'{heavy}'" not in loaded
    assert workspace.cli("nonsense", code=os.EX_USAGE).stderr


def test_a_command_loads_nothing_of_the_daemon_s_nor_of_bench_s(two_prompts: Workspace) -> None:
    """No command but `run` watches files.

    None but `bench` and `compare` computes with samples.
    """
    for arguments in (
        ["check"],
        ["plan"],
        ["explain", "m/a"],
        ["status"],
        ["verify"],
        ["gc", "--dry-run"],
        ["doctor"],
    ):
        command = [sys.executable, "-X", "importtime", "-m", "rkcached", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=two_prompts.environment
        )
        loaded = {
            line.rpartition("|")[2].strip()
            for line in done.stderr.splitlines()
            if "import time:" in line
        }
        assert "rkcached.cli.main" in loaded
        assert loaded & {"watchdog", "numpy"} == set(), arguments


def test_numpy_is_loaded_for_embeddings_only(workspace: Workspace) -> None:
    """Not by the daemon, nor by a worker that answers and builds.

    By the worker of a model that makes vectors.
    """

    def with_numpy() -> list[str]:
        assert workspace.process is not None
        pids = [workspace.process.pid, *(child.pid for child in workspace.children())]
        return [str(pid) for pid in pids if "/numpy/" in Path(f"/proc/{pid}/maps").read_text()]

    workspace.memory_model()
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.declare("{a: prompts/a.md}", model="  vectors: {path: m.model, embedding: true}\n")
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert with_numpy() == []
    made = workspace.request(
        "POST",
        "/v1/embeddings",
        json={"model": "vectors", "input": "hello", "encoding_format": "float"},
    )
    assert made.status_code == 200, made.text
    assert len(with_numpy()) == 1
    assert str(workspace.process.pid if workspace.process else 0) not in with_numpy()


def test_without_a_daemon(workspace: Workspace) -> None:
    """Commands that need the daemon say so, and how to start it."""
    for command in (["status"], ["chat", "m", "hello"], ["regenerate", "--all"]):
        done = workspace.cli(*command, code=os.EX_UNAVAILABLE)
        assert str(workspace.socket) in done.stderr
        assert "rkcached run" in done.stderr


def test_without_a_manifest(workspace: Workspace) -> None:
    """Without a manifest every command that reads it says how to name one.

    The daemon exits with 78.
    """
    for command in ("check", "plan", "run"):
        done = workspace.cli(command, code=os.EX_CONFIG)
        assert "manifest.yaml" in done.stderr
        assert "RKCACHED_MANIFEST" in done.stderr


def test_check_reports_everything_at_once(workspace: Workspace) -> None:
    """Every problem with file:line, the offending value and a hint; all in one run."""
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: lamacpp}\nmodels:\n  m:\n    path: m.model\n"
        "    params: {temprature: 0.7, top_p: 1.5}\n"
        "    chat_template: chatmll\n    prompts:\n      Bad Name: x.md\n      a: a.md\n"
        "      a: b.md\n",
    )
    done = workspace.cli("check", code=os.EX_CONFIG)
    for line, words in [
        (2, ("lamacpp", "llamacpp")),
        (6, ("temprature", "temperature")),
        (6, ("top_p", "1.5")),
        (7, ("chatmll", "chatml")),
        (9, ("Bad Name",)),
        (11, ("'a'",)),
    ]:
        found = [text for text in done.stderr.splitlines() if f"manifest.yaml:{line}: " in text]
        assert any(all(word in text for word in words) for text in found), (
            line,
            words,
            done.stderr,
        )
    problems = json.loads(workspace.cli("check", "--json", code=os.EX_CONFIG).stdout)["problems"]
    assert {2, 6, 7, 9, 11} <= {problem["line"] for problem in problems}


def test_check_tells_the_new_name_of_a_template(workspace: Workspace) -> None:
    """An old name of a built-in template works as before; its owner hears of a better one."""
    workspace.memory_model()
    for name in ("gemma", "gemma3"):
        workspace.write(
            "manifest.yaml",
            "version: 1\nengine: {kind: memory}\nmodels:\n  m:\n    path: m.model\n"
            f"    chat_template: {name}\n",
        )
        done = workspace.cli("check")
        warned = "manifest.yaml:6: warning: chat_template gemma of m is an old name" in done.stderr
        assert warned is (name == "gemma")
        assert ("write gemma3" in done.stderr) is warned


def test_check_shows_a_name_as_it_is(workspace: Workspace) -> None:
    """Nothing in it commands the terminal, or turns the direction of the line."""
    workspace.memory_model()
    for name in ("x\x1b[31m.md", "y\u202e.md"):
        workspace.write(f"more/{name}", "Text.")
    workspace.declare("{}", model="    prompts_from: more/*.md")
    done = workspace.cli("check")
    assert r"x\x1b[31m.md" in done.stderr
    assert r"y\u202e.md" in done.stderr
    assert "\x1b" not in done.stderr


def test_check_reads_the_files(workspace: Workspace) -> None:
    """Problems of prompt and model files carry the line that names the file."""
    workspace.write("empty.md", " \n\n")
    workspace.write("latin.md", b"caf\xe9")
    workspace.write("nul.md", b"a\0b")
    workspace.write("big.md", "x" * (1024 * 1024 + 1))
    (workspace.root / "dir.md").mkdir()
    workspace.declare(
        "\n      empty: empty.md\n      latin: latin.md\n      nul: nul.md\n      big: big.md\n"
        "      dir: dir.md\n      gone: gone.md\n"
    )
    done = workspace.cli("check", code=os.EX_CONFIG)
    first = next(
        n
        for n, text in enumerate(workspace.manifest.read_text().splitlines(), 1)
        if "empty:" in text
    )
    said = [
        "is empty",
        "not UTF-8",
        "NUL byte",
        "1,048,577 bytes",
        "is a directory",
        "source missing",
    ]
    workspace.memory_model()
    done = workspace.cli("check", code=os.EX_CONFIG)
    for number, words in enumerate(said):
        assert any(
            f"manifest.yaml:{first + number}: " in x and words in x
            for x in done.stderr.splitlines()
        ), words
    assert "6 problems" in done.stderr
    for name in ("empty", "latin", "nul", "big", "gone"):
        workspace.write(f"{name}.md", "fine")
    workspace.declare("{empty: empty.md}")
    assert "ok, 1 model, 1 prompt" in workspace.cli("check").stdout


def line_of(workspace: Workspace, words: str) -> int:
    lines = workspace.manifest.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)


def problems(workspace: Workspace) -> list[tuple[int, str]]:
    """Line and message of each problem that `check` reports."""
    found = json.loads(workspace.cli("check", "--json", code=os.EX_CONFIG).stdout)
    return [(problem["line"], problem["message"]) for problem in found["problems"]]


@pytest.mark.parametrize(
    "template", ["{% if %}", b"\xff", None], ids=["broken", "not text", "missing"]
)
def test_a_template_is_reported_at_its_line(
    workspace: Workspace, template: str | bytes | None
) -> None:
    """A broken .jinja is not the model file's fault."""
    workspace.memory_model()
    if template is not None:
        workspace.write("t.jinja", template)
    workspace.declare("{}", model="    chat_template: t.jinja\n")
    ((line, message),) = problems(workspace)
    assert line == line_of(workspace, "chat_template:"), message


def test_a_model_is_explained(workspace: Workspace) -> None:
    """Its template and its tokens with their origins, for people and for programs."""
    workspace.memory_model()
    workspace.write("t.jinja", "{{ x }}{{ strftime_now('%Y') }}{{ messages[0].content }}")
    own = "{files: a.md, chat_template_kwargs: {x: 2}}"
    workspace.write("a.md", "Text.")
    lines = (
        "chat_template: t.jinja",
        "template_date: 2025-01-31",
        "bos_token: <s>",
        "chat_template_kwargs: {x: 1}",
    )
    workspace.declare(f"{{a: {own}}}", model="".join(f"    {line}\n" for line in lines))
    text = workspace.cli("explain", "m").stdout
    assert f"chat template: {workspace.root / 't.jinja'} (named by the manifest), digest " in text
    assert "date: 2025-01-31" in text
    assert "variables: x 1" in text
    assert "variables of a: x 2" in text
    assert "BOS: <s>\n" in text
    assert "EOS: none known" in text
    assert "control tokens: not known" in text
    data = json.loads(workspace.cli("explain", "m", "--json").stdout)
    assert data["template"]["origin"] == "file"
    assert data["prompts"] == {"a": {"variables": {"x": 2}}}
    assert data["trouble"] is None
    assert "known: m" in workspace.cli("explain", "n", code=os.EX_NOINPUT).stderr
    workspace.write("t.jinja", "{% if %}")
    assert "syntax error" in workspace.cli("explain", "m").stdout


@pytest.mark.model
def test_a_gguf_model_is_explained(workspace: Workspace, small_model: Path) -> None:
    """By what its metadata state."""
    text = f"version: 1\nmodels: {{m: {{path: {small_model}, thinking: true}}}}\n"
    workspace.write("manifest.yaml", text)
    data = json.loads(workspace.cli("explain", "m", "--json").stdout)
    assert data["template"]["origin"] == "model"
    assert data["template"]["name"] == f"tokenizer.chat_template of {small_model}"
    assert data["special_tokens"] == {
        "bos": "<|im_start|>",
        "eos": "<|im_end|>",
        "ends": [],
        "engine_adds_bos": False,
        "control_tokens": 17,
        "control_tokens_of": f"tokenizer.ggml.token_type of {small_model}",
    }
    warning = workspace.cli("check").stderr
    assert (
        "thinking of m changes nothing: its chat template does not use enable_thinking" in warning
    )


def test_each_file_is_reported_at_its_line(workspace: Workspace) -> None:
    """The line of a missing file, of several of a prompt, too.

    The line of a model's tokenizer, and that of the engine's library.
    """
    workspace.write("a.md", "Text.")
    workspace.memory_model()
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine:\n  kind: rkllm\n  library: none.so\nmodels:\n  m:\n    path: m.model\n"
        "    lora: none.lora\n  n:\n    path: m.model\n    prompts:\n      a:\n        files:\n"
        "          - a.md\n          - none.md\n",
    )
    for line, message in problems(workspace):
        assert "none" in workspace.manifest.read_text().splitlines()[line - 1], message
    assert len(problems(workspace)) == 3


def test_a_wrong_key_hides_no_missing_file(workspace: Workspace) -> None:
    """What the rest of the manifest names is looked at all the same."""
    workspace.memory_model()
    workspace.declare("\n      gone: gone.md\n", top="cache: {max_size: 1}")
    assert [message.partition(":")[0] for _, message in problems(workspace)] == [
        "unknown key 'max_size'",
        "source missing",
    ]


def test_with_a_wrong_engine_no_other_engine_is_missed(workspace: Workspace) -> None:
    """No library and no format of a model is demanded that the right engine may not need."""
    workspace.write("m.model", "a format of any engine")
    workspace.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: vllm}\nmodels:\n"
        "  m: {path: m.model, prompts: {gone: gone.md}}\n",
    )
    assert [message.partition(":")[0] for _, message in problems(workspace)] == [
        "kind",
        "source missing",
    ]


def test_an_open_quote_is_reported_where_it_opens(workspace: Workspace) -> None:
    """However long the manifest is after it."""
    workspace.memory_model()
    workspace.declare("{}", top='x-note: "begins here')
    ((line, _),) = problems(workspace)
    assert line == line_of(workspace, "begins here")


def test_a_manifest_in_another_encoding(workspace: Workspace) -> None:
    """The encoding is named, and how to convert it; not that another manifest could be named."""
    workspace.write("manifest.yaml", "version: 1\n".encode("utf-16"))
    done = workspace.cli("check", code=os.EX_CONFIG)
    assert "is UTF-16, not UTF-8 (convert it: `iconv -f UTF-16" in done.stderr


def test_files_that_no_prompt_can_be_named_by_are_listed(workspace: Workspace) -> None:
    """A README in a prompts_from folder is no problem.

    Check and plan list it and end well, the daemon tells of it.
    """
    workspace.memory_model()
    for name in ("README.md", "System Prompt.md", "good.md"):
        workspace.write(f"more/{name}", "Text.\n" * 20)
    workspace.declare("{}", model="    prompts_from: more/*.md\n")
    done = workspace.cli("check")
    assert "ok, 1 model, 1 prompt" in done.stdout
    assert "2 files are skipped" in done.stderr
    checked = json.loads(workspace.cli("check", "--json").stdout)
    assert checked["problems"] == []
    assert [Path(file).name for file in checked["skipped_files"]] == [
        "README.md",
        "System Prompt.md",
    ]
    workspace.start()
    workspace.wait_state("good", "fresh")
    for name in ("README.md", "System Prompt.md"):
        assert name in done.stderr
        assert name in workspace.cli("plan").stdout
    assert "2 files are skipped" in workspace.cli("status").stdout
    assert [Path(file).name for file in workspace.status()["manifest"]["skipped_files"]] == [
        "README.md",
        "System Prompt.md",
    ]


def test_a_skipped_file_is_logged_once_and_becomes_a_prompt_by_its_name(
    workspace: Workspace,
) -> None:
    """Each look sees it, one line tells of it.

    Renamed it is built, and renamed back it is skipped again.
    """
    workspace.memory_model()
    workspace.write("more/Rules.md", "Rules.\n" * 20)
    workspace.write("more/good.md", "Text.\n" * 20)
    workspace.declare("{}", model="    prompts_from: more/*.md\n")
    workspace.start()
    workspace.wait_state("good", "fresh")
    for _ in range(3):
        looks = workspace.status()["reconcile"]["looks"]
        workspace.hang_up()
        wait_until(
            lambda before=looks: workspace.status()["reconcile"]["looks"] > before,
            "it looked again",
        )
    assert workspace.log_text().count("prompt files skipped") == 1
    (workspace.root / "more/Rules.md").rename(workspace.root / "more/rules.md")
    workspace.wait_state("rules", "fresh")
    assert workspace.status()["manifest"]["skipped_files"] == []
    (workspace.root / "more/rules.md").rename(workspace.root / "more/Rules.md")
    wait_until(
        lambda: [p["prompt"] for p in workspace.status()["prompts"]] == ["good"],
        lambda: str(workspace.status()),
    )
    assert len(workspace.status()["manifest"]["skipped_files"]) == 1


def test_bad_prompts_block_only_themselves(workspace: Workspace) -> None:
    """A bad prompt is blocked with its reason and hint, and the good one is built and served."""
    workspace.memory_model(context_tokens=300)
    workspace.write("good.md", "Fine.")
    workspace.write("blank.md", "\n")
    workspace.write("long.md", "x" * 400)
    workspace.declare(
        "{blank: blank.md, long: long.md, good: good.md}",
        params="{max_context_len: 300, max_new_tokens: 9}",
    )
    workspace.start()
    workspace.wait_settled()
    assert workspace.prompt("good")["state"] == "fresh"
    assert "is empty" in workspace.prompt("blank")["reason"]
    too_long = workspace.prompt("long")
    assert too_long["state"] == "blocked"
    assert "the context holds 300" in too_long["reason"]
    assert "max_context_len" in too_long["hint"]
    assert workspace.ask("m/good", max_tokens=5)["rkcached"]["state"] == "hit"
    workspace.hang_up()
    assert workspace.built() == ["good"]
    table = workspace.cli("status").stdout
    assert "the context holds 300" in table


def test_plan_and_explain_without_a_daemon(two_prompts: Workspace) -> None:
    """Plan and explain see the same with and without a daemon; --exit-code tells drift.

    --json is the plan.
    """
    assert "nothing to do, 2 fresh" in two_prompts.cli("plan", "--exit-code").stdout
    planned = json.loads(two_prompts.cli("plan", "--json").stdout)
    assert (planned["actions"], planned["fresh"]) == ([], 2)
    assert two_prompts.stop() == 0
    assert "nothing to do, 2 fresh" in two_prompts.cli("plan", "--exit-code").stdout
    assert "m/a: fresh" in two_prompts.cli("explain", "m/a").stdout
    two_prompts.write("prompts/c.md", "C.")
    two_prompts.declare(
        "{a: {files: prompts/a.md, params: {temperature: 0.2}}, c: prompts/c.md, d: d.md}"
    )
    done = two_prompts.cli("plan", "--exit-code", code=2)
    for words in (
        "+ build",
        "params.temperature: 0.8 -> 0.2",
        "~ retire",
        "! blocked",
        "source missing",
    ):
        assert words in done.stdout
    assert "2 to build, 1 to retire, 1 blocked, 0 fresh" in done.stdout
    actions = json.loads(two_prompts.cli("plan", "--json").stdout)["actions"]
    assert [(x["action"], x["prompt"]) for x in actions] == [
        ("retire", "b"),
        ("build", "a"),
        ("build", "c"),
        ("blocked", "d"),
    ]
    explained = two_prompts.cli("explain", "m/a").stdout
    assert "m/a: stale" in explained
    assert "params.temperature: 0.8 -> 0.2" in explained
    data = json.loads(two_prompts.cli("explain", "m/a", "--json").stdout)
    assert data["changes"] == [{"component": "params.temperature", "old": "0.8", "new": "0.2"}]
    only_parameters = two_prompts.cli("explain", "m/a", "--diff").stdout
    assert "diff: the text is the same; only params.temperature changed" in only_parameters
    assert (
        "diff: there is no prompt cache yet" in two_prompts.cli("explain", "m/c", "--diff").stdout
    )
    assert "diff: the text of today" in two_prompts.cli("explain", "m/d", "--diff").stdout
    assert "diff: nobody declares" in two_prompts.cli("explain", "m/b", "--diff").stdout
    two_prompts.write("prompts/a.md", "You are prompt A,\nand more.\x1b[2J\n")
    shown = two_prompts.cli("explain", "m/a", "--diff").stdout
    assert "\n-You are prompt A.\n+You are prompt A,\n+and more.\\x1b[2J\n" in shown
    diff = json.loads(two_prompts.cli("explain", "m/a", "--diff", "--json").stdout)["diff"]
    assert diff["of"] == "text"
    assert "+and more.\x1b[2J" in diff["lines"]
    assert diff["left_out"] == 0
    two_prompts.declare("{cook: prompts/b.md}")
    renaming = two_prompts.cli("plan").stdout
    assert "= rename  m/cook  the prompt cache of m/b has the same text" in renaming
    assert "1 to rename" in renaming
    assert "the daemon renames that prompt cache" in two_prompts.cli("explain", "m/cook").stdout
    (action, *_) = json.loads(two_prompts.cli("plan", "--json").stdout)["actions"]
    assert (action["action"], action["source"], action["renames"]) == ("adopt", "m/b", True)
    assert "m/PROMPT" in two_prompts.cli("explain", "m", "--diff", code=os.EX_USAGE).stderr
    assert "known: " in two_prompts.cli("explain", "m/zzz", code=os.EX_NOINPUT).stderr
    assert "MODEL/PROMPT" in two_prompts.cli("explain", "m/", code=os.EX_USAGE).stderr


@pytest.mark.parametrize("place", ["missing", "empty", "checkout", "project"])
def test_without_a_store_every_command_that_looks_at_one_says_so(
    two_prompts: Workspace, place: str
) -> None:
    """It names the place, where the store may be, and exits with 66.

    The plan is printed all the same: all is missing. In a folder that the daemon refuses, there is
    none.

    Nothing is made, nothing is changed there.
    """
    elsewhere = two_prompts.root / "elsewhere"
    files = {"checkout": ["README.md", ".gitignore"], "project": ["thesis.txt", "README.md"]}.get(
        place, []
    )
    if place != "missing":
        elsewhere.mkdir()
    for name in files:
        (elsewhere / name).write_text("mine")
    why = {"missing": "it does not exist", "project": "it contains 'thesis.txt'"}.get(
        place, "it is empty"
    )
    for command in (
        ["plan"],
        ["plan", "--exit-code", "--json"],
        ["explain", "m/a"],
        ["verify"],
        ["gc"],
    ):
        done = two_prompts.cli(*command, "--cache-dir", str(elsewhere), code=os.EX_NOINPUT)
        assert f"there is no store at {elsewhere}: {why}" in done.stderr
        assert (
            f"there is a store beside the manifest: use --cache-dir {two_prompts.cache}"
            in done.stderr
        )
        assert done.stderr.startswith("error: " if "--json" not in command else '{"format": 1, ')
        if place == "project":
            assert done.stdout == ""
        elif command == ["plan"]:
            assert f"2 to build, 0 fresh; store {elsewhere}" in done.stdout
        elif command == ["explain", "m/a"]:
            assert done.stdout.count("missing") == 1  # it was printed as the reason, too
        elif "--json" in command:
            reasons = [action["reason"] for action in json.loads(done.stdout)["actions"]]
            assert reasons == ["missing", "missing"]
    assert elsewhere.exists() == (place != "missing")
    assert sorted(path.name for path in elsewhere.glob("*")) == sorted(files)


def test_every_command_that_looks_at_a_store_names_it(two_prompts: Workspace) -> None:
    """For people and, where the answer has room for it, for programs.

    An empty store is one, too.
    """
    assert f"2 of 2 good in the store {two_prompts.cache}" in two_prompts.cli("verify").stdout
    assert f"; store {two_prompts.cache}\n" in two_prompts.cli("plan").stdout
    assert f"store {two_prompts.cache}\n" in two_prompts.cli("explain", "m/a").stdout
    assert json.loads(two_prompts.cli("explain", "m/a", "--json").stdout)["store"] == str(
        two_prompts.cache
    )
    assert f"; store {two_prompts.cache}\n" in two_prompts.cli("gc").stdout
    two_prompts.declare("{}")
    two_prompts.hang_up()
    wait_until(lambda: not (two_prompts.cache / "m").exists(), "the artifacts are gone")
    assert f"no artifacts in the store {two_prompts.cache}" in two_prompts.cli("verify").stdout


@pytest.mark.parametrize(
    "command", ["run", "plan", "explain", "verify", "gc", "status", "doctor", "bench", "check"]
)
def test_help_tells_the_default_of_each_place(workspace: Workspace, command: str) -> None:
    """Manifest, store and sockets: where they are when nobody says."""
    told = " ".join(workspace.cli(command, "--help").stdout.split())
    options = re.findall(
        r"--(manifest|cache-dir|state-dir|socket|admin-socket) (?:FILE|DIR|PATH)(.*?)\[RKCACHED",
        told,
    )
    assert options
    assert [name for name, words in options if "default: " not in words] == []


def test_status(workspace: Workspace) -> None:
    """Status is a table for people and JSON for programs; descriptions are shown."""
    workspace.memory_model(prefill_us_per_token=500)
    workspace.write(
        "p.md", "Text. " * 20
    )  # a gain on a busy machine, too: without one, that is said instead
    workspace.declare("{p: {files: p.md, description: the house rules}}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/p")
    table = workspace.cli("status").stdout
    for words in ("m/p", "fresh", "the house rules", "model m: ready", "1 hit"):
        assert words in table
    data = json.loads(workspace.cli("status", "--json").stdout)
    assert data["prompts"][0]["description"] == "the house rules"
    assert data["prompts"][0]["hits"] == 1
    assert data["version"] == __version__


def test_min_tokens(workspace: Workspace) -> None:
    """A prompt below cache.min_tokens is left uncached and says so.

    Lowering the limit builds it, raising drops it.
    """
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", top="cache: {min_tokens: 1000}")
    workspace.start()
    shown = workspace.wait_state("p", "uncached")
    assert "cache.min_tokens is 1000" in shown["reason"]
    assert workspace.ask("m/p")["rkcached"]["state"] == "uncached"
    workspace.declare("{p: p.md}", top="cache: {min_tokens: 10}")
    workspace.wait_state("p", "fresh")
    workspace.declare("{p: p.md}", top="cache: {min_tokens: 2000}")
    workspace.wait_state("p", "uncached")
    wait_until(lambda: not list((workspace.cache / "m").glob("p.*")), "the artifact left the disk")


def test_no_gain(workspace: Workspace) -> None:
    """A prompt whose cache was measured not to help is shown as no gain, with both figures."""
    workspace.memory_model(load_ms=0)
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    workspace.start()
    workspace.wait_settled()
    sidecar = workspace.cache / "m/p.json"
    workspace.stop()
    seal = read_seal(workspace.root / "state")
    assert seal is not None
    record = msgspec.json.decode(sidecar.read_bytes(), type=Sidecar)
    figures = msgspec.structs.replace(record.figures, cold_ttft_ms=5.0, warm_ttft_ms=7.0)
    changed = seal.signed(msgspec.structs.replace(record, figures=figures))
    sidecar.write_bytes(msgspec.json.encode(changed, enc_hook=dict))
    workspace.start()
    assert workspace.prompt("p")["reason"] == "no gain: 7 ms with the cache, 5 ms without"
    assert "no gain" in workspace.cli("status").stdout


def test_regenerate(two_prompts: Workspace) -> None:
    """Regenerate builds fresh prompts anew and waits; unknown names are refused.

    M7's answer with --json.
    """
    before = len(two_prompts.built())
    assert "[1/1] m/a 64 tokens" in two_prompts.cli("regenerate", "m/a").stdout
    assert two_prompts.built()[before:] == ["a"]
    answers = json.loads(two_prompts.cli("regenerate", "--all", "--json").stdout)["built"]
    assert [(x["object"], x["cache_name"]) for x in answers] == [
        ("binary_cache.created", "a"),
        ("binary_cache.created", "b"),
    ]
    assert answers[0]["message"].startswith("Binary cache generated successfully (")
    assert "known: m/a, m/b" in two_prompts.cli("regenerate", "m/zzz", code=os.EX_NOINPUT).stderr
    assert "--all" in two_prompts.cli("regenerate", code=os.EX_USAGE).stderr


@pytest.mark.long
def test_regenerate_shows_how_far_it_is(workspace: Workspace) -> None:
    """At a terminal, a line that is rewritten: tokens done of tokens in total."""
    workspace.memory_model(prefill_us_per_token=10_000)
    workspace.write("a.md", "a" * 100)
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    ours, theirs = pty.openpty()
    environment = {**workspace.environment, "TERM": "xterm"}
    ends = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with workspace.popen("regenerate", "m/a", env=environment, **ends) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while data := os.read(ours, 4096):
                shown += data
        os.close(ours)
        assert process.wait(DEADLINE_S) == 0
    assert re.search(rb"\[1/1\] m/a \d+ of 1\d\d tokens", shown)
    assert re.search(rb"\[1/1\] m/a 1\d\d tokens, .* in \d", shown)


@pytest.mark.parametrize(
    ("forges_header", "words"),
    [
        (False, "it is the cache of another text: "),
        (True, "with this cache the model answers otherwise than with its text"),
    ],
)
def test_verify_proves_what_a_prompt_cache_holds(
    two_prompts: Workspace, *, forges_header: bool, words: str
) -> None:
    """Another text's state, with a sidecar that agrees with it, is told by what it does.

    Whoever put it there had the key of this installation, else it would not be looked at.
    """
    done = two_prompts.cli("verify", "--prove")
    assert done.stdout.count("and answers as its text does") == 2

    seal = read_seal(two_prompts.root / "state")
    assert seal is not None
    folder = two_prompts.cache / "m"
    record = folder / "a.json"
    sidecar = msgspec.json.decode(record.read_bytes(), type=Sidecar)
    other = msgspec.json.decode((folder / "b.json").read_bytes(), type=Sidecar)
    assert sidecar.size_bytes == other.size_bytes
    state = (folder / other.artifact).read_bytes()
    if forges_header:  # of this engine's files, one part in nine is the tokens
        own = (folder / sidecar.artifact).read_bytes()
        state = own[: len(own) // 8] + state[len(own) // 8 :]
    (folder / sidecar.artifact).write_bytes(state)
    digest = hashlib.sha256(state).hexdigest()
    forged = seal.signed(msgspec.structs.replace(sidecar, sha256=digest))
    record.write_bytes(msgspec.json.encode(forged, enc_hook=dict))

    assert two_prompts.cli("verify", "--deep").stdout.count("2 of 2 good") == 1
    proven = two_prompts.cli("verify", "--prove", code=65)
    assert f"FAILED  m/a (fresh)  {words}" in proven.stdout
    assert "ok      m/b" in proven.stdout


def test_a_forged_prompt_cache_is_built_again(two_prompts: Workspace) -> None:
    """Its sidecar agrees with it, but was not signed by this installation."""
    folder = two_prompts.cache / "m"
    record = folder / "a.json"
    sidecar = msgspec.json.decode(record.read_bytes(), type=Sidecar)
    other = msgspec.json.decode((folder / "b.json").read_bytes(), type=Sidecar)
    two_prompts.stop()
    (folder / sidecar.artifact).write_bytes((folder / other.artifact).read_bytes())
    forged = msgspec.structs.replace(sidecar, sha256=other.sha256)
    record.write_bytes(msgspec.json.encode(forged, enc_hook=dict))
    planned = two_prompts.cli("plan").stdout
    assert "no valid signature of this installation" in planned
    verified = two_prompts.cli("verify", code=65).stdout
    unsigned = "its sidecar has no valid signature of this installation"
    assert f"FAILED  m/a (stale)  {unsigned}" in verified

    two_prompts.start()
    two_prompts.wait_settled()
    assert two_prompts.built()[-1] == "a"
    answer = two_prompts.ask("m/a")
    assert answer["rkcached"]["state"] == "hit"
    assert content(answer) == right_answer(two_prompts, "You are prompt A.")


def test_a_store_of_another_installation_is_built_again(two_prompts: Workspace) -> None:
    """Without its key, nobody knows who made it. With it, nothing is built."""
    two_prompts.stop()
    built = len(two_prompts.built())
    two_prompts.start()
    two_prompts.wait_settled()
    assert len(two_prompts.built()) == built
    two_prompts.stop()
    (two_prompts.root / "state" / "store.key").unlink()
    two_prompts.start()
    two_prompts.wait_settled()
    assert sorted(two_prompts.built()[built:]) == ["a", "b"]


def on_terminal(space: Workspace, *arguments: str) -> str:
    """What a command shows whose output is a terminal."""
    ours, theirs = pty.openpty()
    try:
        process = space.popen(*arguments, stdout=theirs, stderr=theirs)
    finally:
        os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that nobody has open any more
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(DEADLINE_S) == 0, shown
    return shown.decode()


HOSTILE = "\x1b[2J\x1b]52;c;aGFja2Vk\x07two\nlines\x9b31m \u202eback \u200d\t."


def test_a_terminal_obeys_no_model(workspace: Workspace) -> None:
    """Neither an answer nor a line of reasoning; a newline, a tab and a joiner are text.

    `--json` has it all, in JSON's escapes.
    """
    workspace.memory_model(script={"Say it.": HOSTILE})
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()
    shown = on_terminal(workspace, "chat", "m", "Say it.")
    assert "\x1b[2J" not in shown
    assert "\x1b]52" not in shown
    assert "\x07" not in shown
    assert "\x9b" not in shown
    assert "\u202e" not in shown
    assert "\\x1b[2J\\x1b]52;c;aGFja2Vk\\x07two\r\nlines\\x9b31m \\u202eback \u200d" in shown

    whole = workspace.cli("chat", "m", "Say it.", "--json").stdout
    assert json.loads(whole)["answer"]["choices"][0]["message"]["content"] == HOSTILE
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(whole)


def test_verify(two_prompts: Workspace) -> None:
    """Verify re-reads every artifact; --deep loads it.

    Damage of any file is found and named, and the exit code is 65.
    """
    done = two_prompts.cli("verify", "--deep")
    assert done.stdout.count("matches its sidecar; loads, 64 tokens") == 2
    verified = json.loads(two_prompts.cli("verify", "--deep", "--json").stdout)
    assert [artifact["ok"] for artifact in verified["artifacts"]] == [True, True]
    two_prompts.stop()
    path = two_prompts.cache / "m/a.memory_cache"
    data = bytearray(path.read_bytes())
    info = path.stat()
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    (two_prompts.cache / "m/b.bin").write_text("not the text")
    done = two_prompts.cli("verify", code=os.EX_DATAERR)
    assert (
        "FAILED  m/a (corrupt)  a.memory_cache does not have the SHA-256 of its sidecar"
        in done.stdout
    )
    assert "FAILED  m/b (corrupt)  b.bin does not have the SHA-256 of its sidecar" in done.stdout
    two_prompts.start()
    two_prompts.wait_settled()
    assert two_prompts.cli("verify", "m/a").stdout.startswith("ok")


def test_chat_shows_reasoning_and_both_times(workspace: Workspace) -> None:
    """While a model thinks, its words are there.

    Regression: nothing was shown, and then a first token after 72 ms was claimed after 6.7 s.
    """
    said = "<think>\nhm, hm</think>\n\nGood day"
    workspace.memory_model(script={"hello": said}, decode_us_per_token=10_000)
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()

    done = workspace.cli("chat", "m", "hello")

    assert done.stdout == "hm, hm\n\nGood day\n"
    times = re.search(r"first token after (\d+) ms, the answer after (\d+) ms, ", done.stderr)
    assert times is not None, done.stderr
    assert int(times[2]) - int(times[1]) >= 100
    assert "the answer after" not in workspace.cli("chat", "m", "other").stderr


def test_chat_shows_every_character(workspace: Workspace) -> None:
    """U+2028 and U+0085 end lines for Python, but not the events of a stream.

    Regression: `rkcached chat` ended with a JSONDecodeError.
    """
    workspace.memory_model(script={"hello": "one\u2028two\x85three\u2029four"})
    workspace.declare("{}", model="    chat_template: chatml\n")
    workspace.start()

    shown = workspace.cli("chat", "m", "hello").stdout
    for word in ("one", "two", "three", "four"):
        assert word in shown


def test_chat(two_prompts: Workspace) -> None:
    """Chat streams an answer and says what was measured; it reads a pipe.

    --cold and --json work.
    """
    done = two_prompts.cli("chat", "m/a", "hello", "--max-tokens", "12")
    assert done.stdout.strip()
    assert "hit on a: first token after" in done.stderr
    assert "64 of " in done.stderr
    piped = two_prompts.cli("chat", "m/a", "--max-tokens", "12", stdin="hello\n")
    assert piped.stdout == done.stdout
    assert (
        "[cold (the request asks for no cache): "
        in two_prompts.cli("chat", "m/a", "hello", "--cold").stderr
    )
    answer = json.loads(two_prompts.cli("chat", "m/a", "hello", "--json").stdout)["answer"]
    assert answer["rkcached"]["state"] == "hit"
    assert "known models: m" in two_prompts.cli("chat", "nope", "hello", code=os.EX_NOINPUT).stderr
    assert "no question" in two_prompts.cli("chat", "m/a", stdin="", code=os.EX_USAGE).stderr


def test_schema(workspace: Workspace) -> None:
    """It lists what it knows, and prints the schema of a command, and of the manifest."""
    listed = workspace.cli("schema").stdout
    names = [
        entry["name"] for entry in json.loads(workspace.cli("schema", "--json").stdout)["schemas"]
    ]
    assert all(f"\n{name} " in f"\n{listed}" for name in names)
    for words, fields in (
        (["key", "add"], {"format", "name", "key"}),
        (["manifest"], {"version", "engine", "cache", "models"}),
    ):
        schema = json.loads(workspace.cli("schema", *words).stdout)
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        assert set(schema["properties"]) >= fields
    assert "known: plan, " in workspace.cli("schema", "plans", code=os.EX_NOINPUT).stderr
    workspace.cli("schema", "plans", "--json", code=os.EX_NOINPUT)
    workspace.cli("plan", "--jsn", "--json", code=os.EX_USAGE)


def test_layout_and_modes(two_prompts: Workspace) -> None:
    """The store's layout is {model}/{name}.memory_cache, .bin (the prefix), .json.

    Their modes are private.
    """
    folder = two_prompts.cache / "m"
    assert sorted(p.name for p in folder.iterdir()) == [
        ".staging",
        *(f"{name}.{suffix}" for name in "ab" for suffix in ("bin", "json", "memory_cache")),
    ]
    assert (
        folder / "a.bin"
    ).read_text() == "<|im_start|>system\nYou are prompt A.<|im_end|>\n<|im_start|>user\n"
    sidecar = json.loads((folder / "a.json").read_text())
    assert sidecar["size_bytes"] == (folder / "a.memory_cache").stat().st_size
    assert sidecar["components"]["params.temperature"] == "0.8"
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE(two_prompts.socket.stat().st_mode) == 0o660
    assert "You are prompt A" not in two_prompts.log_text()


def test_socket_path_too_long(workspace: Workspace) -> None:
    """A path that no socket can have is refused with both lengths."""
    workspace.memory_model()
    workspace.declare("{}")
    done = workspace.cli("run", "--socket", str(workspace.root / ("x" * 120)), code=os.EX_CANTCREAT)
    assert "107" in done.stderr
    assert "--socket" in done.stderr


def test_socket_taken(two_prompts: Workspace) -> None:
    """A live daemon's socket is not taken over; its owner goes on."""
    done = two_prompts.cli(
        "run", "--cache-dir", str(two_prompts.root / "other"), code=os.EX_CANTCREAT
    )
    assert "another daemon listens" in done.stderr
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


def test_the_other_socket_taken(two_prompts: Workspace) -> None:
    """The socket for changes lies beside the one that --socket names: its own option is named."""
    other = ("--cache-dir", str(two_prompts.root / "other"))
    beside = ("--socket", str(two_prompts.root / "other.sock"))
    done = two_prompts.cli("run", *other, *beside, code=os.EX_CANTCREAT)
    assert f"another daemon listens on {two_prompts.root / 'admin.sock'}" in done.stderr
    assert "choose another path with --admin-socket or RKCACHED_ADMIN_SOCKET" in done.stderr
    (two_prompts.root / "file").write_text("precious")
    named = (*beside, "--admin-socket", str(two_prompts.root / "file"))
    done = two_prompts.cli("run", *other, *named, code=os.EX_CANTCREAT)
    assert "is not a socket" in done.stderr
    assert "--admin-socket" in done.stderr


def test_socket_stale_or_no_socket(workspace: Workspace) -> None:
    """A socket that nobody listens on is replaced; a file that is no socket is never touched."""
    workspace.memory_model()
    workspace.declare("{}")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(workspace.socket))
    workspace.start()
    assert workspace.stop() == 0
    workspace.socket.write_text("precious")
    done = workspace.cli("run", code=os.EX_CANTCREAT)
    assert "not a socket" in done.stderr
    assert workspace.socket.read_text() == "precious"


def test_cache_directory_locked(two_prompts: Workspace) -> None:
    """A second daemon on one store is refused and told the pid of the first; plan still works."""
    assert two_prompts.process is not None
    done = two_prompts.cli("run", "--socket", str(two_prompts.root / "t.sock"), code=os.EX_TEMPFAIL)
    assert f"pid {two_prompts.process.pid}" in done.stderr
    assert "nothing to do" in two_prompts.cli("plan").stdout


def test_cache_directory_not_writable(workspace: Workspace) -> None:
    """A cache directory that cannot be made is a sentence with the next step."""
    workspace.memory_model()
    workspace.declare("{}")
    workspace.write("file", "x")
    done = workspace.cli(
        "run", "--cache-dir", str(workspace.root / "file/cache"), code=os.EX_CANTCREAT
    )
    assert "--cache-dir" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"hello, I am no model", "is not a memory-engine model"),
        (b'{"rkcached_memory_model": ', "m"),
    ],
)
def test_model_file_unusable(workspace: Workspace, content: bytes, words: str) -> None:
    """A model that is none, or truncated, blocks its prompts and refuses requests with the reason.

    Then it heals.
    """
    workspace.write("m.model", content)
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    workspace.start()
    shown = workspace.wait_state("p", "blocked")
    assert words in shown["reason"]
    error = workspace.ask("m/p", status=503)["error"]
    assert error["code"] == "model_unavailable"
    workspace.memory_model()
    workspace.wait_state("p", "fresh")
    assert workspace.ask("m/p")["rkcached"]["state"] == "hit"


def test_model_missing(workspace: Workspace) -> None:
    """Check names a missing model with the line of its path.

    So does the daemon, until the file appears.
    """
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}")
    assert "manifest.yaml:6: source missing" in workspace.cli("check", code=os.EX_CONFIG).stderr
    workspace.start()
    assert "m.model" in workspace.wait_state("p", "blocked")["reason"]
    workspace.memory_model()
    workspace.wait_state("p", "fresh", BEFORE_RESCAN_S)


def test_system_message_refused(workspace: Workspace) -> None:
    """With a template without system messages, the prompt opens the user's turn, and is cached."""
    workspace.memory_model()
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') "
        "}}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    workspace.write("t.jinja", template)
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", model="    chat_template: t.jinja\n")
    workspace.start()
    workspace.wait_state("p", "fresh")
    report = workspace.ask("m/p")["rkcached"]
    assert (report["state"], report["cached_tokens"]) == ("hit", len("Text.\n\n"))


def test_system_message_dropped(workspace: Workspace) -> None:
    """A template that drops it blocks the prompt. Requests without one work."""
    workspace.memory_model()
    workspace.write("t.jinja", "{{ messages[-1].content }}")
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", model="    chat_template: t.jinja\n")
    workspace.start()
    assert "drops the system message" in workspace.wait_state("p", "blocked")["reason"]
    assert workspace.ask("m")["rkcached"]["state"] == "cold"
    workspace.ask("m/p", status=503)


def test_budget(workspace: Workspace) -> None:
    """What does not fit into cache.max_bytes is blocked with the numbers, in manifest order.

    Until there is room.
    """
    workspace.memory_model()
    for name in ("a", "b", "c"):
        workspace.write(f"{name}.md", name * 60_000)
    params = "{max_context_len: 100000}"
    prompts = "{a: a.md, b: b.md, c: c.md}"
    workspace.memory_model(context_tokens=100_000)
    workspace.declare(prompts, params=params, top="cache: {max_bytes: 1MiB}")
    workspace.start()
    workspace.wait_settled()
    assert [workspace.prompt(name)["state"] for name in "abc"] == ["fresh", "blocked", "blocked"]
    assert "1,048,576" in workspace.prompt("b")["reason"]
    workspace.declare(prompts, params=params, top="cache: {max_bytes: 1200KiB}")
    workspace.wait_state("b", "fresh")
    workspace.wait_settled()
    assert workspace.prompt("c")["state"] == "blocked"


def test_example_manifest_is_the_documentation(workspace: Workspace) -> None:
    """The shipped example names every key of the schema, and check understands it."""
    example = Path(__file__).parents[2] / "etc/rkcached/manifest.example.yaml"
    assert yaml.safe_load(example.read_text())["version"] == 1
    done = workspace.cli("check", "--manifest", str(example), code=os.EX_CONFIG)
    assert "source missing" in done.stderr
    assert "unknown" not in done.stderr


def test_an_impossible_setting_is_one_sentence(workspace: Workspace) -> None:
    """From the environment, as a service reads it.

    No traceback, and a code that is not tried again.
    """
    workspace.memory_model()
    workspace.declare("{}")
    done = workspace.cli("run", code=78, RKCACHED_LOG_LEVEL="loud")
    assert done.stderr.startswith("error: log-level: ")
    assert "RKCACHED_LOG_LEVEL" in done.stderr
