"""What is known not to be as it should, with the reason: `known.toml`.

A template that is listed there and has the trouble no more is an error, too: the list gets shorter.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

from tests.corpus.checks import Check, Report

DIGITS = 16
"""Of a template's SHA-256: enough to tell a thousand apart."""

_FILE = Path(__file__).with_name("known.toml")


def known(check: Check) -> dict[str, str]:
    """The templates that a check may find something in: their digests and names."""
    templates: dict[str, str] = {}
    for entry in tomllib.loads(_FILE.read_text())["known"]:
        if entry["check"] == check:
            templates |= {line.split()[0]: line for line in entry["templates"]}
    return templates


def surprises(check: Check, reports: Iterable[Report]) -> list[str]:
    """The findings that are not listed, and the listed templates without one."""
    listed = known(check)
    lines = []
    for report in reports:
        found = [finding for finding in report.findings if finding.check is check]
        if found and report.sha256[:DIGITS] not in listed:
            lines += [
                f"{report.sha256[:DIGITS]} {report.name}: {f.case}: {f.detail}" for f in found
            ]
        if not found and report.sha256[:DIGITS] in listed:
            lines.append(f"{report.sha256[:DIGITS]} {report.name}: nothing is found any more")

    return lines
