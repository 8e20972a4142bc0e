"""File transfer between requestor and providers: the `gftp` program, and the providers' side of it.

yapapi starts `gftp server`, once per `Golem` object, through the script that `write_program` puts on the PATH, and
sends it JSON-RPC, one message per line. The server only publishes URLs: each is a small file in the exchange, a folder
that it shares with the daemon. `fetch` and `deliver`, called by `provider/exe_unit.py`, look URLs up there and copy
files. This module imports only the standard library, because it also runs as a script for whose start a requestor
waits.

Limitation: both sides must be on one machine and can read each other's files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: From version 0.7.3 on, yapapi closes URLs after use.
VERSION = "0.17.3 (devnet)"
#: The requestor's node id, which is its wallet's address too. In URLs the publisher; not needed to find a file.
REQUESTOR_ID = "0x" + "de" * 20

_URL = re.compile(r"gftp://0x[0-9a-f]{40}/([0-9a-f]{64})")
_LOCK = "lock"
_BLOCK_BYTES, _PACED_BYTES = 1024 * 1024, 64 * 1024
_METHODS = ("version", "publish", "receive", "close", "shutdown")


#: Waits before so many bytes are copied. :raises TransferFailed: the transfer is over.
Pace = Callable[[int], None]


class TransferFailed(Exception):
    """A file could not be copied."""


class PublishedFile(NamedTuple):
    """A file of the requestor that has a URL."""

    file: Path
    #: A provider may write the file; otherwise it may read it.
    is_target: bool


def resolve_url(exchange: Path, url: str) -> PublishedFile:
    """Look up a URL. :raises TransferFailed: it is not a gftp URL, was closed, or was never published."""
    name = _entry_name(url)
    if not name:
        raise TransferFailed(f"{url} is not a gftp URL, and no other kind is supported.")
    for folder in _folders(exchange):
        with contextlib.suppress(FileNotFoundError):
            entry = json.loads((folder / name).read_text())
            published = PublishedFile(Path(entry["file"]), entry["is_target"])
            # Another server may have published the same content, and its file may still exist.
            if published.is_target or published.file.exists():
                return published
    raise TransferFailed(f"Nothing is published at {url}")


def fetch(exchange: Path, url: str, target: Path, pace: Pace | None = None) -> None:
    """Copy a published file of the requestor to `target`. :raises TransferFailed: why not."""
    published = resolve_url(exchange, url)
    if published.is_target:
        raise TransferFailed(f"There is no file to read at {url}")
    _transfer(published.file, target, f"{url} cannot be fetched", pace)


def deliver(exchange: Path, source: Path, url: str, pace: Pace | None = None) -> None:
    """Copy `source` to a file that the requestor waits for. :raises TransferFailed: why not."""
    published = resolve_url(exchange, url)
    if not published.is_target:
        raise TransferFailed(f"No file is expected at {url}")
    _transfer(source, published.file, f"{source.name} cannot be delivered", pace)


def _transfer(source: Path, target: Path, failure: str, pace: Pace | None) -> None:
    try:
        copy_file(source, target, pace)
    except OSError as error:
        raise TransferFailed(f"{failure}: {error.strerror or error}") from error


def copy_file(source: Path, target: Path, pace: Pace | None = None) -> None:
    """Copy a file in parts into the target, as gftp does: what fails leaves a part. Blocks of zeros become holes."""
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        while block := reader.read(_BLOCK_BYTES if pace is None else _PACED_BYTES):
            if pace is not None:
                pace(len(block))
            # The fault `oversize` must not fill the requestor's disk with zeros.
            if block.count(0) == len(block):
                writer.seek(len(block), os.SEEK_CUR)
            else:
                writer.write(block)
        writer.truncate()


def write_program(bin_folder: Path, exchange: Path) -> Path:
    """Write a script `gftp` that runs this file with this Python, whatever the environment. :return: its path."""
    bin_folder.mkdir(parents=True, exist_ok=True)
    # Without site-packages (-S), Python starts in half the time.
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(exchange.absolute())]
    program = bin_folder / "gftp"
    part = bin_folder / f".gftp.{os.urandom(6).hex()}"
    part.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    part.chmod(0o755)
    part.replace(program)
    return program


def remove_dead_servers(exchange: Path) -> int:
    """Remove what killed servers had published. :return: the number of these servers."""
    removed = 0
    with _exchange_lock(exchange):
        for folder in _folders(exchange):
            with contextlib.suppress(OSError), (folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by a running server
                _remove(folder)
                removed += 1
    return removed


def _entry_name(url: str) -> str:
    """Return the file name of a URL in the exchange; empty if it is not a gftp URL."""
    match = _URL.fullmatch(url)
    return match[1] if match else ""


def _folders(exchange: Path) -> list[Path]:
    """List the folders of all servers, including killed ones."""
    return list(exchange.glob("server-*"))


@contextlib.contextmanager
def _exchange_lock(exchange: Path) -> Iterator[None]:
    """Hold the lock under which servers' folders are made and removed."""
    exchange.mkdir(parents=True, exist_ok=True)
    with (exchange / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink(missing_ok=True)
    folder.rmdir()


class _GftpServer:
    """A server. It publishes in its own folder, so that no other server can close its URLs."""

    def __init__(self, exchange: Path) -> None:
        self._exchange = exchange
        self._folder = exchange / f"server-{os.urandom(6).hex()}"
        self.is_shut_down = False

    @contextlib.contextmanager
    def published_folder(self) -> Iterator[None]:
        """Create the server's folder and lock it; the kernel releases the lock when this process ends in any way."""
        remove_dead_servers(self._exchange)
        with contextlib.ExitStack() as stack:
            with _exchange_lock(self._exchange):
                self._folder.mkdir(mode=0o700)
                lock = stack.enter_context((self._folder / _LOCK).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the daemon may have removed the exchange
                    _remove(self._folder)

    def handle(self, line: bytes) -> dict[str, Any] | None:
        """Handle a message. :return: the response; None for a notification, which has no id."""
        message: Any = None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return _error_response(None, -32700, "The message is not JSON.")
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            return _error_response(None, -32600, "The message is not a JSON-RPC request.")
        method, number = message["method"], message.get("id")
        if method not in _METHODS:
            known = ", ".join(_METHODS)
            response = _error_response(number, -32601, f"There is no method {method!r}. Known: {known}.")
        else:
            try:
                result = getattr(self, f"_{method}")(**message.get("params", {}))
                response = {"jsonrpc": "2.0", "id": number, "result": result}
            except TypeError as error:
                response = _error_response(number, -32602, f"Invalid parameters of {method}: {error}")
            except (OSError, ValueError) as error:  # ValueError: a NUL in a path
                response = _error_response(number, -32000, str(error))
        return response if "id" in message else None

    def _version(self) -> str:
        return VERSION

    def _publish(self, files: list[str]) -> list[dict[str, str]]:
        return [{"file": file, "url": self._register_url(_digest(Path(file)), file, is_target=False)} for file in files]

    def _receive(self, output_file: str) -> dict[str, str]:
        Path(output_file).open("ab").close()  # as the real one does: the file exists even if nothing is ever written
        return {"file": output_file, "url": self._register_url(os.urandom(32).hex(), output_file, is_target=True)}

    def _close(self, urls: list[str]) -> list[str]:
        return [self._close_url(url) for url in urls]

    def _close_url(self, url: str) -> str:
        try:
            (self._folder / (_entry_name(url) or "none")).unlink()
        except FileNotFoundError:
            return "error"
        return "ok"

    def _shutdown(self) -> str:
        self.is_shut_down = True
        return "ok"

    def _register_url(self, name: str, file: str, *, is_target: bool) -> str:
        """Publish a URL for a file. Files with the same content have the same URL, which stands for the latest one."""
        part = self._folder / f"{name}.part"
        part.write_text(json.dumps({"file": str(Path(file).absolute()), "is_target": is_target}))
        part.replace(self._folder / name)
        return f"gftp://{REQUESTOR_ID}/{name}"


def _digest(file: Path) -> str:
    with file.open("rb") as reader:
        return hashlib.file_digest(reader, "sha3_256").hexdigest()


def _error_response(number: object, code: int, message: str) -> dict[str, Any]:
    # yapapi reads lines of up to 64 KiB, and a path in the message can have any length.
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message[:1000]}}


def _serve(exchange: Path) -> None:
    # Ctrl-C reaches the whole process group of the requestor, which still has to close its files.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    server = _GftpServer(exchange)
    with server.published_folder(), contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            response = server.handle(line) if line.strip() else None
            if response is not None:
                sys.stdout.buffer.write(json.dumps(response).encode() + b"\n")
                sys.stdout.buffer.flush()
            if server.is_shut_down:
                break


def main(arguments: list[str]) -> int:
    """Run the program with the exchange, which the script adds, and the caller's arguments."""
    exchange, *rest = arguments
    if rest == ["server"]:
        _serve(Path(exchange))
        return 0
    sys.stderr.write("usage: gftp server\n\nAnswers JSON-RPC, one message per line, until its standard input ends.\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
