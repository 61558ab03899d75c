"""The marks around a model's reasoning and around its words: a table. Pure.

Which ones a model writes is found in its chat template, whose source has them even where it drops
the reasoning of earlier turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rkcached.messages.marks import tokens_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    openings: tuple[str, ...]
    """Reasoning begins after one of these."""
    closings: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    """Other marks, which are no text: after them, reasoning or a call may begin."""
    dropped_first: tuple[str, ...] = ()
    """The same, but only where an answer may begin."""
    again: bool = False
    """Reasoning may begin more than once."""
    found_by: tuple[str, ...] = ()
    """The words in a template's source that tell these marks; the openings, if there are none."""

    @property
    def shown_tokens(self) -> tuple[str, ...]:
        """The marks, and their parts: control tokens are printed on request only."""
        return tokens_in(*self.openings, *self.closings, *self.dropped)

    def begun(self, prompt: str) -> bool:
        """Whether a prompt ends inside reasoning."""
        end = prompt.rstrip()
        return any(end.endswith(opening.rstrip()) for opening in self.openings)


def _pair(opening: str, closing: str) -> Marks:
    return Marks(openings=(opening,), closings=(closing,))


THINK: Final = _pair("<think>", "</think>")

TABLE: Final[tuple[Marks, ...]] = (
    Marks(  # gpt-oss
        openings=("<|channel|>analysis<|message|>",),
        closings=("<|end|>", "<|call|>"),
        dropped=(
            "<|start|>assistant",
            "<|channel|>final<|message|>",
            "<|channel|>final <|constrain|>json<|message|>",
            "<|channel|>commentary<|message|>",
            "<|end|>",
            "<|return|>",
        ),
        again=True,
        found_by=("<|channel|>", "<|message|>", "analysis"),
    ),
    Marks(  # Gemma 4
        openings=("<|channel>thought\n",),
        closings=("<channel|>",),
        again=True,
        found_by=("<|channel>",),
    ),
    Marks(  # Command R7B, Command A
        openings=("<|START_THINKING|>",),
        closings=("<|END_THINKING|>",),
        dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    ),
    Marks(  # Kimi K3
        openings=("<|open|>think<|sep|>",),
        closings=("<|close|>think<|sep|>",),
        dropped=(
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
            "<|end_of_msg|>",
        ),
        found_by=("<|open|>", "<|close|>", "<|sep|>", "think"),
    ),
    Marks(  # Functionary 3.2
        openings=(),
        closings=(),
        dropped=(">>>all\n",),
        dropped_first=("all\n",),
        found_by=(">>>all\n",),
    ),
    Marks(  # Solar
        openings=("<|think|>",),
        closings=("<|end|>",),
        dropped=("<|begin|>assistant", "<|content|>", "<|end|>"),
        again=True,
        found_by=("<|think|>", "<|content|>"),
    ),
    Marks(  # Muse
        openings=("to=self<|message|>",),
        closings=("<|eom|>",),
        dropped=("<|eom|>", "<|eot|>", "<|start|>assistant"),
        dropped_first=("to=user<|message|>",),
        again=True,
        found_by=("<atem:function_calls>",),
    ),
    _pair("<|start_think|>", "<|end_think|>"),
    Marks(  # Hunyuan
        openings=("<think>",),
        closings=("</think>",),
        dropped=("<answer>", "</answer>"),
        found_by=("<think>", "<answer>"),
    ),
    Marks(  # Granite 3.3
        openings=("<think>",),
        closings=("</think>",),
        dropped=("<response>", "</response>"),
        found_by=("<think></think>", "<response></response>"),
    ),
    Marks(  # Granite 3.2
        openings=("Here is my thought process:",),
        closings=("Here is my response:",),
    ),
    Marks(  # Apriel
        openings=("Here are my reasoning steps:",),
        closings=("[BEGIN FINAL RESPONSE]",),
        dropped=("[END FINAL RESPONSE]",),
    ),
    _pair("<|think:start|>", "<|think:end|>"),
    Marks(  # Hunyuan 3, whose template puts the names together
        openings=("<think:opensource>",),
        closings=("</think:opensource>",),
        found_by=("<think{}>", "opensource"),
    ),
    _pair("<longcat_think>", "</longcat_think>"),
    _pair("<mm:think>", "</mm:think>"),
    _pair("<seed:think>", "</seed:think>"),
    _pair("[THINK]", "[/THINK]"),
    _pair("<|inner_prefix|>", "<|inner_suffix|>"),
    _pair("<|thought_start|>", "<|thought_end|>"),
    _pair("<thought>", "</thought>"),
    _pair("<reasoning>", "</reasoning>"),
    _pair("<|reasoning|>", "<|end_reasoning|>"),
    Marks(  # HyperCLOVA X, whose reasoning and answer are two turns
        openings=("/think\n",),
        closings=("<|im_end|>",),
        dropped=("<|im_end|>", "<|im_start|>assistant"),
        found_by=("<|im_start|>assistant/think\n",),
    ),
    # Some templates that write <think> have the other name as a word.
    THINK,
    _pair("<thinking>", "</thinking>"),
)


def marks_of(source: str) -> Marks:
    """The marks that a template's source tells; `<think>` if it tells none."""
    # Sources write a line break as an escape.
    plain = source.replace("\\n", "\n")
    for marks in TABLE:
        words = marks.found_by or (*marks.openings, *marks.closings)
        if all(word in plain for word in words):
            return marks

    return THINK
