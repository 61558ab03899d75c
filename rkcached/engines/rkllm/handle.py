"""Owns the handle of a loaded model, receives its callbacks, and aborts its runs."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import weakref
from typing import Any

from rkcached.engines.rkllm.abi import Handle
from rkcached.engines.rkllm.library import CallError, Library
from rkcached.engines.rkllm.run import Run

_ABORT_AGAIN_S = 0.1


class Current:
    """The run that goes on, and the callback that the library calls."""

    def __init__(self) -> None:
        self.run: Run | None = None
        self._stopper: Stopper | None = None
        self.ended = threading.Lock()
        """Held while an abort is under way, so that no run begins and no handle is destroyed during
        it."""

    def begin(self, run: Run, stopper: Stopper) -> None:
        with self.ended:
            self.run = run
            self._stopper = stopper

    def end(self) -> None:
        with self.ended:
            self.run = None

    def on_result(self, result: Any, _userdata: Any, state: int) -> int:
        """The callback. It always returns 0, "go on": 1 would pause the run for ever."""
        run = self.run
        if run is None:
            return 0

        try:
            contents = result.contents if result else None
            wants_end = run.take(contents, state)
        except BaseException as error:  # noqa: BLE001 - it must not reach C; raise_failure has it
            run.stop_because(error)
            wants_end = True

        if wants_end and not run.saves and self._stopper is not None:
            self._stopper.stop(run)
        return 0


class Stopper:
    """Calls rkllm_abort from its own thread: never from the callback, only during its run."""

    def __init__(self, library: Library, handle: OwnedHandle, current: Current) -> None:
        self._library = library
        self._handle = handle
        self._current = current
        self._asked: Run | None = None
        self._queue: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="rkllm-abort", daemon=True)
        self._thread.start()

    def stop(self, run: Run) -> None:
        if self._asked is not run:
            self._asked = run
            self._queue.put(run)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (run := self._queue.get()) is not None:
            # Retry until it works: the library drops an abort that comes before its run has begun.
            while self._abort(run) and not run.finished.wait(_ABORT_AGAIN_S):
                pass

    def _abort(self, run: Run) -> bool:
        """Abort the run. Returns whether it still goes on."""
        with self._current.ended, contextlib.suppress(CallError):
            if self._current.run is not run or run.finished.is_set():
                return False
            self._library.call("rkllm_abort", self._handle.value)
        return True


class OwnedHandle:
    """Owns an LLMHandle, and the callback and parameters it was made with.

    It is destroyed once, by `destroy` or by the garbage collector.
    """

    def __init__(self, library: Library, param: Any, current: Current) -> None:
        self.value = Handle()
        callback = library.abi.callback(current.on_result)
        given = callback
        argument = given
        if library.abi.callbacks is not None:
            given = library.abi.callbacks(result_callback=callback)
            argument = ctypes.byref(given)

        library.call("rkllm_init", ctypes.byref(self.value), ctypes.byref(param), argument)
        kept = (callback, given, param)
        self._finalizer = weakref.finalize(self, _destroy, library, self.value, kept)
        self._finalizer.atexit = False  # the end of the process frees it, too

    @property
    def destroyed(self) -> bool:
        return not self._finalizer.alive

    def destroy(self) -> None:
        self._finalizer()


def _destroy(library: Library, handle: Handle, _kept: object) -> None:
    with contextlib.suppress(CallError):  # nothing is left to do about it
        library.call("rkllm_destroy", handle)
