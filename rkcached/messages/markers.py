"""Keeps texts that are data from becoming structure: nobody can forge a turn, or any other token.

A chat template writes control tokens (`<|im_end|>`) around texts of users. Where such a text holds
one itself, the tokenizer must read it as letters. `Markers` hides from a template every character
of the texts that could begin a control token, and puts it back into what the template wrote. Each
control token that appears only then was made of data, wherever the template moved, joined or cut
the texts. Its surroundings are enclosed in marks for an engine that can tokenize a part of a text
without control tokens, and nothing is altered; for other engines a blank after the first character
breaks the token: `<|im_end|>` becomes `< |im_end|>`, which reads the same. A blank, because some
tokenizers drop invisible characters.

The control tokens are those that the model's tokenizer states. If none is known, they are guessed:
the forms in which the known families write theirs, and whatever of that kind stands in the template
itself. A guess also breaks some harmless words, and knows no form that nobody has listed. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rkcached.messages.special_tokens import PLAIN_END, PLAIN_START, SpecialTokens

# The forms of the families' control tokens: a tokenizer may know more of them than its template
# writes.
_FORMS: Final = (
    r"<\|[^<>\s]{1,80}\|>",  # <|im_end|>: ChatML, Llama 3, Phi, Qwen, Granite
    "<\uff5c[^<>\\s]{1,80}\uff5c>",  # the same with fullwidth bars: DeepSeek
    r"<\|(?:turn|channel|think|tool\w{0,9})>|<(?:turn|channel|tool\w{0,9})\|>",  # Gemma 4
    r"</?(?:start|end)_of_turn>",  # Gemma
    r"<(?:bos|eos|pad|unk)>",
    r"</?s>",  # Llama 2, Mistral
    r"<_[a-z]{1,32}>",  # <_user>: TeleChat2
    "<(?:用户|AI)>",  # MiniCPM
)

# Forms that do not begin with `<`: what a template that writes them has in it, the form, and the
# characters that it begins with.
_BRACKETS: Final = (
    ("[|", r"\[\|[a-z]{1,32}\|\]", "["),  # [|user|]: EXAONE
    ("]~", r"\]~!?b[\[\]]|\[e~\[", "[]"),  # ]~!b[, ]~b] and [e~[: MiniMax
    ("[gMASK]", r"\[gMASK\]", "["),  # GLM
    ("\u3008|", "\u3008\\|[A-Z]{1,32}\\|\u3009", "\u3008"),  # EOS in such brackets: Laguna
)

# Marks that a template may write around messages: `<user>`, `<<SYS>>`, `[INST]` and the like.
_WRITTEN: Final = re.compile(
    r"</?\|?[A-Za-z][\w.:-]{0,63}\|?>|<<\w{1,32}>>|<</\w{1,32}>>|\[/?[A-Z][A-Z_]{1,31}\]"
)

# Words inside a turn: an answer that is sent back may hold them, and a prompt may explain them.
_WORDS: Final = frozenset(
    {"<think>", "</think>", "<tools>", "</tools>", "<tool_call>", "</tool_call>"}
)

_PLACEHOLDERS: Final = frozenset({"<function-name>", "<args-json-object>"})

_LITERAL: Final = re.compile(r"'((?:[^'\\\n]|\\.){1,200})'|\"((?:[^\"\\\n]|\\.){1,200})\"")

# Unicode's noncharacters are for the use inside a program, so no text has them: the first two
# enclose plain text, the others stand for hidden characters.
_NONCHARACTERS: Final = re.compile("[\ufdd0-\ufdef]")
_FIRST_STAND_IN: Final = 0xFDD2
_LAST_STAND_IN: Final = 0xFDED
_MAX_STAND_INS: Final = _LAST_STAND_IN - _FIRST_STAND_IN + 1

# Stands behind the first character of a control token that is a word, such as GLM's `sop`.
_JOINT: Final = "\ufdee"
_REPLACEMENT: Final = "\ufffd"

# Python's repr and ASCII JSON, which templates write objects in, escape a noncharacter. In a text
# that has such an escape itself, the last noncharacter stands for its backslash.
_ESCAPED: Final = re.compile(r"\\u(fdd[2-9a-f]|fde[0-9a-f])")
_BACKSLASH: Final = "\ufdef"


_PIECE_LETTERS: Final = 32 << 10
_LONGEST_LETTERS: Final = 512
"""No token, form or word that is looked for is longer."""


class _Tokens:
    """The control tokens, as a tokenizer finds them: the longest at each place."""

    def __init__(self, tokens: frozenset[str]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for token in tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(some, reverse=True) for first, some in lengths.items()}

        # A vocabulary may have thousands of them, which begin in a few ways.
        beginnings = sorted({re.escape(token[:4]) for token in tokens})
        self._beginning = re.compile("|".join(beginnings) or r"(?!)")
        self.firsts = frozenset(self._lengths)

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of each token in a text, also of those that overlap."""
        at = 0
        while match := _search(self._beginning, text, at):
            start = match.start()
            at = start + 1
            for length in self._lengths[text[start]]:
                if text[start : start + length] in self._tokens:
                    yield start, start + length
                    break

    def hides(self, word: str) -> bool:
        """Whether a token may begin where the word does."""
        return any(token.startswith(word) or word.startswith(token) for token in self._tokens)


class _Guesses:
    """The control tokens of a template whose tokenizer nobody knows."""

    def __init__(self, source: str, *named: str) -> None:
        written = {*_WRITTEN.findall(source), *named} - _WORDS - _PLACEHOLDERS
        tokens = sorted(token for token in written if len(token) > 1)
        forms = [*_FORMS, *map(re.escape, tokens)]
        firsts = {"<", *(token[0] for token in tokens)}
        for sign, form, beginnings in _BRACKETS:
            if sign in source:
                forms.append(form)
                firsts.update(beginnings)

        self._pattern = re.compile("|".join(forms))
        self.firsts = frozenset(firsts)

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        at = 0
        while match := _search(self._pattern, text, at):
            yield match.span()
            at = match.start() + 1

    def hides(self, word: str) -> bool:
        """Whether a token may begin where the word does.

        It may if the word is open: what follows it in a text could close it.
        """
        is_open = ">" not in word and "]" not in word[1:]
        return is_open or self._pattern.match(word) is not None


class Markers:
    """The control tokens of one template's model.

    `takes_tokens`: the engine reads what stands between `PLAIN_START` and `PLAIN_END` without
    control tokens.
    """

    def __init__(self, source: str, special: SpecialTokens, *, takes_tokens: bool = False) -> None:
        self._tokens: _Tokens | _Guesses
        self._encloses = takes_tokens and special.control is not None
        # These are no plain text for the engine either.
        self._always = _Tokens(frozenset(token for token in special.always if len(token) > 1))
        if special.control is None:
            self._tokens = _Guesses(source, special.bos, special.eos)
        else:
            # Templates look for some words in texts, to hide earlier reasoning for example.
            words = {word for word in _WORDS if word in source}
            tokens = special.control - words
            self._tokens = _Tokens(frozenset(token for token in tokens if len(token) > 1))

        # Letters stand in words that templates look for: only whole tokens are hidden there.
        signs = [first for first in self._tokens.firsts if not (first.isalnum() or first == "_")]
        firsts = sorted(signs)[:_MAX_STAND_INS]
        self._has_words = len(firsts) < len(self._tokens.firsts)
        self._stand_ins = [(first, chr(_FIRST_STAND_IN + at)) for at, first in enumerate(firsts)]
        self._kept = list(self._patterns_of(self._looked_for(source)))

    def hide(self, value: Any) -> Any:
        """A copy in which no text, at any depth, has a character that could begin a control token.

        Words that the template looks for stay.
        """
        match value:
            case str():
                if not value.isascii():
                    value = _NONCHARACTERS.sub(_REPLACEMENT, value)
                if _may_be_escaped(value):
                    value = _ESCAPED.sub(rf"{_BACKSLASH}u\1", value)

                hidden = self._hidden(value)
                if hidden is not value:
                    for pattern, first in self._kept:
                        hidden = _replaced(pattern, first, hidden)
                return hidden
            case list() | tuple():
                return [self.hide(item) for item in value]
            case Mapping():
                return {self.hide(key): self.hide(item) for key, item in value.items()}
            case _:
                return value

    def protect(self, written: str) -> str:
        """The text for the engine, of what a template wrote about hidden texts.

        No data in it can be read as a control token.
        """
        if _may_be_escaped(written):
            written = _ESCAPED.sub(_unescaped, written)

        if not self._has_hidden(written):
            return written

        parts = []
        at = 0
        for start, end in (*self._tokens.places(written), (len(written), len(written))):
            if start < at:
                continue  # the tokenizer reads the first of two that overlap

            data = self._shown(written[at:start])
            if (token := next(self._tokens.places(data), None)) is not None:
                if self._encloses:
                    data = self._enclosed(data, token[0])
                else:
                    data = _with_joints(data, self._tokens, " ")
            parts += [data, written[start:end]]
            at = end

        return "".join(parts)

    def _hidden(self, text: str) -> str:
        """The text itself, if it has no character that could begin a control token."""
        for first, stand_in in self._stand_ins:
            text = text.replace(first, stand_in)
        if self._has_words:
            text = _with_joints(text, self._tokens, _JOINT)
        return text

    def _has_hidden(self, written: str) -> bool:
        if written.isascii():
            return False
        marks = (_BACKSLASH, _JOINT, *(stand_in for _, stand_in in self._stand_ins))
        return any(mark in written for mark in marks)

    def _shown(self, written: str) -> str:
        """The text of a template, with the hidden characters in their places again."""
        if written.isascii():
            return written

        text = written.replace(_BACKSLASH, "\\").replace(_JOINT, "")
        for first, stand_in in self._stand_ins:
            text = text.replace(stand_in, first)
        return text

    def _looked_for(self, source: str) -> list[str]:
        """The parts of the words that the template may look for in a text.

        Each begins with a character that could begin a control token, and has no other such: a
        word may have a control token behind another.
        """
        firsts = re.escape("".join(first for first, _ in self._stand_ins))
        if not firsts:
            return []

        part = re.compile(rf"[{firsts}][^{firsts}\\]*")
        words = set(_WORDS)
        for single, double in _LITERAL.findall(source):
            words.update(part.findall(single or double))

        return [word for word in sorted(words, key=len) if not self._tokens.hides(word)]

    def _patterns_of(self, words: list[str]) -> Iterator[tuple[re.Pattern[str], str]]:
        """For each first character: the places of its stand-in where one of the words begins."""
        for first, stand_in in self._stand_ins:
            rests = [re.escape(word[1:]) for word in words if word[0] == first]
            if rests:
                yield re.compile(f"{stand_in}(?={'|'.join(rests)})"), first

    def _enclosed(self, text: str, at: int) -> str:
        """Plain text from the first token on: what stands before it is as in any other request."""
        return f"{text[:at]}{PLAIN_START}{_with_joints(text[at:], self._always, ' ')}{PLAIN_END}"


def _search(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str] | None:
    """As the pattern's own search, but piece by piece, as nothing else runs in the meantime."""
    while at < len(text):
        end = at + _PIECE_LETTERS
        match = pattern.search(text, at, end + _LONGEST_LETTERS)
        if match is not None and match.start() < end:
            return match
        at = end
    return None


def _replaced(pattern: re.Pattern[str], letter: str, text: str) -> str:
    """The text with this letter for each match, which is one letter, too; piece by piece."""
    if len(text) <= _PIECE_LETTERS:
        return pattern.sub(letter, text)
    return "".join(
        pattern.sub(letter, text[at : at + _PIECE_LETTERS + _LONGEST_LETTERS])[:_PIECE_LETTERS]
        for at in range(0, len(text), _PIECE_LETTERS)
    )


def _may_be_escaped(text: str) -> bool:
    return "\\" in text and "\\ufd" in text  # the search for one character is much faster


def _unescaped(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16))


def _with_joints(text: str, tokens: _Tokens | _Guesses, joint: str) -> str:
    """The joint after the first character of each token, also of those that overlap."""
    parts = []
    at = 0
    for start, _ in tokens.places(text):
        parts += [text[at : start + 1], joint]
        at = start + 1

    return "".join([*parts, text[at:]])
