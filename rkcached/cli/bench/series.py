"""Measures prompt after prompt, whatever becomes of one of them, and keeps what comes of each."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from rkcached.cli.bench import trust
from rkcached.cli.bench.alone import Alone, NotPossible
from rkcached.cli.bench.asking import Asker
from rkcached.cli.bench.measuring import Measuring
from rkcached.cli.bench.progress import Shown
from rkcached.cli.bench.results import Ended, Measured, PromptResult, Run, State
from rkcached.cli.client import Client
from rkcached.errors import (
    DaemonUnreachable,
    ModelLoadError,
    RequestError,
    RkcachedError,
    SourceError,
)
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key

# So many prompts a warning names; it counts the others.
_NAMED = 5


class Series:
    """The measurements of several prompts."""

    def __init__(
        self,
        client: Client,
        runs: int,
        lengths: Mapping[Key, int],
        look: Observation | None,
        shown: Shown,
        *,
        direct: bool,
    ) -> None:
        """Without a look, the engine alone and the texts are left out.

        Errors: DaemonUnreachable, RequestError.
        """
        self._client = client
        self._runs = runs
        self._lengths = lengths
        self._direct = look if direct else None
        self.lender: Client | None = None
        """The client to borrow a model with that must not be loaded twice.

        The engine alone then follows the daemon's runs.
        """
        self._look = look
        self._shown = shown
        self._asked = 0
        self._errors: list[RkcachedError] = []
        self._first = client.status()
        self.status = self._first
        """The last one."""
        self.prompts: list[PromptResult] = []
        self.first_answers: dict[str, Run] = {}
        """By model: the answer that it was loaded for."""
        self.refused: list[str] = []
        self.warnings: list[str] = []
        self.why_not_direct: list[str] = []
        self.ended = Ended.WELL

    def measure(self, keys: Sequence[Key]) -> None:
        """Measure all, until the daemon is gone or somebody interrupts: then what there is counts.

        Errors: why there is nothing, if there is nothing.
        """
        self._shown.plan(
            prompts=len(keys), answers=len(keys) * self._answers(direct=self._direct is not None)
        )
        left = list(keys)
        try:
            self._measure_all(keys, left)
        except KeyboardInterrupt:
            if not self.prompts:
                raise
            self.ended = Ended.INTERRUPTED

        if not self.prompts and self._errors:
            raise self._why_nothing()
        if self._is_gone:
            self.ended = Ended.DAEMON_GONE

        if self.ended is not Ended.WELL:
            rest = [self._name(key) for key in left]
            more = ""
            if len(rest) > _NAMED:
                more = f" and {len(rest) - _NAMED} more"

            not_measured = ""
            if rest:
                not_measured = f"; not measured: {', '.join(rest[:_NAMED])}{more}"

            self.warnings.append(
                f"{self.ended}, this is what was measured until then{not_measured}"
            )

    def _measure_all(self, keys: Sequence[Key], left: list[Key]) -> None:
        """Takes from `left` what was measured, or could not be."""
        for model in dict.fromkeys(key.model for key in keys):
            if self._is_gone:
                break

            with contextlib.ExitStack() as loaded:
                alone = self._start(model)
                if alone is not None:
                    loaded.callback(alone.close)

                of_model = [key for key in keys if key.model == model]
                if alone is None and self._direct is not None and self.lender is None:
                    self._shown.drop(len(of_model) * self._runs * len(State))

                for key in of_model:
                    if not self._is_gone:
                        self._measure(key, alone)
                        left.remove(key)

    def meanwhile(self) -> trust.Meanwhile:
        answers = (
            sum(self.status["answers"].values())
            - sum(self._first["answers"].values())
            - self._asked
        )
        builds = self.status["reconcile"]["builds"] - self._first["reconcile"]["builds"]
        return trust.Meanwhile(answers=answers, builds=builds)

    @property
    def _is_gone(self) -> bool:
        return bool(self._errors) and isinstance(self._errors[-1], DaemonUnreachable)

    def _answers(self, *, direct: bool) -> int:
        """Of one prompt."""
        return self._runs * len(State) * (2 if direct else 1)

    def _start(self, model: str) -> Alone | None:
        if self._direct is None or self.lender is not None:
            return None

        self._shown.preparing(model, "loading a second one")
        try:
            return Alone(self._direct, model)
        except NotPossible as error:
            self.why_not_direct.append(str(error))
            return None

    def _measure(self, key: Key, alone: Alone | None) -> None:
        before = _status_of(self.status, key)
        name = self._name(key)
        self._shown.prompt(name)
        text = None
        if self._look is not None:
            text = self._look.desired.texts.get(key)

        if self._is_another(key, before):
            text = None
            if alone is not None:  # it would compute what was there at first
                alone = None
                self.why_not_direct.append(f"{name} changed meanwhile")
                self._shown.drop(self._runs * len(State))

        borrows = self.lender is not None and self._direct is not None
        if self._is_another(key, before) and borrows:
            borrows = False
            self.why_not_direct.append(f"{name} changed meanwhile")

        asker = Asker(self._client, *key)
        measuring = Measuring(asker, alone, key, self._shown)
        measuring.run(self._runs)
        if borrows and measuring.stopped is None:
            self._measure_borrowed(key, measuring)

        self._shown.drop(self._answers(direct=alone is not None or borrows) - measuring.steps)
        self._asked += asker.answers
        self.why_not_direct.append(measuring.why_not_direct)

        with contextlib.suppress(
            DaemonUnreachable, RequestError
        ):  # the next question fails likewise
            self.status = self._client.status()

        stopped = measuring.stopped
        if stopped is not None:
            self._errors.append(stopped)
            if not measuring.counts():
                refusal = stopped.message
                if str(key) not in refusal:
                    refusal = f"{name}: {refusal}"
                self.refused.append(refusal)
                return

            self.warnings.append(
                f"{name}: {min(measuring.counts())} of {self._runs} runs, then {stopped.message}"
            )

        self.first_answers |= measuring.first_answer
        states = measuring.states()
        if trust.changed(before, _status_of(self.status, key)):
            states = dict.fromkeys(State, Measured(missing=trust.CHANGED))

        self.prompts.append(_result(key, self._lengths.get(key), text, before, states))

    def _measure_borrowed(self, key: Key, measuring: Measuring) -> None:
        """The engine alone, while the daemon has the model unloaded and waits."""
        if self.lender is None or self._direct is None:
            return

        self._shown.preparing(key.model, "borrowing it from the daemon")
        try:
            with (
                self.lender.lent(key.model),
                contextlib.closing(Alone(self._direct, key.model)) as alone,
            ):
                measuring.run_alone(alone)
        except NotPossible as error:
            measuring.why_not_direct = str(error)
        except (RequestError, DaemonUnreachable) as error:
            measuring.why_not_direct = (
                f"{key.model} cannot be borrowed from the daemon: {error.message}"
            )

    def _is_another(self, key: Key, status: dict[str, Any]) -> bool:
        """Whether it is no longer what the look at the beginning saw."""
        if self._look is None or status["state"] != "fresh":
            return False
        wanted = self._look.desired.fingerprint(key)
        return wanted is None or wanted.digest != status["artifact"]["fingerprint"]

    def _name(self, key: Key) -> str:
        """As its result is called."""
        length = self._lengths.get(key)
        return PromptResult(
            model=key.model,
            prompt=key.prompt,
            tokens=None,
            size_bytes=None,
            build_ms=None,
            length=length,
            states={},
        ).name

    def _why_nothing(self) -> RkcachedError:
        """The error of the only prompt, or what all have met.

        Its kind decides about the exit code.
        """
        error = self._errors[-1] if self._is_gone else self._errors[0]
        if not isinstance(error, RequestError):
            return error

        more = ""
        if len(self._errors) > 1:
            more = f"; {len(self._errors) - 1} more could not be measured either"

        hint = "`rkcached status` says what is wrong with each prompt"
        kinds: dict[str, type[RkcachedError]] = {
            "prompt_blocked": SourceError,
            "model_unavailable": ModelLoadError,
        }
        if error.code in kinds:  # 503 for a client; for this command, an input that cannot be used
            return kinds[error.code](error.message + more, hint=hint)
        return RequestError(error.status, error.message + more, code=error.code, hint=hint)


def _result(
    key: Key,
    length: int | None,
    text: str | None,
    status: dict[str, Any],
    states: dict[State, Measured],
) -> PromptResult:
    artifact = status.get("artifact") or {}
    build_ms = None
    if artifact:
        build_ms = round(artifact["build_ms"], 1)
    text_digest = ""
    if text is not None and length is None:
        text_digest = hashlib.sha256(text.encode()).hexdigest()

    return PromptResult(
        model=key.model,
        prompt=key.prompt,
        tokens=artifact.get("tokens"),
        size_bytes=artifact.get("size_bytes"),
        build_ms=build_ms,
        length=length,
        text_digest=text_digest,
        states=states,
        no_gain=trust.why_no_gain(status, states),
        reduction=trust.reductions(states),
        build_saw_no_gain=bool(artifact) and not artifact["gain"],
    )


def _status_of(status: dict[str, Any], key: Key) -> dict[str, Any]:
    gone = {"state": "missing", "reason": "it was removed meanwhile", "hint": ""}
    return next((p for p in status["prompts"] if (p["model"], p["prompt"]) == key), gone)
