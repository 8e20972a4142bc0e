"""The commands `mlg serve`, `mlg migrate` and `mlg requests` as a user runs them, with the real curl."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from tests.cli.run_mlg import mlg
from tests.conftest import RunningServer
from tests.process_tree import children, is_alive
from tests.programs import find_program
from tests.timing import DEADLINE_SECONDS, slowness, wait_until

MODEL = "efficientnet_lite0"


def curl(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the real curl. :return: status and JSON."""
    find_program("curl", package="curl")
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "--noproxy", "*", "-w", "\n%{http_code}", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "kitten.png"
    file = io.BytesIO()
    Image.new("RGB", (48, 48), "maroon").save(file, "PNG")
    path.write_bytes(file.getvalue())
    return path


# The real server and the real curl


def test_curl_sends_an_image_in_each_way_and_reads_its_status(
    start_server: Callable[..., RunningServer], image_file: Path
) -> None:
    base = start_server().base
    url = f"{base}/requestPrediction/{MODEL}"

    as_form = curl("-F", f"image=@{image_file}", url)
    raw = curl("-H", "Content-Type: image/png", "--data-binary", f"@{image_file}", url)
    chunks = ("-H", "Transfer-Encoding: chunked")
    chunked = curl(*chunks, "-H", "Content-Type: image/png", "--data-binary", f"@{image_file}", url)
    read = curl("-X", "POST", f"{base}{as_form[1]['status_url']}")

    assert [as_form[0], raw[0], chunked[0]] == [202, 202, 202]
    assert (read[0], read[1]["status"], read[1]["name"]) == (200, "queued", "kitten.png")


def test_curl_receives_413_for_a_large_upload_however_it_is_sent(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server()
    big = tmp_path / "big.jpg"
    big.write_bytes(b"\xff\xd8" + os.urandom(17_000_000))
    url = f"{server.base}/requestPrediction/{MODEL}"
    raw = ("-H", "Content-Type: image/jpeg", "--data-binary", f"@{big}")
    chunks = ("-H", "Transfer-Encoding: chunked")

    answers = [
        curl("-F", f"image=@{big}", url),
        curl(*raw, url),
        curl(*raw, "-H", "Expect: 100-continue", url),
        curl(*raw, "-H", "Expect:", url),
        curl(*raw, *chunks, url),
        curl("-F", f"image=@{big}", *chunks, url),
    ]

    assert {(status, answer["code"]) for status, answer in answers} == {(413, "too_large")}
    assert not [path for path in (server.home / "blobs").rglob("*") if path.is_file()]


def test_curl_with_d_is_told_to_use_f(start_server: Callable[..., RunningServer], image_file: Path) -> None:
    status, answer = curl("-d", f"image=@{image_file}", f"{start_server().base}/requestPrediction/{MODEL}")

    assert (status, answer["code"]) == (415, "unsupported_media_type")
    assert "curl -F image=@" in answer["reason"]


def test_the_commands_on_a_home_see_the_requests_of_its_server(
    start_server: Callable[..., RunningServer], image_file: Path
) -> None:
    server = start_server()
    id = curl("-F", f"image=@{image_file}", f"{server.base}/requestPrediction/{MODEL}")[1]["req_id"]

    listed = [json.loads(line) for line in mlg("requests", "list", "--json", home=server.home).stdout.splitlines()]
    table = mlg("requests", "list", home=server.home).stdout
    shown = mlg("requests", "show", id, home=server.home).stdout
    cancelled = mlg("requests", "cancel", id, home=server.home)
    again = mlg("requests", "cancel", id, home=server.home)
    retried = mlg("requests", "retry", id, home=server.home)
    unknown = mlg("requests", "show", "nosuchid", home=server.home)

    assert [(row["req_id"], row["status"]) for row in listed] == [(id, "queued")]
    assert id in table
    assert "kitten.png" in shown
    assert (cancelled.returncode, cancelled.stdout) == (0, f"{id}\tcancelled\n")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert (retried.returncode, retried.stdout) == (0, f"{id}\tqueued\n")
    assert (unknown.returncode, unknown.stderr.startswith("mlg: There is no request")) == (1, True)


@pytest.mark.parametrize("ready_fd", [0, 200])
def test_two_processes_serve_one_port_and_a_killed_one_is_replaced(
    ready_fd: int, start_server: Callable[..., RunningServer], image_file: Path
) -> None:
    # The parent may have used any descriptor as --ready-fd, and it is closed by now.
    server = start_server(MLG_SERVER_PROCESSES="2", ready_fd=ready_fd)
    workers = children(server.process.pid)

    os.kill(workers[0], signal.SIGKILL)
    answers = [curl("-F", f"image=@{image_file}", f"{server.base}/requestPrediction/{MODEL}") for _ in range(10)]

    assert len(workers) == 2
    assert {status for status, _ in answers} == {202}
    wait_until(lambda: len(children(server.process.pid)) == 2)


def test_the_port_is_free_after_the_main_process_is_killed(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(MLG_SERVER_PROCESSES="2")
    workers = children(server.process.pid)

    server.process.kill()
    server.process.wait()

    wait_until(lambda: not any(map(is_alive, workers)))
    port = urlsplit(server.base).port
    assert port is not None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_requests_in_progress_finish(
    start_server: Callable[..., RunningServer], image_file: Path, how: signal.Signals
) -> None:
    server = start_server()
    address = urlsplit(server.base)
    data = image_file.read_bytes()
    id = curl("-F", f"image=@{image_file}", f"{server.base}/requestPrediction/{MODEL}")[1]["req_id"]
    held, slow = (
        http.client.HTTPConnection(address.hostname or "", address.port, timeout=DEADLINE_SECONDS) for _ in range(2)
    )
    held.request("GET", f"/readPrediction/{id}?wait=30")
    slow.putrequest("POST", f"/requestPrediction/{MODEL}")
    slow.putheader("Content-Type", "image/png")
    slow.putheader("Content-Length", str(len(data)))
    slow.endheaders(data[:100])
    for _ in range(5):  # these are answered, so the server has received both requests before
        curl(f"{server.base}/readyz")

    began = time.monotonic()
    server.process.send_signal(how)
    slow.send(data[100:])
    responses = [connection.getresponse() for connection in (slow, held)]
    answers = [json.load(response) for response in responses]
    code = server.process.wait(DEADLINE_SECONDS)
    seconds = time.monotonic() - began
    for connection in (slow, held):
        connection.close()

    assert ([response.status for response in responses], code) == ([202, 200], 0)
    assert answers[1]["status"] == "queued"
    assert seconds < 9 * slowness()


def test_the_server_stops_when_its_parent_exits(start_server: Callable[..., RunningServer]) -> None:
    reader, writer = os.pipe()
    server = start_server("--parent-fd", str(reader))
    os.close(reader)

    os.close(writer)

    assert server.process.wait(DEADLINE_SECONDS) == 0


def test_a_taken_port_is_one_line_and_exit_status_2(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    port = str(urlsplit(start_server().base).port)

    second = mlg("serve", "--port", port, home=tmp_path / "other")

    assert second.returncode == 2
    assert re.fullmatch(rf"mlg: Port {port} on 127\.0\.0\.1 is used by another program\. .*--port.*\n", second.stderr)


@pytest.mark.parametrize(
    ("arguments", "variables", "status", "word"),
    [
        (["--home", "/proc/nowhere"], {}, 1, "/proc/nowhere"),
        (["--home", "/dev/null/x"], {}, 1, "/dev/null/x"),
        (["--port", "70000"], {}, 2, "MLG_PORT=70000"),
        (["--host", "no.such.host.invalid"], {}, 2, "MLG_HOST=no.such.host.invalid"),
        ([], {"MLG_SERVER_THREADS": "many"}, 2, "MLG_SERVER_THREADS='many'"),
    ],
)
def test_a_server_that_cannot_start_writes_one_line_with_the_reason(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], status: int, word: str
) -> None:
    done = mlg("serve", "--port", "0", *arguments, home=tmp_path / "home", **variables)

    assert done.returncode == status, done.stderr
    assert word in done.stderr
    assert (done.stderr.startswith("mlg: "), done.stderr.count("\n")) == (True, 1)


# Without a server


def test_migrate_creates_a_home_and_prints_what_it_applied(tmp_path: Path) -> None:
    first = mlg("migrate", "--home", str(tmp_path / "home"))
    second = mlg("migrate", "--home", str(tmp_path / "home"))

    assert (first.returncode, second.returncode) == (0, 0)
    assert "m001_requests" in first.stdout
    assert "up to date" in second.stdout


def test_requests_list_does_not_create_a_home(tmp_path: Path) -> None:
    done = mlg("requests", "list", "--home", str(tmp_path / "none"))

    assert (done.returncode, "mlg migrate" in done.stderr) == (2, True)
    assert not (tmp_path / "none").exists()
