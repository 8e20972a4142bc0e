"""`mlg up` and `mlg batch` as processes: they start, recover from crashes, and leave no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batcher.executors.golem.timings import GolemTimings
from batcher.settings import BatcherTimings
from cli.supervisor import Supervisor, with_short_waits
from store.settings import HomeSettings
from store.store import Store
from tests.process_tree import children, command_line, descendants, is_alive
from tests.timing import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).parents[2]
MODEL = "efficientnet_lite0"


class Up:
    """A running `mlg up`."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.errors = home.parent / "up.err"
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlg", "up", "--home", str(home), *arguments],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def read_startup_message(self) -> str:
        assert self.process.stdout is not None
        lines = []
        while not lines or not lines[-1].startswith("Ctrl-C"):
            line = self.process.stdout.readline()
            assert line, self.errors.read_text()
            lines.append(line)
        return "".join(lines)

    def child(self, command: str) -> int:
        def find() -> int | None:
            wanted = ["mlg", command, "--parent-fd"]
            return next((pid for pid in children(self.process.pid) if command_line(pid)[3:6] == wanted), None)

        return int(wait_until(find))

    def end(self) -> None:
        left = descendants(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started = []

    def make(*arguments: str) -> Up:
        started.append(Up(tmp_path / "home", *arguments))
        return started[-1]

    yield make
    for each in started:
        each.end()


def address(message: str) -> str:
    return next(word for word in message.split() if word.startswith("http://"))


def ask(url: str, data: bytes | None = None) -> dict[str, Any]:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "image/jpeg"} if data else {})
    with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def classify(base: str, photo: bytes) -> dict[str, Any]:
    id = ask(f"{base}/requestPrediction/{MODEL}?fresh=1", photo)["req_id"]
    return wait_until(lambda: (found := ask(f"{base}/readPrediction/{id}?wait=5"))["preds"] and found)


def has_app_key(pid: int) -> bool:
    return b"YAGNA_APPKEY=" in Path(f"/proc/{pid}/environ").read_bytes()


def test_up_restarts_killed_children_and_stops_cleanly(
    start: Callable[..., Up], photos: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YAGNA_APPKEY", "only the batcher needs it")
    up = start("--port", "0", "--workers", "1")
    message = up.read_startup_message()
    base = address(message)

    first = classify(base, photos["chelsea"])
    batcher, server = up.child("batch"), up.child("serve")
    others = [server, *descendants(server), *descendants(batcher)]
    assert has_app_key(batcher) and len(others) > 1 and not any(map(has_app_key, others))
    os.kill(batcher, signal.SIGKILL)
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(batcher) and not is_alive(server))
    assert up.child("batch") != batcher and up.child("serve") != server

    def is_back() -> bool:
        with contextlib.suppress(OSError):
            return ask(f"{base}/healthz") is not None
        return False

    wait_until(is_back)
    second = classify(base, photos["coffee"])
    processes = descendants(up.process.pid)
    up.process.send_signal(signal.SIGINT)
    status = up.process.wait(DEADLINE_SECONDS)

    assert str(up.home) in message and "1 worker" in message and "curl -F image=@" in message
    assert (first["preds"][0][1], second["preds"][0][1]) == ("tiger_cat", "espresso")
    assert status == 0
    assert not any(is_alive(pid) for pid in processes)
    assert [path.name for path in (up.home / "work").iterdir()] == [".lock"]
    errors = up.errors.read_text()
    assert errors.count("the batcher was killed by SIGKILL; starting it again") == 1
    assert errors.count("the server was killed by SIGKILL; starting it again") == 1
    assert "Traceback" not in errors


@pytest.mark.parametrize("settle_seconds", [8, 600])
def test_the_batcher_gets_the_time_to_stop_that_its_executor_needs(settle_seconds: int, tmp_path: Path) -> None:
    variables = {"MLG_HOME": str(tmp_path), "MLG_EXECUTOR": "golem", "MLG_DRAIN_SECONDS": "20"}
    supervisor = Supervisor({**variables, "MLG_GOLEM_SETTLE_SECONDS": str(settle_seconds)}, write_line=print)
    store = Store(HomeSettings(home=tmp_path))
    supervisor._executor = supervisor._load_executor(store)
    timings = GolemTimings()

    granted = supervisor._grace_seconds(supervisor._batcher)

    store.close()
    session = timings.recovery_seconds + 2 * timings.stop_seconds + timings.ledger_close_seconds
    assert granted > 20 + BatcherTimings().final_write_seconds + settle_seconds + session


def test_no_process_outlives_a_killed_supervisor(start: Callable[..., Up]) -> None:
    up = start("--port", "0", "--workers", "1")
    up.read_startup_message()
    processes = descendants(up.process.pid)

    up.process.kill()
    up.process.wait()

    assert len(processes) >= 3
    wait_until(lambda: not any(is_alive(pid) for pid in processes))


def test_a_taken_port_is_one_error_line_without_restarts(start: Callable[..., Up]) -> None:
    first = start("--port", "0", "--workers", "1")
    port = address(first.read_startup_message()).rpartition(":")[2]

    second = subprocess.run(
        [sys.executable, "-m", "mlg", "up", "--home", str(first.home), "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    assert (second.returncode, second.stdout) == (1, "")
    (line,) = second.stderr.splitlines()
    assert line.startswith(f"mlg: Port {port}") and "--port" in line


def test_a_home_that_cannot_be_used_is_one_error_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file, not a folder")

    result = subprocess.run(
        [sys.executable, "-m", "mlg", "up", "--home", str(tmp_path / "home"), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1


def test_options_override_variables_and_errors_name_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlg", "batch", "--once", "--home", str(tmp_path / "home")]
    environment = {**os.environ, "MLG_EXECUTOR": "nowhere"}

    wrong = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    right = subprocess.run(
        [*command, "--executor", "local", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    assert wrong.returncode == 2
    assert "MLG_EXECUTOR" in wrong.stderr and "local" in wrong.stderr
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout)["left"] == []


def test_the_batcher_stops_when_its_parent_exits(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlg", "batch", "--home", str(tmp_path / "home"), "--parent-fd", str(reader)],
        cwd=ROOT,
        pass_fds=[reader],
        stderr=subprocess.DEVNULL,
    )
    os.close(reader)
    wait_until(lambda: (tmp_path / "home" / "mlg.db").exists())

    os.close(writer)

    assert process.wait(DEADLINE_SECONDS) == 0


def test_up_waits_briefly_unless_configured_otherwise() -> None:
    assert with_short_waits({})["MLG_MAX_WAIT_SECONDS"] == "0.2"
    assert with_short_waits({"MLG_MAX_WAIT_SECONDS": ""})["MLG_MAX_WAIT_SECONDS"] == "0.2"
    assert with_short_waits({"MLG_MAX_WAIT_SECONDS": "3"})["MLG_MAX_WAIT_SECONDS"] == "3"
