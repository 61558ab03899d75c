"""Integers in records that come from a file or from another process."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

Int64: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Python reads JSON integers of any length, and arithmetic with a long one raises an
OverflowError, wherever it meets a float."""
