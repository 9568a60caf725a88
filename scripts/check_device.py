"""Check and measure on a GPU in ten minutes: one command, one folder.

The tests that need a device, the figures of `benchmark.py --device cuda`, and training on the
device: a classifier, and a small GPT. Each part ends at its limit, whatever it has found by then,
and the rest goes on. The folder tells the device, the versions and the date.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Part(NamedTuple):
    """A command, and the seconds after which it is ended."""

    name: str
    command: tuple[str, ...]
    limit: float


def parts(out: Path) -> list[Part]:
    """Return what is run, ten minutes in all, what matters most first."""
    python, scripts = sys.executable, ROOT / "scripts"
    bench = (python, f"{scripts}/benchmark.py", "--device", "cuda", "--quick")

    def figures(name: str, only: str) -> tuple[str, ...]:
        return (*bench, "--only", only, "--out", f"{out / name}")

    def trained(script: str, *settings: str) -> tuple[str, ...]:
        run = ("--accelerator", "cuda", "--no-progress", "--out", f"{out / script}")
        return (python, f"{scripts}/{script}", *settings, *run)

    tests = (python, "-m", "pytest", "-m", "cuda", "-rfE", str(ROOT / "tests"), "-k")
    # First what waits for other programs on the device. Then several processes, as most of a test's
    # time is a compiler's; those that need most of a device's memory by themselves.
    return [
        Part("tests of long rows", (*tests, "long_rows"), 30),
        Part("tests", (*tests, "not two_to_the and not long_rows", "-n", "8"), 120),
        Part("steps", figures("steps", "step"), 75),
        Part("curve", figures("curve", "curve"), 75),
        Part("last layer", figures("last-layer", "linear"), 75),
        Part("long rows", figures("long-rows", "131072"), 45),
        Part("large tests", (*tests, "two_to_the"), 45),
        Part("classifier", trained("compare.py", "--seeds", "1", "--max-steps", "300"), 60),
        Part("gpt", trained("train_lm.py", "--max-steps", "60"), 75),
    ]


def run(part: Part, out: Path) -> str:
    """Run a part, what it prints going to a file of its name; return a line about it."""
    began = time.monotonic()
    with (out / f"{part.name}.txt").open("w") as log:
        started = subprocess.Popen(
            part.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            said = f"ended with {started.wait(part.limit)}"
        except subprocess.TimeoutExpired:
            # with all that it started: what is left would keep the device from the next part
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            said = "ended at its limit"
    return f"{part.name}: {said} after {time.monotonic() - began:.0f} s, {log.name}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "device",
        metavar="DIR",
        help="where logs and figures go (default: %(default)s)",
    )
    out = parser.parse_args(argv).out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for part in parts(out):
        print(run(part, out), flush=True)


if __name__ == "__main__":
    main()
