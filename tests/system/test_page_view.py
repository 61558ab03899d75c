"""The page as its user has it: search, a prompt's own view, a question, keyboard, screen reader."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Port
from conftest import Workspace

from tests.ports import free_port

COUNT = 230
"""More than the page shows at first."""
HOSTILE = "</pre><script>document.title = 'taken'</script>\x1b[2J"


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core, as one expression."""
    found = importlib.util.find_spec("axe_playwright_python")
    assert found is not None
    assert found.submodule_search_locations is not None
    return (Path(found.submodule_search_locations[0]) / "axe.min.js").read_text()


@pytest.fixture
def many(workspace: Workspace) -> Workspace:
    """Two prompts with something to tell, and many that are blocked, which takes no builds."""
    workspace.memory_model(script={"hello": "Good day to you."}, prefill_us_per_token=1000)
    workspace.write("keeper.md", f"You are the keeper of a lighthouse. {HOSTILE}")
    workspace.write("cook.md", "You are a ship's cook. " * 30)
    workspace.write("empty.md", "")
    for number in range(COUNT):
        workspace.write(f"many/p{number}.md", "")
    workspace.declare(
        "{keeper: {files: keeper.md, description: of the light}, cook: cook.md, empty: empty.md}",
        model="    prompts_from: many/*.md\n",
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


@pytest.fixture
def page(many: Workspace, tmp_path: Path) -> Iterator[Browser]:
    with Port(many.socket) as port, Browser(tmp_path / "profile") as browser:
        browser.open(port.url)
        yield browser
        assert browser.complaints == []


def rows(browser: Browser) -> list[str]:
    names: list[str] = browser.run(
        "[...document.querySelectorAll('#prompts .name')].map((cell) => cell.innerText)"
    )
    return names


def type_into(browser: Browser, selector: str, text: str) -> None:
    """As a user does, key by key."""
    browser.run(f"document.querySelector({json.dumps(selector)}).focus()")
    browser.call("Input.insertText", text=text)


def press(browser: Browser, key: str) -> None:
    text = {"text": key} if len(key) == 1 else {}
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def test_prompts_are_searched_filtered_and_sorted(page: Browser) -> None:
    """Blocked ones first; the address has it all, so that it can be kept, and goes back."""
    first = rows(page)
    assert len(first) == 200
    assert first[0] == "m/empty"
    click(page, "#more a")
    page.wait_for(f"document.querySelectorAll('#prompts tr').length === {COUNT + 3}")

    press(page, "/")
    assert page.run("document.activeElement.name") == "q"
    page.call("Input.insertText", text="LIGHT of")
    page.wait_for("document.querySelectorAll('#prompts tr').length === 1")
    assert rows(page) == ["m/keeper"]
    assert "1 of 233 prompts" in page.text("#found")
    assert page.run("location.search") == "?q=LIGHT+of"

    page.run("document.querySelector('[name=q]').value = ''")
    page.run(
        "{ const all = document.querySelector('[name=state]'); all.value = 'fresh';"
        " all.dispatchEvent(new Event('input', { bubbles: true })) }"
    )
    page.wait_for("document.querySelectorAll('#prompts tr').length === 2")
    assert sorted(rows(page)) == ["m/cook", "m/keeper"]

    page.open(page.run("location.origin") + "/?sort=tokens")
    assert rows(page)[0] == "m/cook"
    click(page, "#columns a[href='?sort=name']")
    page.wait_for("document.querySelector('#prompts .name').innerText === 'm/cook'")
    page.run("history.back()")
    page.wait_for("document.querySelector('#columns [aria-sort] a').innerText === 'tokens'")
    page.open(page.run("location.origin") + "/?q=nothing+like+it")
    assert "no prompt fits the search" in page.text("#prompts")


def test_a_prompts_own_view(many: Workspace, page: Browser) -> None:
    """What it is, who used it, its text when it is asked for; and how to ask it."""
    many.ask("m/keeper")
    type_into(page, "[name=q]", "keeper")
    page.wait_for("document.querySelectorAll('#prompts tr').length === 1")
    click(page, "#prompts .name a")
    page.wait_for("document.querySelector('#about h2')?.innerText === 'm/keeper'")
    about = page.text("#about")
    assert "fresh" in about
    assert "you: 1 of the answers that are remembered" in about
    assert page.run("document.querySelectorAll('#about rect').length") == 1
    text = many.root.joinpath("keeper.md").read_text()
    assert hashlib.sha256(text.encode()).hexdigest()[:16] in about
    assert not page.run("document.querySelector('#about-text details').open")
    click(page, "#about-text summary")
    shown = page.text("#about-text pre")
    assert HOSTILE.replace("\x1b", "\\x1b") in shown
    assert page.run("document.title") != "taken"
    assert "--unix-socket" in page.run("document.getElementById('as-curl').textContent")

    many.write("keeper.md", "You are somebody else.")
    page.wait_for("document.querySelector('#about-text pre').textContent.includes('somebody')")
    page.run("document.activeElement.blur()")  # in the search, Esc clears it
    press(page, "Escape")
    page.wait_for("document.querySelector('#about h2') === null")
    assert page.run("document.getElementById('try').hidden")
    page.open(page.run("location.origin") + "/?prompt=m/zzz")
    assert "there is no such prompt" in page.text("#about")


def test_a_prompt_is_tried(many: Workspace, page: Browser) -> None:
    """With its cache and without, and the two times beside each other."""
    page.open(page.run("location.origin") + "/?prompt=m/cook")
    type_into(page, "#question", "hello")
    click(page, "#try button")
    page.wait_for("document.getElementById('report').innerText.startsWith('hit: first token')")
    assert page.text("#answer") == "Good day to you."
    assert "tokens reused" in page.text("#report")
    click(page, "#try button[value=cold]")
    page.wait_for("document.getElementById('report').innerText.includes('ms cold, ')")
    assert page.text("#report").startswith("cold")
    page.wait_for("document.getElementById('head').innerText.includes('caches saved') || true")
    assert many.status()["answers"] == {"hit": 1, "cold": 1}


def test_what_the_caches_saved_is_the_headline(many: Workspace, page: Browser) -> None:
    for _ in range(5):
        many.ask("m/cook")
    saved = many.status()["saved_today_s"]
    assert saved >= 2  # 690 tokens of a millisecond each, five times, less what loading took
    page.wait_for("document.getElementById('head').innerText.includes('caches saved')")


def violations(browser: Browser, axe: str) -> list[dict[str, Any]]:
    """What axe-core calls serious or worse."""
    browser.run(f"{axe}; 0")
    found = browser.run(
        "axe.run().then((result) => result.violations.map((one) => "
        "({id: one.id, impact: one.impact, nodes: one.nodes.map((node) => node.html)})))"
    )
    return [one for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 390),
        pytest.param("dark", 1440, marks=pytest.mark.long),
        pytest.param("dark", 390, marks=pytest.mark.long),
        pytest.param("light", 1440, marks=pytest.mark.long),
    ],
)
def test_everybody_can_use_it(
    many: Workspace, page: Browser, axe: str, width: int, scheme: str
) -> None:
    """axe-core finds nothing serious, and nothing is wider than the window."""
    many.ask("m/cook")
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.call("Emulation.setEmulatedMedia", features=[feature])
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    # With few rows: axe-core looks at each of them.
    for query in ("/?q=k", "/?q=cook&prompt=m/cook", "/?q=p22&sort=size&prompt=m/empty"):
        page.open(page.run("location.origin") + query)
        page.run("document.querySelectorAll('details').forEach((one) => { one.open = true })")
        assert violations(page, axe) == []
        assert page.run("document.scrollingElement.scrollWidth") <= width


def test_a_port_without_a_key_shows_no_texts(many: Workspace, tmp_path: Path) -> None:
    """Its users may not be those who may read the files."""
    assert many.stop() == 0
    port = free_port()
    many.start("--listen", f"127.0.0.1:{port}", "--open-loopback")
    many.wait_settled()
    with Browser(tmp_path / "profile") as browser:
        browser.open(f"http://127.0.0.1:{port}/?prompt=m/cook")
        assert "fresh" in browser.text("#about")
        assert "ship's cook" not in browser.run("document.body.innerHTML")
