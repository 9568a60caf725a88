from __future__ import annotations

import subprocess
import sys
import time

import torch

from training.measurement import peak_bytes, seconds_in_turns, timed

CPU = torch.device("cpu")
MIB = 2**18  # float32 entries


def test_peak_counts_what_is_alive_at_the_same_time():
    def work() -> None:
        a = torch.zeros(4 * MIB)
        del a
        b = torch.zeros(3 * MIB)
        c = torch.zeros(2 * MIB)
        del b, c

    assert peak_bytes(work, CPU) == 5 * 2**20


def test_peak_excludes_what_was_there_before_and_what_the_first_time_keeps():
    held = [torch.zeros(8 * MIB)]

    def work() -> None:
        if len(held) == 1:
            held.append(torch.zeros(8 * MIB))
        torch.zeros(MIB)

    assert peak_bytes(work, CPU) == 2**20


def test_the_profiler_prints_nothing():
    program = (
        "import torch; from training.measurement import peak_bytes; "
        "peak_bytes(lambda: torch.zeros(10) + 1, torch.device('cpu'))"
    )
    # In a process of its own: the level is read when the profiler is first used.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_timings():
    seconds, result = timed(lambda: time.sleep(0.02) or 7, CPU)
    assert 0.02 <= seconds < 2
    assert result == 7


def test_works_are_timed_in_turns_and_the_first_rounds_do_not_count():
    done: list[str] = []
    works = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    seconds = seconds_in_turns(works, CPU, rounds=20)
    assert [sorted(done[i : i + 2]) for i in range(0, 40, 2)] == [["a", "b"]] * 20
    assert [len(times) for times in seconds.values()] == [18, 18]


def test_a_single_round_counts():
    assert len(seconds_in_turns({"a": lambda: None}, CPU, rounds=1)["a"]) == 1
