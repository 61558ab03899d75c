"""Chat templates: the one place where messages become the text that a model reads.

The text that a prompt cache is built from (`prefix`) and the text that a request sends (`render`)
come out of the same code, so they cannot drift apart. Prompt text is data: only the template is
ever evaluated, by `environment`. The date that `strftime_now` tells is given, as every prompt cache
depends on it. Pure: no I/O; whatever Jinja2 raises leaves as a TemplateError.

Prompts, messages, tool results, calls and tool definitions cannot forge a turn: see `markers`.
`/v1/completions` has no template: its text is structure by intent.

A template that is not built in may loop for ever or fill the memory, which nothing in this process
can bound: who holds one gives `ChatTemplate` another `compile`, that of `sandbox`, which works in
a process that can be killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from datetime import date
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.adapt import ADAPTATIONS, Adaptation, whole_tools
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.detection import AnswerForm, detect, within_limit
from rkcached.messages.environment import TODAY, Compile, Write, compile_here
from rkcached.messages.markers import Markers
from rkcached.messages.message import Message
from rkcached.messages.reasoning import Marks, marks_of
from rkcached.messages.special_tokens import SpecialTokens

# User texts for `prefix`. They share no first character, not even after trim, upper or lower, and
# they differ in length.
_USER_TEXTS: Final = ("Q", "7 + 5?\nü")
NO_VARIABLES: Final[Mapping[str, Any]] = MappingProxyType({})
NO_SPECIAL_TOKENS: Final = SpecialTokens()

# Is put behind a message that the answer continues. The blank tells whether a template trims.
_CONTINUED: Final = "Zq7-the-answer-goes-on-here "

_SYSTEM_PROBES: Final = ("Zq4-probe", "8 + 4 + 9.")


class ChatTemplate:
    """One chat template, compiled.

    Raises TemplateError, with the line in the template, if it does not parse.

    `variables` are given to the template beside the messages (`enable_thinking` and the like). What
    is not among them is undefined, which lets the template choose. `today` is what `strftime_now`
    tells; without it the function is undefined. `takes_tokens`: the engine can read a part of a
    text without control tokens (see `special_tokens`), so nothing in it must be altered.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str,
        special: SpecialTokens = NO_SPECIAL_TOKENS,
        variables: Mapping[str, Any] = NO_VARIABLES,
        today: date | None = None,
        takes_tokens: bool = False,
        compile_elsewhere: Compile | None = None,
    ) -> None:
        self.name = name
        self.digest = _digest(source, special.bos, special.eos)
        self._source = source
        self._markers = Markers(source, special, takes_tokens=takes_tokens)
        self._added_bos = special.bos if special.adds_bos else ""
        self._variables: dict[str, Any] = {
            "bos_token": special.bos,
            "eos_token": special.eos,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }
        self._variables |= variables
        if today is not None:
            self._variables[TODAY] = today.isoformat()

        self.may_wait = False
        """Whether rendering waits for another process: then not in the event loop."""
        compile_it: Compile = compile_here
        if compile_elsewhere is not None and source not in BUILTIN.values():
            self.may_wait = True
            compile_it = compile_elsewhere

        self._write = compile_it(source, name)
        # The adaptations that this template needs, by name, once they were tried.
        self._needed: dict[str, bool] = {}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        variables: Mapping[str, Any] = NO_VARIABLES,
        continue_final: bool = False,
    ) -> str:
        """The text of a request, up to and including the header of the answer.

        Tools are as OpenAI describes them. `variables` go before those of the template.
        `continue_final`: the answer continues the last message, which is the assistant's.

        Newlines at the end of a system message are dropped: those of a prompt file are not part of
        the prompt. A template that refuses tools without a description gets them with one.
        """
        try:
            text = self._written(
                messages, tools, variables=variables, continue_final=continue_final
            )
        except TemplateExhausted:
            raise
        except TemplateError:
            whole = whole_tools(tools)
            if whole == list(tools):
                raise
            text = self._written(
                messages, whole, variables=variables, continue_final=continue_final
            )
        return self._markers.protect(text)

    def _written(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        variables: Mapping[str, Any] = NO_VARIABLES,
        continue_final: bool = False,
    ) -> str:
        """The template's text about hidden data. Errors: TemplateError."""
        copies: list[Any] = []
        for message in messages:
            if message["role"] == "system":
                copies.append({**message, "content": message["content"].rstrip("\r\n")})
            elif reasoning := message.get("reasoning_content"):
                # The name that gpt-oss and LFM2.5 have for it, as transformers gives it.
                copies.append({"thinking": reasoning, **message})
            else:
                copies.append(message)

        copies = self._markers.hide(self._adapted(copies))
        shown = self._markers.hide(list(tools))
        wanted = {name: self._markers.hide(value) for name, value in variables.items()}
        given = self._variables | wanted | {"tools": shown or None}
        if continue_final:
            given["add_generation_prompt"] = False
            last = copies[-1]
            copies[-1] = {**last, "content": last["content"] + _CONTINUED}

        text = self._write(given, copies)
        if self._added_bos and text.lstrip().startswith(self._added_bos):
            text = text.lstrip().removeprefix(self._added_bos)
        if continue_final:
            return self._until_tag(text, messages[-1]["content"])
        return text

    def _adapted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages in a form that this template takes: see `adapt`."""
        write = within_limit(self.name, self._write)
        for adaptation in ADAPTATIONS:
            if any(map(adaptation.concerns, messages)) and self._needs(adaptation, write):
                messages = adaptation.change(messages)
        return messages

    def _needs(self, adaptation: Adaptation, write: Write) -> bool:
        """Try the template, once for all requests. Errors: TemplateExhausted."""
        if adaptation.name not in self._needed:
            probe = list(adaptation.probe)
            needed = self._refuses(probe, write)
            if needed:
                needed = not self._refuses(adaptation.change(probe), write)
            self._needed[adaptation.name] = needed
        return self._needed[adaptation.name]

    def _refuses(self, messages: list[Message], write: Write) -> bool:
        """Errors: TemplateExhausted."""
        try:
            write(self._variables, messages)
        except TemplateExhausted:
            raise
        except TemplateError:
            return True
        return False

    def _until_tag(self, text: str, content: str) -> str:
        """The text up to the tag at the end of the last message's content, as transformers cuts it.

        A template that trims messages trimmed the tag; it would have trimmed the content's end.

        Errors: TemplateError if the template does not write the end of that content.
        """
        end = text.rfind(_CONTINUED.strip())
        if end < 0:
            raise TemplateError(
                f"template {self.name} does not write the last message as it is, so the answer "
                "cannot continue it",
                hint="leave out continue_final_message and add_generation_prompt",
            )

        if not text.startswith(_CONTINUED, end) and content.strip():
            end -= len(content) - len(content.rstrip())
        return text[:end]

    @cached_property
    def answer(self) -> AnswerForm:
        """How the model writes its answers. It takes some renderings to find out, once.

        Errors: TemplateExhausted.
        """
        tried = copy(self)
        tried._write = within_limit(self.name, self._write)  # noqa: SLF001 - a copy of this one
        return detect(self._source, tried.render)

    @cached_property
    def marks(self) -> Marks:
        """The marks around reasoning. Nothing is rendered to find them."""
        return marks_of(self._source)

    def prefix(self, system: str, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text that every request with this system message and one user message starts with.

        With `tools`, every such request that brings these.

        It is the longest common prefix of two renderings that differ in the user's text alone. The
        idea of the proof: what a template writes before it looks at the user's text cannot depend
        on it, so every rendering starts with it; and since our two texts share no first character,
        the common part ends where they begin. A template may look at the text before it writes, or
        treat a longer conversation otherwise: serving checks `startswith(prefix)`.

        A template may alter the system message: SmolLM3's takes `/no_think` out of it, and writes
        another header. Raises TemplateError if nothing of it is left before the user's text.
        """
        nothing = self._prefix_of_nothing
        if tools:
            nothing = self._prefix_without_system(tools)

        prefix = self._common_prefix(system, tools)
        if system.strip() and prefix == nothing:
            raise TemplateError(
                f"template {self.name} leaves nothing of this system message: the text before the "
                "user's message is the same for an empty one",
                hint="choose another chat_template, or change the prompt",
            )
        return prefix

    @cached_property
    def _prefix_of_nothing(self) -> str | None:
        """Of requests without tools. Errors: TemplateError."""
        return self._prefix_without_system(())

    def _prefix_without_system(self, tools: Sequence[Mapping[str, Any]]) -> str | None:
        """The prefix of an empty system message; None if the template does not take one.

        Errors: TemplateError if it is that of every system message.
        """
        first, second = (self._common_prefix(system, tools) for system in _SYSTEM_PROBES)
        if first != second:
            try:
                return self._common_prefix("", tools)
            except TemplateExhausted:
                raise
            except TemplateError:
                return None

        hint = "choose another chat_template, or one that writes the system message first"
        first, second = (self._asked(system, _USER_TEXTS[0], tools) for system in _SYSTEM_PROBES)
        if first == second:
            raise TemplateError(f"template {self.name} drops the system message", hint=hint)
        raise TemplateError(
            f"template {self.name} writes the system message after the user's, where no prompt "
            "cache can hold it",
            hint=hint,
        )

    def _common_prefix(self, system: str, tools: Sequence[Mapping[str, Any]]) -> str:
        return _common(*(self._asked(system, text, tools) for text in _USER_TEXTS))

    def _asked(self, system: str, user: str, tools: Sequence[Mapping[str, Any]]) -> str:
        messages = [Message(role="system", content=system), Message(role="user", content=user)]
        return self.render(messages, tools)


def _common(left: str, right: str) -> str:
    """The longest common prefix, by bisection: slices compare faster than characters."""
    low = 0
    high = min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1

    return left[:low]


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)

    return digest.hexdigest()
