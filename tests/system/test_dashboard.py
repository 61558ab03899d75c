"""docs/grafana-dashboard.json against the daemon's real metrics, and against Grafana's own records. No Grafana runs."""

from __future__ import annotations

import json
import re
import signal
from collections import defaultdict
from os import kill
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Workspace
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import wait_until

FILE = Path(__file__).parents[2] / "docs/grafana-dashboard.json"


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    variables = [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    return [*variables, *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])]


def exposed(space: Workspace) -> dict[str, set[str]]:
    """The names of all series with their labels."""
    found: dict[str, set[str]] = defaultdict(set)
    with space.http() as client:
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] |= set(sample.labels)
    return found


def test_every_name_is_a_metric(workspace: Workspace, dashboard: dict[str, Any]) -> None:
    """Each series and each label that the dashboard asks for is there, after an answer, a build and a crash."""
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", top="cache: {max_bytes: 2000000}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/p")
    kill(workspace.status()["models"][0]["pid"], signal.SIGKILL)
    wait_until(lambda: "rkcached_worker_deaths_total" in exposed(workspace), "the death is counted", 20)
    workspace.ask("m/p")
    series = exposed(workspace)
    for expression in expressions(dashboard):
        names = re.findall(r"\b(?:rkcached|process)_\w+", expression)
        assert names, expression
        bare = re.sub(r'"[^"]*"', "", expression)
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", bare))
        labels |= {label.strip() for group in re.findall(r"by \(([^)]*)\)", bare) for label in group.split(",")}
        for name in names:
            assert labels <= series.get(name, set()) | {"le"}, (expression, name, series.get(name))
            assert name in series, expression


def test_memory_is_that_of_the_worker(two_prompts: Workspace) -> None:
    """The worker's memory is what the system says of that process; the daemon's own is there, too."""
    with two_prompts.http() as client:
        families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    (sample,) = families["rkcached_worker_resident_bytes"].samples
    actual = psutil.Process(two_prompts.status()["models"][0]["pid"]).memory_info().rss
    assert sample.value == pytest.approx(actual, rel=0.2)
    assert families["process_resident_memory_bytes"].samples[0].value > 1e7
    assert families["rkcached_requests_waiting"].samples[0].value == 0


def test_grafana_knows_every_field(dashboard: dict[str, Any]) -> None:
    """Read into Grafana's records and written again, nothing is lost: no field has a name that it does not know."""
    plugins.register_default_plugins()
    again = json.loads(encoder.JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard)))
    assert list(lost(dashboard, again)) == []


def lost(before: Any, after: Any, at: str = "") -> Any:
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from lost(value, after[key], f"{at}/{key}") if key in after else [f"{at}/{key}"]
    elif isinstance(before, list) and isinstance(after, list):
        assert len(before) == len(after), at
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from lost(one, other, f"{at}/{number}")
    elif before != after:
        yield at


def test_a_dashboard_that_can_be_imported(dashboard: dict[str, Any]) -> None:
    """What an import needs is there, the data source is chosen by the reader, and no two panels overlap."""
    assert dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(thing["datasource"]["uid"] == "${datasource}" for p in panels for thing in (p, *p["targets"]))
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not own & cells, panel["title"]
        cells |= own
