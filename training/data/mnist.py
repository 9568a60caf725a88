"""MNIST's four files: found, else downloaded within a bounded time, and verified byte for byte.

The layout is torchvision's, `<data_dir>/MNIST/raw/train-images-idx3-ubyte` and so on, and so are
the mirrors and the reader of the format. torchvision verifies only the archives it downloads and
waits for a dead network as long as the system does; both are mended here.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from training.refusal import Refused
from training.torchvision_cpu import ensure_importable

#: md5 of each uncompressed file.
MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

#: How long all mirrors together may take to answer at all, and how long a transfer may stall.
REACH_SECONDS = 5.0
STALL_SECONDS = 20.0

# What a download can end with: no route, a refusal, a truncated or wrong archive, a full disk.
_FAILURES = (OSError, EOFError, RuntimeError, http.client.HTTPException)


class Unavailable(Refused):
    """MNIST is neither on the disk nor to be had from a mirror; the message says why."""


class CorruptFile(Refused):
    """A file is there and is not MNIST's; the message names it."""


def ensure_present(data_dir: Path) -> None:
    """Download what is missing under `data_dir` and verify all four files.

    Raise `Unavailable` if they are neither there nor downloadable, `CorruptFile` if one is wrong.
    """
    if not all(path.is_file() for path in _paths(data_dir)):
        _download(data_dir)
    for path in _paths(data_dir):
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        if digest != MD5[path.name]:
            raise CorruptFile(
                f"{path} is corrupt: {path.stat().st_size} bytes with md5 {digest}, expected "
                f"{MD5[path.name]}; delete it to have it downloaded again"
            )


def read(data_dir: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, test images and labels: (N, 28, 28) and (N,) uint8."""
    ensure_importable()
    from torchvision.datasets.mnist import read_image_file, read_label_file

    train_images, train_labels, test_images, test_labels = map(str, _paths(data_dir))
    return (
        read_image_file(train_images),
        read_label_file(train_labels),
        read_image_file(test_images),
        read_label_file(test_labels),
    )


def _paths(data_dir: Path) -> list[Path]:
    return [data_dir / "MNIST" / "raw" / name for name in MD5]


def _download(data_dir: Path) -> None:
    try:
        ensure_importable()
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise Unavailable(str(error)) from error
    archives = [data_dir / "MNIST" / "raw" / name for name, _ in MNIST.resources]
    mirrors = list(MNIST.mirrors)
    if not all(archive.is_file() for archive in archives):
        mirrors = [_first_to_answer(mirrors, MNIST.resources[0][0])]
    # Only mirrors that answer: torchvision would wait for each dead one at each of four files. The
    # subclass bears the same name because torchvision names the folder after the class.
    reachable = type("MNIST", (MNIST,), {"mirrors": mirrors})
    try:
        with _stalls_bounded(), contextlib.redirect_stderr(io.StringIO()):
            reachable(str(data_dir), download=True)
    except _FAILURES as error:
        raise Unavailable(f"{urlsplit(mirrors[0]).netloc}: {_last_line(error)}") from error


def _first_to_answer(mirrors: list[str], name: str) -> str:
    """Ask every mirror for a file at the same time; return the first that has it."""
    answers: queue.Queue[tuple[str, Exception | None]] = queue.Queue()

    def ask(mirror: str) -> None:
        try:
            urllib.request.urlopen(mirror + name, timeout=REACH_SECONDS).close()
            answers.put((mirror, None))
        except Exception as error:
            answers.put((mirror, error))

    # Threads, because looking up a name or trying a host's addresses one by one heeds no timeout;
    # daemons, because one that hangs must not keep the process.
    for mirror in mirrors:
        threading.Thread(target=ask, args=(mirror,), daemon=True).start()
    reason = f"no answer from {urlsplit(mirrors[0]).netloc} in {REACH_SECONDS:g} s"
    deadline = time.monotonic() + REACH_SECONDS
    with contextlib.suppress(queue.Empty):
        for _ in mirrors:
            mirror, error = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            if error is None:
                return mirror
            reason = f"{urlsplit(mirror).netloc}: {_last_line(error)}"
    raise Unavailable(reason)


@contextlib.contextmanager
def _stalls_bounded() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _last_line(error: Exception) -> str:
    reason = getattr(error, "reason", None)  # URLError wraps the cause
    text = str(reason if isinstance(reason, Exception) else error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
