"""A full disk, a locked or read-only database: the client gets an error, and nothing incomplete is left."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sqlite3
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import flask.testing
import pytest
from PIL import Image

from server.app import create_app
from server.settings import ServerSettings
from store.store import Store

URL = "/requestPrediction/efficientnet_lite0"
RAW = {"content_type": "image/png"}
Traces = Callable[[], tuple[list[str], int]]


@pytest.fixture
def settings(settings: ServerSettings) -> ServerSettings:
    """A server that soon gives up waiting for another writer."""
    return replace(settings, busy_seconds=0.3)


def noise(side: int) -> bytes:
    """A PNG that does not compress."""
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(file, "PNG")
    return file.getvalue()


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let every write beyond this size fail as on a full disk (Python ignores SIGXFSZ, so write fails with EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_for_the_image_is_507(client: flask.testing.FlaskClient, stored_state: Traces) -> None:
    image = noise(200)

    with files_no_larger_than(50_000):
        response = client.post(URL, data=image, **RAW)
    afterwards = client.post(URL, data=image, **RAW)

    assert (response.status_code, response.json["code"]) == (507, "disk_full")
    assert response.headers["Retry-After"]
    assert "disk is full" in response.json["reason"]
    assert afterwards.status_code == 202
    assert [len(left) if isinstance(left, list) else left for left in stored_state()] == [1, 1]


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.png", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("url", "content_type"), [(URL, "image/png"), (URL.replace("Prediction", "Predictions"), "application/zip")]
)
def test_uploads_leave_free_what_is_reserved_of_the_disk(
    settings: ServerSettings, store: Store, stored_state: Traces, url: str, content_type: str
) -> None:
    client = create_app(replace(settings, min_free_bytes=2**60), store).test_client()
    body = io.BytesIO(zipped(noise(8)))

    response = client.post(url, input_stream=body, content_type=content_type)

    assert (response.status_code, response.json["code"], body.tell()) == (507, "disk_full", 0)
    assert "MLG_MIN_FREE_BYTES" in response.json["reason"]
    assert response.headers["Retry-After"]
    assert stored_state() == ([], 0)
    assert client.get("/requests").status_code == 200


def test_an_upload_is_refused_that_would_need_what_is_reserved(
    settings: ServerSettings, store: Store, stored_state: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = create_app(replace(settings, min_free_bytes=1000), store).test_client()
    image, usage = noise(8), shutil.disk_usage(settings.home)
    batch = zipped(image)

    def post(free: int, data: bytes = image, kind: str = "image/png", url: str = URL) -> int:
        monkeypatch.setattr("server.intake.staging.shutil.disk_usage", lambda path: usage._replace(free=1000 + free))
        return client.post(url, data=data, content_type=kind).status_code

    assert post(len(image) - 1) == 507
    assert post(len(batch) - 1, batch, "application/zip", URL.replace("Prediction", "Predictions")) == 507
    assert stored_state() == ([], 0)
    assert post(len(image)) == 202


def test_a_full_disk_for_the_row_leaves_no_row_and_only_what_the_sweep_removes(
    client: flask.testing.FlaskClient, settings: ServerSettings, store: Store, stored_state: Traces
) -> None:
    client.post(URL, data=noise(8), **RAW)
    before = stored_state()
    log = Path(f"{settings.database}-wal").stat().st_size

    with files_no_larger_than(log):
        response = client.post(URL, data=noise(8), **RAW)
    rows = stored_state()[1]
    long_ago = datetime.now(UTC) - timedelta(days=1)
    store.retention.purge(images_before=long_ago, results_before=long_ago, now=datetime.now(UTC))

    assert response.status_code in (503, 507)
    assert response.headers["Retry-After"]
    assert rows == before[1]
    assert stored_state() == before
    assert client.post(URL, data=noise(8), **RAW).status_code == 202


def test_a_locked_database_is_503_with_retry_after(
    client: flask.testing.FlaskClient, settings: ServerSettings, stored_state: Traces
) -> None:
    with contextlib.closing(sqlite3.connect(settings.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        response = client.post(URL, data=noise(8), **RAW)
        other.execute("ROLLBACK")

    assert (response.status_code, response.json["code"]) == (503, "store_busy")
    assert response.headers["Retry-After"] == "1"
    assert stored_state() == ([], 0)
    assert client.post(URL, data=noise(8), **RAW).status_code == 202


def test_reads_work_while_the_database_is_locked(client: flask.testing.FlaskClient, settings: ServerSettings) -> None:
    id = client.post(URL, data=noise(8), **RAW).json["req_id"]

    with contextlib.closing(sqlite3.connect(settings.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        response = client.get(f"/readPrediction/{id}")

    assert response.status_code == 200


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Be a user who is not root, for whom the permissions of files do not count."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def frozen_home(models_folder: Path) -> Iterator[ServerSettings]:
    """A home that can be read but not written; not under tmp_path, which only its owner may enter."""
    folder = Path(tempfile.mkdtemp(prefix="mlg-frozen-"))
    folder.chmod(0o755)
    settings = ServerSettings(home=folder / "home", busy_seconds=0.3)
    store = Store(settings)
    store.migrate()
    store.close()
    shutil.copytree(models_folder, settings.models)
    for path in [settings.home, *settings.home.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield settings
    for path in [settings.home, *settings.home.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(folder)


@pytest.mark.parametrize("writable", ["nothing", "the images only"])
def test_a_read_only_home_is_503_and_leaves_nothing(
    frozen_home: ServerSettings, client: flask.testing.FlaskClient, writable: str
) -> None:
    client.post(URL, data=noise(8), **RAW)  # everything is imported now, also what only root may read
    if writable == "the images only":
        for path in [frozen_home.images, *frozen_home.images.rglob("*")]:
            path.chmod(0o777)
    store = Store(frozen_home)
    frozen = create_app(frozen_home, store).test_client()

    with somebody_else():
        response = frozen.post(URL, data=noise(8), **RAW)
        ready = frozen.get("/readyz")
        health = frozen.get("/healthz")
        store.close()

    assert (response.status_code, response.json["code"]) == (503, "store_unavailable"), response.text
    assert "read-only" in response.json["reason"]
    assert ready.status_code == 503
    assert health.status_code == 200
    assert not [path for path in frozen_home.images.rglob("*") if path.is_file()]


def test_a_full_backlog_is_503_and_leaves_nothing(settings: ServerSettings, store: Store, stored_state: Traces) -> None:
    few = ServerSettings(home=settings.home, max_backlog=1)
    create_app(few, store).test_client().post(URL, data=noise(8), **RAW)
    before = stored_state()

    response = create_app(few, store).test_client().post(URL, data=noise(8), **RAW)

    assert (response.status_code, response.json["code"]) == (503, "backlog_full")
    assert response.headers["Retry-After"] == "30"
    assert stored_state() == before
