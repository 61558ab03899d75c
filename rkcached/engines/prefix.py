"""The beginning that two texts share. Pure."""

from __future__ import annotations


def common_bytes(one: bytes, other: bytes) -> int:
    """The length of the beginning that two texts share."""
    same = 0
    differs = min(len(one), len(other))
    if one[:differs] == other[:differs]:
        return differs

    # They agree up to `same`, and not up to `differs`.
    while differs - same > 1:
        middle = (same + differs) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            differs = middle

    return same
