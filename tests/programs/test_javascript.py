"""Packages of npm, with the lines of docs/programs.md, over the port."""

from __future__ import annotations

import pytest

from tests.programs.served import ANSWER, TOOL, Served

OTHER_WAYS = {
    "OpenAI's client": (
        "console.log((await client.responses.create("
        "{ model: 'qwen3-0.6b/assistant', input: 'hello' })).output_text);"
    ),
    "Ollama's client": (
        "console.log((await ollama.list()).models.length);"
        "console.log((await ollama.chat({ model: 'qwen3-0.6b/assistant', messages }))"
        ".message.content);"
    ),
    "Vercel's AI SDK": (
        "import { generateText } from 'ai';"
        "console.log((await generateText({ model: openai.chat('qwen3-0.6b/assistant'), "
        "prompt: 'hello' })).text);"
    ),
}
"""A second request of the same program: a stream where the page has none, and the reverse."""


@pytest.mark.parametrize("title", OTHER_WAYS)
def test_the_module_of_the_page_is_a_hit(served: Served, title: str) -> None:
    """And so is the same program's other way to ask."""
    said = served.node(f"{served.lines(title, 'js')}\n{OTHER_WAYS[title]}\n")
    assert said.count(ANSWER) == 2, said
    assert served.was_hit(2)


@pytest.mark.parametrize("way", ["chat", "responses"])
def test_declared_tools_are_a_hit_for_the_ai_sdk(served: Served, way: str) -> None:
    """The call, and the answer after its result."""
    schema = str(TOOL["function"]["parameters"])
    said = served.node(
        "import { openai } from '@ai-sdk/openai';"
        "import { generateText, jsonSchema, stepCountIs, tool } from 'ai';"
        "const water = tool({ description: 'Waters a plant.',"
        f" inputSchema: jsonSchema({schema}),"
        " execute: async ({ plant }) => 'watered ' + plant });"
        f"const model = openai.{way}('qwen3-0.6b/gardener');"
        "const answer = await generateText({ model, prompt: 'Water the fern', tools: { water },"
        " providerOptions: { openai: { store: false } }, stopWhen: stepCountIs(3) });"
        "console.log(answer.text);"
    )
    assert ANSWER in said
    assert served.was_hit(2)


def test_the_ai_sdk_s_provider_for_compatible_servers(served: Served) -> None:
    """It streams with the usage, and names no endpoint of OpenAI's."""
    said = served.node(
        "import { createOpenAICompatible } from '@ai-sdk/openai-compatible';"
        "import { streamText } from 'ai';"
        "const baseURL = process.env.OPENAI_BASE_URL, apiKey = process.env.OPENAI_API_KEY;"
        "const rkcached = createOpenAICompatible("
        "{ name: 'rkcached', baseURL, apiKey, includeUsage: true });"
        "const answer = streamText({ model: rkcached('qwen3-0.6b/assistant'), prompt: 'hello' });"
        "console.log(await answer.text, (await answer.usage).inputTokenDetails.cacheReadTokens);"
    )
    text, tokens = said.rsplit(maxsplit=1)
    assert text == ANSWER
    assert int(tokens) > 0
    assert served.was_hit()
