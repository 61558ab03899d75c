"""Measures one prompt: each state through the socket, and on the engine alone."""

from __future__ import annotations

import contextlib

from rkcached.cli.bench.alone import Alone, NotPossible
from rkcached.cli.bench.asking import ANSWER_TOKENS, Asker, NotMade
from rkcached.cli.bench.progress import Shown
from rkcached.cli.bench.results import DirectRun, Measured, Run, State
from rkcached.errors import DaemonUnreachable, RequestError
from rkcached.sources.records import Key


class Measuring:
    """The runs of one prompt, in turns: cold, from the file, in memory.

    Each through the socket and on the engine.
    """

    def __init__(self, asker: Asker, alone: Alone | None, key: Key, shown: Shown) -> None:
        self._asker = asker
        self._alone = alone
        self._key = key
        self._shown = shown
        self._runs: dict[State, list[Run]] = {state: [] for state in State}
        self._direct: dict[State, list[DirectRun]] = {state: [] for state in State}
        self._questions: dict[State, list[str]] = {state: [] for state in State}
        self._missing: dict[State, str] = {}
        self.first_answer: dict[str, Run] = {}
        """By model: the answer that it was loaded for; empty if it was in memory."""
        self.why_not_direct = ""
        self.stopped: RequestError | DaemonUnreachable | None = None
        """The error that came instead of an answer; earlier runs are good."""
        self.steps = 0
        """Answers that were shown as done."""

    def run(self, count: int) -> None:
        """The first answer is not counted: it may have to load the model."""
        try:
            with contextlib.suppress(NotMade):
                first, _ = self._asker.ask(State.COLD)
                if first.model_load_ms:
                    self.first_answer[self._key.model] = first
            for number in range(1, count + 1):
                for state in State:
                    if self._why_missing(state) is None:
                        self._once(state, number, count)
        except (RequestError, DaemonUnreachable) as error:
            self.stopped = error

    def run_alone(self, alone: Alone) -> None:
        """Send the same requests in the same order to the engine alone, after the daemon's."""
        count = max(map(len, self._questions.values()))
        for number in range(count):
            for state in State:
                if number < len(self._questions[state]) and not self.why_not_direct:
                    self._shown.doing(state, number + 1, count, alone=True)
                    self._ask_alone(alone, state, self._questions[state][number])

    def _ask_alone(self, alone: Alone, state: State, question: str) -> None:
        try:
            self._direct[state].append(alone.ask(self._key, state, question, ANSWER_TOKENS))
        except NotPossible as error:
            self.why_not_direct = str(error)
        else:
            self._step()

    def _once(self, state: State, number: int, count: int) -> None:
        self._shown.doing(state, number, count, alone=False)
        try:
            run, question = self._asker.ask(state)
        except NotMade as error:
            self._missing[state] = str(error)
            return

        self._runs[state].append(run)
        self._questions[state].append(question)
        self._step()
        if self._alone is not None and not self.why_not_direct:
            self._shown.doing(state, number, count, alone=True)
            self._ask_alone(self._alone, state, question)

    def _step(self) -> None:
        self.steps += 1
        self._shown.done()

    def counts(self) -> list[int]:
        """Runs of each state that has some."""
        counts = []
        for state, runs in self._runs.items():
            if runs and self._why_missing(state) is None:
                counts.append(len(runs))

        return counts

    def states(self) -> dict[State, Measured]:
        """The runs of each state; none of a state that could not be made once."""
        measured = {}
        for state in State:
            missing = self._why_missing(state)
            if missing is None and self.stopped is not None and not self._runs[state]:
                missing = self.stopped.message

            if missing is not None:
                measured[state] = Measured(missing=missing)
                continue
            runs = tuple(self._runs[state])
            measured[state] = Measured(runs=runs, direct=self._whole(state)).summarised()

        return measured

    def _why_missing(self, state: State) -> str | None:
        """A state follows those before it; None if all of them could be made."""
        for earlier in State:
            if earlier in self._missing:
                if earlier is state:
                    return self._missing[earlier]
                return f"{earlier}: {self._missing[earlier]}"
            if earlier is state:
                break

        return None

    def _whole(self, state: State) -> tuple[DirectRun, ...]:
        """Pairs need both."""
        if self.why_not_direct:
            return ()
        return tuple(self._direct[state])
