"""`rkcached plan`: what the daemon would build, adopt, retire and remove, and why."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rkcached.api import words
from rkcached.cli import looks, output
from rkcached.cli.status import show
from rkcached.errors import printable
from rkcached.host.settings import Settings
from rkcached.plan.records import Action, Adopt, Assessment, Blocked, Build, Remove, Retire, State
from rkcached.plan.vocabulary import STEPS, step_of
from rkcached.reconcile.build_times import Hold, hold

if TYPE_CHECKING:
    from rkcached.cli import forms

SOMETHING_TO_DO = 2


def run(settings: Settings, *, want_json: bool, exit_code: bool) -> int:
    looks.need_place(settings)
    look = looks.look_as_service(settings)
    # Nobody knows here when somebody asked last.
    held = hold(look.manifest.cache.build, time.time(), None)
    actions = [_with_wait(action, held) for action in look.actions]

    if want_json:
        planned: forms.Planned = {
            "format": 1,
            "store": str(settings.cache_dir),
            "actions": [action_data(action) for action in actions],
            "fresh": _fresh(look.assessments),
            "skipped_files": list(look.sources.skipped_files),
        }
        output.print_json(planned)
    else:
        print_plan(output.console(), actions, look.assessments, settings.cache_dir)
        if look.sources.skipped_files:
            click.echo(printable(words.skipped_files(look.sources.skipped_files)))

    looks.need_store(settings)
    if exit_code and any(not isinstance(action, Blocked) for action in actions):
        return SOMETHING_TO_DO
    return os.EX_OK


def _with_wait(action: Action, held: Hold | None) -> Action:
    """The same action; a build that is held back says so."""
    if held is None or not isinstance(action, Build):
        return action
    return replace(action, reason=f"{action.reason}; waits {held.why}")


def action_data(action: Action) -> forms.Step:
    """An action as `rkcached plan --json` prints it."""
    whose: forms.Whose = {
        "model": action.key.model,
        "prompt": action.key.prompt,
        "reason": action.reason,
    }
    match action:
        case Build():
            return {"action": "build", **whose, "fingerprint": action.fingerprint.digest}
        case Adopt():
            source = None
            if action.source is not None:
                source = str(action.source)
            return {
                "action": "adopt",
                **whose,
                "fingerprint": action.fingerprint.digest,
                "source": source,
                "renames": step_of(action) == "rename",
            }
        case Retire():
            return {"action": "retire", **whose}
        case Remove():
            return {"action": "remove", **whose, "retired": action.retired or None}
        case Blocked():
            retry_at = action.retry_at or None
            return {"action": "blocked", **whose, "hint": action.hint, "retry_at": retry_at}
        case _:
            assert_never(action)


def _fresh(assessments: Sequence[Assessment]) -> int:
    return sum(assessment.state is State.FRESH for assessment in assessments)


def print_plan(
    console: Console, actions: Sequence[Action], assessments: Sequence[Assessment], store: Path
) -> None:
    table = Table.grid(padding=(0, 2))
    counts = Counter[str]()
    for action in actions:
        data = action_data(action)
        word = step_of(action)
        step = STEPS[word]
        counts[word] += 1

        reason = Text(printable(data["reason"]))
        if data["action"] == "blocked" and data["hint"]:
            reason.append(f"\n{printable(data['hint'])}", style="dim")

        what = Text(f"{step.sign} {word}", style=show.style_of(step.tone))
        table.add_row(what, Text(printable(str(action.key))), reason)

    if actions:
        console.print(table)

    steps = [f"{counts[name]} to {name}" for name in STEPS if name != "blocked" and counts[name]]
    if counts["blocked"]:
        steps.append(f"{counts['blocked']} blocked")

    summary = ", ".join([*(steps or ["nothing to do"]), f"{_fresh(assessments)} fresh"])
    console.print(Text(printable(f"{summary}; store {store}")), soft_wrap=True)
