"""Measure what the ops cost beside torch's: a table of every claim, JSON and pictures.

Forward and backward of torch's function, of the same under torch.compile and of ours are timed in
turns, beside a plain copy of the logits: the least that reading and writing them can cost. On a GPU
other libraries' kernels take part where they are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed with custom_ops

if TYPE_CHECKING:
    from benchmarks.plan import Step

RESULT = "benchmark.json"
PICTURES = "benchmark-*.png"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    (_on_cuda if arguments.device == "cuda" else _on_the_cpu)(parser, arguments)


def _on_the_cpu(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    # After the arguments: torch takes seconds to import.
    import torch

    from benchmarks import environment, figure, plan, table

    chosen_plan = plan.QUICK if arguments.quick else plan.THOROUGH
    chosen = _chosen(parser, plan.steps(chosen_plan, arguments.threads), arguments.only)
    result = _result(arguments)
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "environment": environment.describe(),
        "settings": {"quick": arguments.quick, "only": arguments.only, **chosen_plan.settings},
    }
    _measure(chosen, plan.SECTIONS, report, result)
    table.show(report)
    for earlier in arguments.out.glob(PICTURES):
        earlier.unlink()
    print("", result, *figure.save(report, arguments.out), sep="\n")


def _on_cuda(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as fresh:
        # What an earlier run compiled would hide what a first call costs.
        os.environ |= {"TRITON_CACHE_DIR": fresh, "TORCHINDUCTOR_CACHE_DIR": fresh}
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: this torch sees no CUDA device")
        from benchmarks import device, device_environment, device_table, plan

        here = torch.device("cuda", torch.cuda.current_device())
        chosen_plan = plan.QUICK if arguments.quick else device.THOROUGH
        chosen = _chosen(parser, device.steps(chosen_plan, here), arguments.only)
        result = _result(arguments)
        report: dict[str, Any] = {
            "environment": device_environment.describe(here),
            "settings": {
                "quick": arguments.quick,
                "only": arguments.only,
                **chosen_plan.settings,
            },
        }
        _measure(chosen, device.SECTIONS, report, result)
        device_table.show(report)
        print(f"\n{result}")


def _chosen(parser: argparse.ArgumentParser, every: Sequence[Step], only: str) -> list[Step]:
    """Return the steps that are asked for, or end with the names of all."""
    chosen = [step for step in every if only in step.name]
    if not chosen:
        names = "\n  ".join(step.name for step in every)
        parser.error(f"--only {only!r} is in none of these names:\n  {names}")
    return chosen


def _result(arguments: argparse.Namespace) -> Path:
    """Make the folder of the results, and return where the numbers go."""
    on_cuda = arguments.device == "cuda"
    arguments.out = arguments.out or Path("runs/benchmark-cuda" if on_cuda else "runs/benchmark")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments.out / RESULT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds and cases: on two idle cores about four minutes, not twenty",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PART",
        help="measure only what has PART in its name, for instance 'softmax 4096x1000', bfloat16, "
        "memory, curve or scaling; one that matches nothing lists the names",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what to measure on; cuda: the first GPU, by its own clock (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=_threads, default=2, metavar="N", help="of torch (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where {RESULT} and, for the CPU, {PICTURES} go; earlier ones are replaced (default: "
        "runs/benchmark, or runs/benchmark-cuda)",
    )
    return parser


def _threads(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {text}")
    return int(text)


def _measure(
    steps: Sequence[Step], sections: Sequence[str], report: dict[str, Any], result: Path
) -> None:
    """Take the steps in their order; what they find goes into the report, and at once to disk."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    report |= {section: [] for section in sections}
    columns = (
        BarColumn(12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=len(steps))
        for step in steps:
            progress.update(task, description=step.name)
            report[step.section].append(step.measure())
            result.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
            progress.advance(task)


if __name__ == "__main__":
    main()
