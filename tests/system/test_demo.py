"""`rkcached demo` on a model for the NPU, over the stand-in for its runtime."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Workspace

from tests.rkllm_standin.standin import build, write_model
from tests.rkllm_standin.tokens import byte_tokenizer

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def model(workspace: Workspace) -> Path:
    """A model, and prompts that are short enough for it: each byte is a token of the stand-in."""
    for name in ("reviewer", "greenhouse"):
        workspace.write(f"demo/prompts/{name}.md", f"You are the {name}. You answer briefly.\n")
    (workspace.root / "own").mkdir()
    return write_model(
        workspace.root / "own/Qwen3-0.6B_W8A8_RK3588.rkllm", toolkit="1.2.0", prefill_tps=2000
    )


def test_every_warm_answer_is_a_hit(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    """The runtime is found beside the model, and the chat template in the tokenizer's files."""
    library = model.with_name("librkllmrt.so")
    shutil.copy(build("D", tmp_path / "standin"), library)
    tokenizer = model.parent / "tokenizer"
    tokenizer.mkdir()
    byte_tokenizer(tokenizer / "tokenizer.json")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))

    done = workspace.cli("demo", "--once", "--model", str(model))
    assert f"model {model}, chat template: the tokenizer's files\n" in done.stdout
    assert f"runtime library {library}, version 1.2.3\n" in done.stdout
    assert "one question to qwen3-0.6b\n" in done.stdout
    assert len(re.findall(r"^(greenhouse|reviewer) .* ms .* %", done.stdout, re.MULTILINE)) == 2
    assert done.stderr.count("artifact built") == 2


@pytest.mark.long
def test_a_runtime_that_counts_nothing(workspace: Workspace, model: Path, tmp_path: Path) -> None:
    """The runtime is named, and the chat template guessed; no hit is claimed, and none is missed.

    The second run builds nothing.
    """
    library = build("C", tmp_path / "standin")
    first = workspace.cli("demo", "--once", "--model", str(model), "--library", str(library))
    assert "chat template: qwen3\n" in first.stdout
    assert first.stdout.count("not measured") >= 2
    again = workspace.cli("demo", "--once")
    assert "one question to qwen3-0.6b\n" in again.stdout
    assert "build started" not in again.stderr
