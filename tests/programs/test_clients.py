"""Libraries and commands in Python, with the lines of docs/programs.md, over the port."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documents import README, blocks
from tests.programs.served import ANSWER, PAGE, TOOL, Served

IN_PYTHON = {
    "OpenAI's client": "programs-openai",
    "Ollama's client": "programs",
    "LangChain": "programs",
    "LlamaIndex": "programs-llama-index",
    "litellm": "programs",
    "pydantic-ai": "programs",
    "openai-agents": "programs",
}
"""The headings with a script, and the group of pyproject.toml that it needs."""

OTHER_WAYS = {
    "LangChain": "print(model.invoke('hello').text)",
    "LlamaIndex": "print(model.complete('hello'))",
    "litellm": (
        "print(litellm.completion(model='openai/qwen3-0.6b/assistant', "
        "messages=[{'role': 'user', 'content': 'hello'}]).choices[0].message.content)"
    ),
    "pydantic-ai": "print(Agent('openai-chat:qwen3-0.6b/assistant').run_sync('hello').output)",
    "openai-agents": (
        "import asyncio\n"
        "async def stream():\n"
        "    run = Runner.run_streamed(agent, 'hello')\n"
        "    async for event in run.stream_events():\n"
        "        pass\n"
        "    print(run.final_output)\n"
        "asyncio.get_event_loop_policy().get_event_loop().run_until_complete(stream())"
    ),
    "Ollama's client": (
        "print([model.model for model in ollama.list().models])\n"
        "print(ollama.chat('qwen3-0.6b/assistant:latest', "
        "[{'role': 'user', 'content': 'hello'}]).message.content)"
    ),
    "OpenAI's client": (
        "print(client.responses.create(model='qwen3-0.6b/assistant', input='hello').output_text)"
    ),
}
"""A second request of the same program: a stream where the page has none, and the reverse."""


@pytest.mark.parametrize("title", IN_PYTHON)
def test_the_script_of_the_page_is_a_hit(served: Served, title: str) -> None:
    """And so is the same program's other way to ask."""
    group = IN_PYTHON[title]
    script = served.lines(title, "python")
    assert ANSWER in served.python(script, group)
    assert served.was_hit()

    said = served.python(f"{script}\n{OTHER_WAYS[title]}\n", group)
    assert said.count(ANSWER) == 2, said
    assert served.was_hit(3)


def test_three_steps_lead_to_a_hit(served: Served) -> None:
    """A port with a key, the lines to paste, and a program: no other is taken here."""
    steps = re.findall(r"^\d\. ", PAGE.read_text().partition("\n\n| ")[0], re.MULTILINE)
    assert len(steps) == 3
    assert served.key.startswith("rkc_")
    assert {"OPENAI_BASE_URL", "OPENAI_API_KEY"} <= set(served.environment())
    said = served.python(served.lines("OpenAI's client", "python"), "programs-openai")
    assert said == f"{ANSWER} hit\n"


def test_readme_s_lines_need_openai_alone(served: Served) -> None:
    """Over the socket, in an environment that has what `pip install openai` installs."""
    (lines,) = blocks(README, "python")
    lines = lines.replace("/run/rkcached/rkcached.sock", str(served.space.socket))
    answer = served.lines("OpenAI's client", "python").partition("OpenAI()\n")[2]
    assert served.python(lines + answer, "programs-openai") == f"{ANSWER} hit\n"
    packages = served.run([served.installed / "programs-openai/bin/pip", "list"])
    assert "\nhttpx " not in packages


@pytest.mark.parametrize(
    ("group", "ask"),
    [
        (
            "programs",
            (
                "from langchain_openai import ChatOpenAI\n"
                "model = ChatOpenAI(model='qwen3-0.6b/assistant', http_client=http, "
                "base_url='http://rkcached/v1', api_key='none')\n"
                "print(model.invoke('hello').text)"
            ),
        ),
        (
            "programs",
            (
                "import asyncio\n"
                "from agents import Agent, Runner\n"
                "from agents import set_default_openai_client, set_tracing_disabled\n"
                "set_tracing_disabled(True)\n"
                "set_default_openai_client(async_client)\n"
                "agent = Agent(name='Assistant', model='openai/qwen3-0.6b/assistant')\n"
                "print(asyncio.run(Runner.run(agent, 'hello')).final_output)"
            ),
        ),
        (
            "programs",
            (
                "from pydantic_ai import Agent\n"
                "from pydantic_ai.models.openai import OpenAIResponsesModel\n"
                "from pydantic_ai.providers.openai import OpenAIProvider\n"
                "provider = OpenAIProvider(openai_client=async_client)\n"
                "model = OpenAIResponsesModel('qwen3-0.6b/assistant', provider=provider)\n"
                "print(Agent(model).run_sync('hello').output)"
            ),
        ),
    ],
    ids=["LangChain", "openai-agents", "pydantic-ai"],
)
def test_a_client_of_the_socket_can_be_handed_over(served: Served, group: str, ask: str) -> None:
    """As the page says of these programs."""
    path = str(served.space.socket)
    lines = (
        "import httpx2, openai\n"
        f"http = httpx2.Client(transport=httpx2.HTTPTransport(uds={path!r}))\n"
        f"async_http = httpx2.AsyncClient(transport=httpx2.AsyncHTTPTransport(uds={path!r}))\n"
        "async_client = openai.AsyncOpenAI(base_url='http://rkcached/v1', api_key='none', "
        "http_client=async_http)\n"
    )
    assert ANSWER in served.python(lines + ask, group)
    assert served.was_hit()


def test_llm(served: Served) -> None:
    """Its command for an endpoint, and a model of its own."""
    command = served.lines("llm", "").strip()
    program = served.installed / "programs/bin/llm"
    assert command.startswith("llm ")
    said = served.run(["sh", "-c", command.replace("llm", str(program), 1)])
    assert said.strip() == ANSWER
    assert served.was_hit()

    place = Path(served.run([program, "logs", "path"]).strip()).parent
    served.space.write(f"{place}/extra-openai-models.yaml", served.lines("llm", "yaml"))
    said = served.run([program, "-m", "assistant", "--key", served.key, "hello"])
    assert said.strip() == ANSWER
    assert served.was_hit(2)


WITH_TOOLS = {
    "openai-agents": (
        "import json\n"
        "from agents import Agent, FunctionTool, Runner, set_tracing_disabled\n"
        "set_tracing_disabled(True)\n"
        "async def invoke(context, text):\n"
        "    return 'watered ' + json.loads(text)['plant']\n"
        f"schema = {TOOL['function']['parameters']!r}\n"
        "tool = FunctionTool("
        "'water', 'Waters a plant.', schema, invoke, strict_json_schema=False)\n"
        "agent = Agent(name='A', model='openai/qwen3-0.6b/gardener', tools=[tool])\n"
        "print(Runner.run_sync(agent, 'Water the fern').final_output)"
    ),
    "LangChain": (
        "from langchain_openai import ChatOpenAI\n"
        f"model = ChatOpenAI(model='qwen3-0.6b/gardener').bind_tools([{TOOL!r}])\n"
        "call = model.invoke('Water the fern')\n"
        "assert call.tool_calls[0]['args'] == {'plant': 'fern'}\n"
        "result = {'role': 'tool', 'content': 'watered fern', "
        "'tool_call_id': call.tool_calls[0]['id']}\n"
        "asked = {'role': 'user', 'content': 'Water the fern'}\n"
        "print(model.invoke([asked, call, result]).text)"
    ),
}


@pytest.mark.parametrize("title", WITH_TOOLS)
def test_declared_tools_are_a_hit(served: Served, title: str) -> None:
    """The call and the answer after its result: the program sends the tools that are declared."""
    assert ANSWER in served.python(WITH_TOOLS[title])
    assert served.was_hit(2)
