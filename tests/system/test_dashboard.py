"""docs/grafana-dashboard.json against Grafana's own records and.

By a real Prometheus, against a real daemon's metrics.

No Grafana runs: what it would ask Prometheus is asked here.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import socket
import subprocess
from collections import defaultdict
from os import kill
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import pytest
import yaml
from browser import Port, missing
from conftest import Workspace
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from tests.waiting import DEADLINE_S, wait_until

DOCS = Path(__file__).parents[2] / "docs"
FILE = DOCS / "grafana-dashboard.json"

WINDOW = "30s"
"""What $__rate_interval stands for."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def expressions(dashboard: dict[str, Any]) -> list[str]:
    variables = [
        one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"
    ]
    return [
        *variables,
        *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"]),
    ]


def exposed(space: Workspace) -> dict[str, set[str]]:
    """The names of all series with their labels."""
    found: dict[str, set[str]] = defaultdict(set)
    with space.http() as client:
        for family in text_string_to_metric_families(client.get("/metrics").text):
            for sample in family.samples:
                found[sample.name] |= set(sample.labels)
    return found


def test_every_name_is_a_metric(workspace: Workspace, dashboard: dict[str, Any]) -> None:
    """After an answer, a build and a crash, each series and label of the dashboard is there."""
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", top="cache: {max_bytes: 2000000}")
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/p")
    kill(workspace.status()["models"][0]["pid"], signal.SIGKILL)
    wait_until(lambda: "rkcached_worker_deaths_total" in exposed(workspace), "the death is counted")
    workspace.ask("m/p")
    series = exposed(workspace)
    for expression in expressions(dashboard):
        names = re.findall(r"\b(?:rkcached|process)_\w+", expression)
        assert names, expression
        bare = re.sub(r'"[^"]*"', "", expression)
        labels = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", bare))
        labels |= {
            label.strip()
            for group in re.findall(r"by \(([^)]*)\)", bare)
            for label in group.split(",")
        }
        for name in names:
            assert labels <= series.get(name, set()) | {"le"}, (expression, name, series.get(name))
            assert name in series, expression


def test_memory_is_that_of_the_worker(two_prompts: Workspace) -> None:
    """The worker's memory is what the system says of that process.

    The daemon's own is there, too.
    """
    with two_prompts.http() as client:
        families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    (sample,) = families["rkcached_worker_resident_bytes"].samples
    actual = psutil.Process(two_prompts.status()["models"][0]["pid"]).memory_info().rss
    assert sample.value == pytest.approx(actual, rel=0.2)
    assert families["process_resident_memory_bytes"].samples[0].value > 1e7
    assert families["rkcached_requests_waiting"].samples[0].value == 0


class Prometheus:
    """The server, which scrapes as docs/page.md configures it, but of one port and each second."""

    def __init__(self, folder: Path, target: str) -> None:
        program = shutil.which("prometheus") or missing(
            "Prometheus: apt-get install --no-install-recommends prometheus"
        )
        blocks = re.findall(
            r"^```yaml\n(.*?)^```", (DOCS / "page.md").read_text(), re.DOTALL | re.MULTILINE
        )
        config = yaml.safe_load(next(block for block in blocks if "scrape_configs" in block))
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yml").write_text(
            yaml.safe_dump({**config, "global": {"scrape_interval": "1s"}})
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self._http = httpx.Client(base_url=f"http://{address}/api/v1/")
        command = [
            str(program),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--web.listen-address={address}",
        ]
        command += [f"--storage.tsdb.path={folder / 'tsdb'}", "--log.level=error"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait(DEADLINE_S)

    def ask(self, path: str, **parameters: str) -> Any:
        """The data that it answers with; nothing while it is starting."""
        try:
            said = self._http.get(path, params=parameters)
        except httpx.TransportError:
            return []
        if said.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return []
        answer = said.json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """Of each series that the expression gives now."""
        expression = expression.replace("$model", ".*").replace("$__rate_interval", WINDOW)
        assert "$" not in expression
        found = self.ask("query", query=expression)
        return [float(series["value"][1]) for series in found["result"]] if found else []


@pytest.mark.long
def test_every_panel_has_figures(
    workspace: Workspace, dashboard: dict[str, Any], tmp_path: Path
) -> None:
    """Prometheus takes every expression.

    Answers it with numbers, once there were answers, builds and a crash.
    """
    workspace.memory_model()
    workspace.write("p.md", "Text.")
    workspace.declare("{p: p.md}", top="cache: {max_bytes: 2000000}")
    workspace.start()
    workspace.wait_settled()
    with (
        Port(workspace.socket) as port,
        Prometheus(tmp_path, port.url.removeprefix("http://").rstrip("/")) as server,
    ):
        wait_until(lambda: server.values("rkcached_artifacts"), "it scrapes")
        (model,) = server.ask("label/model/values", **{"match[]": variable(dashboard, "model")})
        assert model == "m"
        workspace.ask("m/p")
        kill(workspace.status()["models"][0]["pid"], signal.SIGKILL)
        wait_until(
            lambda: "rkcached_worker_deaths_total" in exposed(workspace), "the death is counted"
        )

        def asked() -> bool:  # a rate needs a counter that grows from one scrape to the next
            workspace.ask("m/p")
            workspace.ask("m/p", cache=False)
            return all(map(told, expressions(dashboard)[1:]))

        def told(expression: str) -> bool:
            values = server.values(expression)
            return bool(values) and all(map(math.isfinite, values))

        wait_until(asked, "every expression has values")
        ratio, ttft = (expressions(dashboard)[number] for number in (1, 5))
        assert server.values(ratio) == [1.0]
        assert 0 < server.values(ttft)[0] < 10  # seconds, on a busy machine, too


def variable(dashboard: dict[str, Any], name: str) -> str:
    """The series whose label values it lists."""
    (query,) = (
        one["query"]["query"] for one in dashboard["templating"]["list"] if one["name"] == name
    )
    return re.fullmatch(rf"label_values\((.*), {name}\)", query)[1]  # type: ignore[index]


def test_grafana_knows_every_field(dashboard: dict[str, Any]) -> None:
    """Read into Grafana's records and written again, nothing is lost.

    No field has a name that it does not know.
    """
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
    """What an import needs is there, the data source is chosen by the reader.

    No two panels overlap.
    """
    assert dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard
    assert dashboard["templating"]["list"][0]["type"] == "datasource"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(
        thing["datasource"]["uid"] == "${datasource}"
        for p in panels
        for thing in (p, *p["targets"])
    )
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
