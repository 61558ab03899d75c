"""The workspace of `rkcached demo`: what is written for a model, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.cli.demo.workspace import prepare
from rkcached.engines.kinds import EngineKind
from rkcached.errors import ManifestError, RuntimeLibraryError, SourceError, UsageError
from rkcached.sources.manifest_file import read_manifest
from tests import tiny_models
from tests.gguf_files import UINT32, gguf, pair
from tests.rkllm_standin.standin import write_model


@pytest.fixture
def npu(tmp_path: Path) -> Path:
    return write_model(tmp_path / "Qwen3-0.6B_W8A8_RK3588.rkllm")


def test_a_model_for_the_cpu(tmp_path: Path) -> None:
    """Its context is the one that its file states, where that is small."""
    model = tmp_path / "Tiny-Instruct-Q8_0.gguf"
    model.write_bytes(gguf(pair("llama.context_length", UINT32, 512)))
    (finding,) = prepare(tmp_path / "demo", model, None)
    assert finding.startswith(f"model {model}, chat template: ")

    manifest = read_manifest(tmp_path / "demo/manifest.yaml")
    assert manifest.engine.kind is EngineKind.LLAMACPP
    (name,) = manifest.models
    assert name == "tiny-instruct"
    assert manifest.models[name].params.max_context_len == 512
    assert set(manifest.models[name].prompts) == {"greenhouse", "reviewer"}


def test_edits_stay(tmp_path: Path) -> None:
    """Whatever is there is not written again."""
    model = tiny_models.plain(tmp_path / "tiny.gguf")
    prepare(tmp_path / "demo", model, None)
    prompt = tmp_path / "demo/prompts/greenhouse.md"
    prompt.write_text("mine")
    manifest = tmp_path / "demo/manifest.yaml"
    manifest.write_text(manifest.read_text() + "# mine\n")
    prepare(tmp_path / "demo", model, None)
    assert prompt.read_text() == "mine"
    assert manifest.read_text().endswith("# mine\n")


def test_what_is_no_model(tmp_path: Path) -> None:
    """Each is refused with its path and what to do, and nothing is written."""
    texts = {"notes.txt": "no model", "broken.gguf": "GGUF...."}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    write_model(tmp_path / "Qwen3-Embedding-0.6B-rk3588.rkllm")

    for name, words in {
        "nowhere.gguf": "cannot be used: No such file or directory",
        "notes.txt": "its name ends in neither .gguf nor .rkllm",
        "broken.gguf": "cannot be used: its header is damaged",
        "Qwen3-Embedding-0.6B-rk3588.rkllm": "answers nothing",
    }.items():
        with pytest.raises(SourceError) as refused:
            prepare(tmp_path / "demo", tmp_path / name, None)
        assert str(tmp_path / name) in refused.value.message
        assert words in refused.value.message
        assert refused.value.hint
    assert not (tmp_path / "demo").exists()


def test_no_runtime_library(tmp_path: Path, npu: Path) -> None:
    """The message has the place, and the hint the option; nothing is written."""
    with pytest.raises(
        RuntimeLibraryError, match=rf"no runtime library at {tmp_path}/none\.so"
    ) as e:
        prepare(tmp_path / "demo", npu, tmp_path / "none.so")
    assert "--library FILE" in e.value.hint
    assert not (tmp_path / "demo").exists()


def test_a_library_is_not_for_the_cpu(tmp_path: Path) -> None:
    model = tiny_models.plain(tmp_path / "tiny.gguf")
    with pytest.raises(UsageError, match=r"--library is for \.rkllm models"):
        prepare(tmp_path / "demo", model, tmp_path / "librkllmrt.so")


def test_a_workspace_of_another_model(tmp_path: Path, npu: Path) -> None:
    """It is not overwritten, as its owner may have edited it, nor shown in place of this one."""
    prepare(tmp_path / "demo", tiny_models.plain(tmp_path / "tiny.gguf"), None)
    before = (tmp_path / "demo/manifest.yaml").read_text()
    with pytest.raises(UsageError, match=r"demo/manifest\.yaml is of another model"):
        prepare(tmp_path / "demo", npu, None)
    with pytest.raises(UsageError, match=r"names /usr/lib/librkllmrt\.so as engine\.library"):
        prepare(tmp_path / "demo", None, tmp_path / "librkllmrt.so")
    assert (tmp_path / "demo/manifest.yaml").read_text() == before


def test_a_broken_manifest(tmp_path: Path) -> None:
    """The problem is told with its line, and no daemon is started on it."""
    (tmp_path / "manifest.yaml").write_text("version: 1\nmodels: {m: {path: m.gguf}}\nmodles: {}\n")
    with pytest.raises(ManifestError) as refused:
        prepare(tmp_path, None, None)
    assert refused.value.problems[0].line == 3
