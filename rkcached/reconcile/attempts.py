"""What was tried and failed since the start.

The store remembers verdicts, too, but a full disk may not take them.

On the event loop. A failure to load a model is not its prompts' fault: it is remembered for the
model, in memory only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rkcached import errors
from rkcached.plan.desired import Desired, DesiredModel
from rkcached.plan.planner import DesiredPrompt, Verdict
from rkcached.reconcile.verdicts import verdict_on
from rkcached.sources.records import Key


def blames_model(error: errors.RkcachedError) -> bool:
    """No prompt of this model can be built now, but perhaps later."""
    return isinstance(
        error,
        errors.ModelLoadError
        | errors.RuntimeLibraryError
        | errors.WorkerUnavailable
        | errors.ModelReplaced,
    )


class Attempts:
    def __init__(self) -> None:
        self._failures: dict[Key, Verdict] = {}
        self._model_failures: dict[str, tuple[str, Verdict]] = {}
        """By name: the identity of the model that failed, and the verdict."""
        self._first_tries: dict[str, float] = {}
        self._load_faults: dict[str, int] = {}

    def first_try(self, fingerprint: str, now: float) -> float:
        """When this build was first started (the loop's time): it may have stepped aside since."""
        return self._first_tries.setdefault(fingerprint, now)

    def failed(
        self,
        key: Key,
        model: DesiredModel,
        fingerprint: str,
        error: errors.RkcachedError,
        stored: Verdict | None,
    ) -> Verdict:
        """A build failed. `stored` is what the store remembers of this prompt."""
        if blames_model(error):
            identity, before = self._model_failures.get(key.model, ("", None))
            attempts = 1 + (
                before.attempts if before is not None and identity == model.identity else 0
            )
            verdict = verdict_on(error, fingerprint, attempts)
            self._model_failures[key.model] = (model.identity, verdict)
            return verdict
        before = self._failures.get(key) or stored
        attempts = 1 + (
            before.attempts if before is not None and before.fingerprint == fingerprint else 0
        )
        verdict = self._failures[key] = verdict_on(
            error, fingerprint, attempts, model=model.identity
        )
        return verdict

    def needed_bytes(self, key: Key, fingerprint: str) -> int:
        """What the artifact takes at the least, as far as earlier attempts tell."""
        verdict = self._failures.get(key)
        return (
            verdict.needed_bytes
            if verdict is not None and verdict.fingerprint == fingerprint
            else 0
        )

    def built(self, key: Key) -> None:
        # this load lets builds end; the others are as patient as new ones
        self._first_tries.clear()
        self._model_failures.pop(key.model, None)
        self._failures.pop(key, None)

    def blames(self, name: str) -> bool:
        """Whether this model could not be loaded."""
        return name in self._model_failures

    def forgive_model(self, name: str) -> None:
        """Somebody asks for a build now: try the model again."""
        self._model_failures.pop(name, None)

    def load_fault(self, fingerprint: str) -> int:
        """A request could not load the artifact with this fingerprint; returns how often since the last success."""
        faults = self._load_faults[fingerprint] = self._load_faults.get(fingerprint, 0) + 1
        return faults

    def served(self, fingerprint: str) -> None:
        """A request was answered from it: earlier faults had another cause."""
        self._load_faults.pop(fingerprint, None)

    def verdicts(self, desired: Desired) -> dict[Key, Verdict]:
        """What to consider beside the store's verdicts.

        A model that could not be loaded blocks its prompts until it changes or may be tried again.
        """
        verdicts = dict(self._failures)
        prompts: Iterable[DesiredPrompt] = desired.prompts.values() if self._model_failures else ()
        for prompt in prompts:
            failure = self._model_failures.get(prompt.key.model)
            model = desired.models.get(prompt.key.model)
            if (
                failure
                and prompt.fingerprint
                and isinstance(model, DesiredModel)
                and model.identity == failure[0]
            ):
                verdicts[prompt.key] = replace(failure[1], fingerprint=prompt.fingerprint.digest)
        return verdicts
