"""Checks a JSON schema before a run, in a process that can be killed.

A schema comes from a client. A library may take for ever over one, take gigabytes, or end the
process: a pattern is a program, `$ref` a loop, `maxItems` a number of grammar rules. So a schema is
read, bounded, tried and, where the engine compiles it to a grammar, compiled once as a rehearsal,
all in a child with limits of time and memory. Whatever goes wrong there has the same answer:
SchemaInvalid. A bad schema never reaches a worker, which holds a model.

Used from threads, one schema at a time; never from the event loop. The last verdicts are
remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import re
import signal
import socket
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from rkcached.errors import SchemaInvalid, WorkerUnavailable
from rkcached.messages.sandbox import Process, end_all, receive, restrict, send, start
from rkcached.worker.schema_tree import keywords, parts, relocated

MAX_SCHEMA_BYTES = 64 << 10

MAX_REPEATS = 10_000
"""The sum of all counts (`maxItems` and the like) of a schema; llama.cpp makes rules of them, 9 GB
of 10^9."""

MAX_LENGTHS = 50_000
"""The sum of all `minLength` and `maxLength`, each of which is bounded as the other counts are."""

MAX_PATTERN_CHARACTERS = 1_000

CPU_LIMIT_S = 3.0
"""An honest schema takes some milliseconds. It is CPU time: a busy machine makes no schema wrong.
"""

PATIENCE_S = 60.0
"""For an answer of the child, on a machine that is too busy to give it its CPU time."""

IDLE_S = 60.0
"""The child is worth 30 MB, and is ended when no schema came for so long."""

# A child that ends so was not ended by the schema, but by us, a person, or the kernel when memory
# ran out.
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)

# The schema alone used up its CPU time.
_SLOW = -signal.SIGPROF

_REMEMBERED = 256
_COUNTS = ("minItems", "maxItems", "minProperties", "maxProperties", "minContains")
_LENGTHS = ("minLength", "maxLength")
# llguidance may give up on a part with more alternatives than these; it does so at 2,000 states.
_MANY_CHOICES = 100
# The bytes that an answer may begin with, in the order in which they are tried, and how many of
# them are written on trial: they lead into objects, lists and texts.
_OPENING = (*b'{["', *range(0x21, 0x7F))
_FIRST_BYTES = 10

# An escape, the beginning of a set with a bracket that is a part of it, its end, or an operator.
_OF_SETS = re.compile(r"\\.|\[\^?\]?|\]|&&|--|~~", re.DOTALL)

MAX_EXACT = 2**53
"""llguidance reads numbers as JavaScript does."""

_EXACT = frozenset({"const", "enum", "minimum", "maximum", "multipleOf"})

_HINT = "correct or simplify the schema, or set lower limits in it"
# A schema that cannot be evaluated on these cannot check an answer either.
_SAMPLES: tuple[Any, ...] = (None, True, 0, 1.5, "", "a", [], [0, "a"], {}, {"a": 1})


class SchemaChecker:
    """The child, started when it is needed and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, str] = OrderedDict()
        self._running: list[Process] = []
        self._idle: threading.Timer | None = None
        self._finalizer = weakref.finalize(self, end_all, self._running)

    def check(self, schema: str, *, compiled: bool) -> None:
        """Accept or reject a schema; `compiled`: the engine makes a grammar of it.

        Errors: SchemaInvalid; WorkerUnavailable if the child cannot be started.
        """
        digest = hashlib.sha256(f"{compiled}{schema}".encode()).digest()
        with self._lock:
            if digest not in self._verdicts:
                self._verdicts[digest] = self._ask({"schema": schema, "compiled": compiled})
            self._verdicts.move_to_end(digest)
            if len(self._verdicts) > _REMEMBERED:
                self._verdicts.popitem(last=False)
            verdict = self._verdicts[digest]

        if verdict:
            raise SchemaInvalid(verdict, hint=_HINT)

    def kill(self) -> None:
        """End the child now, whatever it is doing. A check that waits for it fails.

        Does not wait.
        """
        for process in tuple(self._running):
            process.popen.kill()

    def close(self) -> None:
        """End the child after its present check. It is started again if it is needed."""
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            end_all(self._running)

    def _ask(self, question: dict[str, Any]) -> str:
        """The problem of the schema in words, from the child; empty if there is none.

        Errors: SchemaInvalid, WorkerUnavailable.
        """
        is_new = self._start()
        answer = self._exchange(question)
        if isinstance(answer, int) and answer not in (*_KILLED, _SLOW) and not is_new:
            # Schemas before this one may have used up the memory: only the death of a new child is
            # the fault of this one.
            self._start()
            answer = self._exchange(question)
        if isinstance(answer, str):
            return answer

        problem = "checking the schema takes too much time or memory"
        if answer in _KILLED:  # not remembered: somebody else ended the child
            raise SchemaInvalid(problem, hint=_HINT)
        return problem

    def _start(self) -> bool:
        """Start a child unless one runs. True: it is a new one. Errors: WorkerUnavailable."""
        if self._running and self._running[0].popen.poll() is not None:
            end_all(self._running)
        if self._running:
            return False

        try:
            self._running.append(start("rkcached.worker.schemas"))
        except OSError as error:
            problem = f"the process that checks schemas cannot be started: {error}"
            hint = "is the machine out of memory or processes?"
            raise WorkerUnavailable(problem, hint=hint) from error
        return True

    def _exchange(self, question: dict[str, Any]) -> str | int:
        """The child's answer; if it died or was silent, its exit code (as Popen.returncode)."""
        self._end_when_idle()
        connection = self._running[0].connection
        connection.settimeout(PATIENCE_S)
        try:
            send(connection, json.dumps(question).encode())
            body = receive(connection, PATIENCE_S)
        except (OSError, ValueError):
            body = None
        if body is not None:
            with contextlib.suppress(ValueError, RecursionError):
                problem = json.loads(body)
                if isinstance(problem, str):
                    return problem

        process = self._running[0]
        end_all(self._running)
        return process.popen.returncode

    def _end_when_idle(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
        self._idle = threading.Timer(IDLE_S, self.close)
        self._idle.daemon = True
        self._idle.start()


# The child


def main() -> None:
    """Check schemas for the daemon, on the socket that the argument names, until that closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    importlib.import_module("jsonschema")  # before memory is limited
    restrict()
    send(connection, b"ready")
    while (data := receive(connection, None)) is not None:
        question = json.loads(data)
        # SIGPROF ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        problem = find_problem(question["schema"], compiled=question["compiled"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(connection, json.dumps(problem).encode())


def find_problem(schema: str, *, compiled: bool) -> str:
    """The problem of a schema in words; empty if there is none.

    May take for ever, or end the process. Errors: MemoryError; a process that was so short of
    memory is not fit for another schema.
    """
    try:
        value = json.loads(schema, parse_constant=no_constant)
        json.dumps(value, allow_nan=False)  # 1e999 is JSON, but no number
        problem = _beyond_bounds(value) or _not_a_schema(value)
        if compiled and not problem:
            problem = _read_otherwise(value) or _not_a_grammar(value)
        return problem
    except MemoryError:
        raise
    except RecursionError:
        return "not a JSON schema that can be used: its references form a loop"
    except BaseException as error:  # noqa: BLE001 - compiled libraries raise what they like
        words = shortened(str(error)) or "the library that reads it failed"
        return f"not a JSON schema that can be used: {words}"


def _beyond_bounds(schema: Any) -> str:
    repeats = lengths = 0.0
    for keyword, value in keywords(schema):
        if keyword in _COUNTS and isinstance(value, int | float):
            repeats += abs(value)
        if keyword in _LENGTHS and isinstance(value, int | float):
            lengths += abs(value)
            if abs(value) > MAX_REPEATS:
                return f"{keyword} is {value:,}; {MAX_REPEATS:,} is the most"
        if repeats > MAX_REPEATS:
            limit = f"all counts of a schema together may be {MAX_REPEATS:,} at most"
            return f"{keyword} is {value:,}; {limit}"
        if lengths > MAX_LENGTHS:
            limit = f"all lengths of a schema together may be {MAX_LENGTHS:,} at most"
            return f"{keyword} is {value:,}; {limit}"
        if keyword == "pattern" and isinstance(value, str) and len(value) > MAX_PATTERN_CHARACTERS:
            limit = f"at most {MAX_PATTERN_CHARACTERS:,} are accepted"
            return f"a pattern has {len(value):,} characters, {limit}"
    return ""


def _not_a_schema(schema: Any) -> str:
    """Errors: whatever the libraries raise."""
    import jsonschema  # noqa: PLC0415 - only the child needs it
    import referencing.jsonschema  # noqa: PLC0415

    if isinstance(schema, dict) and not isinstance(schema.get("$schema", ""), str):
        return "not a JSON schema: $.$schema: it must be a text that names a version"

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        return f"not a JSON schema: {error.json_path}: {shortened(str(error.message))}"

    for keyword, value in keywords(schema):
        if keyword == "pattern" and isinstance(value, str):
            re.compile(value)
    root = referencing.jsonschema.DRAFT202012.create_resource(schema)
    resolver = referencing.Registry().resolver_with_root(root)
    references = {
        value for keyword, value in keywords(schema) if keyword == "$ref" and isinstance(value, str)
    }
    for reference in references:
        if not isinstance(resolver.lookup(reference).contents, dict | bool):
            return f"$ref {shortened(reference)} leads to no schema"

    # A loop shows where it is entered, which may be deep inside the schema.
    validator = kind(schema, registry=referencing.Registry())
    for part in (schema, *({"$ref": reference} for reference in references)):
        for sample in _SAMPLES:
            validator.evolve(schema=part).is_valid(sample)
    return ""


def _read_otherwise(schema: Any) -> str:
    """A keyword that llguidance reads otherwise than the JSON schema says, in words; or nothing.

    It would write what no check of the answer accepts.
    """
    for keyword, value in keywords(schema):
        if keyword.startswith("x-guidance"):
            return f"{keyword} is not accepted"

        if keyword == "pattern" and isinstance(value, str) and _has_nested_set(value):
            return f"the pattern {shortened(value)} has a set of characters, [...], within another"

        values = value if keyword == "enum" and isinstance(value, list) else [value]
        if keyword in _EXACT and any(map(_is_inexact, values)):
            return f"{keyword} has a whole number beyond 2^53, which cannot be written exactly"

    return ""


def _has_nested_set(pattern: str) -> bool:
    """Whether it has `[[:alpha:]]`, `[a[b]]` or `[a&&b]`, which Rust alone reads as two sets."""
    is_in_set = False
    for match in _OF_SETS.finditer(pattern):
        sign = match[0]
        if sign.startswith("\\"):
            continue

        if is_in_set and sign != "]":
            return True
        is_in_set = sign.startswith("[")

    return False


def _is_inexact(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > MAX_EXACT


def _not_a_grammar(schema: Any) -> str:
    """Compile it as llama.cpp will, by the same library. Errors: whatever that raises.

    A part that the answer may reach only later is tried on its own, as no error may come after the
    first token.
    """
    try:
        llguidance = importlib.import_module("llguidance")
    except ImportError:
        return ""  # then only llama.cpp finds out that it cannot keep to the schema

    matcher = llguidance.LLMatcher
    tokens = llguidance.LLTokenizer("byte")

    for part in (schema, *_demanding_parts(schema)):
        grammar = matcher.grammar_from_json_schema(json.dumps(part))
        trial = matcher(tokens, grammar, log_level=0)
        _write_the_beginning(trial)
        if trial.is_error():
            return f"llama.cpp cannot keep to this schema: {_words_of(trial.get_error())}"

    return ""


def _demanding_parts(schema: Any) -> Iterator[Any]:
    """The parts that llguidance may give up on, each as what an object must have."""
    whole = relocated(schema, "#/$defs/whole")

    for place, part in parts(schema):
        choices = sum(len(part.get(keyword, ())) for keyword in ("properties", "anyOf", "oneOf"))
        if "pattern" in part or choices > _MANY_CHOICES:
            yield {
                "$defs": {"whole": whole},
                "type": "object",
                "properties": {"a": {"$ref": f"#/$defs/whole{place}"}},
                "required": ["a"],
            }


def _write_the_beginning(trial: Any) -> None:
    """Begin an answer: llguidance finds some limits only when it goes into an object or a text."""
    for _ in range(_FIRST_BYTES):
        if trial.is_error() or trial.is_stopped():
            return
        allowed = trial.compute_bitmask()
        byte = next((byte for byte in _OPENING if allowed[byte // 8] >> byte % 8 & 1), None)
        if byte is None:
            return
        trial.try_consume_tokens([byte])


def _words_of(error: str) -> str:
    first, *more = error.splitlines()
    # Of a bad pattern, the next line with this mark has the details.
    details = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return shortened(" ".join([first, *details[:1]]))


def shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
