"""Features of table rows, and descriptions of them that cannot be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from provider_image.backends import Device, load_net
from provider_image.chunk import ChunkItem, write_chunk
from provider_image.errors import BrokenArtefact, NotARow
from provider_image.features import FEATURES_FILE, load_table_features, load_text_features
from provider_image.features.table import TableFeatures, to_category
from provider_image.models.artefact import compute_digest, read_artefact
from provider_image.runtime import NetCache, run_chunk
from provider_image.schemas import MAX_ITEMS
from tests.linear_models import install_linear_models

NUMBER = {"kind": "number", "name": "a", "mean": 1.0, "deviation": 2.0, "marks_missing": True}
CATEGORY = {"kind": "category", "name": "b", "categories": ["x", "y"], "has_other": True}


def features(*columns: dict[str, Any]) -> TableFeatures:
    return TableFeatures.from_json({"columns": list(columns)})


@pytest.mark.parametrize(
    ("row", "vector"),
    [
        ({"a": 5, "b": "x"}, [2, 0, 1, 0, 0]),
        ({"a": None, "b": "y"}, [0, 1, 0, 1, 0]),
        ({"a": " 1 ", "b": None}, [0, 0, 0, 0, 1]),
        ({"a": -1, "b": "z" * 1000}, [-1, 0, 0, 0, 1]),
    ],
)
def test_features_are_in_the_order_of_the_kinds(row: dict[str, Any], vector: list[float]) -> None:
    found = features(CATEGORY, NUMBER)

    assert found.vector(row).tolist() == vector
    assert features(*found.to_json()["columns"]).vector(row).tolist() == vector


def test_unknown_category_without_a_mark_for_others_has_only_zeros() -> None:
    assert features({**CATEGORY, "has_other": False}).vector({"b": "z"}).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "category"),
    [
        (3, "3"),
        (3.0, "3"),
        (3.5, "3.5"),
        (True, "true"),
        ("True", "true"),
        (None, ""),
        (" x ", "x"),
        ("NaN", ""),
        ("Ko\u0308ln", "K\u00f6ln"),
    ],
)
def test_category_of_a_value(value: Any, category: str) -> None:
    assert to_category(value) == category


@pytest.mark.parametrize(
    "columns",
    [
        [],
        [{**NUMBER, "deviation": 0.0}],
        [{**NUMBER, "deviation": "nan"}],
        [{**NUMBER, "mean": "inf"}],
        [{**NUMBER, "name": ""}],
        [{**NUMBER, "name": "a\x1b[2J"}],
        [{**NUMBER, "name": 5}],
        [{**NUMBER, "more": 1}],
        [NUMBER, NUMBER],
        [{**CATEGORY, "categories": ["x", "x"]}],
        [{**CATEGORY, "categories": [["x"]]}],
        [{**CATEGORY, "categories": [str(number) for number in range(20_001)]}],
        [{"kind": "code", "name": "a"}],
        [{**NUMBER, "name": f"a{number}"} for number in range(1001)],
        "abc",
        [None],
    ],
)
def test_impossible_description_is_refused(columns: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        TableFeatures.from_json({"columns": columns})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_linear_models(tmp_path_factory.mktemp("models"))


def forge(models: Path, tmp_path: Path, content: bytes) -> Any:
    """An artefact whose digests fit a forged description of its features."""
    import hashlib

    folder = shutil.copytree(models / "rent", tmp_path / "rent")
    (folder / FEATURES_FILE).write_bytes(content)
    facts = json.loads((folder / "model.json").read_text())
    facts["files"][FEATURES_FILE] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "model.json").write_text(json.dumps(facts))
    facts["digest"] = compute_digest(read_artefact(folder))
    (folder / "model.json").write_text(json.dumps(facts))
    return read_artefact(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"kind": []}',
        b'{"kind": "table", "columns": 5}',
        b'{"kind": "table", "columns": [{}]}',
        b'{"kind": "text", "terms": ["a"], "weights": [1], "segmenter": "subprocess"}',
        json.dumps({"kind": "table", "columns": [NUMBER, CATEGORY]}).encode(),
        b"[" * 100_000,
    ],
)
def test_forged_features_of_an_artefact_break_it(models: Path, tmp_path: Path, content: bytes) -> None:
    artefact = forge(models, tmp_path, content)

    with pytest.raises(BrokenArtefact, match="cannot be"):
        load_table_features(artefact)


def test_weights_that_do_not_fit_the_features_break_the_artefact(models: Path, tmp_path: Path) -> None:
    one_more = json.loads((models / "rent" / FEATURES_FILE).read_text())
    one_more["columns"][1]["categories"].append("Ulm")
    artefact = forge(models, tmp_path, json.dumps(one_more).encode())

    with pytest.raises(BrokenArtefact, match="not 7 x 1 numbers"):
        load_net(artefact, Device(threads=1))


def test_row_that_does_not_fit_fails_alone_in_its_chunk(models: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"area": 40 + number, "city": "Bonn"} for number in range(MAX_ITEMS)]
    rows[3]["area"] = "large"
    items = [
        ChunkItem(number=number, inputs={"row": json.dumps(row).encode()}, params={}) for number, row in enumerate(rows)
    ]
    digest = read_artefact(models / "rent").digest
    write_chunk(tmp_path / "chunk.zip", "c1", "table", "rent", digest, items, is_resized=False)

    found = run_chunk(tmp_path / "chunk.zip", tmp_path / "results.zip", NetCache(models, Device(threads=2)))

    assert [each.number for each in found.items if each.error is not None] == [3]
    assert isinstance(found.items[3].error, NotARow)
    # 400 + 20 * (area - 40) / 2 + 150
    assert [each.output["value"] for each in found.items if each.error is None] == [
        550 + 10 * number for number in range(MAX_ITEMS) if number != 3
    ]


def test_features_of_another_kind_break_the_artefact(models: Path) -> None:
    with pytest.raises(BrokenArtefact, match="features of texts"):
        load_text_features(read_artefact(models / "rent"))
