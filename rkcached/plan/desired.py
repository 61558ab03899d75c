"""From declarations to desires: what each declared prompt must be, by manifest and sources.

Pure. `sources/reader.py` makes the `Sources`; `resolve` renders each prompt's prefix and takes its
fingerprint. The same `DesiredModel` then serves requests, so the text a cache is built from and the
text a request sends come out of one renderer.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple

from rkcached.engines.registry import ENGINES
from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.environment import Compile
from rkcached.messages.special_tokens import SpecialTokens
from rkcached.messages.template import ChatTemplate
from rkcached.messages.tools import ToolSet
from rkcached.plan import chat_templates, remarks
from rkcached.plan.chat_templates import ChatTemplates
from rkcached.plan.fingerprint import (
    OWNER,
    TOOLS_DIGEST,
    Fingerprint,
    Value,
    fingerprint,
)
from rkcached.plan.records import DesiredPrompt
from rkcached.sources.manifest import FingerprintMode, Manifest, ModelConfig
from rkcached.sources.records import (
    Declaration,
    Key,
    ModelSource,
    PromptSource,
    RuntimeSource,
    Sources,
    Trouble,
    kept,
)
from rkcached.worker.held import NOBODY


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredModel:
    """A model as requests and builds use it.

    `identity` changes when a running worker must be replaced.
    """

    name: str
    config: ModelConfig
    template: ChatTemplate
    """For requests that name no prompt."""
    source: ModelSource
    runtime: RuntimeSource
    identity: str
    special: SpecialTokens = field(default_factory=SpecialTokens)
    """The special tokens of the model, as the manifest and the model's files state them."""
    template_date: date | None = None
    """The date that the template gets."""
    prompt_templates: Mapping[str, ChatTemplate] = field(default_factory=dict)
    """The templates of prompts with variables of their own, by the prompts' names."""

    def template_for(self, prompt: str | None) -> ChatTemplate:
        """The template of a prompt, or of requests that name none."""
        if prompt is None:
            return self.template
        return self.prompt_templates.get(prompt, self.template)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desired:
    models: Mapping[str, DesiredModel | Trouble]
    prompts: Mapping[Key, DesiredPrompt]
    """In manifest order."""
    texts: Mapping[Key, str]
    """The system message of each usable prompt."""
    stored: frozenset[Key] = frozenset()
    """Prompts that clients stored, and may delete."""
    learned: Mapping[Key, int] = field(default_factory=dict)
    """Those among them that the daemon learned, and the uid of whom they serve, or NOBODY."""
    notices: tuple[str, ...] = ()
    """Sentences on what seems wrong in the manifest and can be used all the same."""

    doubts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By model, those on folders without a file: prompts may be missing that its owner declared."""
    unlisted: Mapping[str, Trouble] = field(default_factory=dict)
    """Models of which some prompts are not known, and why."""

    def fingerprint(self, key: Key) -> Fingerprint | None:
        """The one that its artifact must have; None if it is not declared or in trouble."""
        prompt = self.prompts.get(key)
        return None if prompt is None else prompt.fingerprint


class _Known(NamedTuple):
    """A prompt's prefix (SHA-256, length in bytes) and fingerprint, and what made them."""

    template: ChatTemplate
    source: PromptSource
    prefix: tuple[str, int] | Trouble
    shared: dict[str, Value]
    own: dict[str, Value]
    fingerprint: Fingerprint | Trouble


class Resolver:
    """Turns sources into desires, and remembers digests and fingerprints: texts seldom change.

    `compile_elsewhere` is for templates that are not built in.
    """

    def __init__(self, compile_elsewhere: Compile | None = None) -> None:
        self._templates = ChatTemplates(compile_elsewhere)
        # By model; the same object for as long as nothing in it changes.
        self._shared: dict[str, dict[str, Value]] = {}
        self._known: dict[Key, _Known] = {}
        # As the last `resolve` gave them.
        self._prompts: Mapping[Key, DesiredPrompt] = {}

    def resolve(self, manifest: Manifest, sources: Sources) -> Desired:
        self._templates.turn()
        models = {
            name: self._model(name, config, manifest, sources)
            for name, config in manifest.models.items()
        }
        prompts: dict[Key, DesiredPrompt] = {}
        texts = {}
        self._shared = {
            name: kept(self._shared.get(name), _shared_components(manifest, model))
            for name, model in models.items()
            if isinstance(model, DesiredModel)
        }
        for key, declared in sources.prompts.items():
            prompts[key] = prompt = self.resolve_one(declared, models[key.model], manifest)
            if prompt.fingerprint is not None and isinstance(declared.source, PromptSource):
                texts[key] = declared.source.text

        for gone in self._known.keys() - prompts.keys():
            del self._known[gone]

        self._prompts = prompts
        stored = frozenset(key for key, declared in sources.prompts.items() if declared.stored)
        doubts = {
            name: tuple(notice.text for notice in notices if notice.lacks_prompts)
            for name, notices in sources.notices.items()
        }
        texts_of_remarks = (remark.text for remark in remarks.notices(manifest, sources))
        return Desired(
            models=models,
            prompts=prompts,
            texts=texts,
            stored=stored,
            learned={
                key: NOBODY if declared.owner is None else declared.owner
                for key, declared in sources.prompts.items()
                if declared.learned
            },
            notices=tuple(dict.fromkeys(texts_of_remarks)),  # two models may share a folder
            doubts=doubts,
            unlisted=sources.unlisted_models,
        )

    def resolve_one(
        self, declared: Declaration, model: DesiredModel | Trouble, manifest: Manifest
    ) -> DesiredPrompt:
        """A prompt of a model that the last `resolve` gave."""
        key = declared.key
        result: Fingerprint | Trouble
        if isinstance(declared.source, Trouble):
            result = declared.source
        elif isinstance(model, Trouble):
            result = model
        else:
            own = _sampling_components(manifest, model.config.own_sampling(key.prompt))
            if key.prompt in model.prompt_templates:
                variables = model.config.template_variables(key.prompt)
                own |= chat_templates.variable_components(variables)
            if declared.owner is not None:
                own[OWNER] = declared.owner
            if declared.source.tools is not None:
                own[TOOLS_DIGEST] = declared.source.tools.digest
            result = _fixed_sampling(model.config, key.prompt, model.runtime) or self._fingerprint(
                key, model, declared.source, own
            )

        tools = None
        if isinstance(declared.source, PromptSource) and isinstance(result, Fingerprint):
            tools = declared.source.tools

        prompt = DesiredPrompt(
            key=key,
            description=declared.description,
            fingerprint=result if isinstance(result, Fingerprint) else None,
            trouble=result if isinstance(result, Trouble) else None,
            tools=tools,
        )
        return kept(self._prompts.get(key), prompt)

    def _fingerprint(
        self, key: Key, model: DesiredModel, source: PromptSource, own: dict[str, Value]
    ) -> Fingerprint | Trouble:
        """Make it anew only if the model, the text, or something of the prompt's own changed."""
        shared = self._shared[key.model]
        known = self._known.get(key)
        template = model.template_for(key.prompt)
        if known is None or known.template is not template or known.source != source:
            try:
                prefix = _prefix(template, source)
            except TemplateExhausted as error:  # perhaps the machine was busy: not remembered
                return Trouble.of(error)
        elif known.shared is shared and known.own == own:
            return known.fingerprint
        else:
            prefix = known.prefix

        result: Fingerprint | Trouble
        if isinstance(prefix, Trouble):
            result = prefix
        else:
            result = fingerprint(
                shared | {"prefix.digest": prefix[0], "prefix.bytes": prefix[1]} | own
            )

        self._known[key] = _Known(template, source, prefix, shared, own, result)
        return result

    def _model(
        self, name: str, config: ModelConfig, manifest: Manifest, sources: Sources
    ) -> DesiredModel | Trouble:
        source = sources.models[name]
        if isinstance(source, Trouble):
            return source
        if isinstance(sources.runtime, Trouble):
            return sources.runtime
        engine = ENGINES[manifest.engine.kind]
        if config.rerank and not engine.ranks:
            return Trouble(
                message=f"the engine {manifest.engine.kind.value} gives no relevance scores",
                hint="remove rerank: true; a second daemon with engine.kind: llamacpp can rank",
                place=("rerank",),
            )
        special = chat_templates.special_tokens(config, source)
        today = chat_templates.template_date(config, sources)

        def template_with(variables: Mapping[str, Any]) -> ChatTemplate:
            return self._templates.of(
                source, engine, special=special, variables=variables, today=today
            )

        try:
            template = template_with(config.template_variables())
            of_prompts = {
                prompt: template_with(config.template_variables(prompt))
                for prompt, declared in config.prompts.items()
                if declared.chat_template_kwargs
            }
        except TemplateError as error:
            return Trouble.of(error, source.template.place)

        identity = fingerprint(
            {
                "engine": manifest.engine.kind.value,
                "threads": manifest.engine.threads,
                "runtime": sources.runtime.digest,
                "model": source.digest,
                "path": str(config.path),
                "context": config.params.max_context_len,
                "pooling": config.pools or None,
            }
            | (_rkllm_identity(manifest, config, source) if engine.names_library else {})
        )
        return DesiredModel(
            name=name,
            config=config,
            template=template,
            prompt_templates=of_prompts,
            special=special,
            template_date=today,
            source=source,
            runtime=sources.runtime,
            identity=identity.digest,
        )


def _rkllm_identity(
    manifest: Manifest, config: ModelConfig, source: ModelSource
) -> dict[str, Value]:
    """The values that an RKLLM model is loaded with; the runtime fixes sampling then, too."""
    return {
        "library": str(manifest.engine.library),
        "abi": manifest.engine.abi,
        "concurrent": manifest.engine.concurrent,
        "tokenizer": source.tokenizer_digest,
        "lora.path": str(config.lora or ""),
        "thinking": config.thinks,
        **_rkllm_components(config, source),
        **{f"params.{name}": value for name, value in config.sampling(None).items()},
    }


def _rkllm_components(config: ModelConfig, source: ModelSource) -> dict[str, Value]:
    """The components that only RKLLM's prompt caches depend on.

    Whether a LoRA adapter or the NPU's options matter, nobody says.
    """
    return {
        "tokenizer.digest": source.tokenizer_digest,
        "lora.digest": source.lora_digest,
        "lora.scale": config.lora_scale if config.lora is not None else None,
        "npu.enabled_cpus": ",".join(map(str, config.npu.enabled_cpus)),
        "npu.embed_flash": config.npu.embed_flash,
        "npu.base_domain_id": config.npu.base_domain_id,
        "npu.n_keep": config.npu.n_keep,
        "npu.ignore_eos": config.npu.ignore_eos,
    }


def _fixed_sampling(config: ModelConfig, prompt: str, runtime: RuntimeSource) -> Trouble | None:
    """The trouble of a prompt with sampling of its own, if the runtime fixes it for all runs."""
    if runtime.samples_per_run:
        return None
    of_model = config.sampling(None)
    of_prompt = config.sampling(prompt)
    own = [
        name for name in of_prompt if name != "max_new_tokens" and of_prompt[name] != of_model[name]
    ]
    if not own:
        return None
    return Trouble(
        message=f"RKLLM {runtime.version} fixes {', '.join(own)} when the model is loaded; "
        "no prompt can have its own",
        hint="remove it from the prompt's params, set it in the model's, "
        "or use runtime 1.3.0 or newer",
    )


def _prefix(template: ChatTemplate, source: PromptSource) -> tuple[str, int] | Trouble:
    """SHA-256 and length (both of the UTF-8 bytes) of the text that is prefilled for this prompt.

    Errors: TemplateExhausted.
    """
    try:
        if source.tools is None:
            text = template.prefix(source.text)
        else:
            text = _prefix_with_tools(template, source.text, source.tools)
    except TemplateExhausted:
        raise
    except _ToolsRefused as error:
        return Trouble.of(error, "tools")
    except TemplateError as error:
        return Trouble.of(error)

    data = text.encode()
    return sys.intern(hashlib.sha256(data).hexdigest()), len(data)


class _ToolsRefused(TemplateError):
    """The template takes the prompt, but not its tools."""


def _prefix_with_tools(template: ChatTemplate, text: str, tools: ToolSet) -> str:
    """Errors: _ToolsRefused, TemplateError."""
    form = template.answer
    if form.calls is None:
        raise _ToolsRefused(
            f"template {template.name} {form.why}",
            hint="remove `tools:` from the prompt, or name a chat_template that knows tools, such "
            "as chatml or llama3",
        )

    try:
        return template.prefix(text, tools.plain())
    except TemplateExhausted:
        raise
    except TemplateError as error:
        template.prefix(text)  # if it refuses the text as well, that is the reason
        raise _ToolsRefused(
            f"{error.message} (the template takes this prompt, but not with these tools)",
            hint="state the type and the description of each parameter of the tools, or remove "
            "`tools:` from the prompt",
        ) from error


def _shared_components(manifest: Manifest, model: DesiredModel) -> dict[str, Value]:
    """The components of all prompt caches of a model, by the names that a stale verdict shows."""
    source = model.source
    runtime = model.runtime
    components: dict[str, Value] = {
        "engine": manifest.engine.kind.value,
        "runtime.version": runtime.version,
        "runtime.digest": runtime.digest,
        "model.digest": source.digest,
        "template.digest": model.template.digest,
        "params.max_context_len": model.config.params.max_context_len,
        **chat_templates.variable_components(model.config.template_variables()),
    }
    if model.template_date is not None:
        components["template.date"] = model.template_date.isoformat()
    if ENGINES[manifest.engine.kind].names_library:
        components |= _rkllm_components(model.config, source) | {"engine.abi": manifest.engine.abi}
    return components | _sampling_components(manifest, model.config.sampling(None))


def _sampling_components(
    manifest: Manifest, sampling: Mapping[str, int | float]
) -> dict[str, Value]:
    """Sampling does not change a KV state.

    The rule is that it invalidates all the same; `fingerprint: kv` opts out.
    """
    full = manifest.cache.fingerprint is FingerprintMode.FULL
    return {f"params.{name}": value for name, value in sampling.items()} if full else {}
