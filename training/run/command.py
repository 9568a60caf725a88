"""What surrounds a command line: every foreseen end is one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from training.refusal import Refused
from training.run import processes, terminal
from training.run.arguments import Parser
from training.run.signals import Signals, Stopped


@contextmanager
def command(parser: Parser) -> Iterator[Signals]:
    """Run a command line inside; yield what tells of signals.

    Exit with 2 and one line for what is refused or what the system does not allow, with 128 and the
    signal's number, as shells have it, after a signal.
    """
    # A notebook's backend may not exist here, and importing matplotlib, as Lightning does, would
    # stop at its name. The picture is a file and needs none.
    os.environ["MPLBACKEND"] = "agg"
    processes.forget_places()
    with terminal.lasting():
        try:
            with Signals() as signals:
                yield signals
        except Stopped as stopped:
            if processes.launched_in() is not None:
                sys.exit(0)  # the process that was started reports
            print(stopped, file=sys.stderr)
            sys.exit(128 + stopped.signum)
        except Refused as error:
            parser.error(str(error))
        except OSError as error:
            if error.filename is None:
                raise
            parser.error(f"{error.filename}: {error.strerror}")
