"""What a command shows where the daemon sees less than the caller."""

from __future__ import annotations

import json
from pathlib import Path

from rkcached.cli.service_view import Seen, ServiceView
from rkcached.plan.records import Blocked, Build
from rkcached.reconcile.observer import Observer
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.records import Key, Trouble
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.store import Store


def test_the_plan_follows_what_the_daemon_sees(tmp_path: Path) -> None:
    """A prompt that only the caller can read is not to be built: the plan says why it is blocked.

    The actions were once those of the caller's own look, beside the daemon's assessments.
    """
    (tmp_path / "m.model").write_text(json.dumps({"rkcached_memory_model": 1}))
    (tmp_path / "a.md").write_text("You are a prompt.\n")
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(
        "version: 1\nengine: {kind: memory}\n"
        "models: {m: {path: m.model, params: {max_context_len: 4096}, prompts: {a: a.md}}}\n"
    )
    observer = Observer(Store(tmp_path / "cache"), StoredTexts(tmp_path / "state"))
    look = observer.observe(read_manifest(manifest))
    assert [type(action) for action in look.actions] == [Build]

    trouble = Trouble(message="a.md is hidden from the service", hint="keep it elsewhere")
    seen = Seen(state="blocked", trouble=trouble)
    seen_by_daemon = ServiceView(prompts={Key("m", "a"): seen}).over(look)

    assert [type(action) for action in seen_by_daemon.actions] == [Blocked]
    assert seen_by_daemon.actions[0].reason == trouble.message
