"""The whole system as a user runs it, and as it survives: `mlg up`, real photos over HTTP, processes killed by -9."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.process_tree import descendants, is_alive
from tests.system import RIGHT, System, variant
from tests.timing import DEADLINE_SECONDS, wait_until

ROOT = Path(__file__).parents[1]

#: Counts how often each request became done, by whichever process.
TRIGGER = """
    CREATE TABLE answered (number INTEGER);
    CREATE TRIGGER count_answers AFTER UPDATE OF state ON requests WHEN new.state = 'done'
    BEGIN INSERT INTO answered VALUES (new.number); END;
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., System]]:
    systems: list[System] = []

    def start_one(**settings: str) -> System:
        systems.append(System(tmp_path / "home", **settings))
        return systems[-1]

    yield start_one
    for system in systems:
        if system.process.poll() is None:
            system.stop()


def test_photos_go_in_and_the_right_labels_come_out(start: Callable[..., System], photos: dict[str, bytes]) -> None:
    system = start()

    ids = {name: system.post(photos[name])["req_id"] for name in RIGHT}
    answers = {name: system.answer(id) for name, id in ids.items()}

    for name, (label, probability) in RIGHT.items():
        assert answers[name]["status"] == "done"
        assert len(answers[name]["preds"]) == 5
        assert answers[name]["preds"][0][1] == label
        assert answers[name]["preds"][0][2] == pytest.approx(probability, abs=0.05)
    again = system.post(photos["coffee"])
    assert (again["status"], again["cached"]) == ("done", True)
    assert len(system.read(ids["rocket"], "?top=20")["preds"]) == 20


def test_ctrl_c_and_sigterm_stop_everything_cleanly(start: Callable[..., System], photos: dict[str, bytes]) -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        system = start()
        system.answer(system.post(variant(photos["coffee"], how))["req_id"])
        family = descendants(system.process.pid)

        status = system.stop(how)

        assert status == 0, system.log.read_text()
        wait_until(lambda family=family: not any(map(is_alive, family)))
        assert system.query("SELECT count(*) FROM requests WHERE state = 'claimed'") == [(0,)]
        assert not [path for path in (system.home / "work").rglob("*") if path.is_file() and path.name != ".lock"]


def test_nothing_outlives_a_supervisor_that_is_killed(start: Callable[..., System]) -> None:
    system = start()
    family = descendants(system.process.pid)

    system.process.kill()

    assert len(family) >= 4
    wait_until(lambda: not any(map(is_alive, family)))


@pytest.mark.parametrize("victim", ["worker", "batcher", "server", "server worker"])
def test_a_kill_during_work_loses_nothing_and_answers_nothing_twice(
    start: Callable[..., System], photos: dict[str, bytes], victim: str
) -> None:
    system = start(MLG_LEASE_SECONDS="2")
    system.execute(TRIGGER)
    words = {"worker": ("provider_image", "serve"), "batcher": ("mlg", "batch")}.get(victim, ("mlg", "serve"))
    acknowledged: list[str] = []
    stop = threading.Event()

    def post_all() -> None:
        number = 0
        while not stop.is_set() or len(acknowledged) < 120:
            number += 1
            try:
                acknowledged.append(system.post(variant(photos["coffee"], number))["req_id"])
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.05)

    poster = threading.Thread(target=post_all)
    poster.start()
    for kill in range(3):
        wait_until(lambda kill=kill: len(acknowledged) > 25 * (kill + 1))
        pids = wait_until(lambda: system.pids(*words))
        # The server's main process comes first; its workers are its children.
        os.kill(pids[-1] if victim in ("server worker", "worker") else pids[0], signal.SIGKILL)
    wait_until(lambda: len(acknowledged) > 110)
    stop.set()
    poster.join()
    wait_until(lambda: system.query("SELECT count(*) FROM requests WHERE state IN ('queued', 'claimed')") == [(0,)])

    states = dict(system.query("SELECT id, state FROM requests"))
    assert {states.get(id) for id in acknowledged} == {"done"}
    assert system.query("SELECT number FROM answered GROUP BY number HAVING count(*) > 1") == []


def test_a_model_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    start: Callable[..., System], photos: dict[str, bytes]
) -> None:
    system = start()

    with pytest.raises(urllib.error.HTTPError) as refused:
        system.post(photos["coffee"], "DenseNet121")

    answer = json.load(refused.value)
    assert refused.value.code == 503
    assert answer["code"] == "not_installed"
    assert "mlg models compile densenet121" in answer["reason"]
    assert system.query("SELECT count(*) FROM requests") == [(0,)]


def test_several_batchers_and_servers_share_a_home(
    start: Callable[..., System], photos: dict[str, bytes], tmp_path: Path
) -> None:
    first, second = start(), start()
    first.execute(TRIGGER)

    ids = [(first if n % 2 else second).post(variant(photos["coffee"], n))["req_id"] for n in range(60)]
    wait_until(lambda: first.query("SELECT count(*) FROM requests WHERE state = 'done'") == [(60,)])

    assert all(second.read(id)["status"] == "done" for id in ids)
    assert first.query("SELECT count(*), count(DISTINCT number) FROM answered") == [(60, 60)]


def test_batch_once_works_on_everything_that_waits_and_exits_with_1_if_anything_failed(
    start: Callable[..., System], photos: dict[str, bytes], tmp_path: Path
) -> None:
    once = [sys.executable, "-m", "mlg", "batch", "--once", "--home", str(tmp_path / "home")]
    system = start()
    os.kill(wait_until(lambda: system.pids("mlg", "batch"))[0], signal.SIGSTOP)
    good = system.post(photos["coffee"])["req_id"]

    clean = subprocess.run(once, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    # Header and end are as they should be, so the server accepts it; what is between is damaged.
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photos["coffee"])).save(buffer, "PNG")
    whole = buffer.getvalue()
    bad = system.post(whole[:5000] + b"damaged" + whole[5007:])["req_id"]
    failed = subprocess.run(once, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)

    assert (clean.returncode, failed.returncode) == (0, 1), clean.stderr + failed.stderr
    assert system.read(good)["status"] == "done"
    answer = system.read(bad)
    assert (answer["status"], answer["preds"]) == ("failed", None)
    assert answer["reason"]
    os.kill(system.pids("mlg", "batch")[0], signal.SIGCONT)
