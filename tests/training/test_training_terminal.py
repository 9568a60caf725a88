"""What is printed never ends a run."""

from __future__ import annotations

import io
import os
import sys

import pytest

from training.run import terminal


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_stream_that_lacks_a_character_gets_a_plain_one(monkeypatch, encoding: str):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal.lasting():
        print("12 µs ± 3, 8 × 10, −1 … 一")
    text = stream.buffer.getvalue().decode(encoding)
    if encoding == "utf-8":
        assert text == "12 µs ± 3, 8 × 10, −1 … 一\n"
    if encoding == "ascii":
        assert text == "12 us +- 3, 8 x 10, -1 ... ?\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_no_error(monkeypatch, name: str):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        with terminal.lasting():
            for _ in range(3):
                print("x" * 100_000, file=getattr(sys, name), flush=True)


def test_a_full_disk_behind_stdout_is_no_error(monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with terminal.lasting():
            print("something")


def test_a_closed_stdout_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with terminal.lasting():
        print("nothing")


def test_the_streams_of_before_come_back():
    before = sys.stdout, sys.stderr
    with terminal.lasting():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
