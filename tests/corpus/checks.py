"""What is checked of one template. Each check counts its outcomes and lists what it finds wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rkcached.errors import TemplateError
from rkcached.messages.template import ChatTemplate
from tests.corpus import answers, forgery, referee
from tests.corpus.collection import Sample
from tests.corpus.conversations import CONVERSATIONS, TOOL_NAME, Conversation


class Check(StrEnum):
    PARSE = "parse"
    IDENTICAL = "identical"
    PREFIX = "prefix"
    FORGED = "forged"
    CALLS = "calls"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    check: Check
    case: str
    detail: str


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of all checks of one template."""

    name: str
    sha256: str
    counts: Counter[tuple[Check, str]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def count(self, check: Check, outcome: str) -> None:
        self.counts[check, outcome] += 1

    def find(self, check: Check, case: str, detail: str) -> None:
        self.findings.append(Finding(check=check, case=case, detail=detail))


def checked(sample: Sample) -> Report:
    report = Report(name=sample.name, sha256=sample.sha256)
    try:
        forgery.template_of(sample, None)
    except TemplateError as error:
        _not_compiled(sample, report, error)
        return report

    report.count(Check.PARSE, "compiled")
    control = forgery.control_tokens(sample)
    chats = {}
    for conversation in CONVERSATIONS:
        chosen = tuple(conversation.variables.items())
        if chosen not in chats:
            chats[chosen] = forgery.template_of(sample, control, variables=conversation.variables)
        _check_identical(sample, chats[chosen], conversation, report)
        if conversation.messages[0]["role"] == "system":
            _check_prefix(chats[chosen], conversation, report)

    if report.counts[Check.IDENTICAL, "both refuse"] == len(CONVERSATIONS):
        report.find(Check.IDENTICAL, "all", "neither side renders any conversation")
    _check_forgeries(sample, control, report)
    _check_answers(chats[()], report)
    return report


def _not_compiled(sample: Sample, report: Report, error: TemplateError) -> None:
    if referee.compiles(sample.source):
        report.count(Check.PARSE, "refused")
        report.find(Check.PARSE, "", error.message)
    else:
        report.count(Check.PARSE, "both refuse")


def _check_identical(
    sample: Sample, chat: ChatTemplate, conversation: Conversation, report: Report
) -> None:
    """Compare a rendering with the referee's."""
    expected = referee.rendered(sample, conversation)
    ours = None
    detail = ""
    try:
        ours = _rendered(chat, conversation)
    except TemplateError as error:
        detail = error.message

    if expected is None:
        outcome = "both refuse" if ours is None else "adapted"
    elif ours is None:
        outcome = "refused"
    elif ours == expected:
        outcome = "identical"
    else:
        outcome = "different"
        detail = _difference(ours, expected)

    report.count(Check.IDENTICAL, outcome)
    if outcome in {"refused", "different"}:
        report.find(Check.IDENTICAL, conversation.name, detail)


def _rendered(chat: ChatTemplate, conversation: Conversation) -> str:
    """Errors: TemplateError."""
    messages: Any = conversation.messages
    return chat.render(messages, conversation.tools)


def _difference(ours: str, expected: str) -> str:
    at = 0
    while ours[at : at + 1] == expected[at : at + 1]:
        at += 1
    here = slice(max(0, at - 20), at + 40)
    return f"{ours[here]!r} instead of {expected[here]!r}"


def _check_prefix(chat: ChatTemplate, conversation: Conversation, report: Report) -> None:
    """Whether a conversation begins with the prefix of its system message."""
    system = conversation.messages[0]["content"]
    try:
        text = _rendered(chat, conversation)
    except TemplateError:
        report.count(Check.PREFIX, "conversation refused")
        return

    try:
        prefix = chat.prefix(system)
    except TemplateError as error:
        report.count(Check.PREFIX, "no prefix")
        report.find(Check.PREFIX, conversation.name, error.message)
        return

    if not conversation.tools:
        report.count(Check.PREFIX, "true" if text.startswith(prefix) else "false")
        if not text.startswith(prefix):
            report.find(Check.PREFIX, conversation.name, _difference(text, prefix))
        return

    where = "no tools written"
    if TOOL_NAME in text:
        before = text.find(TOOL_NAME) < text.find(system)
        where = "tools before" if before else "tools after"
    outcome = "true" if text.startswith(prefix) else "false"
    report.count(Check.PREFIX, f"with tools, {where}: {outcome}")
    outcome = _outcome_if_declared(chat, conversation, text)
    report.count(Check.PREFIX, f"with declared tools, {where}: {outcome}")


def _outcome_if_declared(chat: ChatTemplate, conversation: Conversation, text: str) -> str:
    """Whether the conversation begins with the prefix of its system message and its tools."""
    system = conversation.messages[0]["content"]
    try:
        prefix = chat.prefix(system, conversation.tools)
    except TemplateError:
        return "no prefix"
    return "true" if text.startswith(prefix) else "false"


def _check_forgeries(sample: Sample, control: frozenset[str], report: Report) -> None:
    report.count(Check.FORGED, "has control tokens" if control else "has none")
    for mode in forgery.MODES:
        found = list(forgery.forgeries(sample, control, mode))
        report.count(Check.FORGED, f"{mode.name}: {'forged' if found else 'safe'}")
        for place in found[:3]:
            report.find(Check.FORGED, mode.name, place)


def _check_answers(chat: ChatTemplate, report: Report) -> None:
    for check, outcomes in (
        (Check.CALLS, answers.calls(chat)),
        (Check.REASONING, answers.reasoning(chat)),
    ):
        _count_outcomes(check, outcomes, report)


def _count_outcomes(check: Check, outcomes: Iterator[tuple[str, str, str]], report: Report) -> None:
    for case, outcome, detail in outcomes:
        report.count(check, f"{case}: {outcome}" if case else outcome)
        if detail:
            report.find(check, case, detail)
