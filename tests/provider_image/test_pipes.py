"""`mlg-provider next`: the shell script of the provider image gives chunks to a warm process through named pipes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from provider_image.chunk import read_results
from provider_image.pipes import ACCEPTS_NEXT, ChunkPipes, accepts_next
from tests.provider_image.conftest import ROOT, environment, make_chunk
from tests.provider_image.test_warm_client import command, warm_pids
from tests.timing import DEADLINE_SECONDS, wait_until

SCRIPT = ROOT / "provider_image" / "mlg-provider"


def begin_next(place: Path, *arguments: object) -> subprocess.Popen[str]:
    """Begin `mlg-provider next`."""
    return subprocess.Popen(
        ["/bin/sh", SCRIPT, "next", *map(str, arguments)],
        env=environment(MLG_PLACE=str(place)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_next(place: Path, *arguments: object) -> tuple[int | None, str]:
    """Run `mlg-provider next`. :return: its exit status, and what it says."""
    process = begin_next(place, *arguments)
    out, err = process.communicate(timeout=DEADLINE_SECONDS)
    return process.returncode, out + err


@pytest.fixture
def place(tmp_path, models_folder):
    """A folder for warm processes, which are killed after the test."""
    yield tmp_path / "place"
    for pid in warm_pids(tmp_path / "place"):
        os.kill(pid, signal.SIGKILL)


def test_chunks_are_processed_in_the_order_in_which_they_are_given(tmp_path, photos, models_folder, place):
    chunks = [
        make_chunk(tmp_path / f"{number}.zip", [photos["chelsea"]], chunk_id=f"chunk-{number}") for number in range(4)
    ]
    results = [tmp_path / f"results-{number}.zip" for number in range(4)]
    chunks[2].write_bytes(b"not a chunk")

    first = command("run", chunks[0], results[0], "--models", models_folder, "--place", place)
    queued = run_next(place, "-", chunks[1], results[1])
    answers = [
        run_next(place, results[1], chunks[2], results[2], chunks[3], results[3]),
        run_next(place, results[2]),
        run_next(place, results[3]),
    ]

    assert (first.returncode, first.stdout.strip()) == (0, ACCEPTS_NEXT)
    assert queued == (0, "")
    assert [status for status, _ in answers] == [0, 1, 0]
    assert answers[1][1].startswith("Error: ") and "not a zip" in answers[1][1]
    for number in (1, 3):
        (item,) = read_results(results[number], f"chunk-{number}", "efficientnet_lite0", [0]).items
        assert item.output[0][1]
    assert len(warm_pids(place)) == 1, "no other process was started"


def test_a_warm_process_that_ends_is_noticed_by_who_waits_and_by_who_comes_later(tmp_path):
    folder = tmp_path / "place" / "warm"
    folder.mkdir(parents=True)
    program = f"import pathlib, provider_image.pipes as p, time; p.ChunkPipes(pathlib.Path({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", f"{program}; time.sleep(1000)"], cwd=ROOT, env=environment())
    wait_until(lambda: accepts_next(folder))
    finished, earlier = tmp_path / "finished.zip", tmp_path / "earlier.zip"
    finished.touch()
    earlier.touch()  # another chunk had this name for its results
    waiting = begin_next(tmp_path / "place", earlier, tmp_path / "chunk.zip", earlier)
    wait_until(lambda: is_reading(waiting.pid))

    process.kill()
    process.wait()
    out, err = waiting.communicate(timeout=DEADLINE_SECONDS)
    later = run_next(tmp_path / "place", earlier)

    assert (waiting.returncode, out) == (1, "")
    assert "ended before it had written the results" in err
    assert later[0] == 1 and "mlg-provider run" in later[1]
    assert run_next(tmp_path / "place", finished) == (0, ""), "its report was lost, its results are there"


def test_a_warm_process_that_ended_just_now_is_not_waited_for(tmp_path):
    folder = tmp_path / "place" / "warm"
    folder.mkdir(parents=True)
    for name in ("queue", "done"):
        os.mkfifo(folder / name)
    (folder / "pid").write_text(f"{os.getpid()}\n")  # alive, and nobody holds the pipes: it ended after this was read
    (tmp_path / "place" / "next").symlink_to(folder)

    queued = run_next(tmp_path / "place", "-", "chunk.zip", "results.zip")
    answers = [run_next(tmp_path / "place", *words) for words in (["a.zip"], ["b.zip", "chunk.zip", "b.zip"])]

    assert queued == (0, ""), "who waits for the results will know"
    assert answers == [(1, "Error: The warm process ended before it had written the results.\n")] * 2


def is_reading(pid: int) -> bool:
    """Tell whether a process has opened the pipe with what has ended."""
    return any(link.readlink().name == "done" for link in Path(f"/proc/{pid}/fd").iterdir())


def test_results_of_another_chunk_are_not_taken_for_those_that_are_waited_for(tmp_path):
    folder = tmp_path / "place" / "warm"
    folder.mkdir(parents=True)
    pipes = ChunkPipes(folder)
    pipes.report(Path("first.zip"), None)
    pipes.report(Path("second.zip"), "It is\nbroken.")

    wrong = run_next(tmp_path / "place", "second.zip")
    broken = run_next(tmp_path / "place", "second.zip")
    pipes.close()

    assert wrong == (1, "Error: The chunk with first.zip ended instead.\n")
    assert broken == (1, "Error: It is broken.\n")
    assert run_next(tmp_path / "place", "second.zip")[0] == 1
