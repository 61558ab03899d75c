"""The structures of the RKLLM binding against two referees: the vendor's headers, and a C compiler.

data/rkllm-layouts.json has every size and offset as gcc computed them from the vendor's headers of
1.1.0 to 1.3.0; they are the same on x86_64 and aarch64. The stand-in's header has the same
structures written once more, in C.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rkcached.engines.rkllm.abi import ABIS, Abi
from tests.rkllm_standin import standin

LAYOUTS = json.loads((Path(__file__).parent / "data" / "rkllm-layouts.json").read_bytes())
NUMBERS = {"1.1.0": "110", "1.2.0": "120", "1.2.1b1": "1211", "1.2.1": "121", "1.3.0": "130"}
UNION = "<union>"

each_abi = pytest.mark.parametrize("abi", ABIS, ids=lambda abi: abi.name)


def layout(abi: Abi) -> dict[str, Any]:
    """The vendor's figures for this ABI."""
    return next(
        figures for versions, figures in LAYOUTS.items() if versions.partition("-")[0] == abi.name
    )


def fields(structure: Any) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each field, as ctypes has it."""
    for name, *_ in structure._fields_:
        field = getattr(structure, name)
        yield (UNION if name == "union" else name), field.offset, field.size


@each_abi
def test_every_size_and_offset_is_the_vendors(abi: Abi) -> None:
    """No structure is missing, and none has a field that is elsewhere."""
    ours = {
        name: {
            "size": ctypes.sizeof(structure),
            "fields": {n: {"offset": o, "size": s} for n, o, s in fields(structure)},
        }
        for name, structure in abi.structures.items()
    }
    assert ours == layout(abi)


@each_abi
def test_every_size_and_offset_is_the_compilers(abi: Abi, tmp_path: Path) -> None:
    """A C program with the same structures prints the same figures."""
    lines = []
    for name, structure in abi.structures.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, _, _ in fields(structure):
            if field != UNION:  # it has no name in C
                lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    source = tmp_path / "offsets.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#define ABI {NUMBERS[abi.name]}\n"
        '#include "abi.h"\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = tmp_path / "offsets"
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    subprocess.run(["cc", "-std=c11", "-I", standin.HERE, "-o", program, source], check=True)
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = {}
    for name, structure in abi.structures.items():
        expected[name] = ctypes.sizeof(structure)
        expected |= {
            f"{name}.{field}": offset for field, offset, _ in fields(structure) if field != UNION
        }
    assert expected == {name: int(number) for name, number in map(str.split, printed.splitlines())}


@each_abi
def test_every_result_is_a_status_but_two(abi: Abi) -> None:
    """A parameter set cannot fail, and whether a run goes on is an answer."""
    others = {name for name, signature in abi.functions.items() if not signature.is_status}
    assert others == {"rkllm_createDefaultParam", "rkllm_is_running"}


def test_each_version_has_one_layout() -> None:
    """No version is in two records, and a record's name is its first version."""
    versions = [version for abi in ABIS for version in abi.versions]
    assert len(versions) == len(set(versions))
    assert [abi.name for abi in ABIS] == [abi.versions[0] for abi in ABIS]


def test_every_layout_that_is_known_is_there() -> None:
    """As many records as there are different layouts of the vendor's headers."""
    assert [versions.partition("-")[0] for versions in LAYOUTS] == [abi.name for abi in ABIS]
