"""The devnet's `gftp` program: says which of the requestor's files may cross, and under which URLs.

yapapi starts it as `gftp server`, one for each Golem, through the script that `write_program` puts on the PATH, and
talks JSON-RPC with it, one line a message. It carries nothing itself: a URL is a small file in the exchange, a folder
that the daemon's `transfers.py` looks into. It imports only the standard library, because it runs as a lone file and a
requestor waits for its first answer.

Weaker than the real one: both sides must be on one machine and may read each other's files.
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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

#: From 0.7.3 on yapapi closes the URLs that it needs no more.
VERSION = "0.17.3 (devnet)"
#: Who publishes, if nobody says otherwise; the daemon's own identity is not needed to find a file.
NODE_ID = "0x" + "de" * 20

_URL = re.compile(r"gftp://0x[0-9a-f]{40}/([0-9a-f]{64})")
_LOCK = "lock"
_BLOCK_BYTES = 1024 * 1024
_METHODS = ("version", "publish", "receive", "close", "upload", "download", "shutdown")


class UnknownUrl(Exception):
    """Nothing is published under this URL."""


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """What a URL stands for."""

    #: The requestor's file.
    file: Path
    #: It waits for bytes from a provider; otherwise it may be read.
    is_target: bool


def resolve_url(exchange: Path, url: str) -> PublishedFile:
    """Look up a URL. :raises UnknownUrl: it is none of gftp's, was closed, or was never published."""
    name = _entry_name(url)
    for folder in _folders(exchange) if name else []:
        with contextlib.suppress(FileNotFoundError):
            entry = json.loads((folder / name).read_text())
            published = PublishedFile(file=Path(entry["file"]), is_target=entry["is_target"])
            # Another server may have published the same contents, and its file may still be there.
            if published.is_target or published.file.exists():
                return published
    raise UnknownUrl(f"Nothing is published as {url}")


def copy_file(source: Path, target: Path) -> int:
    """Copy a file so that nobody sees half of it; blocks of zeros become holes.

    :return: its size in bytes.
    :raises OSError: one of the two cannot be used; the target is as it was before.
    """
    part = target.with_name(f".{target.name[:200]}.{os.urandom(6).hex()}.part")
    try:
        with source.open("rb") as reader, part.open("xb") as writer:
            while block := reader.read(_BLOCK_BYTES):
                # A provider that answers with 200 MB of nothing shall not fill the requestor's disk.
                if block.count(0) == len(block):
                    writer.seek(len(block), os.SEEK_CUR)
                else:
                    writer.write(block)
            size = writer.tell()
            writer.truncate(size)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return size


def write_program(bin_folder: Path, exchange: Path, *, node_id: str = NODE_ID) -> Path:
    """Write an executable script `gftp` that runs this file with this Python, whatever the environment says.

    :param node_id: stands in the URLs.
    :return: its path; put its folder on the PATH of the requestor.
    """
    bin_folder.mkdir(parents=True, exist_ok=True)
    # Without site-packages (-S) it starts in half the time.
    words = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(exchange.absolute()), node_id]
    program = bin_folder / "gftp"
    part = bin_folder / f".gftp.{os.urandom(6).hex()}"
    part.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    part.chmod(0o755)
    part.replace(program)
    return program


def remove_dead_servers(exchange: Path) -> int:
    """Forget what servers that were killed had published. :return: how many servers."""
    removed = 0
    with _exchange_lock(exchange):
        for folder in _folders(exchange):
            with contextlib.suppress(OSError), (folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by its server for as long as that lives
                _remove(folder)
                removed += 1
    return removed


def _entry_name(url: str) -> str:
    """Return what a URL is called in the exchange; empty if it is none of gftp's."""
    match = _URL.fullmatch(url)
    return match[1] if match else ""


def _folders(exchange: Path) -> list[Path]:
    """List the servers' folders, those of the dead included."""
    return list(exchange.glob("server-*"))


@contextlib.contextmanager
def _exchange_lock(exchange: Path) -> Iterator[None]:
    """Let one process at a time make or remove servers' folders."""
    exchange.mkdir(parents=True, exist_ok=True)
    with (exchange / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink(missing_ok=True)
    folder.rmdir()


class _RpcError(Exception):
    """A JSON-RPC error: its code and its message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _GftpServer:
    """One server: what it has published stands in a folder of its own, so that no other one can close it."""

    def __init__(self, exchange: Path, node_id: str) -> None:
        self._exchange, self._node_id = exchange, node_id
        self._folder = exchange / f"server-{os.urandom(6).hex()}"
        self.is_shut_down = False

    @contextlib.contextmanager
    def published_folder(self) -> Iterator[None]:
        """Have a folder, held by a lock that the kernel drops when this process ends, however it ends."""
        remove_dead_servers(self._exchange)
        with contextlib.ExitStack() as stack:
            with _exchange_lock(self._exchange):
                self._folder.mkdir(mode=0o700)
                lock = stack.enter_context((self._folder / _LOCK).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # the daemon may have removed the whole exchange
                    _remove(self._folder)

    def answer(self, line: bytes) -> dict[str, Any] | None:
        """Answer one message; a notification, which has no id, has no answer."""
        message: Any = None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return _error_response(None, -32700, "This is not JSON.")
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            return _error_response(None, -32600, "This is not a JSON-RPC request.")
        try:
            result = self._call(message["method"], message.get("params", {}))
        except _RpcError as error:
            answer = _error_response(message.get("id"), error.code, str(error))
        except (UnknownUrl, OSError, ValueError) as error:  # ValueError: a NUL in a path
            answer = _error_response(message.get("id"), -32000, str(error))
        else:
            answer = {"jsonrpc": "2.0", "id": message.get("id"), "result": result}
        return answer if "id" in message else None

    def _call(self, method: str, params: Any) -> object:
        if method not in _METHODS:
            raise _RpcError(-32601, f"There is no method {method!r}. There are: {', '.join(_METHODS)}.")
        call: Callable[..., object] = getattr(self, f"_{method}")
        parameter_types = {name: kind for name, kind in call.__annotations__.items() if name != "return"}
        if not isinstance(params, dict) or params.keys() != parameter_types.keys():
            raise _RpcError(-32602, f"{method} takes by name: {', '.join(parameter_types) or 'nothing'}.")
        for name, value in params.items():
            texts = value if parameter_types[name] == "list[str]" else [value]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise _RpcError(-32602, f"{method}: {name} must be a {parameter_types[name]}.")
        return call(**params)

    def _version(self) -> str:
        return VERSION

    def _publish(self, files: list[str]) -> list[dict[str, str]]:
        return [{"file": file, "url": self._register_url(_digest(Path(file)), file, is_target=False)} for file in files]

    def _receive(self, output_file: str) -> dict[str, str]:
        Path(output_file).open("ab").close()  # as the real one does: it exists even if nothing ever comes
        return {"file": output_file, "url": self._register_url(os.urandom(32).hex(), output_file, is_target=True)}

    def _close(self, urls: list[str]) -> list[str]:
        return [self._close_url(url) for url in urls]

    def _close_url(self, url: str) -> str:
        try:
            (self._folder / (_entry_name(url) or "none")).unlink()
        except FileNotFoundError:
            return "error"
        return "ok"

    def _upload(self, file: str, url: str) -> dict[str, str]:
        published = resolve_url(self._exchange, url)
        if not published.is_target:
            raise UnknownUrl(f"Nobody waits for a file at {url}")
        copy_file(Path(file), published.file)
        return {"file": file, "url": url}

    def _download(self, url: str, output_file: str) -> dict[str, str]:
        published = resolve_url(self._exchange, url)
        if published.is_target:
            raise UnknownUrl(f"There is no file to read at {url}")
        copy_file(published.file, Path(output_file))
        return {"file": output_file, "url": url}

    def _shutdown(self) -> str:
        self.is_shut_down = True
        return "ok"

    def _register_url(self, name: str, file: str, *, is_target: bool) -> str:
        """Write down what a URL stands for. The same contents have the same URL, and then the newest file counts."""
        part = self._folder / f"{name}.part"
        part.write_text(json.dumps({"file": str(Path(file).absolute()), "is_target": is_target}))
        part.replace(self._folder / name)
        return f"gftp://{self._node_id}/{name}"


def _digest(file: Path) -> str:
    with file.open("rb") as reader:
        return hashlib.file_digest(reader, "sha3_256").hexdigest()


def _error_response(number: object, code: int, message: str) -> dict[str, Any]:
    # yapapi reads lines of up to 64 KiB, and a path in the message can be of any length.
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message[:1000]}}


def _serve(exchange: Path, node_id: str) -> None:
    # Ctrl-C reaches the whole group of the requestor, which still has files to take leave of.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    server = _GftpServer(exchange, node_id)
    with server.published_folder(), contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            answer = server.answer(line) if line.strip() else None
            if answer is not None:
                sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
                sys.stdout.buffer.flush()
            if server.is_shut_down:
                break


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main(arguments: list[str]) -> int:
    """Run the program.

    :param arguments: the exchange and a node id, which the script adds; then what the caller said.
    """
    exchange, node_id, *words = arguments
    if words == ["server"]:
        _serve(Path(exchange), node_id)
        return 0
    sys.stderr.write("usage: gftp server\n\nAnswers JSON-RPC, one line a message, until its standard input ends.\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
