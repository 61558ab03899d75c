"""The facts that a model's own files state of its chat template and its special tokens. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final

from rkcached.messages.special_tokens import SpecialTokens

MAX_TEMPLATE_BYTES: Final = 1 << 20
"""The longest template. The largest known ones have some 20,000 bytes."""

MAX_CONTROL_TOKENS: Final = 1 << 16
"""The most control tokens that a vocabulary may have. Gemma 3 has some 6,500."""

MAX_TOKEN_CHARACTERS: Final = 256
"""The longest special token. A longer one is not one that a template writes."""

# A tag inside a turn, such as <think> or <tool_call>. Prompts may explain those, and tokenizers
# that have them do not call them special.
_TAG: Final = re.compile(r"</?[a-z][a-z0-9_]*>")


# A token that may be the name of a role, between signs: [|user|], <|user|>, <_user>.
_AROUND: Final = re.compile(r"(?P<before>\W[\W_]+)[A-Za-z]+(?P<after>[\W_]*\W)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFacts:
    """The chat template and the special tokens of a model, with the places that state them."""

    template: str = ""
    """The source of its chat template; empty if there is none, or one that is too long."""
    template_bytes: int = 0
    """The size of the template, also of one that is longer than `MAX_TEMPLATE_BYTES`."""
    template_origin: str = ""
    """The file that has the template, and where in it."""
    place: str = "path"
    """The key of the model in the manifest that leads to that file."""
    special: SpecialTokens = field(default_factory=SpecialTokens)
    special_origin: str = ""
    """The file that states the control tokens, and where in it."""
    added: frozenset[str] = frozenset()
    """Tokens that are found in any text before it is split, but are not control tokens."""
    ends: tuple[str, ...] = ()
    """The tokens that end an answer, where the files state them apart from EOS."""
    sampling: tuple[tuple[str, float], ...] = ()
    """The sampling that the model's makers recommend. It is shown, never applied."""
    refusal: str = ""
    """Why no model can be used that states such things; empty if it can."""

    def special_in(self, template: str) -> SpecialTokens:
        """The special tokens of a model that is used with this template.

        Some models do not declare the tokens around their turns as control tokens (EXAONE's
        `[|user|]`, TeleChat2's `<_user>`). Those that the template writes act as such, in one piece
        or with a role between two signs.
        """
        special = self.special
        if special.control is None:
            return special

        written = {token for token in self.added if _writes(template, token)}
        return replace(special, control=special.control | written, always=special.always | written)

    def completed_by(self, other: TokenizerFacts) -> TokenizerFacts:
        """These facts, with the tokens of the file of another template where they state none.

        A token that is known not to be in the vocabulary is left out: it would be read as letters.
        """
        own = self.special
        bos = own.bos or _known_in(own.control, other.special.bos)
        eos = own.eos or _known_in(own.control, other.special.eos)
        if own.control is not None:
            return replace(self, special=replace(own, bos=bos, eos=eos))
        return replace(
            self,
            special=replace(own, bos=bos, eos=eos, control=other.special.control),
            special_origin=other.special_origin,
            added=other.added,
            refusal=self.refusal or other.refusal,
        )


def _known_in(control: frozenset[str] | None, token: str) -> str:
    return token if control is None or token in control else ""


def _writes(template: str, token: str) -> bool:
    """Whether the template writes the token, or the signs around a role: `'[|' + role + '|]'`."""
    if _TAG.fullmatch(token):
        return False
    around = _AROUND.fullmatch(token)
    return token in template or (
        around is not None and around["before"] in template and around["after"] in template
    )


def combined(default: str, with_tools: str) -> str:
    """One template for a model that has a second one for requests with tools.

    transformers and llama.cpp choose in the same way. The empty expressions keep `trim_blocks` and
    `lstrip_blocks` from changing what the two begin and end with; the first keeps its lines.
    """
    return (
        "{% if not tools %}{{ '' }}"
        + default.removesuffix("\n")
        + "{{ '' }}{% else %}{{ '' }}"
        + with_tools.removesuffix("\n")
        + "{{ '' }}{% endif %}"
    )
