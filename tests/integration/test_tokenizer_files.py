"""The files of a Hugging Face repository as a model's tokenizer, and as a chat template."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from rkcached.engines.rkllm.tokenizer import load_tokenizer
from rkcached.host.digests import Digests
from rkcached.messages.tokenizer_facts import TokenizerFacts
from rkcached.plan.desired import Desired, DesiredModel, Resolver
from rkcached.plan.remarks import warnings
from rkcached.plan.worker_model import worker_model
from rkcached.sources.manifest_file import inputs
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import ModelSource, RuntimeSource, Sources, TemplateOrigin, Trouble
from rkcached.sources.stored_texts import StoredTexts
from tests.integration.test_sources import not_root
from tests.rkllm_standin.tokens import byte_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": TEMPLATE,
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "added_tokens_decoder": {
        "1": {"content": "<s>", "special": True},
        "2": {"content": "</s>", "special": True},
        "9": {"content": "<think>", "special": False},
    },
}


class Repository:
    """A model and a folder with the files of its tokenizer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "hf"
        self.folder.mkdir()
        (root / "m.rkllm").write_bytes(b"weights")
        self.reader = SourceReader(Digests())
        self.config()

    def write(self, name: str, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        (self.folder / name).write_text(text)

    def config(self, **more: object) -> None:
        self.write("tokenizer_config.json", CONFIG | more)

    def tokenizer(self, single: str = "$A", *, special: tuple[str, ...] = ("<s>", "</s>")) -> None:
        """A tokenizer.json whose post-processor makes a text `single`."""
        path = byte_tokenizer(self.folder / "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.add_special_tokens(list(special))
        tokenizer.add_tokens(["<think>"])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer.save(str(path))

    def scan(self, tokenizer: str = "hf", more: str = "") -> Sources:
        text = (
            "version: 1\nengine: {kind: rkllm}\n"
            f"models: {{m: {{path: m.rkllm, tokenizer: {tokenizer}, {more}}}}}\n"
        )
        return self.reader.scan(parse(text, file=self.root / "manifest.yaml"))

    def source(self, tokenizer: str = "hf", more: str = "") -> ModelSource:
        found = self.scan(tokenizer, more).models["m"]
        assert isinstance(found, ModelSource), found
        return found

    def facts(self, tokenizer: str = "hf") -> TokenizerFacts:
        return self.source(tokenizer).tokenizer

    def trouble(self, tokenizer: str = "hf", more: str = "") -> Trouble:
        found = self.scan(tokenizer, more).models["m"]
        assert isinstance(found, Trouble), found
        return found


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.parametrize("tokenizer", ["hf", "hf/", "hf/tokenizer_config.json"])
def test_tokenizer_config_alone(repository: Repository, tokenizer: str) -> None:
    """It has everything but the vocabulary, so the engine gets text, and its runtime adds BOS."""
    found = repository.source(tokenizer)
    assert found.template.text == TEMPLATE
    assert found.template.origin is TemplateOrigin.MODEL
    path = repository.folder / "tokenizer_config.json"
    assert found.template.name == f"chat_template of {path}"
    special = found.tokenizer.special
    assert (special.bos, special.eos, special.adds_bos) == ("<s>", "</s>", True)
    assert special.control == {"<s>", "</s>"}
    assert found.tokenizer.added == {"<think>"}
    assert found.tokenizer.special_origin == str(path)
    assert found.tokenizer_file == ""


def test_tokenizer_json_states_the_control_tokens(repository: Repository) -> None:
    """Those of the other file do not count beside it; the engine gets tokens."""
    repository.config(added_tokens_decoder={"5": {"content": "<old>", "special": True}})
    repository.tokenizer()
    found = repository.source()
    assert found.tokenizer.special.control == {"<s>", "</s>"}
    assert found.tokenizer.added == {"<think>"}
    assert found.tokenizer_file == str(repository.folder / "tokenizer.json")
    assert found.tokenizer.special_origin == found.tokenizer_file


def test_tokenizer_json_alone(repository: Repository) -> None:
    """Under any name. It has no template, which is said with the remedy."""
    repository.tokenizer("<s> $A")
    path = repository.folder / "tokenizer.json"
    other = path.rename(repository.root / "qwen.json")
    found = repository.source("qwen.json")
    assert found.tokenizer_file == str(other)
    assert found.tokenizer.special.adds_bos
    assert found.template.origin is TemplateOrigin.ASSUMED
    assert found.tokenizer_digest == Digests().digest(other)


@pytest.mark.parametrize(
    ("single", "adds"), [("$A", False), ("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False)]
)
def test_whether_bos_is_added_follows_the_post_processor(
    repository: Repository, single: str, adds: bool
) -> None:
    """As the engine's own tokenizer does."""
    repository.tokenizer(single)
    assert repository.facts().special.adds_bos is adds
    tokenize = load_tokenizer(str(repository.folder / "tokenizer.json"))
    assert tokenize is not None
    assert (len(tokenize("a")) == 2) is adds


POST_PROCESSORS: dict[str, tuple[object, bool]] = {
    "none": (None, False),
    "bytes": ({"type": "ByteLevel"}, False),
    "roberta": ({"type": "RobertaProcessing", "cls": ["<s>", 1], "sep": ["</s>", 2]}, True),
    "another-token": ({"type": "BertProcessing", "cls": ["[CLS]", 1]}, False),
    "several": (
        {
            "type": "Sequence",
            "processors": [
                {"type": "ByteLevel"},
                {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
            ],
        },
        True,
    ),
    "nonsense": ({"type": "Sequence", "processors": 5}, False),
}


@pytest.mark.parametrize("case", POST_PROCESSORS)
def test_other_post_processors(repository: Repository, case: str) -> None:
    """Llama 3's is a sequence; what is not understood adds nothing."""
    processor, adds = POST_PROCESSORS[case]
    repository.write("tokenizer.json", {"model": {}, "post_processor": processor})
    assert repository.facts().special.adds_bos is adds


def test_without_files_the_runtime_adds_bos(repository: Repository) -> None:
    """RKLLM adds it to every text."""
    found = repository.source("null")
    assert found.tokenizer.special.adds_bos
    assert found.tokenizer.special.control is None
    assert found.template.origin is TemplateOrigin.ASSUMED


def test_a_file_of_its_own_is_stronger_than_the_configs_template(repository: Repository) -> None:
    """As in transformers."""
    repository.write("chat_template.jinja", "{{ 1 }}")
    found = repository.source()
    assert found.template.text == "{{ 1 }}"
    assert found.template.name == str(repository.folder / "chat_template.jinja")


def test_a_template_in_chat_template_json(repository: Repository) -> None:
    """Processors keep theirs there."""
    repository.config(chat_template=None)
    repository.write("chat_template.json", {"chat_template": "{{ 2 }}"})
    assert repository.source().template.text == "{{ 2 }}"


def test_named_templates(repository: Repository) -> None:
    """The default, and the one for tools where there are some."""
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with tools"},
        {"name": "rag", "template": "with documents"},
        {"name": 7},
        "nonsense",
    ]
    repository.config(chat_template=named)
    text = repository.source().template.text
    assert "plain" in text
    assert "with tools" in text
    assert "documents" not in text


def test_tokens_of_the_special_tokens_map(repository: Repository) -> None:
    """Old repositories state them there alone; null in the config means none."""
    config = {key: value for key, value in CONFIG.items() if key != "eos_token"}
    repository.write("tokenizer_config.json", config | {"bos_token": None})
    repository.write("special_tokens_map.json", {"bos_token": "<b>", "eos_token": "<e>"})
    special = repository.facts().special
    assert (special.bos, special.eos) == ("", "<e>")


def test_generation_config_is_shown(repository: Repository) -> None:
    """Its tokens end answers, its sampling is never applied."""
    config = {key: value for key, value in CONFIG.items() if key != "eos_token"}
    repository.write("tokenizer_config.json", config)
    generation = {"eos_token_id": [2, 1, 77], "temperature": 0.6, "top_k": 20, "do_sample": True}
    repository.write("generation_config.json", generation)
    facts = repository.facts()
    assert facts.ends == ("</s>", "<s>")
    assert facts.special.eos == "</s>"
    assert dict(facts.sampling) == {"temperature": 0.6, "top_k": 20}


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "generation_config.json",
    ],
)
def test_every_file_is_watched_and_part_of_the_identity(repository: Repository, name: str) -> None:
    """Also one that is not there yet."""
    manifest = parse(
        "version: 1\nengine: {kind: rkllm}\nmodels: {m: {path: m.rkllm, tokenizer: hf}}\n",
        file=repository.root / "manifest.yaml",
    )
    watched, _ = inputs(manifest, StoredTexts(repository.root / "stored"))
    assert repository.folder / name in watched

    before = repository.source()
    content: object = {"model": {}} if name == "tokenizer.json" else {"x": 1}
    repository.write(name, content)
    after = repository.source()
    assert before.tokenizer_digest != after.tokenizer_digest
    assert str(repository.folder / name) in dict(after.signatures)


def remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def cut_off(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"chat_template": "')


def a_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")


def deep(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[" * 100_000)


def no_text(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(b'{"chat_template": "\xff"}')


def fifo(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": [{"id": 1}]}')


def too_many(folder: Path) -> None:
    added = [{"content": f"<{n}>", "special": True} for n in range(70_000)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": added}))


BAD: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "empty": (
        remove_all,
        "has none of tokenizer.json, tokenizer_config.json and chat_template.jinja",
    ),
    "cut-off": (cut_off, "tokenizer_config.json is no file of a tokenizer"),
    "list": (a_list, "is no file of a tokenizer"),
    "deep": (deep, "is no file of a tokenizer"),
    "no-text": (no_text, "is no file of a tokenizer"),
    "fifo": (fifo, "tokenizer_config.json is not a regular file"),
    "broken-tokenizer": (broken_tokenizer, "tokenizer.json is no file of a tokenizer"),
    "too-many": (too_many, "states 70,000 control tokens, the limit is 65,536"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_with_such_files_is_said(repository: Repository, case: str) -> None:
    """With the file, and the line of `tokenizer:`."""
    spoil, words = BAD[case]
    spoil(repository.folder)
    found = repository.trouble()
    assert words in found.message
    assert found.hint
    assert found.place == ("tokenizer",)


def broken_link(file: Path) -> None:
    file.symlink_to("../../blobs/0a1b2c")


def link_through_a_file(file: Path) -> None:
    file.symlink_to(file.parent / "tokenizer_config.json" / "x")


def link_loop(file: Path) -> None:
    file.symlink_to(file.name)


NO_FILES: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "broken-link": (broken_link, "is a link that leads to no file"),
    "link-through-a-file": (link_through_a_file, "is a link that leads to no file"),
    "link-loop": (link_loop, "is a link that leads to no file"),
    "fifo": (os.mkfifo, "is not a regular file"),
    "directory": (Path.mkdir, "is a directory"),
}


@pytest.mark.parametrize("case", NO_FILES)
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "chat_template.json"])
@pytest.mark.parametrize("key", ["tokenizer", "chat_template"])
def test_a_name_that_leads_to_no_file_is_not_absent(
    repository: Repository, case: str, name: str, key: str
) -> None:
    """A copy of a cache of Hugging Face is full of such links; the tokens would silently change."""
    make, words = NO_FILES[case]
    other = repository.root / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    make(other / name)

    if key == "tokenizer":
        found = repository.trouble("other")
    else:
        found = repository.trouble(more="chat_template: other/")
    assert found.message == f"{other / name} {words}"
    assert "remove" in found.hint
    assert found.place == (key,)


def test_a_link_to_a_file_is_one(repository: Repository) -> None:
    repository.tokenizer()
    file = repository.folder / "tokenizer.json"
    file.rename(repository.root / "blob")
    file.symlink_to("../blob")
    assert repository.source().tokenizer_file == str(file)


@pytest.mark.parametrize("name", ["nowhere", "hf/nowhere.json"])
def test_a_tokenizer_that_is_missing(repository: Repository, name: str) -> None:
    """It is named."""
    found = repository.trouble(name)
    assert found.message == f"source missing: {repository.root / name}"
    assert found.place == ("tokenizer",)


def test_a_single_file_that_is_a_fifo(repository: Repository) -> None:
    """Nobody waits for its writer."""
    os.mkfifo(repository.root / "t.json")
    assert "is not a regular file" in repository.trouble("t.json").message


def test_a_folder_that_nobody_may_read(repository: Repository) -> None:
    """It is a trouble with the command that helps; what is watched is found all the same."""
    repository.folder.chmod(0o700)
    manifest = parse(
        "version: 1\nengine: {kind: rkllm}\nmodels: {m: {path: m.rkllm, tokenizer: hf}}\n",
        file=repository.root / "manifest.yaml",
    )
    above = repository.root
    while above.name and above.is_relative_to(tempfile.gettempdir()):
        above.chmod(0o755)
        above = above.parent

    with not_root():
        found = repository.trouble()
        watched, _ = inputs(manifest, StoredTexts(repository.root / "stored"))
    assert "cannot be read" in found.message
    assert found.hint
    assert found.place == ("tokenizer",)
    assert repository.folder / "tokenizer.json" in watched


def test_values_of_other_kinds_count_as_not_stated(repository: Repository) -> None:
    """The files are written by hand, too."""
    repository.write(
        "tokenizer_config.json",
        {
            "chat_template": 7,
            "bos_token": ["<s>"],
            "eos_token": {"content": 7},
            "added_tokens_decoder": {"a": {"content": "<x>", "special": 1}, "b": 7, "c": {}},
        },
    )
    repository.write("generation_config.json", {"eos_token_id": "x", "temperature": True})
    found = repository.source()
    assert found.template.origin is TemplateOrigin.ASSUMED
    assert (found.tokenizer.special.bos, found.tokenizer.special.eos) == ("", "")
    assert found.tokenizer.special.control == set()
    assert found.tokenizer.added == {"<x>"}
    assert (found.tokenizer.ends, found.tokenizer.sampling) == ((), ())


def test_numbers_that_are_too_large_count_as_not_stated(repository: Repository) -> None:
    """They raised an OverflowError and a ValueError, which ended the look at all models."""
    decoder = {"9" * 5000: {"content": "<x>", "special": True}}
    repository.config(added_tokens_decoder=decoder, eos_token="</s>")
    repository.write("generation_config.json", {"temperature": 10**400, "top_k": 20})

    found = repository.facts()

    assert found.special.control == {"<x>"}
    assert found.sampling == (("top_k", 20.0),)


def test_a_single_file_that_is_not_utf8(repository: Repository) -> None:
    """Only the look at which kind of file it is raised."""
    data = b'{"model": 1, "added_tokens": [{"content": "\xff"}]}'
    (repository.folder / "tokenizer_config.json").write_bytes(data)

    trouble = repository.trouble("hf/tokenizer_config.json")

    assert "is no file of a tokenizer" in trouble.message


# --- as a chat template, for any engine ---


@pytest.mark.parametrize("template", ["./hf", "hf/", "hf/tokenizer_config.json"])
def test_such_files_as_a_chat_template(repository: Repository, template: str) -> None:
    """The tokens that the template needs are taken with it."""
    text = (
        "version: 1\nengine: {kind: memory}\n"
        f"models: {{m: {{path: m.json, chat_template: {template}}}}}\n"
    )
    (repository.root / "m.json").write_text('{"rkcached_memory_model": 1}')
    manifest = parse(text, file=repository.root / "manifest.yaml")
    found = repository.reader.scan(manifest).models["m"]
    assert isinstance(found, ModelSource)
    assert found.template.text == TEMPLATE
    assert found.template.origin is TemplateOrigin.FILE
    assert (found.tokenizer.special.bos, found.tokenizer.special.eos) == ("<s>", "</s>")
    watched, _ = inputs(manifest, StoredTexts(repository.root / "stored"))
    assert repository.folder / "tokenizer_config.json" in watched


def test_tokens_beside_a_template(repository: Repository) -> None:
    """The model has no tokenizer: they are those of the template's file, but for the manifest's."""
    template = "chat_template: hf/tokenizer_config.json"
    model = resolved(repository, "null", template).models["m"]
    assert isinstance(model, DesiredModel)
    assert (model.special.bos, model.special.eos) == ("<s>", "</s>")
    assert model.special.control == {"<s>", "</s>"}
    assert model.source.tokenizer.added == {"<think>"}
    assert model.source.tokenizer.special_origin.endswith("tokenizer_config.json")
    # The runtime adds BOS to a text.
    assert model.template.prefix("Be brief.").startswith("[Be brief.]</s>")
    assert warned(repository, template) == []

    model = resolved(repository, "null", f"{template}, eos_token: <e>").models["m"]
    assert isinstance(model, DesiredModel)
    assert (model.special.bos, model.special.eos) == ("<s>", "<e>")


def warned(repository: Repository, more: str) -> list[str]:
    """The texts of what `check` remarks about templates."""
    text = f"version: 1\nengine: {{kind: rkllm}}\nmodels: {{m: {{path: m.rkllm, {more}}}}}\n"
    manifest = parse(text, file=repository.root / "manifest.yaml")
    return [remark.text for remark in warnings(manifest, repository.reader.scan(manifest))]


def test_the_models_own_tokens_are_stronger_than_those_beside_a_template(
    repository: Repository,
) -> None:
    """A token that is not in its vocabulary is not taken: it would be letters."""
    other = repository.root / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text(
        json.dumps(CONFIG | {"bos_token": "<b>", "eos_token": "<e>"})
    )
    decoder = {"1": {"content": "<s>", "special": True}, "2": {"content": "<e>", "special": True}}
    repository.config(eos_token=None, added_tokens_decoder=decoder)
    found = repository.source(more="chat_template: other/").tokenizer.special
    assert (found.bos, found.eos) == ("<s>", "<e>")
    assert found.control == {"<s>", "<e>"}

    repository.config(bos_token=None, eos_token="</s>", added_tokens_decoder=decoder)
    found = repository.source(more="chat_template: other/").tokenizer.special
    assert (found.bos, found.eos) == ("", "</s>")


def test_too_many_tokens_beside_a_template(repository: Repository) -> None:
    too_many(repository.folder)
    found = repository.trouble("null", more="chat_template: hf/")
    assert "states 70,000 control tokens" in found.message
    assert found.place == ("chat_template",)


def test_files_without_a_template(repository: Repository) -> None:
    """They are no chat template; the line is that of `chat_template:`."""
    repository.config(chat_template=None)
    found = repository.trouble(more="chat_template: hf/")
    assert found.message == f"{repository.folder} has no chat template"
    assert found.place == ("chat_template",)


# --- to the engine ---


def resolved(repository: Repository, tokenizer: str, more: str = "") -> Desired:
    sources = repository.scan(tokenizer, more)
    runtime = RuntimeSource(version="1.3.0", digest="aa" * 32)
    text = (
        "version: 1\nengine: {kind: rkllm}\n"
        f"models: {{m: {{path: m.rkllm, tokenizer: {tokenizer}, {more}}}}}\n"
    )
    manifest = parse(text, file=repository.root / "manifest.yaml")
    return Resolver().resolve(
        manifest, Sources(runtime=runtime, models=sources.models, prompts=sources.prompts)
    )


def test_the_worker_gets_the_tokenizer_itself(repository: Repository) -> None:
    """Not the folder; and nothing where there is only a config."""
    manifest = parse(
        "version: 1\nengine: {kind: rkllm}\nmodels: {m: {path: m.rkllm, tokenizer: hf}}\n",
        file=repository.root / "manifest.yaml",
    )
    model = resolved(repository, "hf").models["m"]
    assert isinstance(model, DesiredModel)
    assert worker_model(manifest.engine, model).spec.tokenizer == ""
    repository.tokenizer("<s> $A")
    model = resolved(repository, "hf").models["m"]
    assert isinstance(model, DesiredModel)
    expected = str(repository.folder / "tokenizer.json")
    assert worker_model(manifest.engine, model).spec.tokenizer == expected


def test_bos_is_written_where_nobody_adds_it(repository: Repository) -> None:
    """The template writes it; it is dropped where the tokenizer or the runtime puts it first."""
    repository.tokenizer("$A")
    model = resolved(repository, "hf").models["m"]
    assert isinstance(model, DesiredModel)
    assert model.template.prefix("Be brief.").startswith("<s>[Be brief.]</s>")
    repository.tokenizer("<s> $A")
    model = resolved(repository, "hf").models["m"]
    assert isinstance(model, DesiredModel)
    assert model.template.prefix("Be brief.").startswith("[Be brief.]</s>")
