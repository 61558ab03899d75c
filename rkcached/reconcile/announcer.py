"""Logs and publishes what becomes of prompts: one line and one event for each change."""

from __future__ import annotations

from msgspec import UnsetType

from rkcached import errors
from rkcached.host.logs import log
from rkcached.plan.records import Assessment, Build, State, Verdict
from rkcached.reconcile.build_request import BuildRequest
from rkcached.reconcile.events import Events
from rkcached.sources.records import Key
from rkcached.store.sidecar import StoredArtifact


class Announcer:
    def __init__(self, events: Events) -> None:
        self._events = events
        self._known: dict[Key, tuple[State, str]] = {}
        self._notices: tuple[str, ...] = ()
        self._building: Key | None = None
        # Listeners heard that these are being built, and nothing since.
        self._unsettled: set[Key] = set()

    def state(self, assessment: Assessment) -> None:
        """A look or a build found this state of a prompt."""
        key, now = assessment.key, (assessment.state, assessment.reason)
        if key == self._building:
            return  # it is announced when the build ends
        before = self._known.get(key)
        if before != now or key in self._unsettled:
            self._events.publish(
                "artifact",
                **key._asdict(),
                state=assessment.state.value,
                reason=assessment.reason,
            )
        self._unsettled.discard(key)
        self._known[key] = now
        if before == now:
            return
        if assessment.state in (
            State.BLOCKED,
            State.UNCACHEABLE,
            State.QUARANTINED,
            State.UNCACHED,
        ):
            log.warning(
                "prompt not cached",
                **key._asdict(),
                state=assessment.state.value,
                reason=assessment.reason,
                hint=assessment.hint,
            )
        elif assessment.state is State.FRESH and before is not None and before[0] is State.BLOCKED:
            log.info("prompt fresh again", **key._asdict(), state=State.FRESH.value)

    def notices(self, now: tuple[str, ...]) -> None:
        """Log what a look found strange about the inputs, once for each notice."""
        for notice in now:
            if notice not in self._notices:
                log.warning("doubtful input", notice=notice)
        self._notices = now

    def forget_all_but(self, keys: set[Key]) -> None:
        for key in self._known.keys() - keys:
            del self._known[key]

    def build_started(self, build: Build) -> None:
        key = build.key
        self._building = key
        self._unsettled.add(key)
        log.info(
            "build started",
            **key._asdict(),
            state="building",
            reason=build.reason,
        )
        self._events.publish("artifact", **key._asdict(), state="building", reason=build.reason)

    def build_ended(self) -> None:
        """However it did; what became of it follows."""
        self._building = None

    def built(self, request: BuildRequest, artifact: StoredArtifact) -> None:
        key, sidecar, figures = request.action.key, artifact.sidecar, artifact.sidecar.figures
        self._publish_build(request, "built", sidecar.build_ms)
        log.info(
            "artifact built",
            **key._asdict(),
            state=State.FRESH.value,
            reason=request.action.reason,
            tokens=sidecar.tokens,
            reused_tokens=figures.reused_tokens,
            prefill_ms=round(figures.prefill_ms),
            build_ms=round(sidecar.build_ms),
            size_bytes=sidecar.size_bytes,
            cold_ttft_ms=round(figures.cold_ttft_ms),
            warm_ttft_ms=round(figures.warm_ttft_ms),
            verified=figures.verified,
        )
        if not figures.gain:
            log.warning(
                "no gain",
                **key._asdict(),
                hint="loading costs more than prefilling",
            )

    def imported(self, key: Key, artifact: StoredArtifact) -> None:
        sidecar = artifact.sidecar
        signed_by = "" if isinstance(sidecar.imported, UnsetType) else sidecar.imported.signed_by
        log.info(
            "artifact imported",
            **key._asdict(),
            state=State.FRESH.value,
            signed_by=signed_by or None,
            tokens=sidecar.tokens,
            size_bytes=sidecar.size_bytes,
            verified=sidecar.figures.verified,
        )

    def build_failed(
        self, request: BuildRequest, error: errors.RkcachedError, verdict: Verdict
    ) -> None:
        key = request.action.key
        self._publish_build(request, verdict.kind.value)
        log.error(
            "build failed",
            **key._asdict(),
            error=error.message,
            hint=error.hint,
            attempts=verdict.attempts,
            outcome=verdict.kind.value,
        )

    def _publish_build(self, request: BuildRequest, result: str, build_ms: float = 0.0) -> None:
        key, reason = request.action.key, request.action.reason
        self._events.publish(
            "build",
            **key._asdict(),
            reason=reason,
            result=result,
            build_ms=round(build_ms, 1),
        )
