"""litellm's proxy in front of the daemon, by the lines of docs/programs.md."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import httpx
import openai
import pytest
import yaml

from tests.ports import free_port
from tests.programs.served import ANSWER, Served
from tests.waiting import DEADLINE_S, wait_until

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def proxy(served: Served) -> Iterator[openai.OpenAI]:
    """A client of the proxy."""
    config = served.lines("litellm's proxy", "yaml")
    served.space.write("home/config.yaml", config)
    port = free_port()
    program = served.installed / "programs-litellm-proxy/bin/litellm"
    with (served.space.root / "proxy.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=served.home,
            env=served.environment() | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    base = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, (served.space.root / "proxy.log").read_text()
        try:
            return httpx.get(f"{base}/health/liveliness").is_success
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, "the proxy answers")
        with openai.OpenAI(
            base_url=f"{base}/v1",
            api_key=yaml.safe_load(config)["general_settings"]["master_key"],
            max_retries=0,
        ) as client:
            yield client
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@pytest.mark.parametrize("model", ["by-openai", "by-anthropic", "by-ollama"])
def test_each_way_is_a_hit(served: Served, proxy: openai.OpenAI, model: str) -> None:
    """As a whole, and as a stream."""
    whole = proxy.chat.completions.create(model=model, messages=HELLO)
    assert whole.choices[0].message.content == ANSWER
    stream = proxy.chat.completions.create(model=model, messages=HELLO, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in stream if part.choices) == ANSWER
    assert served.was_hit(2)
