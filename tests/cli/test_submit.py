"""`mlg submit` against a real server: what is sent, what is written, and how it continues after an interruption."""

from __future__ import annotations

import csv
import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from cli.submission.files import find_files
from cli.submission.journal import SubmitJournal
from mlg_client import Client
from provider_image.errors import ConfigError
from store.requests import Answer, RequestRecord
from store.rows import to_text
from store.states import RequestState
from store.store import Store
from tests.conftest import MODEL, OUTPUT, ROOT, RunningServer
from tests.timing import DEADLINE_SECONDS, slowness, wait_until


def image(number: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (24, 24), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images in two folders, and a file that is no image."""
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.PNG", "more/d.jpg", "more/c e.png", "kätzchen.png"]):
        (photos / name).write_bytes(image(number))
    (photos / "notes.txt").write_text("no image")
    return photos


class Submit:
    """Runs `mlg submit` with a home that is not the server's."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.url = url

    def command(self, *arguments: str | Path) -> list[str]:
        options = ["--model", MODEL, "--url", self.url, "--home", str(self.home)]
        return [sys.executable, "-m", "mlg", "submit", *options, *map(str, arguments)]

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS
        )

    @property
    def journal(self) -> Path:
        (path,) = (self.home / "submissions").iterdir()
        return path


@pytest.fixture
def submit(tmp_path: Path, server: RunningServer) -> Submit:
    return Submit(tmp_path / "client", server.base)


@pytest.fixture
def batcher(store: Store) -> Iterator[Callable[[], None]]:
    """A thread that answers all queued requests once it is started."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.05):
            now = datetime.now(UTC)
            lease = now + timedelta(seconds=30)
            claims = store.requests.claim(models=[MODEL], limit=16, now=now, lease_ends_at=lease, oldest_before=None)
            store.requests.finish(
                [
                    Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="p", seconds=0.01)
                    for claim in claims
                ],
                now=now,
            )

    thread = threading.Thread(target=loop)
    yield thread.start
    stop.set()
    if thread.is_alive():
        thread.join()


def all_requests(store: Store) -> list[RequestRecord]:
    return store.requests.list(limit=10_000)


def lines(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_files_and_folders_are_found_in_a_stable_order(folder: Path) -> None:
    named = folder / "notes.txt"

    found = find_files([folder / "more", named, folder])

    assert [str(file.relative_to(folder)) for file in found] == [
        "more/c e.png",
        "more/d.jpg",
        "notes.txt",
        "a.PNG",
        "b.png",
        "kätzchen.png",
    ]
    with pytest.raises(ConfigError, match="no file or folder"):
        find_files([folder / "missing.jpg"])


def test_each_line_is_a_file_and_its_id_and_a_second_run_sends_nothing(
    submit: Submit, store: Store, folder: Path
) -> None:
    first = submit(folder)
    second = submit(folder)
    (folder / "new.png").write_bytes(image(999))
    third = submit(folder)

    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert [line[0] for line in lines(first)] == [str(file) for file in find_files([folder]) if file.name != "new.png"]
    assert all(store.requests.get(id).name == Path(file).name for file, id in lines(first))
    assert second.stdout == first.stdout
    assert set(first.stdout.splitlines()) < set(third.stdout.splitlines())
    assert len(all_requests(store)) == 6


def test_moved_files_are_known_and_identical_ones_are_sent_once(submit: Submit, store: Store, folder: Path) -> None:
    for copy in range(20):
        (folder / f"copy{copy}.png").write_bytes(image(0))
    submit(folder)

    folder.rename(folder.with_name("moved"))
    again = submit(folder.with_name("moved"))

    assert len(lines(again)) == 25
    assert len(all_requests(store)) == 5


def test_waiting_prints_the_best_label(submit: Submit, folder: Path, batcher: Callable[[], None]) -> None:
    batcher()

    done = submit("--wait", folder / "a.PNG")

    assert done.returncode == 0, done.stderr
    assert [line[2:] for line in lines(done)] == [["done", "label_0 0.095"]]


def test_results_are_written_as_jsonl_and_csv(
    submit: Submit, folder: Path, tmp_path: Path, batcher: Callable[[], None]
) -> None:
    batcher()

    as_jsonl = submit("--out", tmp_path / "results.jsonl", "--top", "3", folder)
    as_csv = submit("--out", tmp_path / "results.csv", folder)

    assert (as_jsonl.returncode, as_csv.returncode) == (0, 0), as_jsonl.stderr + as_csv.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [str(file) for file in find_files([folder])]
    assert {(row["status"], len(row["preds"]), row["reason"]) for row in rows} == {("done", 3, None)}
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 5 * 5
    assert (table[0]["rank"], table[0]["wnid"], table[0]["label"]) == ("1", "n00000020", "label_0")
    assert {row["req_id"] for row in table} == {row["req_id"] for row in rows}
    assert sorted(path.name for path in tmp_path.glob("*results*")) == ["results.csv", "results.jsonl"]


def test_a_file_that_is_refused_does_not_stop_the_others(
    submit: Submit, store: Store, folder: Path, tmp_path: Path, batcher: Callable[[], None]
) -> None:
    batcher()
    (folder / "letter.jpg").write_text("Dear kitten")
    (folder / "huge.jpg").write_bytes(bytes(17_000_000))
    (folder / "empty.png").touch()

    done = submit("--out", tmp_path / "results.jsonl", folder)

    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    rows = {Path(row["file"]).name: row for row in written}
    assert done.returncode == 1
    assert {name: row["code"] for name, row in rows.items() if row["status"] == "refused"} == {
        "letter.jpg": "not_an_image",
        "huge.jpg": "too_large",
        "empty.png": "empty_image",
    }
    assert sum(row["status"] == "done" for row in rows.values()) == 5
    assert done.stderr.count("\n") == 3
    assert f"mlg: {folder / 'letter.jpg'}: " in done.stderr
    assert len(all_requests(store)) == 5


def test_a_killed_run_continues_where_it_stopped(submit: Submit, store: Store, tmp_path: Path) -> None:
    many = tmp_path / "many"
    many.mkdir()
    for number in range(400):
        (many / f"{number:03d}.png").write_bytes(image(number))
    process = submit.start(many)

    wait_until(lambda: len(all_requests(store)) >= 40)
    process.kill()
    process.communicate()
    sent_before = len(all_requests(store))
    with submit.journal.open("ab") as journal:
        journal.write(b'{"sha256": "torn')
    again = submit(many)

    assert sent_before < 400
    assert (again.returncode, len(lines(again))) == (0, 400), again.stderr
    assert len({request.image_sha256 for request in all_requests(store)}) == 400
    # The batch that was being sent at the kill was sent again with its key.
    assert len(all_requests(store)) == 400
    with SubmitJournal(submit.home, submit.url, MODEL) as journal:
        assert all(journal.find(request.image_sha256) for request in all_requests(store))


@pytest.mark.parametrize("is_key_used", [False, True])
def test_a_batch_without_a_recorded_answer_is_sent_again_and_accepted_once(
    submit: Submit, store: Store, folder: Path, is_key_used: bool
) -> None:
    first = submit(folder)
    heading, batch, *_ = submit.journal.read_text().splitlines()
    if is_key_used:  # with another body, as if the server had received only a part of it
        batch = json.dumps({**json.loads(batch), "key": "used"})
        with Client(submit.url) as client:
            client.submit_many([image(7), image(8)], MODEL, idempotency_key="used")
    submit.journal.write_text(f"{heading}\n{batch}\n")

    again = submit(folder)

    assert again.returncode == 0, again.stderr
    assert (again.stdout == first.stdout) is not is_key_used
    assert len(all_requests(store)) == (5 + 2 + 5 if is_key_used else 5)


def test_an_interrupted_batch_with_a_changed_file_is_dropped(submit: Submit, store: Store, folder: Path) -> None:
    submit(folder)
    heading, batch, *_ = submit.journal.read_text().splitlines()
    submit.journal.write_text(f"{heading}\n{batch}\n")
    (folder / "b.png").write_bytes(image(999))

    again = submit(folder)

    assert again.returncode == 0, again.stderr
    assert {request.image_sha256 for request in all_requests(store)} >= {hashlib.sha256(image(999)).hexdigest()}


def test_the_journal_of_an_earlier_version_is_read(submit: Submit, store: Store, folder: Path) -> None:
    first = submit(folder)
    kept = [line for line in submit.journal.read_text().splitlines() if '"url"' in line or '"sha256"' in line]
    submit.journal.write_text("\n".join(kept) + "\n")

    again = submit(folder)

    assert [sorted(json.loads(line)) for line in kept] == [["model", "url"], *[["req_id", "sha256"]] * 5]
    assert again.stdout == first.stdout
    assert len(all_requests(store)) == 5


def test_ids_that_the_server_does_not_know_are_sent_again(submit: Submit, store: Store, folder: Path) -> None:
    submit(folder)
    sha256 = hashlib.sha256((folder / "b.png").read_bytes()).hexdigest()
    with submit.journal.open("a") as journal:
        journal.write(json.dumps({"sha256": sha256, "req_id": "forgotten"}) + "\n")

    again = submit(folder)

    assert again.returncode == 0
    assert len(all_requests(store)) == 6
    assert dict(lines(again))[str(folder / "b.png")] != "forgotten"


def test_what_ended_without_a_result_ends_the_wait_and_is_sent_again_by_the_next_run(
    submit: Submit, store: Store, folder: Path
) -> None:
    process = submit.start("--wait", folder)
    wait_until(lambda: len(all_requests(store)) == 5)
    now = datetime.now(UTC)
    lease = now + timedelta(seconds=30)
    done, failed = store.requests.claim(models=[MODEL], limit=2, now=now, lease_ends_at=lease, oldest_before=None)
    waiting = [request.id for request in all_requests(store) if request.state is RequestState.QUEUED]
    store.requests.finish(
        [Answer(claim=done, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="p", seconds=0.01)], now=now
    )
    store.requests.fail([failed], code="broken_image", reason="It is torn.", now=now)
    store.requests.cancel(waiting[0], now=now)
    store.database.execute("UPDATE requests SET deadline_at = ? WHERE state = 'queued'", (to_text(now),))
    store.requests.expire(now)

    output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    again = submit(folder)

    statuses = sorted(line.split("\t")[2] for line in output.decode().splitlines())
    assert (process.returncode, statuses) == (1, ["cancelled", "done", "expired", "expired", "failed"]), errors
    assert again.returncode == 0, again.stderr
    ended = {failed.id, *waiting}
    assert len(all_requests(store)) == 5 + len(ended)
    assert done.id in dict(lines(again)).values()
    assert not ended & {id for _, id in lines(again)}


def test_ctrl_c_saves_the_state_and_explains_how_to_continue(
    submit: Submit, store: Store, folder: Path, tmp_path: Path, batcher: Callable[[], None]
) -> None:
    out = tmp_path / "results.jsonl"
    process = submit.start("--out", out, folder)
    # All are sent and the command waits for results that do not come.
    journals = submit.home / "submissions"
    wait_until(lambda: sum(path.read_bytes().count(b'"req_id"') for path in journals.glob("*")) == 5)

    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # faulthandler then prints the stack of each thread
        _, errors = process.communicate()
    took = time.monotonic() - began
    partly = [json.loads(line) for line in out.read_text().splitlines()]
    batcher()
    again = submit("--out", out, folder)

    assert (process.returncode, took < 4 * slowness()) == (130, True), errors
    assert "same command" in errors.decode()
    # What the server has not been asked for yet is said to wait.
    assert {row["status"] for row in partly} <= {"queued", "waiting"}
    assert all(row["req_id"] for row in partly)
    assert again.returncode == 0
    assert {json.loads(line)["status"] for line in out.read_text().splitlines()} == {"done"}
    assert len(all_requests(store)) == 5


class BusyTwice(http.server.BaseHTTPRequestHandler):
    """A server that is busy twice before it accepts an image."""

    received: list[float]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append(time.monotonic())
        busy = len(self.received) <= 2
        self.send_response(503 if busy else 202)
        self.send_header("Retry-After", "1")
        self.end_headers()
        answer: dict[str, Any] = {"success": not busy, "req_id": "r1", "reason": "Busy.", "code": "store_busy"}
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def busy_server() -> Iterator[tuple[str, list[float]]]:
    received: list[float] = []
    handler = type("Handler", (BusyTwice,), {"received": received})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()
        thread.join()


def test_a_busy_server_is_retried_after_its_retry_after(
    busy_server: tuple[str, list[float]], folder: Path, tmp_path: Path
) -> None:
    url, received = busy_server

    done = Submit(tmp_path / "client", url)(folder / "b.png")

    assert (done.returncode, lines(done)) == (0, [[str(folder / "b.png"), "r1"]]), done.stderr
    assert len(received) == 3
    assert received[1] - received[0] >= 1.0


def test_an_unreachable_server_is_given_up_after_the_retry_timeout(folder: Path, tmp_path: Path) -> None:
    began = time.monotonic()

    done = Submit(tmp_path / "client", "http://127.0.0.1:9")("--retry-timeout", "1", folder)

    assert done.returncode == 1
    assert "mlg serve" in done.stderr
    assert "0 of 5 images" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 20 * slowness()


@pytest.mark.parametrize(("model", "word"), [("densenet12", "densenet121"), ("vgg16", "mlg models compile vgg16")])
def test_a_model_that_the_server_cannot_run_ends_the_command_at_once(
    server: RunningServer, folder: Path, tmp_path: Path, model: str, word: str
) -> None:
    submit = Submit(tmp_path / "client", server.base)
    command = [model if part == MODEL else part for part in submit.command(folder)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)

    assert done.returncode == 1
    assert word in done.stderr


@pytest.mark.parametrize("out", ["results.txt", "nowhere/results.csv"])
def test_a_results_file_that_cannot_be_written_is_an_error_before_anything_is_sent(
    submit: Submit, store: Store, folder: Path, tmp_path: Path, out: str
) -> None:
    done = submit("--out", tmp_path / out, folder)

    assert (done.returncode, "--out" in done.stderr) == (2, True)
    assert all_requests(store) == []


def test_a_file_name_need_not_be_utf8(submit: Submit, tmp_path: Path, batcher: Callable[[], None]) -> None:
    batcher()
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes(image(5))

    done = subprocess.run(
        submit.command("--wait", os.fsdecode(name)), cwd=ROOT, capture_output=True, timeout=DEADLINE_SECONDS
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(name + b"\t")
