"""Signals: a request to stop is met at the end of a batch, with a checkpoint and one line."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

#: SIGUSR1 announces the end of a job's time: it saves and goes on.
_STOP = (signal.SIGTERM, signal.SIGINT)
_SAVE = (signal.SIGUSR1,)


class Stopped(BaseException):
    """The process was asked to stop; `signum` says by what, the message where things are."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(where)
        self.signum = signum

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        return f"stopped by {name}" + (f": {self.args[0]}" if self.args[0] else "")


class Signals:
    """Takes SIGTERM, SIGINT and SIGUSR1 while it is entered.

    While `waiting`, a signal is kept for the end of the batch. Else, and at a second request while
    the first is waiting, a request to stop raises `Stopped` where the program happens to be.
    """

    def __init__(self) -> None:
        self.waiting = False
        self._stop: int | None = None
        self._save = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in (*_STOP, *_SAVE)}
        self.install()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            _set(number, handler)

    def install(self) -> None:
        """Take the signals, again where something else has taken them since."""
        for number in (*_STOP, *_SAVE):
            _set(number, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum in _SAVE:
            self._save = True
        elif self.waiting and self._stop is None:
            self._stop = signum
        else:
            raise Stopped(signum)

    @property
    def stop(self) -> int | None:
        """The signal that asked to stop, if one has."""
        return self._stop

    @property
    def save(self) -> bool:
        """Whether a checkpoint was asked for."""
        return self._save

    def saved(self) -> None:
        """Take it that the checkpoint is made."""
        self._save = False


def _set(number: int, handler: Any) -> None:
    # Python lets the main thread alone set a handler; elsewhere signals are the caller's.
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)
