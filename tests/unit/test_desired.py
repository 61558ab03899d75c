"""What a change of manifest or sources does to the fingerprint of which prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import pytest
import yaml

from rkcached.messages.builtin import BUILTIN
from rkcached.messages.message import Message
from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.tokenizer_facts import TokenizerFacts
from rkcached.messages.tools import parse_tools
from rkcached.plan import remarks
from rkcached.plan.desired import Desired, DesiredModel, Resolver
from rkcached.plan.fingerprint import changes, reason_of
from rkcached.sources.manifest import Manifest
from rkcached.sources.parser import parse
from rkcached.sources.records import (
    Declaration,
    FolderNotice,
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    TemplateOrigin,
    TemplateSource,
    Trouble,
)

RULES, PLAIN, OTHER = Key("m", "rules"), Key("m", "plain"), Key("n", "rules")
TROUBLE = Trouble(message="the file is gone", hint="bring it back")
PICKY = (
    "{% for m in messages %}{% if m.content == 'Be rude.' %}{{ raise_exception('not that') }}{% "
    "endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@dataclass
class World:
    """A manifest and its sources, to be changed one thing at a time."""

    manifest: dict[str, object] = field(default_factory=dict)
    models: dict[str, dict[str, object]] = field(
        default_factory=lambda: {
            "m": {
                "path": "m.gguf",
                "params": {"temperature": 0.5},
                "prompts": {"rules": "r.md", "plain": "p.md"},
            },
            "n": {"path": "n.gguf", "prompts": {"rules": "r.md"}},
        }
    )
    texts: dict[Key, str | Trouble] = field(
        default_factory=lambda: {RULES: "Be brief.", PLAIN: "Be kind.", OTHER: "Be brief."}
    )
    tools: dict[Key, list[dict[str, object]]] = field(default_factory=dict)
    digests: dict[str, str | Trouble] = field(
        default_factory=lambda: {"m": "11" * 32, "n": "22" * 32}
    )
    trained: dict[str, int] = field(default_factory=dict)
    tokenizers: dict[str, TokenizerFacts] = field(default_factory=dict)
    today: date | None = None
    templates: dict[str, str] = field(
        default_factory=lambda: {"m": BUILTIN["chatml"], "n": BUILTIN["chatml"]}
    )
    runtime: RuntimeSource | Trouble = field(
        default_factory=lambda: RuntimeSource(version="1", digest="aa" * 32)
    )

    def parsed(self) -> Manifest:
        document = {"version": 1, **self.manifest, "models": self.models}
        return parse(yaml.safe_dump(document), file=Path("/etc/manifest.yaml"))

    def sources(self) -> Sources:
        return Sources(
            runtime=self.runtime,
            models={
                name: digest
                if isinstance(digest, Trouble)
                else ModelSource(
                    digest=digest,
                    template=TemplateSource(
                        text=self.templates[name], name="chatml", origin=TemplateOrigin.BUILT_IN
                    ),
                    tokenizer=self.tokenizers.get(name, TokenizerFacts()),
                    trained_tokens=self.trained.get(name),
                )
                for name, digest in self.digests.items()
            },
            prompts={
                key: Declaration(
                    key=key, source=source(text, self.tools.get(key)), description=str(key)
                )
                for key, text in self.texts.items()
            },
            today=self.today,
        )

    def resolve(self, resolver: Resolver | None = None) -> Desired:
        return (resolver or Resolver()).resolve(self.parsed(), self.sources())


def source(
    text: str | Trouble, tools: list[dict[str, object]] | None = None
) -> PromptSource | Trouble:
    if isinstance(text, Trouble):
        return text
    of_prompt = None if tools is None else parse_tools(json.dumps(tools), name="tools.json")
    return PromptSource(text=text, digest=f"digest of {text}", tools=of_prompt)


def differing(before: World, after: World) -> dict[Key, list[str]]:
    """The prompts whose fingerprint changed, and the components that did."""
    old, new = before.resolve(), after.resolve()
    found = {}
    for key in old.prompts:
        was, now = old.fingerprint(key), new.fingerprint(key)
        assert was is not None
        assert now is not None
        assert (was.digest == now.digest) == (was.components == now.components)
        if was.digest != now.digest:
            found[key] = [change.component for change in changes(was.components, now.components)]
    return found


def with_model(name: str, **more: object) -> World:
    world = World()
    world.models[name] |= more
    return world


def test_the_same_world_gives_the_same_fingerprints() -> None:
    """Also from a resolver that has seen it before."""
    resolver = Resolver()
    assert (
        World().resolve(resolver).prompts
        == World().resolve(resolver).prompts
        == World().resolve().prompts
    )
    assert differing(World(), World()) == {}


def test_a_parameter_of_a_model_changes_its_prompts_alone() -> None:
    """Those of other models stay as they are."""
    after = with_model("m", params={"temperature": 0.6})
    assert differing(World(), after) == {key: ["params.temperature"] for key in (RULES, PLAIN)}


def test_a_parameter_of_a_prompt_changes_that_prompt_alone() -> None:
    """Its neighbour in the same model keeps its cache."""
    after = with_model(
        "m", prompts={"rules": {"files": "r.md", "params": {"temperature": 0.6}}, "plain": "p.md"}
    )
    assert differing(World(), after) == {RULES: ["params.temperature"]}


def test_a_prompt_that_overrides_a_parameter_does_not_see_the_models() -> None:
    """What is effective counts, not where it is written."""
    override = {"rules": {"files": "r.md", "params": {"temperature": 0.2}}, "plain": "p.md"}
    before, after = (
        with_model("m", prompts=override),
        with_model("m", prompts=override, params={"temperature": 0.6}),
    )
    assert differing(before, after) == {PLAIN: ["params.temperature"]}


def test_writing_a_default_out_changes_nothing() -> None:
    """Nor does 1 instead of 1.0."""
    assert (
        differing(World(), with_model("n", params={"temperature": 0.8, "repeat_penalty": 1.1}))
        == {}
    )
    one = with_model("n", params={"top_p": 1})
    assert differing(one, with_model("n", params={"top_p": 1.0})) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 9},
        {"temperature": 0.1},
        {"top_k": 1},
        {"top_p": 0.1},
        {"repeat_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"presence_penalty": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_sampling_counts_unless_the_fingerprint_is_kv(change: dict[str, float]) -> None:
    """`full` follows the project's rule, `kv` what a KV state really depends on."""
    before, after = World(), with_model("n", params=change)
    assert differing(before, after) == {OTHER: [f"params.{name}" for name in change]}
    for world in (before, after):
        world.manifest["cache"] = {"fingerprint": "kv"}
    assert differing(before, after) == {}


@pytest.mark.parametrize("mode", ["full", "kv"])
def test_the_context_length_always_counts(mode: str) -> None:
    """It shapes the KV state itself."""
    before, after = World(), with_model("n", params={"max_context_len": 2048})
    for world in (before, after):
        world.manifest["cache"] = {"fingerprint": mode}
    assert differing(before, after) == {OTHER: ["params.max_context_len"]}


def test_another_model_file_changes_the_prompts_of_that_model() -> None:
    """By its content; its path is no component."""
    after = World()
    after.digests["n"] = "33" * 32
    assert differing(World(), after) == {OTHER: ["model.digest"]}
    assert differing(World(), with_model("n", path="elsewhere.gguf")) == {}


def test_another_runtime_changes_every_prompt() -> None:
    """By its content and by its version."""
    everything = (RULES, PLAIN, OTHER)
    rebuilt = replace(World(), runtime=RuntimeSource(version="1", digest="bb" * 32))
    renumbered = replace(World(), runtime=RuntimeSource(version="2", digest="aa" * 32))
    assert differing(World(), rebuilt) == {key: ["runtime.digest"] for key in everything}
    assert differing(World(), renumbered) == {key: ["runtime.version"] for key in everything}


def test_another_engine_changes_every_prompt() -> None:
    """A prompt cache of one engine is of no use to another."""
    after = replace(World(), manifest={"engine": {"kind": "memory"}})
    assert set(differing(World(), after)) == {RULES, PLAIN, OTHER}


def test_threads_change_no_fingerprint_but_the_worker() -> None:
    """More threads give the same state, in another process."""
    after = replace(World(), manifest={"engine": {"threads": 2}})
    assert differing(World(), after) == {}
    was, now = World().resolve().models["n"], after.resolve().models["n"]
    assert isinstance(was, DesiredModel)
    assert isinstance(now, DesiredModel)
    assert was.identity != now.identity


def test_another_template_changes_the_prompts_of_that_model() -> None:
    """Its digest, and what it renders."""
    after = World()
    after.templates["n"] = BUILTIN["phi"]
    assert set(differing(World(), after)) == {OTHER}
    assert "template.digest" in differing(World(), after)[OTHER]


def test_a_template_that_renders_the_same_prefix_still_counts() -> None:
    """It may render the request otherwise.

    Then its prompt cache would not be the request's beginning.
    """
    after = World()
    after.templates["n"] = BUILTIN["chatml"] + "{# a comment #}"
    assert differing(World(), after) == {OTHER: ["template.digest"]}


def test_thinking_counts_even_where_the_template_ignores_it() -> None:
    """Unset, on and off are three different things."""
    worlds = [World(), with_model("n", thinking=True), with_model("n", thinking=False)]
    prints = [world.resolve().fingerprint(OTHER) for world in worlds]
    assert len({made.digest for made in prints if made}) == 3


def test_another_text_changes_that_prompt_alone() -> None:
    """By the digest of what is prefilled, and its length."""
    after = World()
    after.texts[PLAIN] = "Be very kind."
    assert differing(World(), after) == {PLAIN: ["prefix.bytes", "prefix.digest"]}


def test_a_renamed_prompt_keeps_its_fingerprint() -> None:
    """A name is never a component: neither the prompt's nor the model's."""
    desired = World().resolve()
    renamed = World(
        models={"x": World().models["n"] | {"prompts": {"house": "r.md"}}},
        texts={Key("x", "house"): "Be brief."},
        digests={"x": "22" * 32},
        templates={"x": BUILTIN["chatml"]},
    ).resolve()
    assert desired.fingerprint(OTHER) == renamed.fingerprint(Key("x", "house"))


def test_prompts_keep_their_order_and_description() -> None:
    """Manifest order decides about the budget."""
    desired = World().resolve()
    assert list(desired.prompts) == [RULES, PLAIN, OTHER]
    assert [prompt.description for prompt in desired.prompts.values()] == [
        "m/rules",
        "m/plain",
        "n/rules",
    ]


def troubles(desired: Desired) -> Mapping[Key, str]:
    return {
        key: prompt.trouble.message for key, prompt in desired.prompts.items() if prompt.trouble
    }


def test_trouble_with_a_file_is_that_prompts_alone() -> None:
    """It has no fingerprint and no text; the others have theirs."""
    world = World()
    world.texts[PLAIN] = TROUBLE
    desired = world.resolve()
    assert troubles(desired) == {PLAIN: "the file is gone"}
    assert desired.fingerprint(PLAIN) is None
    assert set(desired.texts) == {RULES, OTHER}


def test_trouble_with_a_model_is_that_of_its_prompts() -> None:
    """And the model itself says so to a request."""
    world = World()
    world.digests["n"] = TROUBLE
    desired = world.resolve()
    assert troubles(desired) == {OTHER: "the file is gone"}
    assert desired.models["n"] == TROUBLE


def test_a_prompts_own_trouble_is_told_before_its_models() -> None:
    """The nearest cause is the one that a person can act upon."""
    world = World()
    world.digests["n"] = Trouble(message="no model")
    world.texts[OTHER] = TROUBLE
    assert troubles(world.resolve()) == {OTHER: "the file is gone"}


def test_trouble_with_the_runtime_is_everybodys() -> None:
    """Nothing can be built or answered."""
    desired = replace(World(), runtime=TROUBLE).resolve()
    assert troubles(desired) == dict.fromkeys((RULES, PLAIN, OTHER), "the file is gone")
    assert set(desired.models.values()) == {TROUBLE}


def test_a_template_that_does_not_parse_is_its_models_trouble() -> None:
    """With the template's line."""
    world = World()
    world.templates["n"] = "\n{% if"
    model = world.resolve().models["n"]
    assert isinstance(model, Trouble)
    assert "line 2" in model.message
    assert set(troubles(world.resolve())) == {OTHER}


def test_a_template_that_drops_system_messages_still_answers_requests() -> None:
    """The prompts are in trouble; the model is not."""
    world = World()
    world.templates["n"] = "{{ messages[-1].content }}"
    desired = world.resolve()
    assert set(troubles(desired)) == {OTHER}
    assert "drops the system message" in troubles(desired)[OTHER]
    assert isinstance(desired.models["n"], DesiredModel)


def test_a_template_that_refuses_one_text_is_trouble_of_that_prompt_only() -> None:
    """Its neighbour renders; and when the text is changed, the trouble is over."""
    world, resolver = World(), Resolver()
    world.templates["m"] = PICKY
    world.texts[RULES] = "Be rude."
    assert set(troubles(world.resolve(resolver))) == {RULES}
    assert set(troubles(world.resolve(resolver))) == {RULES}
    world.texts[RULES] = "Be polite."
    assert troubles(world.resolve(resolver)) == {}


def test_an_undeclared_prompt_has_no_fingerprint() -> None:
    """Asking is not an error."""
    assert World().resolve().fingerprint(Key("m", "nobody")) is None


def test_a_prompts_own_sampling_needs_a_runtime_that_can_change_it() -> None:
    """Where sampling is fixed when the model is loaded, the prompt is in trouble.

    What equals the model's is fine.
    """
    world = World()
    world.models["m"]["prompts"] = {
        "rules": {"files": "r.md", "params": {"temperature": 0.2}},
        "plain": {"files": "p.md", "params": {"temperature": 0.5, "max_new_tokens": 9}},
    }
    assert world.resolve().prompts[RULES].fingerprint is not None
    world.runtime = RuntimeSource(version="1.2.3", digest="aa" * 32, samples_per_run=False)
    prompts = world.resolve().prompts
    trouble = prompts[RULES].trouble
    assert trouble is not None
    assert trouble.message.startswith("RKLLM 1.2.3 fixes temperature when the model is loaded")
    assert prompts[PLAIN].fingerprint is not None


@pytest.mark.parametrize(
    ("params", "trained", "said"),
    [
        (
            {"max_context_len": 16384},
            8192,
            "is 16384, but the context is cut to the model's own, 8192 tokens",
        ),
        (
            {},
            2048,
            (
                "is 4096, but the context is cut to the model's own, 2048 tokens (set "
                "max_context_len "
                "to 2048)"
            ),
        ),
        ({}, 512, "(set max_context_len to 512, and max_new_tokens to less than 512)"),
        ({"max_context_len": 8192}, 8192, ""),
        ({"max_context_len": 1024}, 8192, ""),
        ({"max_context_len": 16384}, None, ""),
    ],
)
def test_a_context_beyond_the_models_own(
    params: dict[str, int], trained: int | None, said: str
) -> None:
    """It is said of that model, also when it is the default, and is no trouble.

    Nothing is said where none is cut.
    """
    world = with_model("m", params=params)
    if trained is not None:
        world.trained["m"] = trained
    found = remarks.notices(world.parsed(), world.sources())
    assert [remark.place[1] for remark in found] == (["m"] if said else [])
    assert all(said in remark.text for remark in found)
    desired = world.resolve()
    assert desired.notices == tuple(remark.text for remark in found)
    assert isinstance(desired.models["m"], DesiredModel)


def test_what_is_strange_of_folders_and_of_contexts_is_said_together() -> None:
    """And of a model in trouble that is all that is said."""
    world = World(trained={"n": 1024}, digests={"m": TROUBLE, "n": "22" * 32})
    notice = FolderNotice("p/*.md matches no file", lacks_prompts=True)
    sources = replace(world.sources(), notices={"m": (notice,)})
    folder, context = Resolver().resolve(world.parsed(), sources).notices
    assert folder == "p/*.md matches no file"
    assert context.startswith("max_context_len of n is 4096")


# --- what a template gets beside the messages ---

DATED = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}[{{ m.content }}]{% endfor %}"


def dated(stated: str | None, today: date | None = None) -> World:
    world = with_model("n", **({} if stated is None else {"template_date": stated}))
    world.templates["n"] = DATED
    world.today = today
    return world


def rendered(world: World, key: Key = OTHER) -> str:
    model = world.resolve().models[key.model]
    assert isinstance(model, DesiredModel)
    return model.template_for(key.prompt).prefix("Be brief.")


def test_a_stated_date_is_part_of_the_prompt() -> None:
    """The clock has no part in it."""
    assert rendered(dated("2024-07-26")).startswith("26 Jul 2024 [Be brief.]")
    assert differing(dated("2024-07-26"), dated("2024-07-26", date(2030, 1, 1))) == {}
    changed = differing(dated("2024-07-26"), dated("2024-07-27"))
    assert changed == {OTHER: ["prefix.digest", "template.date"]}


def test_today_is_the_day_of_the_look() -> None:
    """The prompt caches are stale on the next."""
    first, second = (dated("today", date(2025, 1, day)) for day in (1, 2))
    assert rendered(first).startswith("01 Jan 2025 ")
    assert differing(first, second) == {OTHER: ["prefix.digest", "template.date"]}
    resolver = Resolver()
    old = first.resolve(resolver).fingerprint(OTHER)
    assert old == first.resolve(resolver).fingerprint(OTHER)
    assert old != second.resolve(resolver).fingerprint(OTHER)


def test_a_template_that_needs_a_date_and_gets_none() -> None:
    """The trouble names the key that helps."""
    prompt = dated(None).resolve().prompts[OTHER]
    assert prompt.trouble is not None
    assert "it asks for the date by strftime_now, and none is stated" in prompt.trouble.message
    assert prompt.trouble.hint == "set the model's template_date in the manifest"


def test_what_is_not_set_is_no_component() -> None:
    """Fingerprints of manifests without these keys stay as they were."""
    wanted = World().resolve().fingerprint(OTHER)
    assert wanted is not None
    assert not {"template.date", "chat_template_kwargs"} & wanted.components.keys()
    assert wanted.components["thinking"] == "unset"


SWITCHED = "{{ effort }}{{ enable_thinking }} {% for m in messages %}[{{ m.content }}]{% endfor %}"


def switched(**more: object) -> World:
    world = with_model("n", **more)
    world.templates["n"] = SWITCHED
    return world


def test_variables_of_the_template() -> None:
    """They are part of the prompt and of the fingerprint."""
    low, high = (switched(chat_template_kwargs={"effort": e}) for e in ("low", "high"))
    assert rendered(low).startswith("low [Be brief.]")
    changed = differing(low, high)
    assert changed == {OTHER: ["chat_template_kwargs", "prefix.bytes", "prefix.digest"]}


def test_thinking_is_the_short_form_of_its_variable() -> None:
    """Both ways of writing it are one."""
    short, long = (
        switched(thinking=False),
        switched(chat_template_kwargs={"enable_thinking": False}),
    )
    assert rendered(short) == rendered(long)
    assert differing(short, long) == {}


def test_a_prompt_with_variables_of_its_own() -> None:
    """Two prompts of one file have both variants; the model's other requests have its own."""
    slow = {"files": "r.md", "chat_template_kwargs": {"enable_thinking": True}}
    world = switched(thinking=False, prompts={"rules": "r.md", "slow": slow})
    key = Key("n", "slow")
    world.texts[key] = world.texts[OTHER]
    assert rendered(world, key).startswith("True [")
    assert rendered(world).startswith("False [")
    desired = world.resolve()
    was, now = desired.fingerprint(OTHER), desired.fingerprint(key)
    assert was is not None
    assert now is not None
    components = [change.component for change in changes(was.components, now.components)]
    assert components == ["prefix.bytes", "prefix.digest", "thinking"]
    model = desired.models["n"]
    assert isinstance(model, DesiredModel)
    assert model.template_for(None).prefix("x") == model.template_for("rules").prefix("x")


def said(world: World) -> list[tuple[tuple[str | int, ...], str]]:
    found = remarks.warnings(world.parsed(), world.sources())
    return [(remark.place[2:], remark.text) for remark in found]


def test_switches_that_change_nothing() -> None:
    """Each with its key; nothing is said of those that the template knows."""
    world = with_model(
        "n",
        thinking=True,
        template_date="2025-01-01",
        chat_template_kwargs={"effort": "low"},
        prompts={"rules": {"files": "r.md", "chat_template_kwargs": {"style": 1}}},
    )
    world.templates["n"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert said(world) == [
        (
            ("thinking",),
            (
                "thinking of n changes nothing: its chat template does not use enable_thinking "
                "(remove it)"
            ),
        ),
        (
            ("template_date",),
            (
                "template_date of n changes nothing: its chat template does not use strftime_now "
                "(remove it)"
            ),
        ),
        (
            ("chat_template_kwargs", "effort"),
            "effort changes nothing: the chat template of n does not use it (remove it)",
        ),
        (
            ("prompts", "rules", "chat_template_kwargs", "style"),
            "style changes nothing: the chat template of n does not use it (remove it)",
        ),
    ]
    world.templates["n"] = SWITCHED + "{{ strftime_now('%d') }}{{ style }}"
    assert said(world) == []


def test_a_date_that_changes_each_day() -> None:
    """What it costs is said."""
    (found,) = said(dated("today", date(2025, 1, 1)))
    assert found[0] == ("template_date",)
    assert "is today, so its prompt caches are built anew each day" in found[1]
    assert said(dated("2025-01-01")) == []


def test_a_token_that_the_template_writes_and_nothing_states() -> None:
    """TinyLlama's `</s>` would be missing before the user's turn."""
    world = World()
    world.templates["n"] = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    assert [text for _, text in said(world)] == [
        (
            "the chat template of n writes bos_token, which neither the model's files nor the "
            "manifest state (set bos_token)"
        ),
        (
            "the chat template of n writes eos_token, which neither the model's files nor the "
            "manifest state (set eos_token)"
        ),
    ]
    world.tokenizers["n"] = TokenizerFacts(special=SpecialTokens(bos="<s>", eos="</s>"))
    assert said(world) == []
    # An engine that adds BOS needs none in the text.
    world.tokenizers["n"] = TokenizerFacts(special=SpecialTokens(adds_bos=True))
    assert [text for _, text in said(world)] == [
        (
            "the chat template of n writes eos_token, which neither the model's files nor the "
            "manifest state (set eos_token)"
        ),
    ]
    world.tokenizers = {}
    world.models["n"] |= {"bos_token": "", "eos_token": "</s>"}  # an empty one is stated, too
    assert said(world) == []


def test_a_template_that_would_not_end_is_not_evaluated_for_its_names() -> None:
    """Jinja2 computes constants when it compiles."""
    world = with_model("n", thinking=True)
    world.templates["n"] = "{{ 'a' * 10 ** 12 }}{{ messages }}"
    assert [place for place, _ in said(world)] == [("thinking",)]


# --- tools that belong to a prompt ---


def tool(description: str = "The weather of a city.", **parameters: object) -> dict[str, object]:
    schema = {"type": "object", "properties": parameters or {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def with_tools(*tools: dict[str, object], template: str = "chatml") -> World:
    world = World()
    world.templates["m"] = BUILTIN[template]
    world.tools[RULES] = list(tools)
    return world


@pytest.mark.parametrize("template", ["qwen3.5", "chatml", "llama3"])
def test_a_request_with_the_same_tools_begins_with_the_prefix(template: str) -> None:
    """Whether the template writes them before, inside or after the system text."""
    desired = with_tools(tool(), template=template).resolve()
    model = desired.models["m"]
    assert isinstance(model, DesiredModel)
    prefix = model.template.prefix("Be brief.", [tool()])
    wanted = desired.fingerprint(RULES)
    assert wanted is not None
    assert wanted.components["prefix.bytes"] == str(len(prefix.encode()))
    assert "get_weather" in prefix
    assert "Be brief." in prefix
    for question in ("Hello", "7 + 5"):
        messages = [
            Message(role="system", content="Be brief."),
            Message(role="user", content=question),
        ]
        text = model.template.render(messages, [tool()])
        assert text.startswith(prefix)
        assert text.removeprefix(prefix).startswith(question)


def test_tools_change_that_prompt_alone() -> None:
    """As a component of their own, and the stale verdict says so in words."""
    before, after = with_tools(tool()), with_tools(tool("The weather of a town."))
    changed = differing(before, after)
    assert changed == {RULES: ["prefix.digest", "tools.digest"]}
    assert set(differing(World(), before)) == {RULES}

    old, new = before.resolve().fingerprint(RULES), after.resolve().fingerprint(RULES)
    assert old is not None
    assert new is not None
    assert reason_of(changes(old.components, new.components)) == "its tools changed"


def test_a_prompt_without_tools_has_no_component_of_them() -> None:
    """Caches that were built before are as fresh as they were."""
    plain = with_tools(tool()).resolve().fingerprint(PLAIN)
    assert plain is not None
    assert "tools.digest" not in plain.components


def test_the_order_of_keys_counts_only_if_the_template_writes_it() -> None:
    """Also for a resolver that knows the prompt from before."""
    first = tool(city={"type": "string"}, days={"type": "integer"})
    other = tool(days={"type": "integer"}, city={"type": "string"})
    resolver = Resolver()
    before = with_tools(first).resolve(resolver).fingerprint(RULES)
    after = with_tools(other).resolve(resolver).fingerprint(RULES)
    assert before is not None
    assert after is not None
    written = changes(before.components, after.components)
    assert [change.component for change in written] == ["prefix.digest"]

    sorts = BUILTIN["chatml"].replace("tojson", "tojson(sort_keys=true)")
    worlds = with_tools(first), with_tools(other)
    for world in worlds:
        world.templates["m"] = sorts
    assert differing(*worlds) == {}


def test_the_prompt_has_its_tools() -> None:
    """Builds and requests take them from there."""
    prompts = with_tools(tool()).resolve().prompts
    tools = prompts[RULES].tools
    assert tools is not None
    assert tools.plain() == [tool()]
    assert prompts[PLAIN].tools is None


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        (BUILTIN["smollm2"], "template chatml cannot show tools", "remove `tools:`"),
        (
            BUILTIN["chatml"].replace(
                "{",
                "{% if tools and tools[0].function.description == 'Bad.' %}"
                "{{ raise_exception('no such tool') }}{% endif %}{",
                1,
            ),
            "no such tool (the template takes this prompt, but not with these tools)",
            "remove `tools:`",
        ),
        (
            "{% if tools %}{% set messages = messages | rejectattr('role', 'eq', 'system') "
            "| list %}{% endif %}" + BUILTIN["chatml"],
            "drops the system message (the template takes this prompt, but not with these tools)",
            "remove `tools:`",
        ),
    ],
    ids=["knows-none", "refuses-these", "drops-the-text"],
)
def test_tools_that_the_template_does_not_take_block_the_prompt(
    template: str, message: str, hint: str
) -> None:
    """That prompt alone, with the reason and the next step, at the line of its tools."""
    world = with_tools(tool("Bad."))
    world.templates["m"] = template
    prompts = world.resolve().prompts
    trouble = prompts[RULES].trouble
    assert trouble is not None
    assert message in trouble.message
    assert hint in trouble.hint
    assert trouble.place == ("tools",)
    assert prompts[RULES].tools is None
    assert prompts[PLAIN].trouble is None


def test_tools_are_not_blamed_for_a_text_that_the_template_refuses() -> None:
    """The reason is that of the text."""
    world = with_tools(tool())
    picky = "{% if messages[0].content == 'Be rude.' %}{{ raise_exception('not that') }}{% endif %}"
    world.templates["m"] = picky + BUILTIN["chatml"]
    world.texts[RULES] = "Be rude."
    trouble = world.resolve().prompts[RULES].trouble
    assert trouble is not None
    assert "not that" in trouble.message
    assert "tools" not in trouble.message


def test_a_tool_without_a_description_is_written_as_in_a_request() -> None:
    """A template that fails without one gets an empty one, both times."""
    bare = {"type": "function", "function": {"name": "get_weather"}}
    world = with_tools(bare)
    world.templates["m"] = BUILTIN["chatml"].replace(
        "{",
        "{% for t in tools or [] %}{% if t.function.description is not defined %}"
        "{{ raise_exception('no description') }}{% endif %}{% endfor %}{",
        1,
    )
    desired = world.resolve()
    assert desired.prompts[RULES].trouble is None
    model = desired.models["m"]
    assert isinstance(model, DesiredModel)
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Hi")]
    text = model.template.render(messages, [bare])
    assert text.startswith(model.template.prefix("Be brief.", [bare]))
    assert '"description": ""' in text
