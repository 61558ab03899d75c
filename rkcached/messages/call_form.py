"""The record of a form of tool calls, and those of the larger families. Pure data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from rkcached.messages.call_readers import Read, json_calls, tagged
from rkcached.messages.marks import tokens_in

Values = tuple[tuple[str, str], ...]
"""The marks around values, in which a closing mark is text."""

STRINGS: Final = (('"', '"'),)
PYTHON_STRINGS: Final = (('"', '"'), ("'", "'"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """One form of tool calls.

    Calls stand between one of `openings` or `first` and one of `closings`, or the end of the
    answer. A form without openings is bare: the whole answer is calls or none is.
    """

    name: str
    read: Read
    openings: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    """Openings that count at the beginning of the answer only, or after another mark."""
    named_openings: tuple[str, ...] = ()
    """Openings with `{}` for the name of a tool: those of unknown tools are text."""
    named_first: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    must_close: bool = False
    """Without its closing, the text may be cut off and is no call."""
    values: Values = ()
    bare: tuple[str, ...] = ()
    """The beginnings of an answer that may be calls, of known tools only."""
    inner: tuple[str, ...] = ()
    """Marks that stand within a call."""
    control: bool = False
    """Its marks are control tokens, which not every engine prints."""
    told_by: tuple[tuple[str, ...], ...] = ()
    """Words of templates that write earlier calls wrongly or not at all, but tell the model this
    form: all words of one of these."""
    arguments_key: str = "arguments"
    """The name of the arguments where a schema demands a call in JSON."""

    @property
    def shown_tokens(self) -> tuple[str, ...]:
        """The marks, and their parts: control tokens are printed on request only."""
        values = (mark for pair in self.values for mark in pair)
        return tokens_in(*self.openings, *self.first, *self.closings, *values, *self.inner)

    def opened(self, tools: Iterable[str]) -> tuple[str, ...]:
        """The openings that count anywhere."""
        named = (name.format(tool) for tool in tools for name in self.named_openings)
        return (*self.openings, *named)

    def opened_first(self, tools: Iterable[str]) -> tuple[str, ...]:
        """The openings that count at the beginning."""
        named = (name.format(tool) for tool in tools for name in self.named_first)
        return (*self.opened(tools), *self.first, *named)


def json_between(
    name: str, opening: str, closing: str = "", *, read: Read | None = None
) -> CallForm:
    return CallForm(
        name=name,
        openings=(opening,),
        closings=(closing,) if closing else (),
        read=read or json_calls(),
        values=STRINGS,
        control="|" in opening,
    )


def xml_between(name: str, *openings: str, closing: str) -> CallForm:
    """Qwen3-Coder's form: the call begins and ends with tags that have the function's name."""
    return CallForm(
        name=name,
        openings=openings,
        closings=(closing,),
        read=tagged(
            r"\s*(?:<function=)?(?P<name>[^>\s]+)>",
            r"<parameter=(?P<key>[^>\s]+)>\n?(?P<value>.*?)\n?</parameter>"
            r"(?=\s*(?:<parameter=|</function>|$))",
            r"\s*$" if closing == "</function>" else r"</function>",
        ),
        must_close=closing == "</function>",
        values=(("<parameter=", "</parameter>"),),
    )


def attributes_between(
    name: str, opening: str, closing: str, prefix: str, *, invoke: str = "invoke"
) -> CallForm:
    """MiniMax M2's form: names are attributes of tags. DeepSeek V3.2 says `string="true"` too."""
    return CallForm(
        name=name,
        openings=(opening,),
        closings=(closing,),
        read=tagged(
            rf'<{prefix}{invoke} name="(?P<name>[^"]+)">',
            rf'<{prefix}parameter name="(?P<key>[^"]+)"(?: string="(?P<type>\w+)")?>'
            rf"(?P<value>.*?)</{prefix}parameter>(?=\s*</?{prefix})",
            rf"</{prefix}{invoke}>",
        ),
        must_close=True,
        values=((f"<{prefix}parameter name=", f"</{prefix}parameter>"),),
    )


def pairs_between(
    name: str, opening: str, closing: str, prefix: str = "", suffix: str = ""
) -> CallForm:
    """GLM's form: the function's name, then keys and values in turn."""
    key = f"{prefix}arg_key{suffix}"
    value = f"{prefix}arg_value{suffix}"
    return CallForm(
        name=name,
        openings=(opening,),
        closings=(closing,),
        read=tagged(
            rf"(?:<tool_call{suffix}>)?\s*(?P<name>[\w.-]+)\s*(?:<tool_sep{suffix}>)?"
            rf"(?=\s*<{key}>|\s*</tool_call|\s*$)",
            rf"<{key}>(?P<key>.*?)</{key}>\s*<{value}>(?P<value>.*?)</{value}>"
            rf"(?=\s*(?:<{key}>|</tool_call|$))",
            rf"</tool_call{suffix}>|\s*$",
        ),
        must_close=True,
        values=((f"<{value}>", f"</{value}>"),),
        inner=(
            f"<{key}>",
            f"</{key}>",
            f"<tool_call{suffix}>",
            f"</tool_call{suffix}>",
            "<tool_sep>",
        ),
    )
