"""The embedding of the starter model through the whole system: first use, worker, answer, cache, commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlg_client import Client, Refused
from tests.system import MODEL, ROOT, System

EMBEDDING = f"{MODEL}_embedding"


def test_vectors_come_from_a_new_home_without_an_extra_step(tmp_path: Path, photos: dict[str, bytes]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in photos.items():
        (folder / f"{name}.jpg").write_bytes(data)
    system = System(tmp_path / "home")
    try:
        with Client(system.base) as client:
            request = client.wait(client.submit(photos["chelsea"], EMBEDDING), 120)
            labels = client.wait(client.submit(photos["chelsea"], MODEL), 120)
            vector = np.frombuffer(client.file(request, "vector"), "<f4")
            again = client.submit(photos["chelsea"], EMBEDDING)
            with pytest.raises(Refused, match="top"):
                client.read(request.id, top=3)
            command = [sys.executable, "-m", "mlg", "submit", "--model", EMBEDDING, "--url", system.base]
            command += ["--home", str(tmp_path / "other"), str(folder)]
            written = subprocess.run(
                [*command, "--out", str(tmp_path / "vectors.jsonl")], cwd=ROOT, capture_output=True, text=True
            )
            printed = subprocess.run([*command, "--wait"], cwd=ROOT, capture_output=True, text=True)
            rows = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text().splitlines()]
            vectors = [np.frombuffer(client.file(row["req_id"], "vector"), "<f4") for row in rows]
            client.create_collection("photos")
            client.add_to_collection("photos", folder)  # answered before, so they are members at once
            similar = client.search_collection("photos", photos["chelsea"])
    finally:
        system.stop()

    assert (request.preds, request.files) == ({"dimensions": 1280}, {"vector": "application/octet-stream"})
    assert labels.best is not None and labels.best[0] == "tiger_cat"
    assert vector.shape == (1280,) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert again.is_cached
    assert (written.returncode, printed.returncode) == (0, 0), written.stderr + printed.stderr
    assert [(Path(row["file"]).name, row["preds"], row["cached"]) for row in rows] == [
        ("chelsea.jpg", {"dimensions": 1280}, True),
        ("coffee.jpg", {"dimensions": 1280}, False),
        ("rocket.jpg", {"dimensions": 1280}, False),
    ]
    assert rows[1]["files"]["vector"]["bytes"] == 4 * 1280
    assert np.array_equal(vectors[0], vector)
    assert max(float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])) < 0.6
    assert similar[0]["name"] == "chelsea.jpg" and len(similar) == 3
    assert similar[0]["score"] == pytest.approx(1, abs=1e-5)
    assert [match["score"] for match in similar[1:]] == pytest.approx(
        sorted((float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])), reverse=True), abs=1e-5
    )
    assert similar[0]["labels"] == {MODEL: "tiger_cat"}
    assert [line.split("\t")[2:] for line in printed.stdout.splitlines()] == [["done", '{"dimensions": 1280}']] * 3
