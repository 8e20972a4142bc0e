"""The gftp program: the protocol as yapapi speaks it, URLs that come and go, and how it ends."""

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

from devnet.gftp import UnknownUrl, copy_file, remove_dead_servers, resolve_url, write_program
from devnet.transfers import TransferFailed, Transfers
from tests.devnet.exe_units import GftpProcess
from tests.process_tree import wait_until


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
    """Kill a server and wait until the kernel has dropped its lock: the shell between us may be gone before it."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.end()
    [path] = exchange.glob("server-*/lock")

    def is_free() -> bool:
        with path.open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    wait_until(is_free, 10)


def make_file(folder: Path, data: bytes = b"some bytes", name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def test_its_version_makes_yapapi_close_urls(gftp: GftpProcess) -> None:
    number = gftp.call("version").split()[0]

    assert tuple(map(int, number.split("."))) >= (0, 7, 3)


def test_a_url_ends_with_the_sha3_of_the_contents(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    path = make_file(tmp_path)

    url = gftp.publish(path)

    assert url.rpartition("/")[2] == hashlib.sha3_256(b"some bytes").hexdigest()
    assert resolve_url(exchange, url).file == path


def test_methods_are_taken_in_any_order(gftp: GftpProcess, tmp_path: Path) -> None:
    target = gftp.receive(tmp_path / "out")
    source = gftp.publish(make_file(tmp_path))

    assert gftp.call("close", urls=[source, target, source]) == ["ok", "ok", "error"]
    assert gftp.call("version")


def test_a_file_to_be_received_exists_at_once(gftp: GftpProcess, tmp_path: Path) -> None:
    gftp.receive(tmp_path / "out")

    assert (tmp_path / "out").read_bytes() == b""


def test_equal_contents_have_one_url_and_the_newest_file_counts(
    gftp: GftpProcess, tmp_path: Path, exchange: Path
) -> None:
    first = gftp.publish(make_file(tmp_path, name="one"))
    second = gftp.publish(make_file(tmp_path, name="two"))

    assert first == second
    assert resolve_url(exchange, first).file == tmp_path / "two"


def test_closing_forgets_only_what_that_server_published(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    other = GftpProcess(tmp_path)
    path = make_file(tmp_path)
    url = gftp.publish(path)
    assert other.publish(path) == url

    assert gftp.call("close", urls=[url]) == ["ok"]

    assert resolve_url(exchange, url).file == path
    assert other.end() == 0
    with pytest.raises(UnknownUrl):
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
        ('{"id": 1, "method": "publish", "params": {"files": "a"}}', -32602),
        ('{"id": 1, "method": "publish", "params": {"files": ["/none/such"]}}', -32000),
        ('{"id": 1, "method": "receive", "params": {"output_file": "/none/such"}}', -32000),
        ('{"id": 1, "method": "download", "params": {"url": "gftp://x/y", "output_file": "a"}}', -32000),
    ],
)
def test_what_it_cannot_do_is_an_error_and_not_its_end(gftp: GftpProcess, line: str, code: int) -> None:
    answer = gftp.send(line)

    assert answer["error"]["code"] == code and answer["error"]["message"]
    assert gftp.call("version")


def test_files_cross_between_two_servers(gftp: GftpProcess, tmp_path: Path) -> None:
    other = GftpProcess(tmp_path)
    source, target = gftp.publish(make_file(tmp_path)), gftp.receive(tmp_path / "received")

    other.call("download", url=source, output_file=str(tmp_path / "got"))
    other.call("upload", file=str(tmp_path / "got"), url=target)

    assert (tmp_path / "received").read_bytes() == (tmp_path / "got").read_bytes() == b"some bytes"
    other.end()


def test_it_ends_with_its_standard_input_and_leaves_nothing(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    url = gftp.publish(make_file(tmp_path))

    assert gftp.end() == 0

    with pytest.raises(UnknownUrl):
        resolve_url(exchange, url)
    assert [path.name for path in exchange.iterdir()] == ["lock"]


def test_shutdown_ends_it(gftp: GftpProcess) -> None:
    assert gftp.call("shutdown") == "ok"
    assert gftp.process.wait(10) == 0
    gftp.end()


def test_ctrl_c_is_for_the_requestor_alone(gftp: GftpProcess) -> None:
    gftp.call("version")  # it has come so far

    os.killpg(gftp.process.pid, signal.SIGINT)

    assert gftp.call("version")


def test_what_a_killed_server_published_is_forgotten_by_the_next(tmp_path: Path, exchange: Path) -> None:
    killed = GftpProcess(tmp_path)
    url = killed.publish(make_file(tmp_path))
    kill(killed, exchange)
    assert resolve_url(exchange, url)

    following = GftpProcess(tmp_path)
    following.call("version")

    with pytest.raises(UnknownUrl):
        resolve_url(exchange, url)
    following.end()


def test_a_living_servers_urls_are_not_forgotten(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    url = gftp.publish(make_file(tmp_path))

    assert remove_dead_servers(exchange) == 0

    assert resolve_url(exchange, url)


def test_without_the_word_server_it_says_how_it_is_used(gftp: GftpProcess, tmp_path: Path) -> None:
    result = subprocess.run([tmp_path / "bin/gftp", "publish"], capture_output=True, text=True, timeout=10)

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
        timeout=10,
    )

    assert (result.returncode, result.stderr, result.stdout.count(b"\n")) == (0, b"", 1)
    server.end()


def test_yapapi_itself_gets_along_with_it(tmp_path: Path, exchange: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("yapapi.storage.gftp")
    monkeypatch.setenv("PATH", f"{write_program(tmp_path / 'bin', exchange).parent}:{os.environ['PATH']}")
    transfers = Transfers(exchange)

    async def main() -> None:
        async with storage.provider() as provider:
            sources = [await provider.upload_bytes(b"some bytes") for _ in range(2)]
            assert sources[0].download_url == sources[1].download_url
            await provider.release_source(sources[0])
            await transfers.fetch(sources[1].download_url, tmp_path / "inside")
            destination = await provider.new_destination(tmp_path / "received")
            await transfers.deliver(tmp_path / "inside", destination.upload_url)
            await destination.download_file(tmp_path / "received")
            assert await (await provider.new_destination()).download_bytes() == b""

            await provider.release_source(sources[1])
            with pytest.raises(TransferFailed):
                await transfers.fetch(sources[1].download_url, tmp_path / "inside")

    started_at = time.monotonic()
    asyncio.run(main())

    assert time.monotonic() - started_at < 10  # so long yapapi would wait for a gftp that does not end
    assert (tmp_path / "received").read_bytes() == b"some bytes"
    assert [path.name for path in exchange.iterdir()] == ["lock"]


# Transfers


def test_transfers_carry_files_both_ways(gftp: GftpProcess, tmp_path: Path, exchange: Path) -> None:
    transfers = Transfers(exchange)
    source, target = gftp.publish(make_file(tmp_path)), gftp.receive(tmp_path / "received")

    assert asyncio.run(transfers.fetch(source, tmp_path / "inside")) == 10
    assert asyncio.run(transfers.deliver(tmp_path / "inside", target)) == 10

    assert (tmp_path / "received").read_bytes() == b"some bytes"


def test_transfers_refuse_what_is_not_known_or_goes_the_wrong_way(
    gftp: GftpProcess, tmp_path: Path, exchange: Path
) -> None:
    transfers, path = Transfers(exchange), make_file(tmp_path)
    source, target = gftp.publish(path), gftp.receive(tmp_path / "received")
    gone = gftp.publish(make_file(tmp_path, b"others", "gone"))
    (tmp_path / "gone").unlink()

    for url in ("gftp://0x/../lock", f"{source}0", gone, target, "https://example.org/x", "file:///etc/passwd", ""):
        with pytest.raises(TransferFailed):
            asyncio.run(transfers.fetch(url, tmp_path / "inside"))
    with pytest.raises(TransferFailed):
        asyncio.run(transfers.deliver(path, source))
    with pytest.raises(TransferFailed):
        asyncio.run(transfers.deliver(tmp_path / "missing", target))

    assert not (tmp_path / "inside").exists()
    assert (tmp_path / "received").read_bytes() == b""


def test_a_transfer_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = make_file(tmp_path, b"before", "target")

    with pytest.raises(OSError):
        copy_file(tmp_path, target)  # a folder cannot be read

    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_file_full_of_nothing_takes_no_room(tmp_path: Path) -> None:
    source = make_file(tmp_path, b"begin")
    os.truncate(source, 50_000_000)

    assert copy_file(source, tmp_path / "target") == 50_000_000

    assert (tmp_path / "target").stat().st_blocks * 512 < 4_000_000
    assert (tmp_path / "target").read_bytes()[:6] == b"begin\0"


def test_the_daemons_last_act_forgets_killed_servers(tmp_path: Path, exchange: Path) -> None:
    killed = GftpProcess(tmp_path)
    killed.publish(make_file(tmp_path))
    kill(killed, exchange)

    Transfers(exchange).remove_dead_servers()

    assert [path.name for path in exchange.iterdir()] == ["lock"]
