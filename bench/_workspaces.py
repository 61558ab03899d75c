"""Makes the workspaces to measure on: the demo's prompts on two engines, many prompts.

The first two are made once in a run, and their stores stay filled from part to part.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from _programs import HOUSE, OTHER, Tool

from rkcached.cli.demo.workspace import prepare
from rkcached.cli.launcher import Workspace, small_model
from rkcached.engines.memory import MemoryModel

MODEL = "smollm2-135m-instruct"
"""The name that the demo gives its model; here models of other engines have it, too."""

PROMPTS = ("greenhouse", "reviewer")
"""The demo's: about 600 and 1,100 tokens."""

PEER_CONTEXT = 4096
PEER_TOKENS = {"short": 256, "middle": 1000, "long": 3000}

SHAPES_CONTEXT = 8192
"""The whole of the model's. The server's slots share it."""

_WORDS_PER_TOKEN = 0.8
_TEXT_BYTES = 2048
_LINE = "the roof opens when water and air are warm enough for plants but never at night or in rain"


@dataclass(slots=True, kw_only=True)
class Bench:
    """The state that the parts share: options, and the workspaces, each made and filled once."""

    root: Path
    runs: int
    idle_s: float
    pictures: Path | None = None
    """The folder to draw pictures in."""
    say: Callable[[str], None] = lambda _: None
    """Is told what is measured next."""
    _made: dict[str, Workspace] = field(default_factory=dict)

    def workspace(self, make: Callable[[Path], Workspace]) -> Workspace:
        name = make.__name__
        if name not in self._made:
            self._made[name] = make(self.root / name)
        return self._made[name]


def llama(root: Path) -> Workspace:
    """SmolLM2-135M with the demo's manifest, parameters and prompts."""
    prepare(root, None, None)
    return Workspace.at(root)


def memory(root: Path) -> Workspace:
    """The same prompts on an engine that computes next to nothing.

    Its tokens are bytes, so the context is longer.
    """
    workspace = _made(
        root, _memory_manifest({MODEL: {"prompts": {p: f"prompts/{p}.md" for p in PROMPTS}}})
    )
    _write_model(root, MODEL)
    _copy_prompts(root)
    return workspace


def peers(root: Path) -> Workspace:
    """SmolLM2-135M, as a copy that may be changed, with a prompt of about each number of tokens."""
    (root / "prompts").mkdir(parents=True)
    shutil.copyfile(small_model(), root / "model.gguf")
    for name, tokens in PEER_TOKENS.items():
        words = (f"You are assistant {name}. " + f"Rule: {_LINE}. " * tokens).split()
        (root / "prompts" / f"{name}.md").write_text(
            " ".join(words[: round(tokens * _WORDS_PER_TOKEN)]) + "\n"
        )
    return _made(root, _llama_manifest("model.gguf", *PEER_TOKENS))


def shapes(root: Path) -> Workspace:
    """SmolLM2-135M, a declared prompt of some 600 tokens, and a short one of another program.

    `declare_shapes` says with which tools.
    """
    (root / "prompts").mkdir(parents=True)
    _copy_prompt(root, PROMPTS[0], HOUSE)
    (root / "prompts" / f"{OTHER}.md").write_text(f"You keep the log. {_LINE}.\n" * 8)
    # The server's own, as memory that two processes share is counted by halves.
    shutil.copyfile(small_model(), root / "model.gguf")
    return _made(root, _shapes_manifest())


def declare_shapes(workspace: Workspace, tools: Sequence[Tool]) -> None:
    """Write the manifest of `shapes`, with these tools for the declared prompt."""
    (workspace.root / "tools.json").write_text(json.dumps(tools))
    workspace.manifest.write_text(_shapes_manifest(with_tools=bool(tools)))


def _shapes_manifest(*, with_tools: bool = False) -> str:
    manifest = json.loads(_llama_manifest(str(small_model()), HOUSE, OTHER))
    model = manifest["models"]["small"]
    model["params"]["max_context_len"] = SHAPES_CONTEXT
    model["preload"] = HOUSE  # as the server has its model before it answers
    if with_tools:
        model["prompts"][HOUSE] = {"files": f"prompts/{HOUSE}.md", "tools": "tools.json"}
    return json.dumps(manifest | {"cache": {"keep_retired_s": 0}})


def alone(root: Path) -> Workspace:
    """SmolLM2-135M with a context of 4,096 tokens and one short prompt."""
    (root / "prompts").mkdir(parents=True)
    (root / "prompts/short.md").write_text(f"{_LINE}.\n")
    return _made(root, _llama_manifest(str(small_model()), "short"))


def many(root: Path, prompts: int, models: int) -> Workspace:
    """Prompts of 2 KB over models of the memory engine: half of these name them, half find them.

    With a budget that has room for all: it is the harder case, as each look adds up what the caches
    take.
    """
    texts: list[dict[str, str]] = [{} for _ in range(models)]
    for number in range(prompts):
        name = f"prompts/model{number % models}/prompt{number:05d}.md"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(_text(number))
        texts[number % models][f"prompt{number:05d}"] = name
    wanted: dict[str, Any] = {}
    for number, named in enumerate(texts):
        finds = number % 2 == 0 and named
        wanted[f"model{number}"] = (
            {"prompts_from": [f"prompts/model{number}/*.md"]} if finds else {"prompts": named}
        )
        _write_model(root, f"model{number}")
    return _made(root, _memory_manifest(wanted, cache={"max_bytes": "1 GiB"}))


def _made(root: Path, manifest: str) -> Workspace:
    root.mkdir(exist_ok=True)
    workspace = Workspace.at(root)
    workspace.manifest.write_text(manifest)
    return workspace


def _llama_manifest(path: str, *prompts: str) -> str:
    """JSON is YAML."""
    model = {
        "path": path,
        "chat_template": "chatml",
        "params": {"max_context_len": PEER_CONTEXT, "max_new_tokens": 64, "temperature": 0.0},
        "prompts": {name: f"prompts/{name}.md" for name in prompts},
    }
    return json.dumps({"version": 1, "engine": {"kind": "llamacpp"}, "models": {"small": model}})


def _memory_manifest(models: Mapping[str, Mapping[str, Any]], **others: Any) -> str:
    params = {"max_context_len": 16384, "max_new_tokens": 64, "temperature": 0.0}
    whole = {
        name: {"path": f"{name}.json", "params": params, **model} for name, model in models.items()
    }
    return json.dumps(
        {"version": 1, "engine": {"kind": "memory"}, "models": whole, **others}, indent=1
    )


def _write_model(root: Path, name: str) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{name}.json").write_bytes(
        msgspec.json.encode(MemoryModel(context_tokens=16384, seed=name))
    )


def _copy_prompts(root: Path) -> None:
    (root / "prompts").mkdir()
    for name in PROMPTS:
        _copy_prompt(root, name, name)


def _copy_prompt(root: Path, source: str, name: str) -> None:
    data = resources.files("rkcached.cli.demo").joinpath(f"prompts/{source}.md").read_bytes()
    (root / "prompts" / f"{name}.md").write_bytes(data)


def _text(number: int) -> str:
    """Some 2 KB that differ from every other prompt's from the first line on."""
    lines, size = [f"You are assistant number {number}."], 0
    while size < _TEXT_BYTES:
        start = (number + len(lines)) % len(_LINE)
        lines.append(f"{_LINE[start:]} {_LINE[:start]}.")
        size += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"
