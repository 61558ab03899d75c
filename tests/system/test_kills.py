"""Workers that are killed at random while many clients ask.

Nobody gets a wrong text, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections import Counter

import httpx
import psutil
from conftest import Workspace

from rkcached.engines.base import Sampling
from rkcached.engines.memory import expected_text
from tests.waiting import wait_until

KILLS = int(os.environ.get("RKCACHED_KILLS", "25"))
SEED = os.environ.get("RKCACHED_KILLS_SEED", "1")
CLIENTS = 16
TOKENS = 24
CLEAN = {"worker_died", "worker_unavailable"}
PATIENCE_S = 60.0
"""The longest rest of a worker is 30 s. A request that takes longer hangs."""

REFUSED_S = 0.1
"""A client that was refused asks again after so long."""

SAMPLING = Sampling(
    max_new_tokens=TOKENS,
    temperature=0.0,
    repeat_penalty=1.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
)
PROMPTS = ("a", "b", "c")


def text(name: str, edit: int) -> str:
    """An edit is at the end, so that its build goes on from the prompt cache before it."""
    rules = "You keep a café and never forget the salt. " * 16
    return f"You are prompt {name}. {rules}This is edit {edit}."


def right(model: bytes, system: str, question: str) -> str:
    turns = (("system", system), ("user", question))
    whole = (
        "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
        + "<|im_start|>assistant\n"
    )
    return expected_text(model, whole, SAMPLING)


class Clients:
    """Ask until they are told to stop, and remember how each request ended."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.model = (space.root / "m.model").read_bytes()
        self.texts = {name: [text(name, 0)] for name in PROMPTS}
        """Every text that a prompt had."""
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()
        self.threads = [
            threading.Thread(target=self.work, args=(number,)) for number in range(CLIENTS)
        ]

    def edit(self, name: str) -> None:
        self.texts[name].append(text(name, len(self.texts[name])))
        beside = self.space.write(f".{name}.new", self.texts[name][-1])
        beside.rename(self.space.root / f"{name}.md")

    def work(self, number: int) -> None:
        chance = random.Random(f"{SEED}/{number}")
        transport = httpx.HTTPTransport(uds=str(self.space.socket), verify=False)
        with httpx.Client(transport=transport, base_url="http://d", timeout=PATIENCE_S) as client:
            while not self.over.is_set():
                name, question = chance.choice(PROMPTS), f"question {chance.randrange(1000)}"
                try:
                    said, end = self.ask(client, name, question, stream=chance.random() < 0.5)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is no clean end
                    self.wrong.append(repr(error))
                    return
                self.ends[end] += 1
                if end in CLEAN:
                    self.over.wait(REFUSED_S)
                answers = [right(self.model, system, question) for system in self.texts[name]]
                complete = end not in CLEAN
                if not any(
                    said == answer if complete else answer.startswith(said) for answer in answers
                ):
                    self.wrong.append(f"{name}, {question}: {end} with {said!r}")

    @property
    def answered(self) -> int:
        return sum(count for end, count in self.ends.items() if end not in CLEAN)

    def is_mended(self, name: str) -> bool:
        """Whether the newest text of a prompt has its cache.

        Asking for it would have the build step aside.
        """
        stored = self.space.cache / f"m/{name}.bin"
        newest = stored.exists() and self.texts[name][-1] in stored.read_text()
        return newest and self.space.prompt(name)["state"] == "fresh"

    def ask(
        self, client: httpx.Client, name: str, question: str, *, stream: bool
    ) -> tuple[str, str]:
        """What was said, and the code of the failure or the state of the cache."""
        messages = [{"role": "user", "content": question}]
        body = {"model": f"m/{name}", "messages": messages, "temperature": 0, "repeat_penalty": 1.0}
        response = client.post(
            "/v1/chat/completions", json=body | {"max_tokens": TOKENS, "stream": stream}
        )
        if response.status_code != httpx.codes.OK:
            return "", known(response.json()["error"]["code"])
        if not stream:
            answer = response.json()
            return answer["choices"][0]["message"]["content"], answer["rkcached"]["state"]
        events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        said = "".join(
            choice["delta"].get("content", "") for c in chunks for choice in c.get("choices", ())
        )
        if "error" in chunks[-1]:
            return said, known(chunks[-1]["error"]["code"])
        assert events[-1] == "[DONE]", events[-1]
        return said, next(
            chunk["rkcached"]["state"] for chunk in reversed(chunks) if "rkcached" in chunk
        )


def known(code: str) -> str:
    assert code in CLEAN, code
    return code


def kill_a_worker(clients: Clients, chance: random.Random) -> None:
    """In two of three cases one that has answered.

    So that the rests after failures in a row stay short.
    """
    space, answered = clients.space, clients.answered
    if chance.random() < 2 / 3:
        wait_until(lambda: clients.answered > answered, "a request was answered")
    worker = wait_until(lambda: next(iter(space.children()), None), "there is a worker")
    time.sleep(chance.random() / 5)  # any moment of its life, not a synchronisation
    worker.kill()
    wait_until(lambda: worker not in space.children(), "its end was noticed")


def held(space: Workspace) -> dict[str, int]:
    assert space.process is not None
    daemon = psutil.Process(space.process.pid)
    return {
        "descriptors": daemon.num_fds(),
        "children": len(daemon.children()),
    }  # zombies are children, too


def test_killed_workers_give_no_wrong_answer_and_leave_nothing(workspace: Workspace) -> None:
    """Sixteen clients, workers killed at any moment, texts edited meanwhile.

    Each request is answered rightly or fails with its reason; then all is fresh, and the daemon
    holds what it held. RKCACHED_KILLS and RKCACHED_KILLS_SEED for more and others.
    """
    workspace.memory_model(prefill_us_per_token=100, decode_us_per_token=500)
    for name in PROMPTS:
        workspace.write(f"{name}.md", text(name, 0))
    workspace.declare("{a: a.md, b: b.md, c: c.md}")
    workspace.start()
    workspace.wait_settled()
    chance, clients = random.Random(SEED), Clients(workspace)
    for name in PROMPTS:
        workspace.ask(f"m/{name}")
    before = held(workspace)
    for thread in clients.threads:
        thread.start()
    try:
        for number in range(KILLS):
            kill_a_worker(clients, chance)
            if number % 5 == 0:
                clients.edit(chance.choice(PROMPTS))
    finally:
        clients.over.set()
        for thread in clients.threads:
            thread.join()
    assert clients.wrong == []
    assert clients.ends["hit"] > KILLS / 10
    for (
        name
    ) in PROMPTS:  # one that was killed three times over one text is left alone until it changes
        clients.edit(name)
    for name in PROMPTS:
        wait_until(lambda name=name: clients.is_mended(name), f"{name} is fresh again", PATIENCE_S)
    for name in PROMPTS:
        answer = workspace.ask(f"m/{name}", "hello", temperature=0, repeat_penalty=1.0)
        assert (
            right(clients.model, clients.texts[name][-1], "hello")
            == answer["choices"][0]["message"]["content"]
        )
        assert answer["rkcached"]["state"] == "hit"
    wait_until(
        lambda: all(n <= before[what] for what, n in held(workspace).items()),
        f"it holds {before} again",
    )
    (model,) = workspace.status()["models"]
    assert model["restarts"] > 0
    assert re.search(r"artifact built .* reused_tokens=[1-9]", workspace.log_text())
    print(
        f"{KILLS} kills, {model['restarts']} restarts, ends {dict(clients.ends)}, {before} = "
        f"{held(workspace)}"
    )
