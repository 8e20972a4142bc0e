"""The Python client and its notebook against `mlg up`, with real photos."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlg_client import AsyncClient, Client
from tests.system import MODEL, RIGHT, System
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/classify.ipynb"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[System]:
    home = tmp_path_factory.mktemp("client") / "home"
    home.mkdir()
    (home / "models").symlink_to(models_folder)
    system = System(home)
    yield system
    system.stop()


@pytest.fixture
def folder(tmp_path: Path, photos: dict[str, bytes]) -> Path:
    """A folder `photos` with three images and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in RIGHT:
        (folder / f"{name}.jpg").write_bytes(photos[name])
    (folder / "letter.jpg").write_text("Dear kitten")
    return folder


def test_a_folder_is_sent_and_the_right_labels_are_returned(system: System, folder: Path) -> None:
    with Client(system.base) as client:
        before = client.usage()["total"]
        batch = client.submit_dir(folder, MODEL, labels={"shelf": "7"})
        ended = {request.name: request for request in client.as_completed(batch.requests, timeout=DEADLINE_SECONDS)}
        in_order = [request.name for request in client.results(batch)]
        counts = client.batch(batch.ids[0], hold_seconds=5)["counts"]
        used = client.usage(by="client")

    assert [file for file, _ in batch.refused] == ["letter.jpg"]
    assert in_order == [f"{name}.jpg" for name in sorted(RIGHT)]
    for name, (label, probability) in RIGHT.items():
        assert ended[f"{name}.jpg"].best == (label, pytest.approx(probability, abs=0.05))
        assert ended[f"{name}.jpg"].labels == {"shelf": "7"}
    assert (counts["done"], counts["refused"]) == (3, 1)
    assert {row["client"] for row in used["usage"]} == {"mlg_client"}
    assert [used["total"][name] - before[name] for name in ("accepted", "refused")] == [3, 1]


def test_async_code_gets_the_same_results(system: System, folder: Path) -> None:
    async def classify() -> dict[str | None, Any]:
        async with AsyncClient(system.base) as client:
            batch = await client.submit_dir(folder, MODEL, params={"fresh": True})
            return {
                request.name: request.best
                async for request in client.as_completed(batch.requests, timeout=DEADLINE_SECONDS)
            }

    best = asyncio.run(classify())

    assert {name: found[0] for name, found in best.items()} == {f"{name}.jpg": RIGHT[name][0] for name in RIGHT}


def test_the_notebook_runs_from_top_to_bottom(system: System, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("MLG_URL", system.base)
    notebook = json.loads(NOTEBOOK.read_text())
    space: dict[str, Any] = {}
    printed = io.StringIO()

    with contextlib.redirect_stdout(printed):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec"), space)

    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    assert "3 accepted, 1 refused" in printed.getvalue()
    assert RIGHT["coffee"][0] in printed.getvalue()
    assert len(space["table"]) == 9
    assert space["costs"] == [None]
