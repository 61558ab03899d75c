"""The planner: one state and at most one action for each prompt, each with its reason in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkcached.plan.fingerprint import Fingerprint, fingerprint
from rkcached.plan.planner import assess, plan
from rkcached.plan.records import (
    MAX_QUARANTINE_S,
    PASSING_RETRY_S,
    Action,
    Adopt,
    Assessment,
    Blocked,
    Build,
    DesiredPrompt,
    Limits,
    Observed,
    Remove,
    Retire,
    Retired,
    State,
    Verdict,
    VerdictKind,
    over_budget,
    too_short,
)
from rkcached.sources.records import Key, Trouble

KEY = Key("m", "p")
NO_LIMITS = Limits()
TROUBLE = Trouble(message="it did not work", hint="do something")


def made_of(text: str, **more: str) -> Fingerprint:
    return fingerprint({"prefix": text, **more})


WANTED = made_of("text")
OTHER = made_of("other text")


def desired(key: Key = KEY, wanted: Fingerprint = WANTED) -> DesiredPrompt:
    return DesiredPrompt(key=key, fingerprint=wanted)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An artifact and whose it is."""

    key: Key
    fingerprint: str
    components: Mapping[str, str]
    tokens: int
    size_bytes: int
    corrupt: str
    unsigned: bool = False


def artifact(
    key: Key = KEY,
    made: Fingerprint = WANTED,
    *,
    tokens: int = 100,
    size_bytes: int = 1000,
    corrupt: str = "",
) -> Stored:
    return Stored(
        key=key,
        fingerprint=made.digest,
        components=made.components,
        tokens=tokens,
        size_bytes=size_bytes,
        corrupt=corrupt,
    )


def verdict(kind: VerdictKind, **more: float) -> Verdict:
    return replace(Verdict(fingerprint=WANTED.digest, kind=kind, trouble=TROUBLE), **more)


def quarantine(until: float) -> Verdict:
    return verdict(VerdictKind.QUARANTINED, retry_at=until)


def world(
    *artifacts: Stored, verdicts: Mapping[Key, Verdict] | None = None, now: float = 0.0
) -> Observed:
    return Observed(artifacts={a.key: a for a in artifacts}, verdicts=verdicts or {}, now=now)


def only(prompt: DesiredPrompt, observed: Observed, limits: Limits = NO_LIMITS) -> Assessment:
    (assessment,) = assess([prompt], observed, limits)
    return assessment


# --- without verdicts ---


def test_an_artifact_of_the_wanted_fingerprint_is_fresh() -> None:
    """There is nothing to do and nothing to say."""
    found = only(replace(desired(), description="rules"), world(artifact()))
    assert Assessment(key=KEY, state=State.FRESH, description="rules") == found


def test_a_prompt_without_an_artifact_is_missing_and_built() -> None:
    """The plainest case."""
    found = only(desired(), world())
    assert State.MISSING is found.state
    assert Build(key=KEY, reason="missing", fingerprint=WANTED) == found.action


def test_a_stale_artifact_is_built_anew_and_the_reason_names_each_change() -> None:
    """Old and new value, in the order of the components' names."""
    old = made_of("text", temperature="0.8", gone="1")
    new = made_of("text", temperature="0.7", top_k="40")
    found = only(desired(wanted=new), world(artifact(made=old)))
    assert State.STALE is found.state
    assert found.reason == "gone: 1 -> absent, temperature: 0.8 -> 0.7, top_k: absent -> 40"
    assert Build(key=KEY, reason=found.reason, fingerprint=new) == found.action
    assert [change.component for change in found.changes] == ["gone", "temperature", "top_k"]


def test_a_corrupt_artifact_is_built_anew_even_with_the_right_fingerprint() -> None:
    """What it claims to be counts for nothing."""
    found = only(desired(), world(artifact(corrupt="p.bin is missing")))
    assert (found.state, found.reason) == (State.CORRUPT, "p.bin is missing")
    assert Build(key=KEY, reason="corrupt: p.bin is missing", fingerprint=WANTED) == found.action


def test_a_prompt_in_trouble_is_blocked_and_its_artifact_is_kept() -> None:
    """The same text may come back, and then the artifact is good again."""
    found = only(DesiredPrompt(key=KEY, trouble=TROUBLE), world(artifact()))
    assert State.BLOCKED is found.state
    assert Blocked(key=KEY, reason="it did not work", hint="do something") == found.action


def test_a_trouble_that_may_pass_is_looked_at_again() -> None:
    """So whoever waits for the prompt does not give up.

    A file that is being written is complete some time.
    """
    passing = replace(TROUBLE, passing=True)
    found = only(DesiredPrompt(key=KEY, trouble=passing), world(now=100.0))
    assert (
        Blocked(
            key=KEY, reason="it did not work", hint="do something", retry_at=100 + PASSING_RETRY_S
        )
        == found.action
    )


def test_a_prompt_with_neither_fingerprint_nor_trouble_is_blocked_all_the_same() -> None:
    """It never counts as fresh."""
    found = only(DesiredPrompt(key=KEY), world(artifact()))
    assert (found.state, found.reason) == (State.BLOCKED, "the prompt has no text")


def test_an_artifact_that_nobody_declares_is_removed() -> None:
    """It follows the declared ones, in the order of the names."""
    others = [Key("z", "a"), Key("a", "b"), Key("a", "a")]
    found = assess([desired()], world(artifact(), *(artifact(key) for key in others)), NO_LIMITS)
    assert [KEY, Key("a", "a"), Key("a", "b"), Key("z", "a")] == [one.key for one in found]
    expected = tuple(Remove(key=key, reason="not in the manifest") for key in sorted(others))
    assert expected == plan(found)


def test_orphans_of_a_model_whose_folder_cannot_be_listed_are_kept() -> None:
    """What it declares is not known: an unmounted folder must not cost its prompt caches."""
    observed = replace(
        world(artifact(Key("m", "x")), artifact(Key("n", "x"))), unlisted_models=frozenset({"m"})
    )
    kept, removed = assess([], observed, NO_LIMITS)
    assert (kept.state, kept.action) == (State.ORPHAN, None)
    assert "kept" in kept.reason
    assert Remove(key=Key("n", "x"), reason="not in the manifest") == removed.action


# --- verdicts ---


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        (VerdictKind.UNCACHEABLE, State.UNCACHEABLE),
        (VerdictKind.TOO_LONG, State.BLOCKED),
    ],
)
@pytest.mark.parametrize(
    "observed", [world(), world(artifact(corrupt="damaged")), world(artifact(made=made_of("x")))]
)
def test_a_lasting_verdict_blocks_whatever_else_there_is(
    kind: VerdictKind, state: State, observed: Observed
) -> None:
    """Missing, corrupt or stale: an attempt would end as the last one did, now and later."""
    found = only(desired(), replace(observed, verdicts={KEY: verdict(kind)}, now=1e12))
    assert state is found.state
    assert Blocked(key=KEY, reason="it did not work", hint="do something") == found.action


@pytest.mark.parametrize("kind", VerdictKind)
def test_a_verdict_on_another_fingerprint_says_nothing(kind: VerdictKind) -> None:
    """The prompt was edited since: everything is possible again."""
    elsewhere = replace(verdict(kind, retry_at=1e12), fingerprint=made_of("other").digest)
    limits = Limits(max_bytes=1, min_tokens=10**6)
    assert State.MISSING is only(desired(), world(verdicts={KEY: elsewhere}), limits).state


@pytest.mark.parametrize("kind", VerdictKind)
def test_a_fresh_artifact_outweighs_any_verdict(kind: VerdictKind) -> None:
    """What is there and good is used."""
    assert (
        State.FRESH
        is only(desired(), world(artifact(), verdicts={KEY: verdict(kind, retry_at=1e12)})).state
    )


def test_a_failed_attempt_is_repeated_when_its_time_has_come() -> None:
    """Until then it is blocked, and says until when; at that very second it is due."""
    failed = {KEY: verdict(VerdictKind.FAILED, retry_at=50.0)}
    early = only(desired(), world(verdicts=failed, now=49.9))
    assert (
        Blocked(key=KEY, reason="it did not work", hint="do something", retry_at=50.0)
        == early.action
    )
    assert State.MISSING is only(desired(), world(verdicts=failed, now=50.0)).state


def test_a_failed_attempt_on_a_stale_artifact_stays_stale_when_it_is_due() -> None:
    """The reason is the change again, not the failure."""
    failed = {KEY: verdict(VerdictKind.FAILED, retry_at=50.0)}
    found = only(desired(), world(artifact(made=made_of("old")), verdicts=failed, now=60.0))
    assert State.STALE is found.state


# --- limits ---


def test_a_retry_that_a_wrong_clock_put_far_ahead_is_due() -> None:
    """A board without a battery had a later time before; its prompts would wait until then."""
    failed = {KEY: verdict(VerdictKind.FAILED, retry_at=86_400.0)}
    assert isinstance(only(desired(), world(verdicts=failed, now=10.0)).action, Build)


def test_a_prompt_below_min_tokens_is_uncached_until_the_limit_is_lowered() -> None:
    """No action while it is too short: it is what the owner asked for.

    Lowered to its length, it is built.
    """
    short = {KEY: too_short(WANTED.digest, 9, 10)}
    found = only(desired(), world(verdicts=short), Limits(min_tokens=10))
    assert (found.state, found.action) == (State.UNCACHED, None)
    assert found.reason == "the prompt has 9 tokens, cache.min_tokens is 10"
    assert State.MISSING is only(desired(), world(verdicts=short), Limits(min_tokens=9)).state


def test_the_reason_of_a_short_prompt_tells_the_present_limit() -> None:
    """Not the one at the time of the attempt."""
    short = {KEY: too_short(WANTED.digest, 9, 10)}
    assert (
        "cache.min_tokens is 99"
        in only(desired(), world(verdicts=short), Limits(min_tokens=99)).reason
    )


def test_an_artifact_goes_when_min_tokens_is_raised_above_it() -> None:
    """The verdict that it leaves behind keeps it from being built again."""
    found = only(desired(), world(artifact(tokens=9)), Limits(min_tokens=10))
    assert State.UNCACHED is found.state
    assert isinstance(found.action, Remove)
    assert too_short(WANTED.digest, 9, 10) == found.action.verdict
    assert State.FRESH is only(desired(), world(artifact(tokens=10)), Limits(min_tokens=10)).state


def test_the_budget_is_spent_in_manifest_order() -> None:
    """The first two fit exactly.

    The third goes, the fourth, which is smaller than what is left of nothing, too.
    """
    keys = [Key("m", name) for name in "dbca"]
    sizes = [600, 400, 1, 1]
    observed = world(
        *(artifact(key, size_bytes=size) for key, size in zip(keys, sizes, strict=True))
    )
    found = assess([desired(key) for key in keys], observed, Limits(max_bytes=1000))
    assert [one.state for one in found] == [State.FRESH, State.FRESH, State.BLOCKED, State.BLOCKED]
    assert [keys[2], keys[3]] == [action.key for action in plan(found)]


def test_a_smaller_artifact_may_follow_one_that_does_not_fit() -> None:
    """What is left over is used."""
    keys = [Key("m", name) for name in "abc"]
    observed = world(
        *(artifact(key, size_bytes=size) for key, size in zip(keys, [600, 500, 400], strict=True))
    )
    found = assess([desired(key) for key in keys], observed, Limits(max_bytes=1000))
    assert [one.state for one in found] == [State.FRESH, State.BLOCKED, State.FRESH]


def test_foreign_files_make_the_budget_smaller() -> None:
    """What they take is nobody else's, and the hint says how to get it back."""
    observed = replace(world(artifact(size_bytes=600)), foreign_bytes=500)
    found = only(desired(), observed, Limits(max_bytes=1000))
    assert found.reason == "needs 600 bytes, 500 of cache.max_bytes 1,000 are left"
    assert (
        "500 bytes are taken by files that are not the store's: `rkcached gc --strangers`"
        in found.hint
    )
    assert only(desired(), observed, Limits(max_bytes=1100)).state is State.FRESH


def test_over_budget_tells_what_is_needed_and_what_is_left() -> None:
    """With the advice that helps."""
    found = only(desired(), world(artifact(size_bytes=1500)), Limits(max_bytes=1000))
    assert found.reason == "needs 1,500 bytes, 1,000 of cache.max_bytes 1,000 are left"
    assert "cache.max_bytes" in found.hint


def test_an_artifact_over_budget_is_built_when_there_is_room() -> None:
    """By raising the limit, by taking the limit away.

    Or because what came before it became smaller.
    """
    first, second = Key("m", "first"), Key("m", "second")
    prompts = [desired(first), desired(second)]
    verdicts = {second: over_budget(WANTED.digest, 500, 600, 1000)}
    prompts[0] = desired(first, OTHER)

    def state(size_bytes: int, max_bytes: int | None) -> tuple[State, str]:
        observed = world(artifact(first, OTHER, size_bytes=size_bytes), verdicts=verdicts)
        _, found = assess(prompts, observed, Limits(max_bytes=max_bytes))
        return found.state, found.reason

    assert state(600, 1000) == (
        State.BLOCKED,
        "needs 500 bytes, 400 of cache.max_bytes 1,000 are left",
    )
    assert state(600, 900) == (
        State.BLOCKED,
        "needs 500 bytes, 300 of cache.max_bytes 900 are left",
    )
    assert [state(600, 1100)[0], state(600, None)[0], state(500, 1000)[0]] == [State.MISSING] * 3


def test_a_build_that_is_due_gets_its_room_from_later_prompts() -> None:
    """Regression: the plan said build, the store said full.

    The same build was repeated without end.
    """
    first, second = Key("m", "first"), Key("m", "second")
    verdicts = {first: over_budget(WANTED.digest, 400, 800, 1000)}
    found = assess(
        [desired(first), desired(second, OTHER)],
        world(artifact(second, OTHER, size_bytes=800), verdicts=verdicts),
        Limits(max_bytes=1000),
    )
    remove, build = plan(found)
    assert isinstance(remove, Remove)
    assert over_budget(OTHER.digest, 800, 400, 1000) == remove.verdict
    assert Build(key=first, reason="missing", fingerprint=WANTED) == build


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        (DesiredPrompt(key=Key("m", "idle"), trouble=TROUBLE), State.BLOCKED),
        (desired(Key("m", "idle"), made_of("new")), State.STALE),
        (None, State.ORPHAN),
    ],
    ids=["trouble", "stale", "kept-orphan"],
)
def test_an_artifact_that_serves_nobody_makes_room_where_the_budget_is_short(
    prompt: DesiredPrompt | None, state: State
) -> None:
    """With room for both it stays; otherwise it goes, and leaves no verdict behind."""
    idle = Key("m", "idle")
    prompts = [desired(), *([prompt] if prompt else [])]
    observed = replace(
        world(artifact(size_bytes=600), artifact(idle, size_bytes=400)),
        unlisted_models=frozenset({"m"}),
    )
    fits = assess(prompts, observed, Limits(max_bytes=1000))[1]
    short = assess(prompts, observed, Limits(max_bytes=999))[1]
    assert [state, state] == [fits.state, short.state]
    assert not isinstance(fits.action, Remove)
    reason = f"makes room: it is {state}, and cache.max_bytes 999 is too small for it"
    assert Remove(key=idle, reason=reason) == short.action


def test_an_edited_prompt_keeps_its_room() -> None:
    """Or what did not fit beside it would be built at each edit.

    Be removed when the edited one is there.
    """
    first, second = Key("m", "first"), Key("m", "second")
    edited = [desired(first, made_of("new")), desired(second)]
    verdicts = {second: over_budget(WANTED.digest, 500, 600, 1000)}
    observed = world(artifact(first, OTHER, size_bytes=600), verdicts=verdicts)
    (build, blocked) = plan(assess(edited, observed, Limits(max_bytes=1000)))
    assert isinstance(build, Build)
    assert isinstance(blocked, Blocked)
    assert (build.key, blocked.key) == (first, second)
    assert blocked.reason == "needs 500 bytes, 400 of cache.max_bytes 1,000 are left"


@pytest.mark.parametrize(("needed_bytes", "kept"), [(700, True), (750, False)])
def test_a_build_and_what_it_replaces_share_their_room(needed_bytes: int, *, kept: bool) -> None:
    """What is known to be needed counts, not both: the one comes when the other goes."""
    first, second = Key("m", "first"), Key("m", "second")
    new = made_of("new")
    verdicts = {first: over_budget(new.digest, needed_bytes, 900, 1000)}
    observed = world(
        artifact(first, size_bytes=600), artifact(second, size_bytes=300), verdicts=verdicts
    )
    actions = plan(assess([desired(first, new), desired(second)], observed, Limits(max_bytes=1000)))
    assert [(type(action), action.key) for action in actions] == (
        [(Build, first)] if kept else [(Remove, second), (Build, first)]
    )


@pytest.mark.parametrize("why", ["corrupt", "no room"])
def test_a_size_that_tells_nothing_displaces_nobody(why: str) -> None:
    """A damaged file may have any; and of one that is too large the next may be smaller."""
    first, second = Key("m", "first"), Key("m", "second")
    old = artifact(
        first,
        size_bytes=700 if why == "corrupt" else 1100,
        corrupt="cut" if why == "corrupt" else "",
    )
    observed = world(old, artifact(second, size_bytes=400))
    actions = plan(
        assess([desired(first, made_of("new")), desired(second)], observed, Limits(max_bytes=1000))
    )
    assert [(type(action), action.key) for action in actions] == [(Remove, first)]


# --- the plan ---


def test_removals_come_first_then_builds_in_manifest_order_then_what_is_blocked() -> None:
    """Removals make room; fresh prompts are not in the plan."""
    prompts = [
        DesiredPrompt(key=Key("m", "troubled"), trouble=TROUBLE),
        desired(Key("m", "z")),
        desired(Key("m", "fresh")),
        desired(Key("m", "a")),
    ]
    prompts[1], prompts[3] = desired(Key("m", "z"), OTHER), desired(Key("m", "a"), OTHER)
    actions = plan(
        assess(prompts, world(artifact(Key("m", "fresh")), artifact(Key("m", "orphan"))), NO_LIMITS)
    )
    expected: list[tuple[type[Action], str]] = [
        (Remove, "orphan"),
        (Build, "z"),
        (Build, "a"),
        (Blocked, "troubled"),
    ]
    assert expected == [(type(action), action.key.prompt) for action in actions]


# --- what is no longer declared, and what is declared again ---

WEEK = Limits(keep_retired_s=7 * 86_400)
A, B, C = (Key("m", name) for name in "abc")


def retired(
    key: Key = KEY, made: Fingerprint = WANTED, *, size_bytes: int = 1000, at: float = 0.0
) -> Retired:
    return Retired(
        key=key, fingerprint=made.digest, tokens=100, size_bytes=size_bytes, retired_at=at
    )


def with_retired(observed: Observed, *kept: Retired) -> Observed:
    return replace(observed, retired={one.fingerprint: one for one in kept})


def test_an_artifact_that_nobody_declares_any_more_is_put_aside() -> None:
    """An unmounted folder or another branch may bring it back."""
    (found,) = assess([], world(artifact()), WEEK)
    assert (State.ORPHAN, Retire(key=KEY, reason="not in the manifest")) == (
        found.state,
        found.action,
    )


def test_a_corrupt_artifact_that_nobody_declares_is_removed() -> None:
    """It is of no use to anybody."""
    (found,) = assess([], world(artifact(corrupt="cut")), WEEK)
    assert isinstance(found.action, Remove)


def test_a_retired_artifact_is_shown_and_kept_for_its_time() -> None:
    """The clock of a board may be set back, too."""
    (kept,) = assess([], replace(with_retired(world(), retired(at=1000)), now=999), WEEK)
    assert (State.RETIRED, None, WANTED.digest) == (kept.state, kept.action, kept.retired)
    (gone,) = assess(
        [], replace(with_retired(world(), retired(at=1000)), now=1000 + 7 * 86_400), WEEK
    )
    assert isinstance(gone.action, Remove)
    assert (KEY, WANTED.digest) == (gone.action.key, gone.action.retired)
    assert "cache.keep_retired_s" in gone.action.reason


def test_a_text_that_comes_back_is_adopted_and_not_built() -> None:
    """A -> B -> A: what is in its place is put aside by the one that comes."""
    found, shown = assess([desired()], with_retired(world(artifact(made=OTHER)), retired()), WEEK)
    assert found.state is State.STALE
    assert (
        Adopt(key=KEY, reason=found.reason, fingerprint=WANTED, source=None, take=True)
        == found.action
    )
    assert "retired prompt cache of m/p" in found.reason
    assert shown.action is None


def test_a_renamed_prompt_takes_its_artifact_over() -> None:
    """`mv a.md b.md`: the artifact is renamed, and put aside by nobody."""
    actions = plan(assess([desired(B)], world(artifact(A)), WEEK))
    reason = "the prompt cache of m/a has the same text and parameters"
    assert (Adopt(key=B, reason=reason, fingerprint=WANTED, source=A, take=True),) == actions


def test_a_copied_prompt_copies_the_artifact() -> None:
    """`cp a.md c.md`: both are fresh afterwards."""
    actions = plan(assess([desired(A), desired(C)], world(artifact(A)), WEEK))
    assert [(type(action), action.key) for action in actions] == [(Adopt, C)]
    assert isinstance(actions[0], Adopt)
    assert not actions[0].take


def test_only_the_last_of_several_takes_the_source_over() -> None:
    """The others copy it, and do so before."""
    actions = plan(assess([desired(A), desired(B)], with_retired(world(), retired()), WEEK))
    assert [(type(a), a.key, a.take) for a in actions if isinstance(a, Adopt)] == [
        (Adopt, A, False),
        (Adopt, B, True),
    ]


def test_a_stale_artifact_of_a_declared_prompt_is_a_source_too() -> None:
    """Two files that exchange their texts: both are copied before either is put aside."""
    observed = world(artifact(A), artifact(B, OTHER))
    actions = plan(assess([desired(A, OTHER), desired(B, WANTED)], observed, WEEK))
    assert [(type(a), a.key, a.source) for a in actions if isinstance(a, Adopt)] == [
        (Adopt, A, B),
        (Adopt, B, A),
    ]


def test_a_corrupt_artifact_is_no_source() -> None:
    """The text is read again."""
    found, _ = assess([desired(B)], world(artifact(A, corrupt="cut")), WEEK)
    assert isinstance(found.action, Build)


def test_a_quarantined_fingerprint_is_not_adopted() -> None:
    """It failed when it was used, and would again."""
    observed = with_retired(world(verdicts={KEY: quarantine(until=10)}), retired())
    assert assess([desired()], observed, WEEK)[0].state is State.QUARANTINED


@pytest.mark.parametrize("until", [0, -5, 2 * MAX_QUARANTINE_S])
def test_what_was_quarantined_is_built_again_when_its_time_has_come(until: float) -> None:
    """It is not adopted, as it failed when it was used.

    A time that no quarantine lasts was written by a clock that was wrong.
    """
    observed = with_retired(world(verdicts={KEY: quarantine(until=until)}), retired())
    [assessment, *_] = assess([desired()], observed, WEEK)
    assert isinstance(assessment.action, Build)


def test_a_quarantine_blocks_until_its_end_whatever_else_there_is() -> None:
    for observed in (world(), world(artifact(corrupt="damaged"))):
        sentenced = replace(observed, verdicts={KEY: quarantine(until=10)})
        [assessment] = assess([desired()], sentenced, WEEK)
        assert assessment.state is State.QUARANTINED
        assert assessment.action == Blocked(
            key=KEY, reason="it did not work", hint="do something", retry_at=10
        )


@pytest.mark.parametrize(
    "kind", [VerdictKind.FAILED, VerdictKind.TOO_LONG, VerdictKind.UNCACHEABLE]
)
def test_a_verdict_on_building_keeps_nothing_from_being_adopted(kind: VerdictKind) -> None:
    """The artifact is there: it need not be built."""
    observed = with_retired(world(verdicts={KEY: verdict(kind, retry_at=60)}), retired())
    assert isinstance(assess([desired()], observed, WEEK)[0].action, Adopt)


def test_the_limits_hold_for_what_is_adopted() -> None:
    """As for what is built."""
    observed = with_retired(world(), retired())
    short = assess([desired()], observed, replace(WEEK, min_tokens=101))[0]
    large = assess([desired()], observed, replace(WEEK, max_bytes=999))[0]
    assert [(short.state, short.action), large.state] == [(State.UNCACHED, None), State.BLOCKED]
    assert large.reason == "needs 1,000 bytes, 999 of cache.max_bytes 999 are left"


def test_retired_artifacts_get_what_the_declared_ones_leave_the_youngest_first() -> None:
    """The oldest goes first."""
    keys = [made_of(text) for text in ("old", "middle", "young")]
    kept = [retired(made=made, size_bytes=300, at=at) for at, made in enumerate(keys)]
    observed = with_retired(world(artifact(size_bytes=400)), *kept)
    found = assess([desired()], observed, replace(WEEK, max_bytes=1000))
    gone = [one.retired for one in found if isinstance(one.action, Remove)]
    assert gone == [keys[0].digest]
    assert State.FRESH is found[0].state


def test_without_a_budget_the_oldest_go_when_the_disk_is_nearly_full() -> None:
    """An editor's hundred saves must not fill a card; nor does one go before that."""
    kept = [retired(made=made_of(str(at)), size_bytes=300, at=at) for at in range(3)]
    observed = with_retired(world(), *kept)

    def gone(spare_bytes: int) -> list[str]:
        found = assess([], replace(observed, spare_bytes=spare_bytes), WEEK)
        return [one.retired for one in found if isinstance(one.action, Remove)]

    assert [len(gone(spare)) for spare in (5000, 0, -1, -300, -301)] == [0, 0, 1, 1, 2]
    assert gone(-1) == [kept[0].fingerprint]


def test_a_clock_that_jumps_lets_nothing_expire() -> None:
    """A board without a clock retires at an old time, and is set right a minute later."""
    observed = replace(with_retired(world(), retired(at=0)), now=1e9)
    assert isinstance(assess([], observed, WEEK)[0].action, Remove)
    assert (
        assess([], replace(observed, new_retired=frozenset({WANTED.digest})), WEEK)[0].action
        is None
    )


@pytest.mark.parametrize("tightened", [Limits(min_tokens=101), Limits(max_bytes=999)])
def test_what_the_limits_no_longer_allow_is_put_aside(tightened: Limits) -> None:
    """With the verdict that keeps it from being built again.

    It is adopted when they are what they were.
    """
    (found,) = assess(
        [desired()], world(artifact()), replace(tightened, keep_retired_s=WEEK.keep_retired_s)
    )
    assert isinstance(found.action, Retire)
    assert found.action.verdict is not None
    again = with_retired(world(verdicts={KEY: found.action.verdict}), retired())
    assert isinstance(assess([desired()], again, WEEK)[0].action, Adopt)


def test_a_retired_artifact_that_a_prompt_has_again_goes() -> None:
    """It is a second copy of a fresh one."""
    _, gone = assess([desired()], with_retired(world(artifact()), retired(A)), WEEK)
    assert isinstance(gone.action, Remove)
    assert gone.reason == "m/p has the same prompt cache"


def test_with_nothing_kept_what_nobody_declares_is_removed_at_once() -> None:
    """keep_retired_s: 0."""
    found = assess([], with_retired(world(artifact(A)), retired(B, OTHER)), NO_LIMITS)
    assert [type(one.action) for one in found] == [Remove, Remove]


# --- properties ---

KEYS = [Key(model, prompt) for model in "mn" for prompt in "abc"]
FINGERPRINTS = [made_of(text) for text in ("one", "two", "three")]
SIZES = st.sampled_from([1, 400, 600])
ARTIFACTS = st.builds(
    lambda made, tokens, size_bytes, corrupt: artifact(
        made=made, tokens=tokens, size_bytes=size_bytes, corrupt=corrupt
    ),
    st.sampled_from(FINGERPRINTS),
    st.integers(1, 30),
    SIZES,
    st.sampled_from(["", "", "damaged"]),
)
VERDICTS = st.builds(
    lambda made, kind, retry_at, tokens, needed_bytes: Verdict(
        fingerprint=made.digest,
        kind=kind,
        trouble=TROUBLE,
        retry_at=retry_at,
        tokens=tokens,
        needed_bytes=needed_bytes,
    ),
    st.sampled_from(FINGERPRINTS),
    st.sampled_from(VerdictKind),
    st.sampled_from([0.0, 100.0]),
    st.integers(1, 30),
    SIZES,
)
RETIRED = st.builds(
    lambda key, made, tokens, size_bytes, at: Retired(
        key=key, fingerprint=made.digest, tokens=tokens, size_bytes=size_bytes, retired_at=at
    ),
    st.sampled_from(KEYS),
    st.sampled_from(FINGERPRINTS),
    st.integers(1, 30),
    SIZES,
    st.sampled_from([10.0, 40.0, 90.0]),
)
WORLDS = st.builds(
    lambda artifacts, verdicts, unlisted, kept, spare_bytes: Observed(
        artifacts={key: replace(found, key=key) for key, found in artifacts.items()},
        verdicts=verdicts,
        unlisted_models=frozenset(unlisted),
        retired={one.fingerprint: one for one in kept},
        spare_bytes=spare_bytes,
        now=50.0,
    ),
    st.dictionaries(st.sampled_from(KEYS), ARTIFACTS),
    st.dictionaries(st.sampled_from(KEYS), VERDICTS),
    st.sets(st.sampled_from("mn")),
    st.lists(RETIRED),
    st.none() | st.sampled_from([-700, 0, 10_000]),
)
LIMITS = st.builds(
    lambda max_bytes, min_tokens, keep_retired_s: Limits(
        max_bytes=max_bytes, min_tokens=min_tokens, keep_retired_s=keep_retired_s
    ),
    st.none() | st.sampled_from([500, 1000, 5000]),
    st.sampled_from([0, 10, 20]),
    st.sampled_from([0, 20, 100]),
)
WISHES = st.lists(
    st.builds(
        lambda key, wanted: DesiredPrompt(
            key=key, fingerprint=wanted, trouble=None if wanted else TROUBLE
        ),
        st.sampled_from(KEYS),
        st.none() | st.sampled_from(FINGERPRINTS),
    ),
    unique_by=lambda prompt: prompt.key,
)


@given(WISHES.map(lambda prompts: [p for p in prompts if p.fingerprint]))
def test_the_plan_of_a_fully_fresh_world_is_empty(prompts: list[DesiredPrompt]) -> None:
    """Nothing to build, to remove or to complain about."""
    observed = world(*(artifact(p.key, p.fingerprint) for p in prompts if p.fingerprint))
    assert plan(assess(prompts, observed, NO_LIMITS)) == ()
    assert plan(assess(prompts, observed, WEEK)) == ()


@given(WISHES, WORLDS, LIMITS)
def test_each_prompt_has_one_state_and_at_most_one_action(
    prompts: list[DesiredPrompt], observed: Observed, limits: Limits
) -> None:
    """Declared or not; the action is about this very prompt.

    The same look gives the same plan.
    """
    found = assess(prompts, observed, limits)
    assert {p.key for p in prompts} | set(observed.artifacts) == {
        one.key for one in found if not one.retired
    }
    assert sorted(observed.retired) == sorted(one.retired for one in found if one.retired)
    assert len({(one.key, one.retired) for one in found}) == len(found)
    assert all(one.action is None or one.action.key == one.key for one in found)
    assert all(one.reason for one in found if one.state is not State.FRESH)
    assert found == assess(prompts, observed, limits)


@given(WISHES, WORLDS, LIMITS)
def test_what_is_fresh_keeps_to_the_limits(
    prompts: list[DesiredPrompt], observed: Observed, limits: Limits
) -> None:
    """Together they fit into the budget, and none is too short."""
    fresh = [
        observed.artifacts[one.key]
        for one in assess(prompts, observed, limits)
        if one.state is State.FRESH
    ]
    assert limits.max_bytes is None or sum(one.size_bytes for one in fresh) <= limits.max_bytes
    assert all(one.tokens >= limits.min_tokens for one in fresh)


@given(
    WISHES,
    WORLDS,
    LIMITS,
    st.dictionaries(st.sampled_from(KEYS), st.tuples(st.integers(1, 30), SIZES)),
)
def test_carrying_out_the_plan_leaves_nothing_to_do(
    prompts: list[DesiredPrompt],
    observed: Observed,
    limits: Limits,
    real: Mapping[Key, tuple[int, int]],
) -> None:
    """Looking again gives no Build and no Remove in the end, whatever the builds turn out to be."""
    for _ in range(len(KEYS) + 2):
        actions = [a for a in plan(assess(prompts, observed, limits)) if not isinstance(a, Blocked)]
        if not actions:
            return
        observed = carry_out(actions, observed, limits, real)
    pytest.fail(f"the plan does not come to rest: {actions}")


@given(WISHES, WORLDS, st.lists(st.sampled_from(KEYS)))
def test_what_was_once_there_is_never_built_again_within_its_time(
    prompts: list[DesiredPrompt], observed: Observed, away: list[Key]
) -> None:
    """Prompts that go away and come back, in any order.

    With room and time enough nothing is prefilled again.
    """
    observed = replace(observed, verdicts={}, unlisted_models=frozenset(), spare_bytes=None)
    limits = Limits(keep_retired_s=1000)
    prompts = [p for p in prompts if p.fingerprint]
    observed = settle(prompts, observed, limits)
    rest = [p for p in prompts if p.key not in away]
    observed = settle(rest, observed, limits)
    actions = plan(assess(prompts, observed, limits))
    assert not [action for action in actions if isinstance(action, Build)]


def settle(prompts: list[DesiredPrompt], observed: Observed, limits: Limits) -> Observed:
    """The world when all is done."""
    for _ in range(len(KEYS) + 2):
        actions = [a for a in plan(assess(prompts, observed, limits)) if not isinstance(a, Blocked)]
        if not actions:
            return observed
        observed = carry_out(actions, observed, limits, {})
    pytest.fail(f"the plan does not come to rest: {actions}")


def carry_out(
    actions: list[Action], observed: Observed, limits: Limits, real: Mapping[Key, tuple[int, int]]
) -> Observed:
    """What the world is like after these actions."""
    disk = Disk(observed, limits)
    for action in actions:
        match action:
            case Remove():
                disk.remove(action)
            case Retire():
                disk.retire(action)
            case Adopt():
                disk.adopt(action)
            case Build():
                disk.build(action, *real.get(action.key, (15, 400)))
    return replace(observed, artifacts=disk.artifacts, verdicts=disk.verdicts, retired=disk.retired)


class Disk:
    """A simulated executor: what each action would do to the store."""

    def __init__(self, observed: Observed, limits: Limits) -> None:
        self.artifacts = dict(observed.artifacts)
        self.verdicts = dict(observed.verdicts)
        self.retired = dict(observed.retired)
        self._now = observed.now
        self._limits = limits

    def put_aside(self, key: Key) -> None:
        old = self.artifacts.pop(key, None)
        if old is not None and not old.corrupt and self._limits.keep_retired_s:
            self.retired[old.fingerprint] = Retired(
                key=key,
                fingerprint=old.fingerprint,
                tokens=old.tokens,
                size_bytes=old.size_bytes,
                retired_at=self._now,
            )

    def retire(self, action: Retire) -> None:
        self.put_aside(action.key)
        if action.verdict:
            self.verdicts[action.key] = action.verdict

    def adopt(self, action: Adopt) -> None:
        digest = action.fingerprint.digest
        source = (
            self.retired[digest] if action.source is None else self.artifacts.get(action.source)
        )
        if source is None or source.fingerprint != digest:
            return  # another adoption came first: the next look sees it
        if action.take and action.source is None:
            del self.retired[digest]
        elif action.take and action.source is not None:
            del self.artifacts[action.source]
        self._publish(action, source.tokens, source.size_bytes)

    def remove(self, action: Remove) -> None:
        if action.retired:
            del self.retired[action.retired]
            return
        del self.artifacts[action.key]
        if action.verdict:
            self.verdicts[action.key] = action.verdict

    def build(self, action: Build, tokens: int, size_bytes: int) -> None:
        digest, limit = action.fingerprint.digest, self._limits.max_bytes
        used = sum(other.size_bytes for key, other in self.artifacts.items() if key != action.key)
        if tokens < self._limits.min_tokens:
            self.verdicts[action.key] = too_short(digest, tokens, self._limits.min_tokens)
        elif limit is not None and used + size_bytes > limit:
            self.verdicts[action.key] = over_budget(digest, size_bytes, used, limit)
        else:
            self._publish(action, tokens, size_bytes)

    def _publish(self, action: Adopt | Build, tokens: int, size_bytes: int) -> None:
        self.put_aside(action.key)
        self.artifacts[action.key] = artifact(
            action.key, action.fingerprint, tokens=tokens, size_bytes=size_bytes
        )
        self.verdicts.pop(action.key, None)
