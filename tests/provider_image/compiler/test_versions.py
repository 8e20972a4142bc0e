"""The versions of a model: kept by links, limited in number, and installed again with the same digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from provider_image.compiler.installing import begin_artefact, build_folder, install
from provider_image.compiler.versions import (
    UnknownVersion,
    keep_version,
    list_versions,
    remove_model,
    remove_version,
    use_version,
)
from provider_image.models.artefact import Artefact, check_files, find_artefact
from provider_image.models.catalogue import ModelFacts


def install_version(models: Path, content: bytes, *, name: str = "pets") -> Artefact:
    keep_version(models, name)
    row = ModelFacts(name=name, title="Pets", preprocessing="none", source="own")
    draft = begin_artefact(row, weights_sha256="0" * 64, recipe="test", reference="test")
    with build_folder(models, name) as folder:
        (folder / "model.bin").write_bytes(content)
        return install(draft, folder, models, ["model.bin"])


def test_an_earlier_version_is_installed_again(tmp_path: Path) -> None:
    first, second = install_version(tmp_path, b"first"), install_version(tmp_path, b"second")

    used = use_version(tmp_path, "pets", first.digest)

    assert used.digest == first.digest != second.digest
    assert find_artefact(tmp_path, "pets").digest == first.digest
    assert (tmp_path / "pets" / "model.bin").read_bytes() == b"first"
    check_files(find_artefact(tmp_path, "pets"))
    assert set(list_versions(tmp_path, "pets")) == {first.digest, second.digest}
    assert use_version(tmp_path, "pets", second.digest).digest == second.digest


def test_using_the_installed_version_changes_nothing(tmp_path: Path) -> None:
    install_version(tmp_path, b"first")
    second = install_version(tmp_path, b"second")

    assert use_version(tmp_path, "pets", second.digest).digest == second.digest


def test_a_version_shares_its_files_with_the_model(tmp_path: Path) -> None:
    first = install_version(tmp_path, b"first")

    keep_version(tmp_path, "pets")

    kept = tmp_path / ".versions" / "pets" / first.digest / "model.bin"
    assert kept.stat().st_ino == (first.folder / "model.bin").stat().st_ino


def test_only_the_last_versions_are_kept(tmp_path: Path) -> None:
    made = [install_version(tmp_path, b"%d" % number).digest for number in range(4)]

    keep_version(tmp_path, "pets", max_versions=2)

    assert len(list_versions(tmp_path, "pets")) == 2
    assert made[3] == find_artefact(tmp_path, "pets").digest


def test_an_unknown_version_is_an_error(tmp_path: Path) -> None:
    install_version(tmp_path, b"first")

    for name, digest in (("pets", "f" * 64), ("pets", "../../x"), ("../pets", "f" * 64)):
        with pytest.raises(UnknownVersion):
            use_version(tmp_path, name, digest)
    assert keep_version(tmp_path, "unknown") is None


def test_a_version_and_a_model_can_be_deleted(tmp_path: Path) -> None:
    first, second = install_version(tmp_path, b"first"), install_version(tmp_path, b"second")

    remove_version(tmp_path, "pets", first.digest)
    remove_version(tmp_path, "pets", second.digest)  # it is installed, and not kept apart from that

    assert list_versions(tmp_path, "pets") == []
    assert find_artefact(tmp_path, "pets").digest == second.digest
    remove_model(tmp_path, "pets")
    remove_model(tmp_path, "pets")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and any(path.iterdir())] == []
