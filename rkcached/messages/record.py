"""The base of all records of requests: what it refuses costs little. Pure."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from rkcached.messages.bounds import MAX_VALUES

MAX_KEYS = 64
"""No record has half as many. Each unknown key of an object would be an error of its own."""

Item = TypeVar("Item")

Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list whose validation ends with the first bad item, as nobody reads an error for each."""

Name = Annotated[str, Field(max_length=256)]
"""Of something that exists or not; errors repeat it."""


def of_types(*known: str) -> BeforeValidator:
    """Refuse objects whose `type` is none of these, by its name."""

    def check(value: object) -> object:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in known:
            raise ValueError(
                f"the type {kind!r} is not supported here; supported: {', '.join(known)}"
            )
        return value

    return BeforeValidator(check)


def _has_items(value: list[Item]) -> list[Item]:
    if not value:
        raise ValueError("it should have at least one item")
    return value


NOT_EMPTY = AfterValidator(_has_items)
"""Of a list of unions: schemathesis cannot break one for which the description has a minimum."""


class Record(BaseModel):
    # strict: true is not 1, and "16" is not 16. A schema is built when it is first needed, so the
    # start does not wait for schemas that nobody uses.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        defer_build=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )

    max_values: ClassVar[int] = MAX_VALUES
    """A body of this kind may have so many values and keys."""

    foreign_prefixes: ClassVar[tuple[str, ...]] = ()
    """Unknown keys that begin so are left out."""

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, value: Any) -> Any:
        """Refuse an object of many keys, and leave out unknown ones that say nothing.

        A client that has no value for a parameter may say so with null. One validator for both: it
        runs for every message of a body.
        """
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_KEYS:
            raise ValueError(f"an object of {len(value):,} keys, at most {MAX_KEYS} are accepted")
        known = cls.__pydantic_fields__
        if value.keys() <= known.keys():
            return value
        return {
            key: item
            for key, item in value.items()
            if key in known or not (item is None or key.startswith(cls.foreign_prefixes))
        }


class ForeignFields(Record):
    """Fields that programs between a client and us add. They are accepted, and change nothing."""

    cache_control: Any = Field(default=None, description="Anthropic's; ignored.")
    provider_specific_fields: Any = Field(default=None, description="LiteLLM's; ignored.")
