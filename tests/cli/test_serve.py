"""The commands serve, migrate, requests and models, as they are typed."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from provider_image.models.catalogue import CATALOGUE
from tests.conftest import RunningServer
from tests.process_tree import children, is_alive, wait_until

ROOT = Path(__file__).parents[2]
MODEL = "efficientnet_lite0"


def mlg(*arguments: str, home: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    where = {} if home is None else {"MLG_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "mlg", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **where, **variables},
    )


def curl(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the real curl. :return: status and JSON."""
    if shutil.which("curl") is None and os.environ.get("CI") != "true":
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["curl", "-sS", "-m", "20", "--noproxy", "*", "-w", "\n%{http_code}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "kitten.png"
    file = io.BytesIO()
    Image.new("RGB", (48, 48), "maroon").save(file, "PNG")
    path.write_bytes(file.getvalue())
    return path


# The real server and the real curl


def test_curl_sends_a_picture_each_way_and_reads_its_state(
    start_server: Callable[..., RunningServer], picture: Path
) -> None:
    base = start_server().base
    url = f"{base}/requestPrediction/{MODEL}"

    as_form = curl("-F", f"image=@{picture}", url)
    raw = curl("-H", "Content-Type: image/png", "--data-binary", f"@{picture}", url)
    chunks = ("-H", "Transfer-Encoding: chunked")
    chunked = curl(*chunks, "-H", "Content-Type: image/png", "--data-binary", f"@{picture}", url)
    read = curl("-X", "POST", f"{base}{as_form[1]['status_url']}")

    assert [as_form[0], raw[0], chunked[0]] == [202, 202, 202]
    assert (read[0], read[1]["status"], read[1]["name"]) == (200, "queued", "kitten.png")


def test_curl_sees_the_413_of_a_large_upload_however_it_is_sent(
    start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start_server()
    big = tmp_path / "big.jpg"
    big.write_bytes(b"\xff\xd8" + os.urandom(10_000_000))
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


def test_curl_with_d_is_told_to_use_f(start_server: Callable[..., RunningServer], picture: Path) -> None:
    status, answer = curl("-d", f"image=@{picture}", f"{start_server().base}/requestPrediction/{MODEL}")

    assert (status, answer["code"]) == (415, "unsupported_media_type")
    assert "curl -F image=@" in answer["reason"]


def test_a_request_on_a_server_is_seen_by_the_commands_on_its_home(
    start_server: Callable[..., RunningServer], picture: Path
) -> None:
    server = start_server()
    id = curl("-F", f"image=@{picture}", f"{server.base}/requestPrediction/{MODEL}")[1]["req_id"]

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
    ready_fd: int, start_server: Callable[..., RunningServer], picture: Path
) -> None:
    # Whoever is told that the server is ready may have used any descriptor for it, which is closed by now.
    server = start_server(MLG_SERVER_PROCESSES="2", ready_fd=ready_fd)
    workers = children(server.process.pid)

    os.kill(workers[0], signal.SIGKILL)
    answers = [curl("-F", f"image=@{picture}", f"{server.base}/requestPrediction/{MODEL}") for _ in range(10)]

    assert len(workers) == 2
    assert {status for status, _ in answers} == {202}
    wait_until(lambda: len(children(server.process.pid)) == 2)


def test_nothing_keeps_the_port_when_the_main_process_is_killed(start_server: Callable[..., RunningServer]) -> None:
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
def test_a_stop_lets_requests_under_way_finish(
    start_server: Callable[..., RunningServer], picture: Path, how: signal.Signals
) -> None:
    server = start_server()
    address = urlsplit(server.base)
    data = picture.read_bytes()
    id = curl("-F", f"image=@{picture}", f"{server.base}/requestPrediction/{MODEL}")[1]["req_id"]
    held: list[tuple[int, dict[str, Any]]] = []
    reader = threading.Thread(target=lambda: held.append(curl(f"{server.base}/readPrediction/{id}?wait=30")))
    reader.start()
    slow = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    slow.putrequest("POST", f"/requestPrediction/{MODEL}")
    slow.putheader("Content-Type", "image/png")
    slow.putheader("Content-Length", str(len(data)))
    slow.endheaders(data[:100])
    time.sleep(0.3)  # both are inside now; there is nothing to look at from here

    began = time.monotonic()
    server.process.send_signal(how)
    slow.send(data[100:])
    response = slow.getresponse()
    status = response.status
    response.read()
    slow.close()
    code = server.process.wait(30)
    reader.join(30)

    assert (status, code) == (202, 0)
    assert [(kind, answer["status"]) for kind, answer in held] == [(200, "queued")]
    assert time.monotonic() - began < 9


def test_the_server_stops_when_its_parent_is_gone(start_server: Callable[..., RunningServer]) -> None:
    reader, writer = os.pipe()
    server = start_server("--parent-fd", str(reader))
    os.close(reader)

    os.close(writer)

    assert server.process.wait(30) == 0


def test_a_taken_port_is_one_line_and_exit_status_2(start_server: Callable[..., RunningServer], tmp_path: Path) -> None:
    port = str(urlsplit(start_server().base).port)

    second = mlg("serve", "--port", port, home=tmp_path / "other")

    assert second.returncode == 2
    assert re.fullmatch(rf"mlg: Port {port} on 127\.0\.0\.1 is taken .*--port.*\n", second.stderr)


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
def test_a_server_that_cannot_start_says_why_in_one_line(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], status: int, word: str
) -> None:
    done = mlg("serve", "--port", "0", *arguments, home=tmp_path / "home", **variables)

    assert done.returncode == status, done.stderr
    assert word in done.stderr
    assert (done.stderr.startswith("mlg: "), done.stderr.count("\n")) == (True, 1)


# Without a server


def test_migrate_makes_a_home_and_says_what_it_did(tmp_path: Path) -> None:
    first = mlg("migrate", "--home", str(tmp_path / "home"))
    second = mlg("migrate", "--home", str(tmp_path / "home"))

    assert (first.returncode, second.returncode) == (0, 0)
    assert "m001_requests" in first.stdout
    assert "up to date" in second.stdout


def test_requests_of_a_home_that_is_not_there_make_none(tmp_path: Path) -> None:
    done = mlg("requests", "list", "--home", str(tmp_path / "none"))

    assert (done.returncode, "mlg migrate" in done.stderr) == (2, True)
    assert not (tmp_path / "none").exists()


def test_models_lists_bare_and_by_name(tmp_path: Path, models_folder: Path) -> None:
    (tmp_path / "models").symlink_to(models_folder)

    bare = mlg("models", home=tmp_path)
    as_json = [json.loads(line) for line in mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()]
    group_json = mlg("models", "--json", "--home", str(tmp_path)).stdout.splitlines()

    assert re.search(r"efficientnet_lite0 .* 224 x 224 +yes", bare.stdout)
    assert re.search(r"nasnet_large .* 331 x 331 +no", bare.stdout)
    assert len(as_json) == len(group_json) == len(CATALOGUE)
    assert as_json[0]["installed"] is True
    assert (as_json[0]["storage"], as_json[0]["images_per_second"]) == ("f32", None)
    assert as_json[0]["size_bytes"] > 18e6
    assert re.search(rf"yes +{as_json[0]['digest'][:12]} +1\d\.\d +f32\s", bare.stdout)
    assert "mlg models check" in bare.stderr
    assert all(len(line) < 130 for line in bare.stdout.splitlines())


def test_models_fit_a_terminal_of_100_columns(tmp_path: Path, models_folder: Path) -> None:
    (tmp_path / "models").symlink_to(models_folder)
    main, other = pty.openpty()
    termios.tcsetwinsize(other, (40, 100))

    process = subprocess.Popen(
        [sys.executable, "-m", "mlg", "models"],
        cwd=ROOT,
        stdout=other,
        stderr=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}, "MLG_HOME": str(tmp_path)},
    )
    os.close(other)
    shown = b""
    with os.fdopen(main, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # it ends with an error
        while data := terminal.read(65536):
            shown += data
    status = process.wait(60)

    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown.decode()).split("\r\n")
    assert status == 0
    assert len([line for line in lines if line]) == 1 + len(CATALOGUE)
    assert all(word in lines[0] for word in ("service", "input", "digest", "MB", "weights", "images/s"))
    assert max(map(len, lines)) <= 100


def test_models_check_says_ok_and_the_list_then_shows_the_speed(tmp_path: Path, models_folder: Path) -> None:
    shutil.copytree(models_folder / MODEL, tmp_path / "models" / MODEL)

    checked = mlg("models", "check", "EfficientNet-Lite0", home=tmp_path)
    listed = mlg("models", home=tmp_path)
    as_json = json.loads(mlg("models", "list", "--json", home=tmp_path).stdout.splitlines()[0])

    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.startswith(f"{MODEL} (EfficientNet-Lite0)\n")
    assert checked.stdout.splitlines()[-1].split() == ["verdict", "ok"]
    said = re.search(r"speed +([\d.]+) images/s", checked.stdout)
    assert said and as_json["images_per_second"] == pytest.approx(float(said[1]), abs=0.06)
    assert (listed.stderr, "f32" in listed.stdout) == ("", True)


def test_models_check_takes_the_path_of_an_artefact_and_its_status_is_the_verdict(
    tmp_path: Path, models_folder: Path
) -> None:
    copy = Path(shutil.copytree(models_folder / MODEL, tmp_path / "copy"))
    options = ("--json", "--threads", "1", "--precision", "bf16", "--home", str(tmp_path / "home"))
    sound = mlg("models", "check", str(copy), *options)
    data = bytearray((copy / "model.bin").read_bytes())
    data[1000] ^= 1
    (copy / "model.bin").write_bytes(data)

    spoilt = mlg("models", "check", str(copy), "densenet121", *options)

    report = json.loads(sound.stdout)
    assert (sound.returncode, report["ok"], report["threads"], report["precision"]) == (0, True, 1, "bf16")
    assert spoilt.returncode == 1
    problems = [json.loads(line)["problem"] for line in spoilt.stdout.splitlines()]
    assert "model.bin has changed" in problems[0]
    assert "mlg models compile densenet121" in problems[1]
    assert not (tmp_path / "home").exists()


def test_models_check_of_an_unknown_model_is_one_line(tmp_path: Path) -> None:
    done = mlg("models", "check", "densenet12", home=tmp_path)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "densenet121" in done.stderr
