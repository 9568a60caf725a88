"""No network: mirrors are servers of this process, and MNIST is four files of a few digits."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("training.lightning", reason="needs the extra [train]")

from torchvision.datasets import MNIST

from training.data import DigitData, mnist
from training.data.images import load_mnist

REAL = Path(__file__).parents[3] / "shared" / "mnist"


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def idx(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.numpy().tobytes()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small MNIST: what it holds, and what its checksums are."""
    tensors = (
        torch.randint(256, (20, 28, 28), dtype=torch.uint8),
        torch.arange(20, dtype=torch.uint8) % 10,
        torch.randint(256, (10, 28, 28), dtype=torch.uint8),
        torch.arange(10, dtype=torch.uint8),
    )
    files = {name: idx(tensor) for name, tensor in zip(mnist.MD5, tensors, strict=True)}
    monkeypatch.setattr(mnist, "MD5", {name: md5(content) for name, content in files.items()})
    resources = [
        (f"{name}.gz", md5(gzip.compress(content, mtime=0))) for name, content in files.items()
    ]
    monkeypatch.setattr(MNIST, "resources", resources)
    return files


@pytest.fixture
def data_dir(files: dict[str, bytes], tmp_path: Path) -> Path:
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    return tmp_path / "data"


Serve = Callable[[Callable[[str], bytes | None]], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server that answers a file's name with its content; return the address."""
    servers = []

    def start(answer: Callable[[str], bytes | None]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = answer(self.path.lstrip("/"))
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def nothing_there() -> str:
    """An address at which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/"


def test_found_files_are_read_and_normalised(data_dir: Path):
    images = load_mnist(data_dir)
    assert images.train_inputs.shape == (20, 1, 28, 28)
    assert images.test_inputs.shape == (10, 1, 28, 28)
    assert images.train_inputs.dtype == torch.float32
    assert images.train_targets.dtype == torch.int64
    assert images.test_targets.tolist() == list(range(10))


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty"])
def test_a_corrupt_file_is_an_error_that_names_it(data_dir: Path, damage: str):
    path = data_dir / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    if damage == "one byte":
        content[3000] ^= 1
    path.write_bytes(content[:-1] if damage == "truncated" else content * (damage != "empty"))
    for name in ("auto", "mnist"):  # a damaged file is no reason to take other data
        with pytest.raises(mnist.CorruptFile, match="t10k-images-idx3-ubyte is corrupt") as error:
            _ = DigitData(name, data_dir).examples
        assert str(path) in str(error.value)


def test_missing_files_are_downloaded_once(monkeypatch, capfd, files, serve: Serve, tmp_path: Path):
    asked: list[str] = []

    def answer(name: str) -> bytes:
        asked.append(name)
        return gzip.compress(files[name.removesuffix(".gz")], mtime=0)

    monkeypatch.setattr(MNIST, "mirrors", [serve(answer)])
    data = DigitData("auto", tmp_path)
    assert data.examples.name == "mnist"
    assert len(data.examples.train_targets) == 20
    assert capfd.readouterr() == ("", "")
    asked.clear()
    assert len(DigitData("mnist", tmp_path).examples.train_targets) == 20
    assert not asked


def test_a_dead_mirror_does_not_hide_a_live_one(
    monkeypatch, files, serve: Serve, nothing_there: str, tmp_path: Path
):
    live = serve(lambda name: gzip.compress(files[name.removesuffix(".gz")], mtime=0))
    monkeypatch.setattr(MNIST, "mirrors", [nothing_there, live])
    assert DigitData("mnist", tmp_path).examples.name == "mnist"


def test_a_mirror_that_serves_something_else_is_no_mnist(monkeypatch, files, serve, tmp_path):
    monkeypatch.setattr(MNIST, "mirrors", [serve(lambda name: b"<html>log in first</html>")])
    with pytest.raises(mnist.Unavailable, match="corrupted"):
        _ = DigitData("mnist", tmp_path).examples


@pytest.mark.parametrize("answer", ["nothing there", "not found", "silence"])
def test_without_mnist_one_line_says_so_and_the_digits_are_used(
    monkeypatch, capfd, serve: Serve, nothing_there: str, tmp_path: Path, answer: str
):
    silent = socket.create_server(("127.0.0.1", 0))  # accepts and never answers
    mirrors = {
        "nothing there": (nothing_there, "refused"),
        "not found": (serve(lambda name: None), "Not Found"),
        "silence": (f"http://127.0.0.1:{silent.getsockname()[1]}/", "no answer|timed out"),
    }
    mirror, reason = mirrors[answer]
    monkeypatch.setattr(MNIST, "mirrors", [mirror])
    monkeypatch.setattr(mnist, "REACH_SECONDS", 0.3)
    began = time.monotonic()
    data = DigitData("auto", tmp_path / "absent")
    assert data.examples.name == "digits"
    assert time.monotonic() - began < 5
    (line,) = capfd.readouterr().err.splitlines()
    assert f"MNIST is not under {tmp_path / 'absent'} and cannot be downloaded" in line
    assert "--data-dir" in line
    assert any(part in line for part in reason.split("|"))
    with pytest.raises(mnist.Unavailable, match="--data-dir"):
        _ = DigitData("mnist", tmp_path / "absent").examples
    silent.close()


def test_a_name_lookup_that_hangs_does_not_hang_the_run(monkeypatch, files, tmp_path: Path):
    # As getaddrinfo may, whatever timeout the socket has.
    monkeypatch.setattr(mnist.urllib.request, "urlopen", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(mnist, "REACH_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(mnist.Unavailable, match=r"no answer from .* in 0.2 s"):
        _ = DigitData("mnist", tmp_path).examples
    assert time.monotonic() - began < 2


def test_a_transfer_that_stalls_is_given_up(monkeypatch, files, tmp_path: Path):
    def stall(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
            connections.append(connection)

    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=stall, args=(server,), daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        monkeypatch.setattr(mnist, "STALL_SECONDS", 0.3)
        with pytest.raises(mnist.Unavailable, match="timed out"):
            _ = DigitData("mnist", tmp_path).examples
        assert socket.getdefaulttimeout() is None


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MNIST is not beside the repository")
def test_the_real_mnist():
    images = load_mnist(REAL)
    assert images.train_inputs.shape == (60_000, 1, 28, 28)
    assert images.test_inputs.shape == (10_000, 1, 28, 28)
    assert images.train_targets[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    torch.testing.assert_close(images.train_inputs.mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.train_inputs.std(), torch.tensor(1.0), atol=1e-4, rtol=0)
