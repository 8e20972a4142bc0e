"""Weights are found where they should be, downloaded whole or not at all, and never taken for what they are not."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from provider_image.compiler.keras_weights import KERAS_WEIGHTS_URL, WeightsSources, find_weights
from provider_image.errors import WeightsMismatch, WeightsMissing
from provider_image.models.catalogue import CATALOGUE, ModelRow

DATA = b"weights" * 500_000


def row_of(data: bytes, algorithm: str = "md5", name: str = "nasnet_large") -> ModelRow:
    """The row of a model whose published weights are these bytes."""
    row = CATALOGUE[name]
    return dataclasses.replace(
        row, weights=dataclasses.replace(row.weights, hash=hashlib.new(algorithm, data).hexdigest())
    )


class Mirror:
    """A small HTTP server instead of that of Keras."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requested: list[str] = []
        self.cut_at: int | None = None
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.requested.append(self.path)
                data = mirror.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: mirror.cut_at])

            def log_message(self, *arguments: object) -> None:
                """Tests are quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/published/"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A mirror that has the file that Keras calls NASNet-large.h5."""
    mirror = Mirror()
    mirror.files["/published/nasnet/NASNet-large.h5"] = DATA
    yield mirror
    mirror.close()


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_download_is_checked_and_kept_where_keras_keeps_it(tmp_path, mirror, algorithm):
    row, shown = row_of(DATA, algorithm), []
    sources = WeightsSources(cache=tmp_path / "models", address=mirror.address)

    first = find_weights(row, sources, progress=lambda done, total: shown.append((done, total)))
    second = find_weights(row, sources)

    assert first == second
    assert first.path == tmp_path / "models" / "nasnet_large.h5"
    assert first.path.read_bytes() == DATA and first.is_published
    assert first.sha256 == hashlib.sha256(DATA).hexdigest()
    assert mirror.requested == ["/published/nasnet/NASNet-large.h5"]
    assert shown[-1] == (len(DATA), len(DATA)) and len(shown) > 2


def test_download_with_another_hash_is_thrown_away(tmp_path, mirror):
    with pytest.raises(WeightsMismatch, match=r"NASNet-large\.h5 does not have the hash .*--weights FOLDER"):
        find_weights(row_of(b"something else"), WeightsSources(cache=tmp_path, address=mirror.address))

    assert list(tmp_path.iterdir()) == []


def test_download_that_is_cut_short_is_thrown_away(tmp_path, mirror):
    mirror.cut_at = len(DATA) // 2

    with pytest.raises(WeightsMissing, match=r"nasnet_large\.h5"):
        find_weights(row_of(DATA), WeightsSources(cache=tmp_path, address=mirror.address))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["{mirror}wrong/", "http://127.0.0.1:9/", "nonsense", "https://[::1"])
def test_error_for_missing_weights_names_the_file_its_url_and_the_folder(tmp_path, mirror, address):
    sources = WeightsSources(cache=tmp_path, address=address.format(mirror=mirror.address))

    with pytest.raises(WeightsMissing) as caught:
        find_weights(row_of(DATA), sources)

    for word in ("nasnet/NASNet-large.h5", "as nasnet_large.h5", "mlg models compile nasnet_large --weights FOLDER"):
        assert word in caught.value.reason
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written_is_reported(tmp_path, mirror):
    (tmp_path / "file").touch()

    with pytest.raises(WeightsMissing, match="Not a directory"):
        find_weights(row_of(DATA), WeightsSources(cache=tmp_path / "file" / "models", address=mirror.address))


def test_damaged_cache_is_downloaded_again(tmp_path, mirror):
    (tmp_path / "nasnet_large.h5").write_bytes(DATA[:-1])

    found = find_weights(row_of(DATA), WeightsSources(cache=tmp_path, address=mirror.address))

    assert found.path.read_bytes() == DATA and found.is_published


@pytest.mark.parametrize("name", ["nasnet_large.h5", "NASNet-large.h5", "nasnet_large.weights.h5"])
def test_folder_may_have_the_file_under_any_of_its_names(tmp_path, mirror, name):
    (tmp_path / name).write_bytes(DATA)

    given = find_weights(row_of(DATA), WeightsSources(given=tmp_path, cache=tmp_path / "none", address=mirror.address))
    usual = find_weights(row_of(DATA), WeightsSources(folder=tmp_path, cache=tmp_path / "none", address=mirror.address))

    assert given == usual and given.path == tmp_path / name
    assert not mirror.requested


def test_error_for_a_folder_without_the_file_names_the_file(tmp_path):
    with pytest.raises(WeightsMissing, match=r"no weights of NASNet-Large\. Put nasnet_large\.h5 or"):
        find_weights(row_of(DATA), WeightsSources(given=tmp_path, cache=tmp_path))


def test_usual_folder_without_the_file_goes_on_to_the_download(tmp_path, mirror):
    found = find_weights(
        row_of(DATA), WeightsSources(folder=tmp_path, cache=tmp_path / "cache", address=mirror.address)
    )

    assert found.path.parent == tmp_path / "cache"


def test_given_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsMissing, match="There is no weights file"):
        find_weights(row_of(DATA), WeightsSources(given=tmp_path / "none.h5", cache=tmp_path))


def test_given_file_may_hold_own_weights_and_is_told_apart(tmp_path):
    (tmp_path / "mine.h5").write_bytes(b"mine")

    found = find_weights(row_of(DATA), WeightsSources(given=tmp_path / "mine.h5", cache=tmp_path))

    assert not found.is_published


def test_file_without_a_published_hash_is_not_downloaded_unseen(tmp_path, mirror):
    with pytest.raises(WeightsMissing, match=r"no hash .*mlg models compile mobilenet_v2 --weights FILE"):
        find_weights(CATALOGUE["mobilenet_v2"], WeightsSources(cache=tmp_path, address=mirror.address))

    assert not mirror.requested


def test_settings_name_the_places():
    sources = WeightsSources.from_env(
        {"MLG_WEIGHTS_DIR": "/w", "KERAS_HOME": "/k", "MLG_WEIGHTS_URL": "https://mirror/"}
    )
    usual = WeightsSources.from_env({"HOME": "/home/me"})

    assert (sources.folder, sources.cache, sources.address) == (Path("/w"), Path("/k/models"), "https://mirror/")
    assert (usual.folder, usual.address) == (None, KERAS_WEIGHTS_URL)
