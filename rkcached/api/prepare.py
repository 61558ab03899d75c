"""Turns a checked body into a job for serving: model and prompt, rendered text, sampling, schema.

Every refusal is a RequestError with its HTTP status, OpenAI's code and the next thing to do.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from rkcached import errors
from rkcached.api.demand import ANY_OBJECT, Demand
from rkcached.api.named_prompt import named_prompt
from rkcached.api.rendering import RenderThread
from rkcached.api.requests import (
    MOST,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    GenerationRequest,
    RerankRequest,
)
from rkcached.api.write_chat import (
    WrittenChat,
    nul_refused,
    refuse_too_long,
    write_again,
    write_chat,
)
from rkcached.engines.base import Sampling
from rkcached.engines.registry import ENGINES
from rkcached.errors import RequestError
from rkcached.messages.detection import AnswerForm
from rkcached.messages.reasoning import Marks
from rkcached.messages.reply import Reply
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.snapshot import Published
from rkcached.serving.failures import as_request_error
from rkcached.serving.job import Job, Part
from rkcached.serving.models import find_embedding_model, find_reranker, find_text_model
from rkcached.serving.pooling import EmbeddingInput
from rkcached.sources.manifest import Unsupported
from rkcached.worker.held import EVERYBODY
from rkcached.worker.schemas import MAX_SCHEMA_BYTES, SchemaChecker

Result = TypeVar("Result")


class Preparation:
    def __init__(self, published: Published) -> None:
        self._published = published
        self._render_thread = RenderThread()
        self._schema_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schema")
        self._schemas = SchemaChecker()
        # By user: each has one place in the queue of checks, which may take seconds each.
        self._turns = WeakValueDictionary[int, asyncio.Lock]()

    @property
    def ignores_unsupported(self) -> bool:
        """Whether parameters that are not supported are left out of requests."""
        return self._published.now.manifest.serving.unsupported is Unsupported.IGNORE

    def close(self) -> None:
        """Stop checking schemas: the requests that wait for a check are refused."""
        self._schemas.kill()

    async def chat(
        self,
        request: ChatRequest,
        accepted: float,
        owner: int,
        size_bytes: int,
        *,
        is_admin: bool = False,
        tolerant: bool = False,
    ) -> tuple[Job, Reply]:
        """Check a request against what is declared, and render it.

        `accepted` is in monotonic seconds, `owner` the client's uid, `size_bytes` the size of the
        body; `is_admin`: it came on the admin socket; `tolerant`: what the engine lacks is
        ignored. Errors: RequestError.
        """
        snapshot = self._published.now
        model = find_text_model(snapshot, request.model.partition("/")[0])
        named, param = named_prompt(request)
        if named is not None:
            snapshot = snapshot.seen_by(owner)
        template = model.template_for(named.prompt if named else None)

        async def off_the_loop(work: Callable[[], Result]) -> Result:
            return await self._render_thread.do(template, work, caller=owner, size_bytes=size_bytes)

        write = functools.partial(write_chat, request, snapshot, model, named, param)
        written = await off_the_loop(write)
        demand = written.demand

        values = _sampling_values(request, model, named.prompt if named else None)
        correct = None
        if demand.schema is None:
            values["shown_tokens"] = _shown_tokens(written.form, demand)
        else:
            schema = values["json_schema"] = written.schema
            await self._check(schema, demand, owner)

            async def correct(answer: str, why: str) -> str:
                return await off_the_loop(
                    functools.partial(write_again, written.conversation, schema, answer, why)
                )

        job = Job(
            model=model,
            named=named,
            prompt=written.prompt,
            sampling=Sampling(**values),
            cold=request.is_cold,
            accepted=accepted,
            owner=owner,
            state_owner=self._state_owner(owner),
            ignores_unsupported=tolerant or self.ignores_unsupported,
            ignored=_ignored(request, is_admin=is_admin) + written.ignored,
            ends_model=request.ends_model and is_admin,
            parts=written.parts,
            goes_on=any(message["role"] == "assistant" for message in written.messages),
            with_tools=bool(demand.tools),
            variables=tuple(written.conversation.variables),
            schema_param=demand.schema_param,
            correct=correct,
        )
        form = written.form
        reply = Reply(
            form=form.calls if demand.tools else None,
            tools={tool.function.name: tool.arguments_schema for tool in demand.tools},
            marks=form.marks,
            forced=demand.is_call or demand.may_call,
            reasons=_reasons(form.marks, written) and demand.schema is None,
        )
        return job, reply

    def completion(
        self,
        request: CompletionRequest,
        accepted: float,
        owner: int,
        *,
        is_admin: bool = False,
        tolerant: bool = False,
    ) -> Job:
        """Check a request whose text goes to the model as it is.

        The arguments are those of `chat`. Errors: RequestError.
        """
        name, _, prompt = request.model.partition("/")
        if prompt or isinstance(request.wanted_cache, str):
            raise RequestError(
                400,
                "a plain completion has no system message, so no prompt can be chosen by name",
                code="unsupported_parameter",
                param="model" if prompt else "cache",
                hint=f"ask for the model {name!r}, or use /v1/chat/completions",
            )
        if not request.text:
            raise RequestError(
                400,
                "the prompt is empty",
                code="invalid_value",
                param="prompt",
                hint="send its text",
            )
        if "\0" in request.text:
            raise nul_refused("prompt")

        model = find_text_model(self._published.now, name)
        refuse_too_long(model, len(request.text.encode()), "prompt")
        values = _sampling_values(request, model, None)
        return Job(
            model=model,
            named=None,
            prompt=request.text,
            text_param="prompt",
            sampling=Sampling(**values),
            cold=request.is_cold,
            accepted=accepted,
            owner=owner,
            state_owner=self._state_owner(owner),
            ignores_unsupported=tolerant or self.ignores_unsupported,
            ignored=_ignored(request, is_admin=is_admin),
            ends_model=request.ends_model and is_admin,
            parts=(Part("the prompt", request.text),),
        )

    def _state_owner(self, owner: int) -> int:
        return EVERYBODY if self._published.now.manifest.serving.share_state else owner

    def embedding(self, request: EmbeddingRequest) -> tuple[str, list[EmbeddingInput]]:
        """The name of the model and the inputs. Errors: RequestError."""
        model = find_embedding_model(self._published.now, request.model)
        inputs = list(request.each())
        if any(isinstance(content, str) and "\0" in content for content in inputs):
            raise nul_refused("input")
        texts = [len(item.encode()) for item in inputs if isinstance(item, str)]
        refuse_too_long(model, max(texts, default=0), "input")  # lists of tokens count themselves
        return model.name, inputs

    def ranking(self, request: RerankRequest) -> tuple[str, list[str]]:
        """The name of the model and the documents. Errors: RequestError."""
        model = find_reranker(self._published.now, request.model)
        documents = request.texts()
        if "\0" in request.query:
            raise nul_refused("query")
        if any("\0" in document for document in documents):
            raise nul_refused("documents")

        longest = max(len(document.encode()) for document in documents)
        refuse_too_long(model, len(request.query.encode()), "query")
        refuse_too_long(model, longest, "documents")
        return model.name, documents

    async def _check(self, text: str, demand: Demand, owner: int) -> None:
        """Whether a run can be held to this schema. Errors: RequestError."""
        if demand.schema == ANY_OBJECT:
            return

        try:
            if len(text) > MAX_SCHEMA_BYTES:
                raise errors.SchemaInvalid(
                    f"the schema is larger than {MAX_SCHEMA_BYTES:,} bytes", hint="simplify it"
                )
            compiled = ENGINES[self._published.now.manifest.engine.kind].compiles_schemas
            check = functools.partial(self._schemas.check, text, compiled=compiled)
            turn = self._turns.setdefault(owner, asyncio.Lock())
            async with turn:
                await asyncio.get_running_loop().run_in_executor(self._schema_thread, check)
        except errors.RkcachedError as error:
            raise as_request_error(error, schema_param=demand.schema_param) from error


def _sampling_values(
    request: GenerationRequest, model: DesiredModel, prompt: str | None
) -> dict[str, Any]:
    """The fields of `Sampling`: the model's, changed by the prompt's, changed by the request's."""
    values: dict[str, Any] = model.config.sampling(prompt) | request.sampling()
    if values["max_new_tokens"] == MOST:
        values["max_new_tokens"] = model.config.params.max_context_len
    return values


def _ignored(request: GenerationRequest, *, is_admin: bool) -> tuple[str, ...]:
    """The parameters that have no effect on this socket."""
    if request.keep_alive is None or (request.ends_model and is_admin):
        return request.ignored
    return (*request.ignored, "keep_alive")


def _shown_tokens(form: AnswerForm, demand: Demand) -> tuple[str, ...]:
    """The tokens that an engine has to print for an answer to be taken apart."""
    tokens = form.marks.shown_tokens
    if demand.tools and form.calls is not None:
        tokens += form.calls.shown_tokens
    return tuple(dict.fromkeys(tokens))


def _reasons(marks: Marks, written: WrittenChat) -> bool:
    """Whether the answer begins with reasoning: the prompt, or what it continues, is inside it."""
    continued = written.continued
    if not continued:
        return marks.begun(written.prompt)
    return max(map(continued.rfind, marks.openings)) > max(map(continued.rfind, marks.closings))
