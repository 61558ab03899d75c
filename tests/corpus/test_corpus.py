"""957 real chat templates: they render as transformers renders them, and none is forged.

The templates come from packages when this runs (`packages`), by `make test-templates`. transformers
is the referee. The findings that we know of are in `known.toml`, each with its reason.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from rkcached.errors import TemplateError
from rkcached.messages.sandbox import RENDER_TIMEOUT_S, Renderer
from rkcached.messages.template import ChatTemplate
from tests.corpus.checks import Check, Report, checked
from tests.corpus.collection import Sample, samples
from tests.corpus.known import surprises

PROGRESS_EVERY = 100


@pytest.fixture(scope="module")
def corpus() -> list[Sample]:
    every = samples()
    assert len(every) > 900
    return every


@pytest.fixture(scope="module")
def reports(corpus: list[Sample]) -> Iterator[list[Report]]:
    """All checks of all templates that were published to be used; their counts are printed."""
    honest = [sample for sample in corpus if not sample.hostile]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    done = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for report in pool.map(checked, honest, chunksize=8):
            done.append(report)
            if len(done) % PROGRESS_EVERY == 0:
                print(f"{len(done)} of {len(honest)} templates, {time.monotonic() - started:.0f} s")

    yield done
    _print_counts(done)


def _print_counts(reports: list[Report]) -> None:
    counts: Counter[tuple[Check, str]] = Counter()
    for report in reports:
        counts += report.counts

    print(f"\n{len(reports)} templates")
    for (check, outcome), count in sorted(counts.items()):
        print(f"{check:10} {outcome:50} {count:6}")


@pytest.mark.parametrize("check", Check)
def test_nothing_is_found_but_what_is_known(check: Check, reports: list[Report]) -> None:
    """In both directions: `known.toml` lists all that is found, and nothing else."""
    lines = surprises(check, reports)
    assert not lines, "\n".join(lines)


def test_templates_that_attack_the_program_fail(corpus: list[Sample]) -> None:
    """Those that were published as attacks: an error or a text in time, and nothing of ours."""
    renderer = Renderer()
    hostile = [sample for sample in corpus if sample.hostile]
    assert len(hostile) > 20
    try:
        for sample in hostile:
            started = time.monotonic()
            text = _attempted(renderer, sample)
            assert time.monotonic() - started < 2 * RENDER_TIMEOUT_S, sample.name
            assert "uid=" not in text, sample.name
            assert "root:" not in text, sample.name

        source = "{{ messages[0].content }}"
        chat = ChatTemplate(source, name="t", compile_elsewhere=renderer.compile)
        assert chat.render([{"role": "user", "content": "Hi"}]) == "Hi"
    finally:
        renderer.close()


def _attempted(renderer: Renderer, sample: Sample) -> str:
    try:
        chat = ChatTemplate(sample.source, name=sample.name, compile_elsewhere=renderer.compile)
        return chat.render([{"role": "user", "content": "Hi"}])
    except TemplateError as error:
        return error.message
