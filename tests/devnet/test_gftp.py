"""The gftp program: its protocol, published URLs and its end; and the transfers of the providers."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devnet.gftp import (
    TransferFailed,
    copy_file,
    deliver,
    fetch,
    remove_dead_servers,
    resolve_url,
    write_program,
)
from tests.devnet.exe_units import GftpProcess
from tests.timing import DEADLINE_SECONDS, slowness, wait_until


@pytest.fixture
def gftp(tmp_path: Path) -> Iterator[GftpProcess]:
    server = GftpProcess(tmp_path)
    yield server
    if server.process.poll() is None:
        server.end()


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    return tmp_path / "exchange"


def kill(server: GftpProcess, exchange: Path) -> None:
    """Kill a server and wait until the kernel has released its lock; the shell that started it may end first."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.end()
    [path] = exchange.glob("server-*/lock")

    def is_free() -> bool:
        with path.open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    wait_until(is_free)


def make_file(folder: Path, data: bytes = b"some bytes", name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_its_version_is_one_for_which_yapapi_closes_urls(gftp: GftpProcess) -> None:
    number = gftp.call("version").split()[0]

    assert tuple(map(int, number.split("."))) >= (0, 7, 3)


def test_a_url_ends_with_the_sha3_of_the_content(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    path = make_file(tmp_path)

    url = gftp.publish(path)

    assert url.rpartition("/")[2] == hashlib.sha3_256(b"some bytes").hexdigest()
    assert resolve_url(exchange, url).file == path


def test_methods_can_be_called_in_any_order(gftp: GftpProcess, tmp_path: Path) -> None:
    target = gftp.receive(tmp_path / "out")
    source = gftp.publish(make_file(tmp_path))

    assert gftp.call("close", urls=[source, target, source]) == ["ok", "ok", "error"]
    assert gftp.call("version")


def test_a_file_to_receive_is_created_at_once(gftp: GftpProcess, tmp_path: Path) -> None:
    gftp.receive(tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == b""


def test_files_of_equal_content_share_a_url_that_stands_for_the_latest(
    gftp: GftpProcess, tmp_path: Path, exchange: Path
) -> None:
    first = gftp.publish(make_file(tmp_path, name="one"))
    second = gftp.publish(make_file(tmp_path, name="two"))

    assert first == second
    assert resolve_url(exchange, first).file == tmp_path / "two"


def test_closing_a_url_leaves_those_of_other_servers(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    other = GftpProcess(tmp_path)
    path = make_file(tmp_path)
    url = gftp.publish(path)
    assert other.publish(path) == url

    assert gftp.call("close", urls=[url]) == ["ok"]

    assert resolve_url(exchange, url).file == path
    assert other.end() == 0
    with pytest.raises(TransferFailed, match="Nothing is published"):
        resolve_url(exchange, url)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("nonsense", -32700),
        ("[]", -32600),
        ('{"id": 1}', -32600),
        ('{"id": 1, "method": "_leave"}', -32601),
        ('{"id": 1, "method": "publish"}', -32602),
        ('{"id": 1, "method": "publish", "params": ["a"]}', -32602),
        ('{"id": 1, "method": "publish", "params": {"files": [1]}}', -32602),
        ('{"id": 1, "method": "publish", "params": {"files": ["/none/such"]}}', -32000),
        ('{"id": 1, "method": "receive", "params": {"output_file": "/none/such"}}', -32000),
    ],
)
def test_the_server_survives_an_invalid_request(gftp: GftpProcess, line: str, code: int) -> None:
    response = gftp.send(line)

    assert response["error"]["code"] == code and response["error"]["message"]
    assert gftp.call("version")


def test_it_ends_with_its_standard_input_and_leaves_no_files(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    url = gftp.publish(make_file(tmp_path))

    assert gftp.end() == 0

    with pytest.raises(TransferFailed, match="Nothing is published"):
        resolve_url(exchange, url)
    assert [path.name for path in exchange.iterdir()] == ["lock"]


def test_shutdown_ends_it(gftp: GftpProcess) -> None:
    assert gftp.call("shutdown") == "ok"
    assert gftp.process.wait(DEADLINE_SECONDS) == 0
    gftp.end()


def test_ctrl_c_does_not_end_the_server(gftp: GftpProcess) -> None:
    gftp.call("version")  # it has started

    os.killpg(gftp.process.pid, signal.SIGINT)

    assert gftp.call("version")


def test_a_new_server_removes_the_urls_of_a_killed_one(tmp_path: Path, exchange: Path) -> None:
    killed = GftpProcess(tmp_path)
    url = killed.publish(make_file(tmp_path))
    kill(killed, exchange)
    assert resolve_url(exchange, url)

    following = GftpProcess(tmp_path)
    following.call("version")

    with pytest.raises(TransferFailed, match="Nothing is published"):
        resolve_url(exchange, url)
    following.end()


def test_the_urls_of_a_running_server_are_kept(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    url = gftp.publish(make_file(tmp_path))

    assert remove_dead_servers(exchange) == 0

    assert resolve_url(exchange, url)


def test_an_unknown_command_prints_the_usage(gftp: GftpProcess, tmp_path: Path) -> None:
    result = subprocess.run(
        [tmp_path / "bin/gftp", "publish"], capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )

    assert result.returncode == 2 and result.stderr.startswith("usage: gftp server")


def test_it_needs_neither_site_packages_nor_the_environment(tmp_path: Path, exchange: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    server = GftpProcess(tmp_path)

    result = subprocess.run(
        [tmp_path / "bin/gftp", "server"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PYTHONHOME": "/none/such"},
        input=b'{"jsonrpc": "2.0", "method": "version", "params": {}, "id": 1}\n',
        capture_output=True,
        timeout=DEADLINE_SECONDS,
    )

    assert (result.returncode, result.stderr, result.stdout.count(b"\n")) == (0, b"", 1)
    server.end()


def test_yapapi_works_with_it(tmp_path: Path, exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("yapapi.storage.gftp")
    monkeypatch.setenv("PATH", f"{write_program(tmp_path / 'bin', exchange).parent}:{os.environ['PATH']}")

    async def main() -> None:
        async with storage.provider() as provider:
            sources = [await provider.upload_bytes(b"some bytes") for _ in range(2)]
            assert sources[0].download_url == sources[1].download_url
            await provider.release_source(sources[0])
            fetch(exchange, sources[1].download_url, tmp_path / "inside")
            destination = await provider.new_destination(tmp_path / "received")
            deliver(exchange, tmp_path / "inside", destination.upload_url)
            await destination.download_file(tmp_path / "received")
            assert await (await provider.new_destination()).download_bytes() == b""

            await provider.release_source(sources[1])
            with pytest.raises(TransferFailed):
                fetch(exchange, sources[1].download_url, tmp_path / "inside")

    started_at = time.monotonic()
    asyncio.run(main())

    # yapapi waits this long for a gftp that does not end.
    assert time.monotonic() - started_at < 10 * slowness()
    assert (tmp_path / "received").read_bytes() == b"some bytes"
    assert [path.name for path in exchange.iterdir()] == ["lock"]


# Transfers


def test_transfers_copy_files_in_both_directions(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    source, target = gftp.publish(make_file(tmp_path)), gftp.receive(tmp_path / "received")

    fetch(exchange, source, tmp_path / "inside")
    deliver(exchange, tmp_path / "inside", target)

    assert (tmp_path / "received").read_bytes() == b"some bytes"


def test_a_transfer_with_an_unknown_url_or_in_the_wrong_direction_fails(
    gftp: GftpProcess, tmp_path: Path, exchange: Path
) -> None:
    path = make_file(tmp_path)
    source, target = gftp.publish(path), gftp.receive(tmp_path / "received")
    gone = gftp.publish(make_file(tmp_path, b"others", "gone"))
    (tmp_path / "gone").unlink()

    for url in ("gftp://0x/../lock", f"{source}0", gone, target, "https://example.org/x", "file:///etc/passwd", ""):
        with pytest.raises(TransferFailed):
            fetch(exchange, url, tmp_path / "inside")
    with pytest.raises(TransferFailed):
        deliver(exchange, path, source)
    with pytest.raises(TransferFailed):
        deliver(exchange, tmp_path / "missing", target)

    assert not (tmp_path / "inside").exists()
    assert (tmp_path / "received").read_bytes() == b""


def test_a_failed_transfer_leaves_the_part_that_arrived(tmp_path: Path) -> None:
    source, target = make_file(tmp_path, b"x" * 200_000), make_file(tmp_path, b"before", "target")
    sizes = []

    def pace(size: int) -> None:
        sizes.append(target.stat().st_size)
        if len(sizes) == 3:
            raise TransferFailed("The line is cut.")

    with pytest.raises(TransferFailed, match="cut"):
        copy_file(source, target, pace)

    assert sizes == sorted(set(sizes)) and sizes[0] == 0
    assert target.read_bytes() == b"x" * sizes[-1] and sizes[-1] < 200_000
    with pytest.raises(OSError):
        copy_file(tmp_path, target)  # a folder cannot be read


def test_zeros_are_copied_as_holes(tmp_path: Path) -> None:
    source = make_file(tmp_path, b"begin")
    os.truncate(source, 50_000_000)

    copy_file(source, tmp_path / "target")

    assert (tmp_path / "target").stat().st_size == 50_000_000
    assert (tmp_path / "target").stat().st_blocks * 512 < 4_000_000
    assert (tmp_path / "target").read_bytes()[:6] == b"begin\0"


def test_the_urls_of_killed_servers_can_be_removed_without_a_server(tmp_path: Path, exchange: Path) -> None:
    killed = GftpProcess(tmp_path)
    killed.publish(make_file(tmp_path))
    kill(killed, exchange)

    assert remove_dead_servers(exchange) == 1

    assert [path.name for path in exchange.iterdir()] == ["lock"]
