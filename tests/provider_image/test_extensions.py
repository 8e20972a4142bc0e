"""Implementations that other installed packages declare."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_image.extensions import Extensions

GROUP = "mlg.tests"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that declares one implementation that works and one whose module does not exist."""
    (tmp_path / "mlg_other_package.py").write_text("class Works:\n    pass\n")
    facts = tmp_path / "mlg_other_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mlg-other-package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        f"[{GROUP}]\nworks = mlg_other_package:Works\nbroken = mlg_other_package_that_is_missing:Broken\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_one_that_cannot_be_imported_is_left_out_and_logged(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    extensions = Extensions(GROUP, {"own": "json:loads"})

    assert sorted(extensions) == ["own", "works"]
    assert "broken" not in extensions
    assert extensions.load("works").__name__ == "Works"
    assert [record.getMessage() for record in caplog.records] == [
        f"{GROUP} 'broken' cannot be imported, so it is left out"
    ]


def test_a_name_of_this_project_cannot_be_replaced(package: Path) -> None:
    extensions = Extensions(GROUP, {"works": "json:loads"})

    assert extensions["works"] == "json:loads"
