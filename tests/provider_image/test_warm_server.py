"""The warm process: one job after another, survives bad ones, ends when it should and leaves nothing behind."""

import json
import os
import signal
import socket
import threading
import time

import pytest

from provider_image.chunk import read_results
from provider_image.errors import BrokenImage, ChunkError, ConfigError, NotInstalled, error_from_reply
from provider_image.progress import ProgressBoard
from provider_image.runtime import NetCache
from provider_image.runtime_paths import make_private_folder, socket_path, user_runtime_folder
from provider_image.warm_server import _WarmServer
from tests.process_tree import is_alive, wait_for_work
from tests.provider_image.conftest import make_chunk, read_reply
from tests.timing import DEADLINE_SECONDS, slowness, wait_until


def job(chunk, results) -> dict:
    return {"chunk": str(chunk), "results": str(results)}


@pytest.fixture
def chunk(tmp_path, photos):
    return make_chunk(tmp_path / "chunk.zip", [photos["coffee"]])


def test_warm_process_answers_job_after_job_with_the_model_loaded_once(tmp_path, start_warm_server, chunk):
    server = start_warm_server().wait_until_ready()

    replies = [server.send_and_receive(job(chunk, tmp_path / f"{number}.zip")) for number in range(3)]

    assert [each["ok"] for each in replies] == [True] * 3
    loads = [read_results(tmp_path / f"{n}.zip", "chunk-1", "efficientnet_lite0", [0]).load_seconds for n in range(3)]
    assert loads[0] > 0 == loads[1] == loads[2]


def test_one_connection_may_send_many_jobs(tmp_path, start_warm_server, chunk):
    server = start_warm_server().wait_until_ready()

    with server.connect() as connection, connection.makefile("rw") as lines:
        for number in range(2):
            print(f'{{"chunk": "{chunk}", "results": "{tmp_path}/{number}.zip"}}', file=lines, flush=True)
            assert '"ok": true' in lines.readline()


def test_second_client_waits_for_the_first(tmp_path, start_warm_server, chunk, slow_chunk):
    server = start_warm_server(options=("--threads", "1")).wait_until_ready()
    with server.send(job(slow_chunk, tmp_path / "slow.zip")) as slow:
        wait_for_work(server.process.pid)  # else the other may be read first

        quick = server.send_and_receive(job(chunk, tmp_path / "quick.zip"))

        assert quick["ok"] and quick["seconds"] < 5
        assert (tmp_path / "slow.zip").exists()
        assert read_reply(slow)["ok"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("not json", "malformed_request"),
        ("[]", "malformed_request"),
        ('{"chunk": 1, "results": 2}', "malformed_request"),
        ({"chunk": "chunk.zip", "results": "results.zip"}, "malformed_request"),
        ({"chunk": "/nowhere/chunk.zip", "results": "/nowhere/r.zip"}, "malformed_chunk"),
    ],
)
def test_bad_job_is_answered_and_survived(tmp_path, start_warm_server, chunk, line, code):
    server = start_warm_server().wait_until_ready()

    bad = server.send_and_receive(line)
    good = server.send_and_receive(job(chunk, tmp_path / "r.zip"))

    assert (bad["ok"], bad["code"]) == (False, code)
    assert good["ok"]


def test_bad_chunks_are_answered_and_survived(tmp_path, start_warm_server, chunk, photos):
    server = start_warm_server().wait_until_ready()
    (tmp_path / "bad.zip").write_bytes(b"PK\5\6" + b"\xff" * 18)
    missing = make_chunk(tmp_path / "missing.zip", [photos["coffee"]], model="vgg16")

    bad = server.send_and_receive(job(tmp_path / "bad.zip", tmp_path / "r.zip"))
    unwritable = server.send_and_receive(job(chunk, tmp_path / "no" / "r.zip"))
    not_installed = server.send_and_receive(job(missing, tmp_path / "r.zip"))

    assert (bad["code"], bad["permanent"]) == ("malformed_chunk", True)
    assert unwritable["code"] == "chunk_error"
    assert (not_installed["code"], not_installed["permanent"]) == ("not_installed", False)
    assert "mlg models compile vgg16" in not_installed["reason"]
    assert server.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]


def test_client_that_leaves_or_talks_rubbish_harms_nobody(tmp_path, start_warm_server, chunk):
    server = start_warm_server().wait_until_ready()
    server.connect().close()
    server.send(job(chunk, tmp_path / "left.zip")).close()
    with server.connect() as rubbish:
        rubbish.settimeout(120)
        try:
            rubbish.sendall(b"x" * 1_000_000)
        except OSError as error:
            assert isinstance(error, ConnectionError)

    assert server.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]
    assert wait_until((tmp_path / "left.zip").exists)  # each client has a thread: it may come second


@pytest.mark.timeout(method="thread")  # the other method uses the timer that is tested
def test_chunk_that_was_announced_ends_soon_after_its_client_has_gone(tmp_path, start_warm_server, chunk, slow_chunk):
    server = start_warm_server(options=("--threads", "1")).wait_until_ready()
    with server.send({**job(slow_chunk, tmp_path / "slow.zip"), "announce": True}) as slow:
        assert slow.recv(100) == b'{"began": true}\n'

    assert server.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]
    assert not (tmp_path / "slow.zip").exists()
    assert server.process.poll() is None


def test_limit_of_a_chunk_counts_only_during_the_chunk(tmp_path, models_folder, chunk):
    seen = []

    class Watching(NetCache):
        def get(self, *arguments):
            seen.append(signal.getitimer(signal.ITIMER_REAL)[0])
            return super().get(*arguments)

    server = _WarmServer(None, tmp_path / "socket", Watching(models_folder), 0)

    replies = [
        server._run_job(
            json.dumps({**job(chunk, tmp_path / "r.zip"), **limit}).encode(),
            None,
            None,
            ProgressBoard(),
            threading.Event(),
        )
        for limit in ({"limit_seconds": 500}, {})
    ]

    assert [reply["ok"] for reply in replies] == [True, True]
    assert 0 < seen[0] <= 500 and seen[1] == 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.timeout(method="thread")
def test_of_chunks_at_the_same_time_the_nearest_limit_counts(tmp_path, models_folder):
    server = _WarmServer(None, tmp_path / "socket", NetCache(models_folder), 0, chunks=3)
    seen = []
    for name, limit in (("long", 500), ("short", 300), ("none", 0)):
        server._begin(name, limit)
        seen.append(signal.getitimer(signal.ITIMER_REAL)[0])
    for name in ("short", "long", "none"):
        server._end(name)
        seen.append(signal.getitimer(signal.ITIMER_REAL)[0])

    assert [300 < seen[0] <= 500, 0 < seen[1] <= 300, 0 < seen[2] <= 300, 300 < seen[3] <= 500] == [True] * 4
    assert seen[4:] == [0, 0]


def test_idle_process_ends_and_removes_its_socket(start_warm_server):
    server = start_warm_server(options=("--idle-seconds", "0.2")).wait_until_ready()

    assert server.wait_for_exit() == 0
    assert not socket_path(server.runtime_folder).exists()


def test_idle_process_ends_in_spite_of_an_open_connection(start_warm_server):
    server = start_warm_server(options=("--idle-seconds", "0.2")).wait_until_ready()

    with server.connect():
        assert server.wait_for_exit() == 0


def test_process_that_never_idles_away_stays(tmp_path, start_warm_server, chunk):
    server = start_warm_server(options=("--idle-seconds", "0")).wait_until_ready()
    time.sleep(0.5)

    assert server.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_the_chunk_under_way_finish(tmp_path, start_warm_server, slow_chunk, chunk, number):
    server = start_warm_server(options=("--threads", "2")).wait_until_ready()
    server.send_and_receive(job(chunk, tmp_path / "first.zip"))
    under_way = server.send(job(slow_chunk, tmp_path / "r.zip"))
    wait_for_work(server.process.pid)
    waiting = server.send(job(chunk, tmp_path / "waiting.zip"))

    server.process.send_signal(number)
    turned_away, finished = read_reply(waiting), read_reply(under_way)

    assert finished["ok"]
    assert (turned_away["ok"], turned_away["code"]) == (False, "worker_died")
    assert server.wait_for_exit() == 0
    assert len(read_results(tmp_path / "r.zip", "chunk-1", "efficientnet_lite0", range(16)).items) == 16
    assert not (tmp_path / "waiting.zip").exists()
    assert not socket_path(server.runtime_folder).exists()
    under_way.close()
    waiting.close()


def test_signal_ends_an_idle_process(start_warm_server):
    server = start_warm_server().wait_until_ready()

    server.process.terminate()

    assert server.wait_for_exit() == 0


def test_socket_of_a_killed_process_is_replaced(tmp_path, start_warm_server, chunk):
    killed = start_warm_server().wait_until_ready()
    killed.process.kill()
    killed.wait_for_exit()
    assert socket_path(killed.runtime_folder).exists()

    second = start_warm_server().wait_until_ready()

    assert second.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]


def test_of_processes_that_start_at_once_exactly_one_serves(tmp_path, start_warm_server, chunk):
    started = [start_warm_server() for _ in range(4)]

    wait_until(lambda: sum(each.process.poll() is not None for each in started) == 3)
    served = [each for each in started if each.process.poll() is None]

    assert len(served) == 1
    served[0].wait_until_ready()
    assert served[0].send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]
    for each in started:
        if each is not served[0]:
            assert each.process.wait() == 1
            assert "Another process already serves" in each.process.stderr.read()


def test_process_runs_on_the_cores_that_it_is_given(start_warm_server):
    core = max(os.sched_getaffinity(0))

    server = start_warm_server(options=("--cores", f"{core}-{core}")).wait_until_ready()

    assert os.sched_getaffinity(server.process.pid) == {core}


def test_process_ends_with_its_standard_input(start_warm_server):
    server = start_warm_server(options=("--exit-with-stdin",)).wait_until_ready()

    server.process.stdin.close()

    assert server.process.wait(DEADLINE_SECONDS) == 0
    assert not socket_path(server.runtime_folder).exists()


def test_process_ends_with_its_standard_input_even_in_mid_chunk(tmp_path, start_warm_server, slow_chunk, chunk):
    server = start_warm_server(options=("--exit-with-stdin", "--threads", "1")).wait_until_ready()
    server.send_and_receive(job(chunk, tmp_path / "first.zip"))
    connection = server.send(job(slow_chunk, tmp_path / "r.zip"))
    wait_for_work(server.process.pid)

    started = time.monotonic()
    server.process.stdin.close()

    assert server.process.wait(DEADLINE_SECONDS) == 0
    assert time.monotonic() - started < 3 * slowness()
    assert read_reply(connection) == {}
    assert not (tmp_path / "r.zip").exists()
    connection.close()


def test_process_dies_with_a_parent_that_is_killed(tmp_path, models_folder):
    import subprocess
    import sys

    from tests.provider_image.conftest import ROOT

    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'provider_image', 'serve', '--exit-with-stdin', '--models', "
        f"{str(models_folder)!r}, '--place', {str(tmp_path / 'place')!r}], stdin=subprocess.PIPE, "
        "stdout=subprocess.PIPE, text=True)\n"
        "child.stdout.readline(); print(child.pid, flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())

    process.kill()
    process.communicate()

    wait_until(lambda: not is_alive(child))
    wait_until(lambda: not socket_path(tmp_path / "place").exists())


def test_long_place_gets_a_short_socket(tmp_path, start_warm_server, chunk):
    runtime_folder = tmp_path / ("long" * 30)
    server = start_warm_server(runtime_folder=runtime_folder).wait_until_ready()

    assert len(os.fsencode(socket_path(runtime_folder))) < 108
    assert socket_path(runtime_folder).parent == user_runtime_folder()
    assert server.send_and_receive(job(chunk, tmp_path / "r.zip"))["ok"]
    server.process.terminate()
    assert server.wait_for_exit() == 0
    assert not socket_path(runtime_folder).exists()


def test_place_is_private(tmp_path, start_warm_server):
    server = start_warm_server().wait_until_ready()

    assert server.runtime_folder.stat().st_mode & 0o777 == 0o700


def test_folder_that_others_can_access_is_refused_and_not_changed(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o1777)  # as /tmp

    with pytest.raises(ConfigError, match="Other users can access"):
        make_private_folder(place)

    assert place.stat().st_mode & 0o7777 == 0o1777


def test_link_is_not_a_private_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    with pytest.raises(ConfigError, match="is a link"):
        make_private_folder(tmp_path / "link")


def test_folder_of_another_user_is_not_private(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder that belongs to another user")
    (tmp_path / "place").mkdir()
    os.chown(tmp_path / "place", 12345, 12345)

    with pytest.raises(ConfigError, match="belongs to another user"):
        make_private_folder(tmp_path / "place")


def test_reply_becomes_the_error_that_it_was():
    found = error_from_reply({"ok": False, "code": "not_installed", "reason": "no", "permanent": False})

    assert (type(found), found.reason) == (NotInstalled, "no")
    assert type(error_from_reply({"code": "broken_image"})) is BrokenImage
    assert type(error_from_reply({"code": "of another version", "reason": "x"})) is ChunkError


def test_socket_is_a_socket(start_warm_server):
    server = start_warm_server().wait_until_ready()

    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path(server.runtime_folder)))
        assert socket_path(server.runtime_folder).is_socket()
