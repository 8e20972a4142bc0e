"""The client finds the warm process for its options, starts one if there is none, and reports when it died."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from provider_image import runtime_paths, warm_client
from provider_image.chunk import read_results
from provider_image.errors import ConfigError
from provider_image.warm_client import server_folder
from tests.decode_gate import DECODE_GATE
from tests.process_tree import wait_for_work
from tests.provider_image.conftest import ROOT, encode_image, environment, make_chunk
from tests.provider_image.test_warm_server import is_alive
from tests.timing import DEADLINE_SECONDS, slowness, wait_until


def command(*arguments, **changes) -> subprocess.CompletedProcess:
    """Run `python -m provider_image`."""
    return subprocess.run(
        [sys.executable, "-m", "provider_image", *map(str, arguments)],
        cwd=ROOT,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@pytest.fixture
def chunk(tmp_path, photos):
    return make_chunk(tmp_path / "chunk.zip", [photos["chelsea"], photos["coffee"]])


@pytest.fixture
def runtime_folder(tmp_path, models_folder):
    """A folder for warm processes, which are killed after the test."""
    yield tmp_path / "place"
    for pid in warm_pids(tmp_path / "place"):
        os.kill(pid, signal.SIGKILL)


def warm_pids(runtime_folder) -> list[int]:
    """Ids of the processes that serve below a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"\0serve\0" in line and os.fsencode(runtime_folder) in line and is_alive(int(entry.name)):
            found.append(int(entry.name))
    return found


def labels(path) -> list[str]:
    items = read_results(path, "chunk-1", "efficientnet_lite0", [0, 1]).items
    return [item.output[0][1] for item in items]


def test_run_answers_and_a_second_run_finds_the_warm_process(tmp_path, chunk, runtime_folder, models_folder):
    options = ("--models", models_folder, "--place", runtime_folder)

    first = command("run", chunk, tmp_path / "1.zip", *options)
    pids = warm_pids(runtime_folder)
    second = command("run", chunk, tmp_path / "2.zip", *options)

    assert (first.returncode, first.stderr, second.returncode) == (0, "", 0)
    assert labels(tmp_path / "1.zip") == labels(tmp_path / "2.zip") == ["tiger_cat", "espresso"]
    assert len(pids) == 1
    assert warm_pids(runtime_folder) == pids
    second_load = read_results(tmp_path / "2.zip", "chunk-1", "efficientnet_lite0", [0, 1]).load_seconds
    assert second_load == 0


def test_a_run_limits_its_warm_process_to_as_many_cores_as_threads(tmp_path, chunk, runtime_folder, models_folder):
    options = ("--models", models_folder, "--place", runtime_folder, "--threads", "1")

    done = command("run", chunk, tmp_path / "r.zip", *options)
    (pid,) = warm_pids(runtime_folder)

    assert done.returncode == 0
    assert len(os.sched_getaffinity(pid)) == 1 and os.sched_getaffinity(pid) <= os.sched_getaffinity(0)


def test_runs_at_once_share_one_warm_process(tmp_path, chunk, runtime_folder, models_folder):
    options = ("--models", models_folder, "--place", runtime_folder)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "provider_image", "run", chunk, tmp_path / f"{n}.zip", *options],
            cwd=ROOT,
        )
        for n in range(3)
    ]

    assert [process.wait(DEADLINE_SECONDS) for process in started] == [0, 0, 0]
    assert len(warm_pids(runtime_folder)) == 1
    for n in range(3):
        assert labels(tmp_path / f"{n}.zip") == ["tiger_cat", "espresso"]


def test_other_settings_get_another_warm_process(tmp_path, models_folder):
    places = {
        server_folder(tmp_path, models_folder, 1, "f32"),
        server_folder(tmp_path, models_folder, 2, "f32"),
        server_folder(tmp_path, models_folder, 1, "bf16"),
        server_folder(tmp_path, tmp_path, 1, "f32"),
        server_folder(None, models_folder, 1, "f32"),
    }

    assert len(places) == 5
    assert server_folder(tmp_path, models_folder, 1, "f32") in places


def test_warm_process_ends_after_the_time_it_is_kept(tmp_path, chunk, runtime_folder, models_folder):
    done = command(
        *("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--place", runtime_folder),
        MLG_KEEP_WARM_SECONDS="0.3",
    )

    assert done.returncode == 0
    wait_until(lambda: not warm_pids(runtime_folder))
    again = command("run", chunk, tmp_path / "again.zip", "--models", models_folder, "--place", runtime_folder)
    assert again.returncode == 0


def test_run_cold_starts_no_process(tmp_path, chunk, runtime_folder, models_folder):
    done = command("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--place", runtime_folder, "--cold")

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert labels(tmp_path / "r.zip") == ["tiger_cat", "espresso"]
    assert warm_pids(runtime_folder) == []


def test_death_in_mid_chunk_is_one_line_and_status_one(tmp_path, chunk, slow_chunk, runtime_folder, models_folder):
    options = ("--models", models_folder, "--place", runtime_folder)
    command("run", chunk, tmp_path / "r.zip", *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "provider_image", "run", slow_chunk, tmp_path / "slow.zip", *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    (pid,) = warm_pids(runtime_folder)
    wait_for_work(pid)
    os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)

    assert process.returncode == 1
    assert errors.startswith("Error: The warm process ended before it had written the results")
    assert errors.count("\n") == 1
    assert not (tmp_path / "slow.zip").exists()
    assert command("run", chunk, tmp_path / "after.zip", *options).returncode == 0


@pytest.fixture
def held(tmp_path, models_folder, monkeypatch):
    """A chunk whose item hangs until a file exists; returns both. Abandoned chunks are ended quickly."""
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    hurry = "import provider_image.warm_server as warm\nwarm.REPORT_SECONDS = warm._ABANDONED_SECONDS = 0.1\n"
    (plugin / "sitecustomize.py").write_text(DECODE_GATE + hurry)
    monkeypatch.setenv("PYTHONPATH", str(plugin))
    gate = tmp_path / "gate"
    image = encode_image(Image.new("RGB", (8, 8)), "PNG") + b"HOLD:" + os.fsencode(gate)
    return make_chunk(tmp_path / "held.zip", [image]), gate


def test_item_that_hangs_ends_its_run_and_does_not_block_the_next(tmp_path, chunk, held, runtime_folder, models_folder):
    options = ("--models", models_folder, "--place", runtime_folder)

    hanging = command("run", held[0], tmp_path / "held-results.zip", "--timeout", "1", *options)
    following = command("run", chunk, tmp_path / "r.zip", *options)

    assert hanging.returncode == 1
    assert hanging.stderr == "Error: The chunk took longer than 1 s, so its warm process was ended.\n"
    assert (following.returncode, following.stderr) == (0, "")


def test_item_that_hangs_does_not_block_the_next_run_when_its_own_is_killed(
    tmp_path, chunk, held, runtime_folder, models_folder
):
    options = ("--models", models_folder, "--place", runtime_folder)
    hanging = subprocess.Popen(
        [sys.executable, "-m", "provider_image", "run", held[0], tmp_path / "held-results.zip", *options], cwd=ROOT
    )
    wait_until(held[1].with_suffix(".begun").exists)

    hanging.kill()
    hanging.wait()
    wait_until(lambda: not warm_pids(runtime_folder))
    following = command("run", chunk, tmp_path / "r.zip", *options)

    assert (following.returncode, following.stderr) == (0, "")


def test_socket_in_a_folder_that_others_can_access_is_not_used(tmp_path, chunk, models_folder, monkeypatch):
    shared, place = tmp_path / "shared", tmp_path / ("long" * 30)
    shared.mkdir(mode=0o755)
    monkeypatch.setattr(runtime_paths, "user_runtime_folder", lambda: shared)

    with pytest.raises(ConfigError, match="Other users can access"):
        warm_client.run(chunk, tmp_path / "results.zip", models=models_folder, runtime_root=place)


def test_place_of_a_run_may_have_other_uses(tmp_path, chunk, models_folder, runtime_folder):
    runtime_folder.mkdir()
    runtime_folder.chmod(0o1777)

    done = command("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--place", runtime_folder)

    assert (done.returncode, done.stderr) == (0, "")
    assert runtime_folder.stat().st_mode & 0o7777 == 0o1777
    folders = [path for path in runtime_folder.iterdir() if not path.is_symlink()]
    assert [path.stat().st_mode & 0o777 for path in folders] == [0o700]


@pytest.mark.parametrize("how", [(), ("--cold",)])
def test_error_is_one_line(tmp_path, photos, runtime_folder, models_folder, how):
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]], model="vgg16")

    done = command("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--place", runtime_folder, *how)

    expected = "Error: The model vgg16 is not installed here. Install it: mlg models compile vgg16\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_debugging_shows_the_traceback(tmp_path):
    done = command("run", tmp_path / "none.zip", tmp_path / "r.zip", "--cold", MLG_DEBUG="1")

    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("Error: none.zip cannot be opened: No such file or directory\n")


def test_bad_setting_names_its_variable(tmp_path):
    done = command("run", tmp_path / "c.zip", tmp_path / "r.zip", MLG_KEEP_WARM_SECONDS="soon")

    assert (done.returncode, done.stderr) == (1, "Error: MLG_KEEP_WARM_SECONDS='soon' is not a number.\n")


@pytest.mark.parametrize(
    "option",
    [("--threads", "0"), ("--threads", "two"), ("--idle-seconds", "nan"), ("--cores", "3-1"), ("--cores", "x")],
)
def test_invalid_option_is_explained(tmp_path, option):
    done = command("serve", "--place", tmp_path / "place", *option)

    assert done.returncode == 2
    assert f"argument {option[0]}: {option[1]!r} is not a" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("run",), ("serve",)])
def test_help_has_an_example(arguments):
    done = command(*arguments, "--help")

    assert done.returncode == 0
    assert "example:" in done.stdout
    assert "mlg-provider " in done.stdout


def test_error_says_why_the_warm_process_cannot_start(tmp_path, chunk, models_folder):
    (tmp_path / "file").write_text("")

    done = command("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--place", tmp_path / "file" / "place")

    assert done.returncode == 1
    assert "cannot be used" in done.stderr


def test_cold_chunk_of_sixteen_is_quick_and_small(tmp_path, photos, models_folder):
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]] * 16)

    started = time.perf_counter()
    done = command("run", chunk, tmp_path / "r.zip", "--models", models_folder, "--cold", "--threads", "2")

    assert done.returncode == 0
    assert time.perf_counter() - started < 10 * slowness()  # half a second on two cores that do nothing else
    results = read_results(tmp_path / "r.zip", "chunk-1", "efficientnet_lite0", range(16))
    assert results.peak_memory_bytes < 220e6
