"""The contract of files beside the image: inputs and files of answers, stored once, deleted with the last request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from store import new_id
from store.batches import BatchRecord
from store.files import NewFile
from store.requests import Answer, Claim, NewRequest, RequestRecord
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
DIGEST = "d" * 64


def add(store: Store, data: bytes = b"image", note: bytes | None = None, **facts: Any) -> RequestRecord:
    new = NewRequest(id=new_id(), service="iris", model="iris_means", digest=DIGEST, created_at=NOW, **facts)
    staged = store.images.stage(data)
    if note is not None:
        staged = replace(staged, others={"note": replace(store.images.stage(note), media_type="text/plain")})
    return store.requests.add(new, staged)


def claim(store: Store) -> list[Claim]:
    return store.requests.claim(
        models=["iris_means"], limit=100, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    )


def finish(store: Store, claims: list[Claim], **files: bytes) -> int:
    found = {name: NewFile(data=data, media_type="text/plain") for name, data in files.items()}
    answers = [
        Answer(claim=each, output={}, files=found, digest=DIGEST, chunk_id="c", provider="p", seconds=0.1)
        for each in claims
    ]
    return store.requests.finish(answers, now=NOW)


@pytest.fixture
def files(store: Store) -> Callable[[], set[bytes]]:
    """The contents of every file under blobs."""
    return lambda: {path.read_bytes() for path in store.images.folder.rglob("*") if path.is_file()}


def test_inputs_and_files_of_an_answer_read_back(store: Store, files: Callable[[], set[bytes]]) -> None:
    id = add(store, b"image", b"note").id
    (claimed,) = claim(store)

    finish(store, [claimed], out=b"result")

    found = store.requests.get(id)
    assert store.images.read(claimed.inputs["note"].sha256) == b"note"
    assert store.images.read(found.files["out"].sha256) == b"result"
    assert (found.files["out"].media_type, found.files["out"].size_bytes) == ("text/plain", 6)
    assert found.inputs == claimed.inputs
    assert files() == {b"image", b"note", b"result"}


def test_answers_of_equal_claims_share_their_files(store: Store, files: Callable[[], set[bytes]]) -> None:
    ids = [add(store, is_fresh=True).id for _ in range(3)]

    assert finish(store, claim(store), out=b"result", copy=b"result") == 3

    assert [list(store.requests.get(id).files) for id in ids] == [["copy", "out"]] * 3
    assert files() == {b"image", b"result"}


def test_equal_request_gets_the_answer_with_its_files(store: Store) -> None:
    first = add(store, b"image", b"note", params={"levels": 4})
    finish(store, claim(store), out=b"result")

    same = add(store, b"image", b"note", params={"levels": 4})
    others = [
        add(store, b"image", b"note", params={"levels": 5}),
        add(store, b"image", b"another", params={"levels": 4}),
        add(store, b"image", None, params={"levels": 4}),
    ]

    assert same.is_cached
    assert same.files == store.requests.get(first.id).files != {}
    assert not any(other.is_cached for other in others)


def test_result_under_an_old_token_leaves_no_file(store: Store, files: Callable[[], set[bytes]]) -> None:
    add(store)
    old = claim(store)
    store.requests.release_expired(NOW + timedelta(minutes=1))

    assert finish(store, old, out=b"too late") == 0

    assert files() == {b"image"}


def test_answer_that_is_not_recorded_leaves_no_file(
    store: Store, files: Callable[[], set[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store)
    claims = claim(store)
    monkeypatch.setattr(store.images, "sync", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))

    with pytest.raises(Exception, match=r"(?i)space|full"):
        finish(store, claims, out=b"result")
    monkeypatch.undo()

    assert files() == {b"image"}
    assert finish(store, claims, out=b"result") == 1
    assert files() == {b"image", b"result"}


@pytest.mark.parametrize("how", ["remove", "purge", "own time"])
def test_files_are_deleted_with_the_last_request_that_refers_to_them(
    store: Store, files: Callable[[], set[bytes]], how: str
) -> None:
    keep_seconds = 1.0 if how == "own time" else None
    first = add(store, b"image", b"note", keep_seconds=keep_seconds)
    finish(store, claim(store), out=b"result")
    second = add(store, b"image", b"note")
    later = NOW + timedelta(hours=1)

    if how == "remove":
        store.requests.remove(first.id)
    elif how == "own time":
        store.retention.purge(images_before=NOW, results_before=NOW, now=later)
    if how != "purge":
        assert files() == {b"image", b"note", b"result"}
        assert store.requests.get(second.id).files
        store.requests.remove(second.id)
    else:
        store.retention.purge(images_before=later, results_before=later, now=later)

    assert files() == set()


def test_retention_of_images_deletes_the_inputs_and_keeps_the_answer(
    store: Store, files: Callable[[], set[bytes]]
) -> None:
    id = add(store, b"image", b"note").id
    finish(store, claim(store), out=b"result")

    store.retention.purge(images_before=NOW + timedelta(hours=1), results_before=NOW, now=NOW)

    assert files() == {b"result"}
    assert store.images.read(store.requests.get(id).files["out"].sha256) == b"result"


def test_input_that_is_also_a_result_is_kept_as_long_as_either_needs_it(
    store: Store, files: Callable[[], set[bytes]]
) -> None:
    add(store, b"same", b"note")
    finish(store, claim(store), out=b"same")

    store.retention.purge(images_before=NOW + timedelta(hours=1), results_before=NOW, now=NOW)

    assert files() == {b"same"}


def test_files_go_with_their_batch(store: Store, files: Callable[[], set[bytes]]) -> None:
    batch = BatchRecord(
        id=new_id(), service="iris", model="iris_means", params={}, name=None, labels={}, key_id=None, created_at=NOW
    )
    new = NewRequest(id=new_id(), service="iris", model="iris_means", batch_id=batch.id, client_id="a", created_at=NOW)
    staged = store.images.stage(b"image")
    staged = replace(staged, others={"note": store.images.stage(b"note")})
    store.batches.add(batch, [(new, staged)], [])
    finish(store, claim(store), out=b"result")
    assert files() == {b"image", b"note", b"result"}

    store.batches.remove(batch.id)

    assert files() == set()


def test_request_that_is_refused_leaves_none_of_its_inputs(store: Store, files: Callable[[], set[bytes]]) -> None:
    first = add(store)

    with pytest.raises(Exception, match="UNIQUE"):
        staged = replace(store.images.stage(b"another"), others={"note": store.images.stage(b"note")})
        store.requests.add(
            NewRequest(id=first.id, service="iris", model="iris_means", created_at=NOW),
            staged,
        )

    assert files() == {b"image"}


def test_sweep_keeps_what_requests_refer_to(store: Store, files: Callable[[], set[bytes]]) -> None:
    add(store, b"image", b"note")
    finish(store, claim(store), out=b"result")
    (store.images.published_folder / ("0" * 64)).write_bytes(b"its row was never committed")

    report = store.retention.purge(images_before=NOW, results_before=NOW, now=NOW)

    assert report.leftovers == 1
    assert files() == {b"image", b"note", b"result"}
