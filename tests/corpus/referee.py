"""The referee: what transformers makes of a template. It is told the day; its clock is not read."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from unittest import mock

from transformers.utils import chat_template_utils

from tests.corpus.collection import Sample
from tests.corpus.conversations import TODAY, Conversation


class _OnThatDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _OnThatDay:
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


def compiles(source: str) -> bool:
    try:
        chat_template_utils._compile_jinja_template(source)
    except Exception:  # noqa: BLE001  whatever Jinja2 raises
        return False
    return True


def rendered(sample: Sample, conversation: Conversation) -> str | None:
    """The text for the model, up to the header of the answer.

    None if the template does not take the conversation.
    """
    with mock.patch.object(chat_template_utils, "datetime", _OnThatDay):
        try:
            texts, _ = chat_template_utils.render_jinja_template(
                conversations=[list(conversation.messages)],
                tools=list(conversation.tools) or None,
                chat_template=sample.source,
                add_generation_prompt=True,
                bos_token=sample.bos,
                eos_token=sample.eos,
                **conversation.variables,
            )
        except Exception:  # noqa: BLE001  whatever the template raises
            return None

    text: str = texts[0]
    return text
