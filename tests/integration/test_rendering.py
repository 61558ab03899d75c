"""Chat templates of other people.

Whatever they do, it ends, and only the child that renders them is harmed.
"""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from rkcached.errors import TemplateError, TemplateExhausted
from rkcached.messages.builtin import BUILTIN
from rkcached.messages.message import Message
from rkcached.messages.sandbox import Renderer, _checked
from rkcached.messages.template import ChatTemplate
from tests.waiting import wait_until

MESSAGES = [Message(role="system", content="Be brief."), Message(role="user", content="Hello ü")]
GOOD = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
TIMEOUT_S = 2.0

BOMBS = {
    "a long range": "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% "
    "endfor %}",
    "a long text while compiling": "{{ 'a' * 10**10 }}",
    "a long number while compiling": "{{ 10 ** (10 ** 10) }}",
    "doubling": "{% set n = namespace(x='a' * 64) %}{% for i in range(60) %}{% set n.x = n.x ~ "
    "n.x %}{% endfor %}",
    "a wide field": "{{ '%9999999999d' % 1 }}",
    "a wide field of format": "{{ '{:>9999999999}'.format(1) }}",
    "a wide filter": "{{ 'x' | center(9999999999) }}",
    "a long list": "{{ (range(99999) | list) * 99999 }}",
    "a deep indent": "{{ messages | tojson(indent=999999999) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "wide recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% "
    "endmacro %}{{ f(60) }}",
    "nested parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "nested blocks": "{% if x %}" * 5_000 + "{% endif %}" * 5_000,
    "much output": "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
}

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(messages) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': messages}) }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{% set _ = messages.append(messages[0]) %}",
    "{% set _ = messages[0].update({'role': 'x'}) %}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.fixture
def renderer() -> Iterator[Renderer]:
    renderer = Renderer(timeout_s=TIMEOUT_S)
    yield renderer
    renderer.close()
    assert psutil.Process().children() == []


def elsewhere(renderer: Renderer, source: str) -> ChatTemplate:
    return ChatTemplate(source, name="theirs.jinja", compile_elsewhere=renderer.compile)


def test_same_text_as_in_place(renderer: Renderer) -> None:
    """A render in the child is that in this process, tools, errors and their lines included."""
    for source in (*BUILTIN.values(), GOOD):
        theirs = elsewhere(renderer, source + "{# not built in #}")
        ours = ChatTemplate(source, name="ours")

        assert theirs.may_wait
        assert not ours.may_wait
        assert ours.render(MESSAGES) == theirs.render(MESSAGES)
    with pytest.raises(TemplateError, match=r"theirs\.jinja, line 2: syntax error"):
        elsewhere(renderer, "\n{% for %}")
    with pytest.raises(TemplateError, match=r"theirs\.jinja, line 3: no such role"):
        elsewhere(renderer, "\n\n{{ raise_exception('no such role') }}").render(MESSAGES)


def test_builtin_templates_are_rendered_in_place(renderer: Renderer) -> None:
    """They are ours: no process, no price."""
    assert not elsewhere(renderer, BUILTIN["chatml"]).may_wait
    assert psutil.Process().children() == []


@pytest.mark.parametrize("bomb", BOMBS)
def test_bomb_ends(renderer: Renderer, bomb: str) -> None:
    """Time, memory and text of a render are bounded, also while it is compiled.

    The next template is not harmed.
    """
    before = psutil.Process().memory_info().rss
    with pytest.raises(TemplateError) as refused:
        elsewhere(renderer, BOMBS[bomb] + GOOD).render(MESSAGES)

    assert "theirs.jinja" in refused.value.message
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert "Be brief." in elsewhere(renderer, GOOD).render(MESSAGES)


@pytest.mark.parametrize("source", ESCAPES)
def test_escape_is_refused(renderer: Renderer, source: str) -> None:
    """No way out of the sandbox: it raises, or what it writes shows nothing of Python."""
    try:
        text = elsewhere(renderer, source).render(MESSAGES)
    except TemplateError:
        return
    assert not any(word in text for word in ("class", "root:", "uid=", "PATH", "module"))


def test_exhausted_template_rests(renderer: Renderer) -> None:
    """A template that never ends costs its deadline once in a while, not at each request."""
    bomb = elsewhere(
        renderer, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(TemplateExhausted, match="did not end within"):
        bomb.render(MESSAGES)

    for _ in range(100):
        with pytest.raises(TemplateExhausted, match="did not end within"):
            bomb.render(MESSAGES)
    assert psutil.Process().children() == []  # none was started for them


def test_child_cannot_write_files(renderer: Renderer) -> None:
    """Beyond the sandbox, a template's process has no files to write and little to read."""
    elsewhere(renderer, GOOD).render(MESSAGES)
    (child,) = psutil.Process().children()

    assert child.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert all(name.startswith(("PYTHON", "PATH", "LANG", "LC_")) for name in child.environ())


def test_killed_child_is_replaced(renderer: Renderer) -> None:
    """The next render starts another."""
    theirs = elsewhere(renderer, GOOD)
    (child,) = psutil.Process().children()
    child.kill()
    wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE, "it is dead")

    assert "Be brief." in theirs.render(MESSAGES)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"nothing",
        b"[" * 100_000,
        b'{"text": 5}',
        b'{"text": "\\ud800"}',
        b'{"error": 5}',
        b'{"error": "x", "hint": 5}',
    ],
)
def test_a_child_that_is_not_ours_any_more_is_ended(body: bytes) -> None:
    """Code that got into it may answer as it likes; a request is refused for it, and no more."""
    with pytest.raises(ValueError):  # noqa: PT011 - what `Renderer` expects of a broken child
        _checked(body)
