"""A loaded librkllmrt.so: its ABI is checked, its signatures are set, its errors are raised.

Three witnesses must agree before a structure is handed to it: the version in the file, the symbols
it exports, and where a default parameter has its values. Loads native code: for worker processes
only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rkcached.engines.rkllm.abi import ABIS, Abi
from rkcached.engines.rkllm.identify import choose_abi, identify
from rkcached.errors import EngineError, RuntimeLibraryError

# More than any version's RKLLMParam. A result type that is too small would be a stack overwrite.
_PROBE_BYTES = 512

# Defaults of rkllm_createDefaultParam, the same in 1.2.0 to 1.3.0 (decompiled 1.2.1b1).
_EMBED_FLASH = 1
_ENABLED_CPUS = 4


class Library:
    """The functions of one library, as attributes-by-name: `library.call("rkllm_run", ...)`.

    Errors of the constructor: RuntimeLibraryError, with what was found and what to do.
    """

    def __init__(self, path: Path, override: str = "") -> None:
        facts = identify(path)
        self.path = path
        self.abi = choose_abi(facts, override or None)
        self.version = facts.version or self.abi.name
        self.fits = facts.version is None or self.version in self.abi.versions
        """Whether the ABI is that of the version that the library states: an override may differ.
        """

        try:
            self._cdll = ctypes.CDLL(str(path))
        except OSError as error:
            raise _not_loaded(path, str(error)) from error

        if not override:
            self._check_layout()

        self._functions: dict[str, Any] = {}
        for name, signature in self.abi.functions.items():
            function = self._cdll[name]  # a function object of our own, unlike the attribute
            function.restype = signature.result
            function.argtypes = signature.arguments
            if signature.is_status:
                # The result is an int, by its restype.
                function.errcheck = _checker(name)  # type: ignore[assignment]
            self._functions[name] = function

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function, without the GIL. Errors: CallError if the function reports failure."""
        return self._functions[name](*arguments)

    def has(self, name: str) -> bool:
        return name in self._functions

    def _check_layout(self) -> None:
        """Compare where the defaults are with where this ABI has them."""
        if not self.abi.probe_offset:
            return

        offsets = sorted({abi.probe_offset for abi in ABIS if abi.probe_offset})
        matching = [offset for offset in offsets if _has_defaults(self._default_bytes(), offset)]
        if matching == [self.abi.probe_offset]:
            return

        seen = " and ".join(map(str, matching)) or "neither"
        raise RuntimeLibraryError(
            f"{self.path} says it is RKLLM {self.version}, but its default parameters are not laid "
            f"out so: expected at offset {self.abi.probe_offset} of {offsets}, found at {seen}",
            hint="it may be a newer or patched runtime; name the ABI it really has as engine.abi "
            "in the manifest",
        )

    def _default_bytes(self) -> bytes:
        class Oversized(ctypes.Structure):
            _fields_ = (("data", ctypes.c_uint8 * _PROBE_BYTES),)

        create = self._cdll["rkllm_createDefaultParam"]
        create.restype = Oversized
        create.argtypes = ()
        return bytes(create().data)


class CallError(EngineError):
    """A function of the library reported failure; the reason is in its log."""


def zeroed_reserved(abi: Abi, param: Any) -> None:
    """Zero the bytes that rkllm_createDefaultParam leaves unset (decompiled 1.2.1b1)."""
    reserved = param.extend_param.reserved
    ctypes.memset(reserved, 0, ctypes.sizeof(reserved))
    if abi.group in ("D", "E"):
        param.extend_param.n_batch = 1  # more than 1 asserts on 1.2.1 and 1.2.2
        param.extend_param.use_cross_attn = 0


def _has_defaults(data: bytes, offset: int) -> bool:
    """Whether base domain 0 (4 bytes before), embed_flash and the number of CPUs are there."""
    domain = data[offset - 4 : offset]
    flash = data[offset]
    cpus = data[offset + 1]
    return domain == bytes(4) and (flash, cpus) == (_EMBED_FLASH, _ENABLED_CPUS)


def _checker(name: str) -> Callable[[int, Any, Any], int]:
    def check(result: int, _function: Any, _arguments: Any) -> int:
        if result != 0:
            raise CallError(
                f"{name} failed with {result}", hint="the runtime's own lines in the log say why"
            )
        return result

    return check


def _not_loaded(path: Path, reason: str) -> RuntimeLibraryError:
    """The error with the dynamic linker's reason, and the package that has what is missing."""
    packages = {"libgomp.so.1": "libgomp1", "libomp.so": "libomp5", "libomp.so.5": "libomp5"}
    missing = reason.partition(":")[0]
    if "cannot open shared object file" in reason and missing != str(path):
        hint = f"install the package that has {missing}"
        if package := packages.get(missing):
            hint = f"apt install {package}"
        return RuntimeLibraryError(f"{path} needs {missing}, which is not installed", hint=hint)

    return RuntimeLibraryError(
        f"{path} cannot be loaded: {reason}",
        hint="take librkllmrt.so for Linux aarch64 from the vendor's release",
    )
