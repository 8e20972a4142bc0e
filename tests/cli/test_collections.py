"""`mlg collections` and the client's calls against a real server, with vectors that the test makes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from mlg_client import Client, Refused
from provider_image.models.artefact import find_artefact
from server.settings import ServerSettings
from store.files import NewFile
from store.requests import Answer
from store.store import Store
from tests.cli.run_mlg import mlg
from tests.cli.test_submit import image
from tests.conftest import RunningServer
from tests.timing import DEADLINE_SECONDS

MODEL = "efficientnet_lite0_embedding"
DIMENSIONS = 8


@pytest.fixture
def settings(tmp_path: Path, embedding_models_folder: Path) -> ServerSettings:
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(embedding_models_folder)
    return ServerSettings(home=home, server_threads=4)


@pytest.fixture
def embedding(store: Store, settings: ServerSettings) -> Iterator[None]:
    """Answers requests as a batcher would, until the test ends; the vector of an image follows from its bytes."""
    digest, is_over = find_artefact(settings.models, MODEL).digest, threading.Event()

    def answer() -> None:
        while not is_over.wait(0.05):
            now = datetime.now(UTC)
            claims = store.requests.claim(
                models=[MODEL], limit=16, now=now, lease_ends_at=now + timedelta(seconds=60), oldest_before=None
            )
            answers = []
            for claim in claims:
                values = np.random.default_rng(list(store.images.read(claim.image_sha256))).random(DIMENSIONS)
                vector = (values / np.linalg.norm(values)).astype("<f4").tobytes()
                file = NewFile(data=vector, media_type="application/octet-stream")
                facts = {"digest": digest, "chunk_id": "c", "provider": "local", "seconds": 0.01}
                output = {"dimensions": DIMENSIONS}
                answers.append(Answer(claim=claim, output=output, files={"vector": file}, **facts))
            store.requests.finish(answers, now=now)

    thread = threading.Thread(target=answer)
    thread.start()
    yield
    is_over.set()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images, of which two are equal."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(image(number))
    (folder / "again.png").write_bytes(image(0))
    return folder


@pytest.mark.usefixtures("embedding")
def test_commands_create_fill_search_and_delete_a_collection(server: RunningServer, folder: Path) -> None:
    def run(*arguments: str | Path, status: int = 0) -> str:
        done = mlg("collections", *map(str, arguments), MLG_URL=server.base)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    run("create", "holiday")
    (folder / "letter.jpg").write_text("Dear kitten")
    added = run("add", "holiday", folder, "--label", "place:Rome", "--wait", status=1)
    (listed,) = [json.loads(line) for line in run("list", "--json").splitlines()]
    found = [json.loads(line) for line in run("search", "holiday", folder / "3.png", "--json").splitlines()]
    table = run("search", "holiday", "--request", found[0]["req_id"], "-k", "2", "--label", "Rome")
    duplicates = run("duplicates", "holiday", "--threshold", "0.2", "--images", "2")
    groups = [json.loads(line) for line in run("group", "holiday", "--count", "2", "--json").splitlines()]
    run("remove", "holiday", found[0]["req_id"])
    left = json.loads(run("list", "--json"))
    run("delete", "holiday")

    assert "letter.jpg: The bytes are not an image" in added
    assert listed["counts"] == {"ready": 5, "pending": 0, "failed": 0}
    assert (found[0]["name"], found[0]["score"], len(found)) == ("3.png", pytest.approx(1, abs=1e-5), 5)
    assert found[0]["labels"] == {"place": "Rome"}
    assert found[0]["req_id"] not in table and table.count("place:Rome") == 2
    assert "1. 5 images, Rome" in duplicates and duplicates.count(".png") == 2
    assert sum(group["size"] for group in groups) == 5
    assert left["counts"]["ready"] == 4
    assert run("list").splitlines()[1:] == []
    assert "There is no collection with this name" in run("search", "holiday", folder / "3.png", status=1)
    assert "Give an image, or --request ID" in run("search", "holiday", status=2)


@pytest.mark.usefixtures("embedding")
def test_client_adds_requests_and_searches_by_vectors(server: RunningServer, store: Store) -> None:
    with Client(server.base) as client:
        client.create_collection("holiday")
        sent = [client.submit(image(number), MODEL) for number in range(3)]
        for request in sent:
            client.wait(request, 60)
        items = client.add_requests_to_collection("holiday", [*sent, "unknown"], labels={"place": "Rome"})
        vector = np.frombuffer(client.file(sent[1], "vector"), "<f4").tolist()
        by_vector = client.search_collection("holiday", vector=vector, k=1, labels=["place:Rome"])
        by_image = client.search_collection("holiday", image(1), threshold=0.99)
        images = [each["req_id"] for each in client.collection_images("holiday")]
        with pytest.raises(ValueError, match="an image, a request or a vector"):
            client.search_collection("holiday")
        with pytest.raises(Refused) as refused:
            client.collection("other")

    assert [item["req_id"] for item in items] == [*(request.id for request in sent), None]
    assert [match["req_id"] for match in by_vector] == [match["req_id"] for match in by_image] == [sent[1].id]
    assert images == [request.id for request in sent][::-1]
    assert refused.value.code == "unknown_collection"


def test_process_killed_after_an_answer_loses_no_member(
    start_server: Callable[..., RunningServer], settings: ServerSettings, store: Store
) -> None:
    with Client(start_server().base) as client:
        client.create_collection("holiday")
        (request,) = client.add_to_collection("holiday", [image(7)]).requests
    digest = find_artefact(settings.models, MODEL).digest
    now = datetime.now(UTC)
    (claim,) = store.requests.claim(
        models=[MODEL], limit=1, now=now, lease_ends_at=now + timedelta(seconds=60), oldest_before=None
    )
    vector = np.eye(1, DIMENSIONS, dtype="<f4").tobytes()
    file = NewFile(data=vector, media_type="application/octet-stream")
    facts = {"digest": digest, "chunk_id": "c", "provider": "local", "seconds": 0.01}
    store.requests.finish(
        [Answer(claim=claim, output={"dimensions": DIMENSIONS}, files={"vector": file}, **facts)], now=now
    )
    first = start_server()
    with Client(first.base) as client:
        before = client.search_collection("holiday", request=request.id)
    first.process.kill()
    first.process.wait(DEADLINE_SECONDS)

    with Client(start_server().base) as client:
        (found,) = client.search_collection("holiday", vector=[1.0] + [0.0] * (DIMENSIONS - 1))

    assert before == []  # the image itself is left out
    assert (found["req_id"], found["score"]) == (request.id, pytest.approx(1))
