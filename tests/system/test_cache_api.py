"""The operations on prompt caches and models over the socket, as the guide's users know them."""

from __future__ import annotations

import json
import shutil
import stat
from typing import Any

import pytest
from conftest import Workspace

from tests.waiting import BEFORE_RESCAN_S, wait_until

TEXT = "You are the keeper of a lighthouse. "
STORE = {"cache_name": "keeper", "content": TEXT}


def call(
    space: Workspace, method: str, path: str, body: Any = None, *, status: int = 200
) -> dict[str, Any]:
    with space.http(admin=True) as client:
        response = client.request(method, path, json=body)
    assert response.status_code == status, response.text
    answer: dict[str, Any] = response.json()
    return answer


def code(answer: dict[str, Any]) -> str:
    found: str = answer["error"]["code"]
    return found


def test_a_stored_text_is_a_prompt_like_any_other(two_prompts: Workspace) -> None:
    """Stored, built, used by name, listed; found again after a restart.

    Deleted with its artifact.
    """
    created = call(two_prompts, "POST", "/v1/cache/m", STORE)
    assert (created["object"], created["cache_name"], created["state"]) == (
        "cache.created",
        "keeper",
        "fresh",
    )
    assert two_prompts.ask("m/keeper")["rkcached"]["state"] == "hit"
    names = [one["cache_name"] for one in call(two_prompts, "GET", "/v1/cache/m")["data"]]
    assert names == ["a", "b", "keeper"]
    assert (two_prompts.cache / "m/keeper.memory_cache").exists()
    two_prompts.cli("plan", "--exit-code", code=0)
    assert two_prompts.stop() == 0
    two_prompts.start()
    assert two_prompts.ask("m/keeper")["rkcached"]["state"] == "hit"
    assert two_prompts.built() == ["a", "b", "keeper"]
    deleted = call(two_prompts, "DELETE", "/v1/cache/m/keeper")
    assert (deleted["object"], deleted["deleted"]) == ("cache.deleted", True)
    assert code(call(two_prompts, "GET", "/v1/cache/m/keeper", status=404)) == "prompt_not_found"
    artifact = two_prompts.cache / "m/keeper.memory_cache"
    wait_until(lambda: not artifact.exists(), "the artifact is gone", BEFORE_RESCAN_S)
    assert not list((two_prompts.root / "state" / "prompts" / "m").iterdir())


def test_generate_binary_answers_as_the_guide_says(two_prompts: Workspace) -> None:
    """The guide's fields first; a prompt replaces the stored text, and without one it stays."""
    made = call(
        two_prompts, "POST", "/v1/cache/m/generate-binary", {"cache_name": "keeper", "prompt": TEXT}
    )
    assert list(made)[:7] == [
        "object",
        "model",
        "cache_name",
        "size_mb",
        "ttft_ms",
        "timestamp",
        "message",
    ]
    assert (made["object"], made["model"], made["cache_name"]) == (
        "binary_cache.created",
        "m",
        "keeper",
    )
    assert made["message"] == f"Binary cache generated successfully ({made['size_mb']:.2f} MB)"
    path = two_prompts.root / "state/prompts/m/keeper.md"
    assert path.read_text() == TEXT
    again = call(two_prompts, "POST", "/v1/cache/m/generate-binary", {"cache_name": "keeper"})
    assert again["tokens"] == made["tokens"]
    assert path.read_text() == TEXT
    longer = call(
        two_prompts,
        "POST",
        "/v1/cache/m/generate-binary",
        {"cache_name": "keeper", "prompt": TEXT * 2},
    )
    assert longer["tokens"] > made["tokens"]
    assert path.read_text() == TEXT * 2
    assert two_prompts.built() == ["a", "b", "keeper", "keeper", "keeper"]


def test_an_unchanged_text_is_not_built_again(two_prompts: Workspace) -> None:
    """Storing what is stored answers at once."""
    first = call(two_prompts, "POST", "/v1/cache/m", STORE)
    second = call(two_prompts, "POST", "/v1/cache/m", STORE)
    assert first["artifact"]["built_at"] == second["artifact"]["built_at"]
    assert two_prompts.built() == ["a", "b", "keeper"]


def test_nobody_has_to_wait(workspace: Workspace) -> None:
    """With wait: false the answer is 202 and says where to look.

    A newer text overtakes the build of an older one.
    """
    workspace.memory_model(prefill_us_per_token=5_000)
    workspace.write("a.md", "a")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    body = {"cache_name": "keeper", "content": "an old text " * 40, "wait": False}
    accepted = call(workspace, "POST", "/v1/cache/m", body, status=202)
    assert accepted["location"] == "/v1/cache/m/keeper"
    wait_until(
        lambda: workspace.prompt("keeper").get("state") == "building",
        "the old text is built",
        BEFORE_RESCAN_S,
    )
    newer = call(
        workspace, "POST", "/v1/cache/m", {"cache_name": "keeper", "content": "a newer text"}
    )
    assert newer["state"] == "fresh"
    assert (workspace.cache / "m/keeper.bin").read_text().count("a newer text") == 1
    assert (
        call(workspace, "GET", accepted["location"])["artifact"]["tokens"]
        == newer["artifact"]["tokens"]
    )


def test_what_the_manifest_declares_is_the_manifests(two_prompts: Workspace) -> None:
    """It can be built anew, but neither replaced nor deleted over the socket."""
    assert code(call(two_prompts, "DELETE", "/v1/cache/m/a", status=409)) == "declared_in_manifest"
    body = {"cache_name": "a", "content": TEXT}
    assert (
        code(call(two_prompts, "POST", "/v1/cache/m", body, status=409)) == "declared_in_manifest"
    )
    body = {"cache_name": "a", "prompt": TEXT}
    assert (
        code(call(two_prompts, "POST", "/v1/cache/m/generate-binary", body, status=409))
        == "declared_in_manifest"
    )
    assert (
        call(two_prompts, "POST", "/v1/cache/m/generate-binary", {"cache_name": "a"})["cache_name"]
        == "a"
    )
    shown = call(two_prompts, "GET", "/v1/cache/m/a")
    assert (shown["state"], shown["stored"]) == ("fresh", False)


def test_a_stored_text_yields_to_the_manifest(two_prompts: Workspace) -> None:
    """Declared later under the same name, the manifest's text counts.

    The stored one is kept beside it.
    """
    call(two_prompts, "POST", "/v1/cache/m", STORE)
    two_prompts.write("k.md", "You are another keeper.")
    two_prompts.write(
        "manifest.yaml", two_prompts.manifest.read_text().replace("{a:", "{keeper: k.md, a:")
    )
    text = two_prompts.cache / "m/keeper.bin"
    wait_until(
        lambda: "another keeper" in text.read_text(),
        "the manifest's text was built",
        BEFORE_RESCAN_S,
    )
    two_prompts.wait_settled()
    assert (
        code(call(two_prompts, "DELETE", "/v1/cache/m/keeper", status=409))
        == "declared_in_manifest"
    )
    assert (two_prompts.root / "state/prompts/m/keeper.md").read_text() == TEXT


@pytest.mark.parametrize(
    ("name", "content", "status", "expected"),
    [
        ("keeper", " \n", 400, "empty_prompt"),
        ("keeper", "a\0b", 400, "invalid_value"),
        ("keeper", "x" * ((1 << 20) + 1), 413, "prompt_too_large"),
        ("../../etc/passwd", TEXT, 400, "invalid_name"),
        ("Keeper", TEXT, 400, "invalid_name"),
        ("", TEXT, 400, "invalid_name"),
    ],
    ids=["blank", "NUL", "long", "path", "capital", "none"],
)
def test_bad_texts_and_names(
    two_prompts: Workspace, name: str, content: str, status: int, expected: str
) -> None:
    """Each is refused in words, and nothing is written."""
    answer = call(
        two_prompts, "POST", "/v1/cache/m", {"cache_name": name, "content": content}, status=status
    )
    assert code(answer) == expected
    assert [path.name for path in (two_prompts.root / "state").rglob("*")] == ["store.key"]


def test_unknown_models(two_prompts: Workspace) -> None:
    """OpenAI's 404 for every operation."""
    for method, path, body in (
        ("GET", "/v1/cache/zzz", None),
        ("GET", "/v1/cache/zzz/a", None),
        ("POST", "/v1/cache/zzz", STORE),
        ("DELETE", "/v1/cache/zzz/a", None),
        ("POST", "/v1/models/load", {"model": "zzz"}),
        ("POST", "/v1/models/unload", {"model": "zzz"}),
        ("GET", "/v1/models/zzz", None),
    ):
        assert code(call(two_prompts, method, path, body, status=404)) == "model_not_found"


def test_models_are_loaded_and_unloaded(two_prompts: Workspace) -> None:
    """On demand, and again by the next request.

    Available ones are listed with their worker's state.
    """
    unloaded = call(two_prompts, "POST", "/v1/models/unload", {"model": "m"})
    assert (unloaded["object"], unloaded["worker"]) == ("model.unloaded", "stopped")
    assert two_prompts.children() == []
    assert call(two_prompts, "GET", "/v1/models/loaded")["data"] == []
    assert [one["name"] for one in call(two_prompts, "GET", "/v1/models/available")["data"]] == [
        "m"
    ]
    loaded = call(two_prompts, "POST", "/v1/models/load", {"model": "m"})
    assert (loaded["object"], loaded["worker"]) == ("model.loaded", "ready")
    assert len(two_prompts.children()) == 1
    assert [one["name"] for one in call(two_prompts, "GET", "/v1/models/loaded")["data"]] == ["m"]
    assert call(two_prompts, "POST", "/v1/models/load", {"model": "m"})["pid"] == loaded["pid"]
    assert call(two_prompts, "GET", "/v1/models/m/a")["id"] == "m/a"
    assert code(call(two_prompts, "GET", "/v1/models/m/zzz", status=404)) == "prompt_not_found"


def test_a_model_that_cannot_be_loaded(workspace: Workspace) -> None:
    """503 with the reason."""
    workspace.write("m.model", json.dumps({"rkcached_memory_model": 1, "no such": 1}))
    workspace.declare("{}")
    workspace.start()
    assert (
        code(call(workspace, "POST", "/v1/models/load", {"model": "m"}, status=503))
        == "model_unavailable"
    )


def test_plain_completions(two_prompts: Workspace) -> None:
    """The text as it is, in OpenAI's shape, streamed or not; nothing chooses a prompt by name."""
    body = {"model": "m", "prompt": "Once upon a time", "max_tokens": 12}
    whole = call(two_prompts, "POST", "/v1/completions", body)
    assert (whole["object"], whole["choices"][0]["finish_reason"]) == ("text_completion", "length")
    assert whole["usage"]["prompt_tokens"] == len("Once upon a time")
    lines = two_prompts.request(
        "POST", "/v1/completions", json={**body, "stream": True}
    ).text.split("\n\n")
    chunks = [
        json.loads(line.removeprefix("data: "))
        for line in lines
        if line and not line.endswith("[DONE]")
    ]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    refusal = call(two_prompts, "POST", "/v1/completions", {**body, "model": "m/a"}, status=400)
    assert (code(refusal), refusal["error"]["param"]) == ("unsupported_parameter", "model")


def test_changes_are_the_administrators(two_prompts: Workspace) -> None:
    """On the socket for everyone they get 403, which names the one that only its owner may open."""
    admin = two_prompts.root / "admin.sock"
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    with two_prompts.http() as client:
        for method, path in (
            ("POST", "/v1/cache/m"),
            ("POST", "/v1/cache/m/generate-binary"),
            ("DELETE", "/v1/cache/m/a"),
            ("POST", "/v1/models/load"),
            ("POST", "/v1/models/unload"),
        ):
            refused = client.request(method, path, json=STORE)
            assert (refused.status_code, code(refused.json())) == (403, "admin_only")
            assert str(admin) in refused.json()["error"]["message"]
        assert client.get("/v1/cache/m").status_code == 200
    assert two_prompts.stop() == 0
    assert not admin.exists()


def test_use_cache_is_another_word(two_prompts: Workspace) -> None:
    """False is really cold, a name chooses, true is the default."""
    assert two_prompts.ask("m/a", use_cache=False)["rkcached"]["state"] == "cold"
    assert two_prompts.ask("m", use_cache="a")["rkcached"]["cache"] == "a"
    assert two_prompts.ask("m/a", use_cache=True)["rkcached"]["state"] == "hit"


def test_every_answer_has_a_request_id(two_prompts: Workspace) -> None:
    """The client's own, if it can be a header; else a new one. Errors and streams have it, too."""
    with two_prompts.http() as client:
        assert (
            client.get("/healthz", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"]
            == "mine-1"
        )
        made = [
            client.get(path).headers["x-request-id"]
            for path in ("/healthz", "/nowhere", "/v1/models/zzz")
        ]
    assert len(set(made)) == 3
    assert all(one.startswith("req-") for one in made)


def test_readiness(two_prompts: Workspace) -> None:
    """Ready once the first plan exists."""
    assert call(two_prompts, "GET", "/readyz") == {"status": "ready"}


def test_a_state_directory_that_cannot_be_written(two_prompts: Workspace) -> None:
    """503 with the path; the daemon goes on."""
    shutil.rmtree(two_prompts.root / "state")
    (two_prompts.root / "state").write_text("a file, where a directory should be")
    answer = call(two_prompts, "POST", "/v1/cache/m", STORE, status=503)
    assert code(answer) == "state_not_writable"
    assert str(two_prompts.root / "state") in answer["error"]["message"]
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
