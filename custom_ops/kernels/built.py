"""Which C++ library may be loaded, and if none, why and what mends it.

setup.py writes `built.json` beside this file. A library is opened under the torch that it was built
for and under no other, where its symbols would be missing or, worse, mean something else.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import NamedTuple

__all__ = ["REINSTALL", "Found", "find", "read"]

RECORD = Path(__file__).with_name("built.json")
# pip keeps the wheel that it made of an sdist, whichever torch it was for: hence --no-cache-dir.
REINSTALL = (
    "reinstall with `pip install --force-reinstall --no-deps --no-cache-dir .` in its sources"
)
_BESIDE_TORCH = REINSTALL.replace("--no-deps", "--no-deps --no-build-isolation")
# Of a processor with any other, the compiler's own choice of instructions.
_VECTOR_SETS = ("AVX2", "AVX512")


class Found(NamedTuple):
    """The library's name; else the reason, and whether there are kernels, which cannot be used."""

    name: str = ""
    missing: str = ""
    unusable: bool = False


def read() -> str | None:
    """Return the record's text, or None."""
    return RECORD.read_text() if RECORD.exists() else None


def find(record: str | None, torch_version: str, capability: str) -> Found:
    """Return the library for this torch and the vector set that it uses.

    `record` is the text of `built.json`, None where there is none.
    """
    if record is None:
        return Found(missing=f"they were not built: {_BESIDE_TORCH}")
    built = json.loads(record)
    if built["unusable"]:
        return Found(missing=f"{built['unusable']}: {_BESIDE_TORCH}")
    then, now = (version.partition("+")[0] for version in (built["torch"], torch_version))
    if then != now:
        return Found("", f"built for torch {then}, this is {now}: {REINSTALL}", True)
    then, now = built["python"], sysconfig.get_config_var("SOABI")
    if then != now:
        return Found("", f"built for {then}, this is {now}: {REINSTALL}", True)
    libraries = built["libraries"]
    name = f"_cpu_{capability.lower()}" if capability in _VECTOR_SETS else "_cpu_default"
    if name not in libraries:
        others = " and ".join(sorted(other.removeprefix("_cpu_").upper() for other in libraries))
        reason = f"built for {others}, torch uses {capability} here"
        return Found("", f"{reason}: with CUSTOM_OPS_CPU_CAPABILITY=all, {REINSTALL}", True)
    if failure := libraries[name]:
        return Found(missing=f"their build failed ({failure}): with a C++20 compiler, {REINSTALL}")
    return Found(name)
