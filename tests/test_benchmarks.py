"""The benchmarks: what they share with each other and write for people, on stores of a few rows."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import click
import pytest

from provider_image.images.decoding import decode
from scripts.benchmarks.execution import peers
from scripts.benchmarks.registry import RUNS, import_benchmark
from scripts.benchmarks.serving import scale
from scripts.benchmarks.support import page, photos, stored_requests
from scripts.benchmarks.support.measuring import print_table
from store.states import RequestState

FOLDER = Path(__file__).parents[1] / "scripts/benchmarks"


def test_every_benchmark_can_be_run_and_has_the_options_of_the_page() -> None:
    folders = {run.folder for run in RUNS.values()}
    commands = {
        path.stem for each in folders for path in (FOLDER / each).glob("*.py") if "def main" in path.read_text()
    }

    assert set(RUNS) == commands
    for name, run in RUNS.items():
        command: click.Command = import_benchmark(name).main
        command.make_context(name, shlex.split(run.options))


def test_a_printed_table_is_read_and_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    click.echo("before")
    print_table("<Rates>", ("server", "runs", "images/s"), [("mlg", "9 8", "1,200"), ("peer", "4", "300.0 /s")])
    click.echo("after")

    (table,), rest = page.read_output(capsys.readouterr().out)
    section = page.Section(
        name="n", about="a", command="c", full_command="f", seconds=1, load=1, tables=[table], text=rest
    )
    shown = page.render({"Processor": "<p>"}, [section])

    assert (table.title, list(table.head)) == ("<Rates>", ["server", "runs", "images/s"])
    assert rest.split() == ["before", "after"]
    assert re.findall(r"width:([\d.]+)%", shown) == ["100.0", "25.0"]
    assert "&lt;Rates&gt;" in shown and "<Rates>" not in shown and "<script" not in shown


def test_figures_over_sizes_are_level_where_nothing_grows() -> None:
    rows = [("1,000", "2.0", "1"), ("10,000", "2.0", "10"), ("last / first", "1.00", "10")]
    table = page.Table(title="t", head=("rows", "level", "grows"), rows=rows)
    section = page.Section(name="n", about="a", command="c", full_command="f", seconds=1, load=1, tables=[table])

    lines = re.findall(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', page.render({}, [section]))

    level, grows = [[float(each) for each in line] for line in lines]
    assert level[1] == level[3]
    assert grows[1] > grows[3] and grows[0] < grows[2]


def test_a_benchmark_that_fails_is_said_so_on_the_page() -> None:
    section = page.Section(name="n", about="a", command="c", full_command="f", seconds=1, load=1, failure="No wrk.")

    assert "Not measured.</strong> No wrk." in page.render({}, [section])


def test_a_peer_that_cannot_be_measured_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, list[peers.Seen | None]] = {
        name: [peers.Seen(rate=rate, cost=1, labels=labels)]
        for name, rate, labels in ((peers.LIMIT, 100, ("cat",)), (peers.OURS, 80, ("cat",)), ("FastAPI", 40, ("dog",)))
    }

    peers.report({**seen, "BentoML": [None]}, {"BentoML": "not installed: no network"}, "title")

    (table,), _ = page.read_output(capsys.readouterr().out)
    rows = {row[0].split()[0]: row for row in table.rows}
    assert rows["mlg"][3:5] == ["80%", "1.00"]
    assert rows["FastAPI"][3:5] == ["40%", "2.00"] and rows["FastAPI"][6] == "NO"
    assert rows["BentoML"][1] == "not installed: no network"


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "fastapi" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")

    with pytest.raises(RuntimeError, match="no environment"):
        peers.environment_of(mine.parent, peers.PEERS["FastAPI"])

    assert mine.read_text() == "mine"


def test_peers_compute_what_mlg_computes(models_folder: Path) -> None:
    classifier_module = pytest.importorskip("scripts.benchmarks.peer_servers.classifier")
    classifier = classifier_module.Classifier(models_folder / peers.MODEL, 1)

    for name, size in (("chelsea.png", (451, 300)), ("coffee.png", (300, 400))):
        jpeg = photos.encode(name, size, (90,))
        ours = decode(jpeg, 224, 224, 0.875, margin=math.inf)
        assert (classifier.decode(jpeg) == ours).all()
    assert classifier.classify(photos.encode("coffee.png", (400, 300), (90,)))[0][0] == "espresso"


def test_a_store_is_filled_and_measured(tmp_path: Path) -> None:
    stored_requests.add_rows(tmp_path, 100, models=2, state=RequestState.DONE)
    stored_requests.add_rows(tmp_path, 400, models=2, state=RequestState.QUEUED, claims=116)
    with stored_requests.opened(tmp_path) as store:
        before = store.requests.backlog()
        kept = store.requests.list(state=RequestState.DONE, limit=200)

    found = scale.measure_store(tmp_path, 3, [])

    assert sum(each.waiting for each in before) == 384 and sum(each.claimed for each in before) == 16
    assert len(kept) == 100
    assert {"add", "read", "count the queue", "claim 16", "renew 16", "answer 16"} <= set(found)
    with stored_requests.opened(tmp_path) as store:
        assert sum(each.waiting for each in store.requests.backlog()) == 384 + 3 - 3 * 16
