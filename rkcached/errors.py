"""Every error this program raises on purpose, in one tree.

Each error says what happened in its message and the next thing to do in its hint, so that any edge
(command line, HTTP, log) can show it to a person without knowing what it is.
The numbers are exit codes.

    RkcachedError
      UsageError              the command line was wrong                                   64
        ExtraMissing          an optional library is not installed                         69
      OutputError             standard output cannot be written                            74
      ManifestError           the manifest has problems: a list, each with file:line       78
      SettingsError           a flag or variable has an impossible value                   78
      NotPermitted            the command is for root, or for the daemon's user            77
      SourceError             an input file is missing or unusable                         66
        SourceUnsettled       somebody is writing to it
      TemplateError           a chat template cannot render this                           65
        TemplateExhausted     it takes too much time or memory for that
      FormatError             a file is not what it should be, or a damaged one            65
        NotTrusted            nobody whom the manifest trusts has signed this bundle
      StoreError              the store cannot be read or written                          73
        StoreLocked           another daemon owns the cache directory                      75
        BudgetExceeded        the artifact does not fit into cache.max_bytes
        NoRoom                the artifact does not fit on the disk: needed and free bytes
      SocketError             the socket path is unusable or taken                         73
      DaemonUnreachable       nobody answers on the socket                                 69
        NotAllowed            its permissions keep us out                                  77
      AnotherServer           another program answers on the socket                        69
      NotFresh                a prompt cache will not become fresh by waiting              65
      StillWaiting            it was not fresh in time                                     75
      EngineError             the engine refused or failed; the worker lives on            70
        ModelLoadError        the model file cannot be loaded                              66
        RuntimeLibraryError   the engine's shared library is missing, damaged or unknown   66
        ArtifactLoadError     a prompt cache cannot be loaded; the KV state is cleared
        ContextExceeded       the prompt is longer than the context: both numbers
        SamplingFixed         a run asks for sampling that the engine cannot change or lacks
        InputInvalid          tokens that the model does not have
        SchemaInvalid         what an answer shall look like is no JSON schema
        SchemaMismatch        the answer is not what the request's schema asks for
        PromptTooShort        below cache.min_tokens: both numbers
        Uncacheable           the model cannot save its state with this runtime
        VerifyFailed          a built prompt cache did not prove itself
        Aborted               the run was stopped on request
      WorkerError             the worker process failed                                    70
        WorkerDied            signal or exit code
        WorkerTimeout         a deadline passed; the worker was killed
          GrammarStuck        it found no token that fits the request's schema
        WorkerUnavailable     in backoff after failures, or shutting down
        ModelReplaced         the model's files are no longer those that were looked at
      RequestError            a client's request cannot be served: HTTP status, code, param
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar


class RkcachedError(Exception):
    """Base of all expected errors.

    `message` says what happened, `hint` the next thing to do (it may be empty).
    """

    exit_code: ClassVar[int] = os.EX_SOFTWARE
    passing: ClassVar[bool] = False
    """Whether it may end without anybody's doing, so that the daemon tries again soon."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def printable(text: str) -> str:
    """A foreign text, with escapes in place of letters that terminals obey instead of printing."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


# What a terminal obeys: control characters but for tab and newline, separators of lines, and what
# turns the order of a text (the embeddings, overrides and isolates of Unicode's bidirectional
# algorithm). Joiners and direction marks stay, as many scripts need them.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """A foreign text of several lines, with escapes in place of what a terminal would obey."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class UsageError(RkcachedError):
    exit_code = os.EX_USAGE


class ExtraMissing(UsageError):
    """The command needs an optional library that is not installed."""

    exit_code = os.EX_UNAVAILABLE


class OutputError(RkcachedError):
    """Standard output cannot be written."""

    exit_code = os.EX_IOERR


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong in a file, with the place (1-based line) and the next thing to do."""

    file: str
    line: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class ManifestError(RkcachedError):
    """The manifest cannot be used; `problems` holds every reason, in file order."""

    exit_code = os.EX_CONFIG

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(
            f"{counted(len(problems), 'problem')} in the manifest: {problems[0]}",
            hint="run `rkcached check` to see all of them",
        )
        self.problems = problems


class SettingsError(RkcachedError):
    """A flag or an environment variable has a value that it cannot have."""

    exit_code = os.EX_CONFIG


class NotPermitted(RkcachedError):
    """A command changes or shows what is not for the user who runs it."""

    exit_code = os.EX_NOPERM


class SourceError(RkcachedError):
    exit_code = os.EX_NOINPUT


class SourceUnsettled(SourceError):
    """An input file changes while it is read."""

    passing = True


class TemplateError(RkcachedError):
    exit_code = os.EX_DATAERR


class TemplateExhausted(TemplateError):
    """A chat template did not end in time, or needs more memory than a render may have."""


class FormatError(RkcachedError):
    exit_code = os.EX_DATAERR


class NotTrusted(FormatError):
    """A bundle has no signature of a key in cache.trust, or was changed since it was signed."""


class StoreError(RkcachedError):
    exit_code = os.EX_CANTCREAT
    passing = True


class StoreLocked(StoreError):
    exit_code = os.EX_TEMPFAIL


class BudgetExceeded(StoreError):
    """`needed_bytes` more do not fit beside the other artifacts within cache.max_bytes."""

    def __init__(self, message: str, *, needed_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes


class NoRoom(StoreError):
    """`needed_bytes`, at the least, do not fit on the disk."""

    def __init__(self, message: str, *, needed_bytes: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.needed_bytes = needed_bytes


class SocketError(RkcachedError):
    exit_code = os.EX_CANTCREAT


class DaemonUnreachable(RkcachedError):
    exit_code = os.EX_UNAVAILABLE


class NotAllowed(DaemonUnreachable):
    """The socket's permissions keep us out."""

    exit_code = os.EX_NOPERM

    def __init__(self, socket: str) -> None:
        super().__init__(
            f"permission denied on {socket}",
            hint="members of the group rkcached may ask "
            "(`sudo adduser NAME rkcached`, then log in again); "
            "changes are for root: sudo",
        )


class AnotherServer(RkcachedError):
    """Another program answers on the socket, so waiting for the daemon does not help."""

    exit_code = os.EX_UNAVAILABLE


class NotFresh(RkcachedError):
    """A prompt cache will not become fresh, however long one waits: something must be changed."""

    exit_code = os.EX_DATAERR


class StillWaiting(RkcachedError):
    """A prompt cache did not become fresh in time."""

    exit_code = os.EX_TEMPFAIL


class EngineError(RkcachedError):
    """The engine refused or failed. The worker that hosts it lives on."""


class ModelLoadError(EngineError):
    exit_code = os.EX_NOINPUT


class RuntimeLibraryError(EngineError):
    """The engine's shared library is missing, damaged, unknown, or another library."""

    exit_code = os.EX_NOINPUT


class ArtifactLoadError(EngineError):
    """A prompt cache cannot be loaded. Whoever raises this has cleared the KV state."""


class ContextExceeded(EngineError):
    """A prompt of `tokens` does not fit the context of `limit` tokens that the model was given.

    The engine gives none that is larger than the model's own, `trained_tokens`, where it knows
    that.
    """

    def __init__(self, tokens: int, limit: int, trained_tokens: int | None = None) -> None:
        self.tokens = tokens
        self.limit = limit
        self.trained_tokens = trained_tokens
        message = f"the prompt has {tokens} tokens, the context holds {limit}"
        super().__init__(message, hint=self.remedy("the prompt"))

    def remedy(self, text: str) -> str:
        """The next thing to do; `text` is what is too long, in the caller's words."""
        if self.trained_tokens is not None and max(self.limit, self.tokens) >= self.trained_tokens:
            return f"shorten {text}: the model's own context is {self.trained_tokens} tokens"
        bound = "" if self.trained_tokens is None else f" up to {self.trained_tokens}"
        return f"shorten {text}, or raise params.max_context_len of the model{bound}"


class SamplingFixed(EngineError):
    """The run asks for a sampling value (`param`) that this engine fixes or does not have."""

    def __init__(self, message: str, *, param: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.param = param


class InputInvalid(EngineError):
    """The model cannot read this: tokens that it does not have, or no text at all."""


class SchemaInvalid(EngineError):
    """The schema that the request gives is no JSON schema, or one that cannot be checked."""


class SchemaMismatch(EngineError):
    """The answer (`text`) is not JSON that fits the request's schema."""

    def __init__(self, message: str, *, text: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.text = text


class PromptTooShort(EngineError):
    """A prompt of `tokens` is below cache.min_tokens (`limit`)."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens} tokens, cache.min_tokens is {limit}",
            hint="requests are answered without a cache; lower cache.min_tokens to cache it",
        )
        self.tokens = tokens
        self.limit = limit


class Uncacheable(EngineError):
    """The model cannot save its state with this runtime: a lasting fact, not worth a retry."""


USE_PROVE = "import with --prove, which compares each prompt cache with a prefill"
"""The way to import what another machine's proof does not show to be good."""


class VerifyFailed(EngineError):
    """A freshly built prompt cache did not prove itself, so it must not be published."""


class Aborted(EngineError):
    """The run was stopped on request; no result."""


class WorkerError(RkcachedError):
    """The worker process failed; it will be restarted."""


class WorkerDied(WorkerError):
    """The worker process ended by a signal or an exit code."""


class WorkerTimeout(WorkerError):
    """A deadline passed while waiting for the worker, which was killed."""


class GrammarStuck(WorkerTimeout):
    """An answer that is held to a JSON schema had no first token: the worker was ended for it."""


class WorkerUnavailable(WorkerError):
    """The worker is in backoff after failures, or shutting down."""


class ModelReplaced(WorkerError):
    """The model's files changed since the last look; another look finds out what they are."""


class RequestError(RkcachedError):
    """A client's request cannot be served; the fields follow OpenAI's error envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        hint: str = "",
        retry_after_s: int = 0,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
