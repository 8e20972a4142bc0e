"""The contract of collections: what is acknowledged is found, what is deleted is not, and retention spares members."""

from __future__ import annotations

import errno
import hashlib
import itertools
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from provider_image.errors import InvalidParams
from store import new_id
from store.collections import collections as collections_module
from store.collections import members as members_module
from store.collections.collections import (
    CollectionExists,
    CollectionRecord,
    TooManyMembers,
    UnknownCollection,
    UnknownMember,
)
from store.collections.members import TooManyCollections
from store.collections.vector_cache import VectorCache
from store.database import Transaction
from store.files import NewFile
from store.requests import Answer, NewRequest, RequestRecord, delete_requests, insert_requests, request_row
from store.rows import to_text
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL, CLASSIFIER = "net_embedding", "net"
DIGEST = "d" * 64
DIMENSIONS = 8


def vector_of(image: bytes, dimensions: int = DIMENSIONS) -> bytes:
    """The vector that the model of these tests has for an image."""
    values = np.random.default_rng(list(image)).random(dimensions)
    return (values / np.linalg.norm(values)).astype("<f4").tobytes()


def make(store: Store, name: str = "holiday", **facts: Any) -> CollectionRecord:
    return store.collections.add(CollectionRecord(id=new_id(), name=name, model=MODEL, created_at=NOW, **facts))


def add(store: Store, image: bytes, collection: CollectionRecord | None = None, **facts: Any) -> RequestRecord:
    number = None if collection is None else collection.number
    values = {"service": "embedding", "model": MODEL, "digest": DIGEST, "collection": number, "created_at": NOW}
    return store.requests.add(NewRequest(id=new_id(), **{**values, **facts}), store.images.stage(image))


def classify(store: Store, image: bytes, **facts: Any) -> RequestRecord:
    return add(store, image, service="classification", model=CLASSIFIER, **facts)


def answer(
    store: Store, *, digest: str = DIGEST, vector: Callable[[bytes], bytes] = vector_of, now: datetime = NOW
) -> None:
    """Answer everything that is queued, as a batcher would; the label of an image is its bytes."""
    claims = store.requests.claim(
        models=[MODEL, CLASSIFIER], limit=100, now=NOW, lease_ends_at=NOW + timedelta(seconds=30), oldest_before=None
    )
    answers = []
    for claim in claims:
        image = store.images.read(claim.image_sha256)
        is_vector = claim.model == MODEL
        file = NewFile(data=vector(image), media_type="application/octet-stream")
        answers.append(
            Answer(
                claim=claim,
                output={"dimensions": DIMENSIONS} if is_vector else [["n1", image.decode(), 0.9]],
                files={"vector": file} if is_vector else {},
                digest=digest,
                chunk_id="c",
                provider="p",
                seconds=0.1,
            )
        )
    store.requests.finish(answers, now=NOW)


def reread(store: Store, collection: CollectionRecord) -> CollectionRecord:
    return store.collections.find(collection.id, key_id=None)


def search(store: Store, collection: CollectionRecord, image: bytes, k: int = 100) -> list[str]:
    """The ids of the members, the most similar first."""
    collection = reread(store, collection)
    if collection.dimensions is None:
        return []
    cache = store.collections.cache(collection)
    store.collections.update_cache(collection, cache)
    numbers = [match.number for match in cache.search(vector_of(image), k)]
    members = store.collections.get_members(numbers)
    return [members[number].id for number in numbers]


def statuses(store: Store, collection: CollectionRecord) -> dict[str, str]:
    return {member.id: member.status for member in store.collections.members(collection)}


def test_image_is_a_member_once_it_has_its_vector(store: Store) -> None:
    collection = make(store)
    cat = add(store, b"cat", collection, name="cat.jpg", labels={"place": "Rome"})
    dog = add(store, b"dog", collection)
    before = store.collections.count(collection)

    answer(store)

    after = reread(store, collection)
    assert (before.ready, before.pending, before.total) == (0, 2, 2)
    assert store.collections.count(after).ready == 2
    assert (after.digest, after.dimensions, after.sequence) == (DIGEST, DIMENSIONS, 2)
    assert search(store, collection, b"cat", 1) == [cat.id]
    assert search(store, collection, b"dog", 1) == [dog.id]
    (_, shown) = store.collections.members(collection)
    assert (shown.id, shown.name, shown.status, shown.labels) == (cat.id, "cat.jpg", "ready", {"place": "Rome"})


def test_image_that_was_answered_before_is_a_member_at_once(store: Store) -> None:
    add(store, b"cat")
    answer(store)
    collection = make(store)

    again = add(store, b"cat", collection)

    assert again.is_cached
    assert statuses(store, collection) == {again.id: "ready"}


def test_requests_that_are_there_become_members_now_or_when_they_are_answered(store: Store) -> None:
    done = add(store, b"cat")
    answer(store)
    waiting, other = add(store, b"dog"), classify(store, b"owl")
    collection = make(store)

    added = store.collections.add_requests(collection, [done.id, waiting.id, other.id, "unknown"], {"place": "Rome"})

    assert added == {done.id, waiting.id}
    assert statuses(store, collection) == {done.id: "ready", waiting.id: "pending"}
    answer(store)
    assert statuses(store, collection) == {done.id: "ready", waiting.id: "ready"}
    with_label = store.collections.numbers_with_labels(collection, [("place", "Rome")])
    assert with_label is not None and len(with_label) == 2


def test_image_is_a_member_once_and_gets_further_labels(store: Store) -> None:
    collection = make(store)
    first = add(store, b"cat", collection, labels={"place": "Rome"})
    answer(store)

    add(store, b"cat", collection, labels={"year": "2026"})

    (member,) = store.collections.members(collection)
    assert (member.id, member.labels) == (first.id, {"place": "Rome", "year": "2026"})
    assert store.collections.sequence(collection) == 1


def test_further_label_of_a_name_replaces_the_earlier_and_their_number_is_limited(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "MAX_LABELS", 3)
    collection = make(store)
    add(store, b"cat", collection, labels={"place": "Rome"})

    add(store, b"cat", collection, labels={"place": "Oslo"})
    add(store, b"cat", collection, labels={"a": "1", "b": "2", "c": "3"})

    (member,) = store.collections.members(collection)
    assert member.labels == {"place": "Oslo", "a": "1", "b": "2"}
    assert store.collections.numbers_with_labels(collection, [(None, "Rome")]) == []


def test_purge_deletes_vectors_from_the_files_and_files_without_a_collection(store: Store, tmp_path: Path) -> None:
    collection = make(store)
    request = add(store, b"cat", collection)
    answer(store)
    search(store, collection, b"cat")
    folder = store.collections.cache(reread(store, collection))._folder
    (folder.parent / "left").mkdir()
    store.requests.remove(request.id)
    (file,) = folder.glob("*/vectors.f32")
    before = file.read_bytes()

    store.retention.purge(images_before=NOW, results_before=NOW, now=NOW)

    assert vector_of(b"cat") in before
    assert vector_of(b"cat") not in file.read_bytes()
    assert [path.name for path in folder.parent.iterdir()] == [collection.id]


def test_failed_image_may_be_sent_again_or_retried(store: Store) -> None:
    collection = make(store)
    sent, retried = add(store, b"cat", collection), add(store, b"dog", collection)
    claims = store.requests.claim(
        models=[MODEL], limit=9, now=NOW, lease_ends_at=NOW + timedelta(seconds=9), oldest_before=None
    )
    store.requests.fail(claims, code="broken_image", reason="The image is damaged.", now=NOW)
    failed = store.collections.members(collection)
    counted = store.collections.count(collection)

    again = add(store, b"cat", collection)
    store.requests.retry(retried.id, now=NOW)
    answer(store)

    assert {member.status for member in failed} == {"failed"}
    assert {member.reason for member in failed} == {"The image is damaged."}
    assert (counted.failed, counted.pending) == (2, 0)
    assert statuses(store, collection) == {again.id: "ready", retried.id: "ready"}
    assert sent.id not in statuses(store, collection)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "e" * 64}, "installed anew"),
        ({"vector": lambda image: vector_of(image, 9)}, "9 values"),
        ({"vector": lambda image: bytes(4 * DIMENSIONS)}, "did not return a vector"),
        ({"vector": lambda image: b"\xff" * 4 * DIMENSIONS}, "did not return a vector"),
        ({"vector": lambda image: b"abc"}, "did not return a vector"),
    ],
)
def test_vector_that_cannot_be_compared_is_refused_with_the_reason(
    store: Store, change: dict[str, Any], reason: str
) -> None:
    collection = make(store)
    good = add(store, b"cat", collection)
    answer(store)
    bad = add(store, b"dog", collection)

    answer(store, **change)

    assert statuses(store, collection) == {bad.id: "failed", good.id: "ready"}
    assert reason in (store.collections.members(collection)[0].reason or "")
    assert search(store, collection, b"dog") == [good.id]


def test_request_that_goes_away_takes_no_image_that_waits_for_another(store: Store) -> None:
    collection = make(store)
    first = add(store, b"cat", collection)

    def add_and_fail(transaction: Transaction) -> None:
        insert_requests(transaction, [(new, staged, request_row(new, staged))], usage=None)
        delete_requests(transaction, f"id = '{new.id}'", {})

    staged = store.images.stage(b"cat")
    new = NewRequest(
        id=new_id(), service="embedding", model=MODEL, digest=DIGEST, collection=collection.number, created_at=NOW
    )
    store.database.write(add_and_fail)
    answer(store)

    assert statuses(store, collection) == {first.id: "ready"}


def test_cancelled_image_has_failed(store: Store) -> None:
    collection = make(store)
    store.requests.cancel(add(store, b"cat", collection).id, now=NOW)

    (member,) = store.collections.members(collection)

    assert (member.status, member.reason) == ("failed", "Its request was cancelled.")


def test_most_likely_label_comes_from_a_classification_before_or_after(store: Store) -> None:
    collection = make(store)
    classify(store, b"before")
    classify(store, b"of_another_key", key_id="k2")
    answer(store)
    for image in (b"before", b"after", b"of_another_key"):
        add(store, image, collection)
    answer(store)

    classify(store, b"after")
    answer(store)

    labels = [dict(member.labels) for member in reversed(store.collections.members(collection))]
    assert labels == [{CLASSIFIER: "before"}, {CLASSIFIER: "after"}, {}]
    assert store.collections.numbers_with_labels(collection, [(None, "after")]) == [2]
    assert store.collections.numbers_with_labels(collection, [(CLASSIFIER, "after"), (None, "before")]) == []
    assert store.collections.numbers_with_labels(collection, []) is None
    assert store.collections.numbers_with_labels(collection, [(CLASSIFIER, "after"), (None, "after")]) == [2]


def test_deleted_request_or_member_is_not_found_and_leaves_no_vector(store: Store) -> None:
    collection = make(store)
    cat, dog, owl = (add(store, image, collection) for image in (b"cat", b"dog", b"owl"))
    answer(store)
    search(store, collection, b"cat")

    store.requests.remove(cat.id)
    store.collections.remove_member(collection, dog.id)

    assert search(store, collection, b"cat") == [owl.id]
    assert store.requests.get(dog.id).status == "done"
    with store.database.read() as connection:
        assert connection.execute("SELECT count(*) FROM collection_vectors").fetchone()[0] == 1
    with pytest.raises(UnknownMember):
        store.collections.remove_member(collection, dog.id)


def test_retention_spares_members_but_not_those_with_a_retention_time_of_their_own(store: Store) -> None:
    collection = make(store)
    member, short = add(store, b"cat", collection), add(store, b"dog", collection, keep_seconds=60)
    other = add(store, b"owl")
    answer(store)
    later = NOW + timedelta(days=400)

    def purge() -> set[str]:
        store.retention.purge(images_before=later, results_before=later, now=later)
        return {request.id for request in store.requests.list()}

    first = purge()
    kept = store.requests.get(member.id)
    image = store.images.read(kept.image_sha256)
    store.collections.remove_member(collection, member.id)
    second = purge()

    assert first == {member.id}
    assert (kept.image_deleted_at, image) == (None, b"cat")
    assert not store.images.path(kept.image_sha256).exists()
    assert second == set()
    assert {short.id, other.id}.isdisjoint(first)


def test_deleted_collection_is_gone_and_its_requests_follow_the_retention_again(store: Store) -> None:
    collection, other = make(store), make(store, "other")
    member = add(store, b"cat", collection)
    answer(store)
    store.collections.add_requests(other, [member.id])
    search(store, collection, b"cat")

    store.collections.remove(collection, now=NOW)

    assert [each.name for each in store.collections.list()] == ["other"]
    assert search(store, other, b"cat") == [member.id]
    make(store)
    later = NOW + timedelta(days=400)
    store.retention.purge(images_before=later, results_before=later, now=later)
    assert store.requests.get(member.id)
    store.collections.remove(reread(store, other), now=NOW)
    store.retention.purge(images_before=later, results_before=later, now=later)
    assert store.requests.list() == []
    with pytest.raises(UnknownCollection):
        store.collections.remove(collection, now=NOW)


def test_image_for_a_collection_that_was_deleted_meanwhile_is_an_ordinary_request(store: Store) -> None:
    collection = make(store)
    store.collections.remove(collection, now=NOW)

    request = add(store, b"cat", collection, labels={"place": "Rome"})
    answer(store)

    assert store.requests.get(request.id).status == "done"
    with store.database.read() as connection:
        assert connection.execute("SELECT count(*) FROM collection_members").fetchone()[0] == 0


def test_interrupted_removal_is_finished_by_a_purge(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = make(store)
    for number in range(5):
        add(store, b"%d" % number, collection)
    answer(store)
    search(store, collection, b"1")
    monkeypatch.setattr(collections_module, "REMOVAL_SECONDS", -1.0)

    store.collections.remove(collection, now=NOW)
    store.retention.purge(images_before=NOW - timedelta(days=1), results_before=NOW - timedelta(days=1), now=NOW)

    with store.database.read() as connection:
        for table in ("collections", "collection_members", "collection_vectors", "collection_changes"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0, table
        assert connection.execute("SELECT sum(collections) FROM requests").fetchone()[0] == 0


def test_removal_leaves_other_deleted_collections_to_a_purge(store: Store) -> None:
    large, small = make(store, "large"), make(store, "small")
    for collection in (large, small):
        add(store, b"cat", collection)
    answer(store)
    store.database.execute("UPDATE collections SET deleted_at = ? WHERE name = 'large'", (to_text(NOW),))

    store.collections.remove(small, now=NOW)

    left = store.database.rows("SELECT collection FROM collection_members")
    assert [number for (number,) in left] == [large.number]


def test_removal_stops_between_commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collections_module, "_MEMBERS_PER_COMMIT", 2)
    collection = make(store)
    for number in range(5):
        add(store, b"%d" % number, collection)
    answer(store)
    calls = itertools.count()
    store.database.execute("UPDATE collections SET deleted_at = ?", (to_text(NOW),))

    store.collections.finish_removals(is_stopping=lambda: next(calls) > 0)

    (members,) = store.database.row("SELECT count(*) FROM collection_members")
    (changes,) = store.database.row("SELECT count(*) FROM collection_changes")
    assert (members, changes) == (3, 5)


def test_collections_that_an_image_is_in_are_limited_for_each_key(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members_module, "MAX_COLLECTIONS_OF_IMAGE", 2)
    mine = [make(store, f"c{number}", key_id="k1") for number in range(3)]
    for collection in mine[:2]:
        add(store, b"cat", collection, key_id="k1")

    with pytest.raises(TooManyCollections, match="An image can be in 2 collections"):
        add(store, b"cat", mine[2], key_id="k1")

    add(store, b"cat", mine[0], key_id="k1", labels={"place": "Rome"})
    add(store, b"dog", mine[2], key_id="k1")
    add(store, b"cat", make(store, key_id="k2"), key_id="k2")
    assert store.collections.members(mine[0])[0].labels == {"place": "Rome"}
    assert [member.image_sha256 for member in store.collections.members(mine[2])] == [
        hashlib.sha256(b"dog").hexdigest()
    ]


def test_purge_goes_on_if_the_vectors_of_a_collection_cannot_be_written(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    collection = make(store)
    add(store, b"cat", collection)
    answer(store)
    search(store, collection, b"cat")
    add(store, b"dog", collection)
    answer(store)

    def fail(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(VectorCache, "update", fail)
    (before,) = store.database.row("SELECT count(*) FROM changes")
    store.retention.purge(images_before=NOW, results_before=NOW, now=NOW + timedelta(days=400))

    assert "cannot bring the vectors" in caplog.text
    assert store.database.row("SELECT count(*) FROM changes")[0] < before


def test_name_is_unique_for_a_key_and_found_for_that_key_only(store: Store) -> None:
    mine, other = make(store, key_id="k1"), make(store, key_id="k2")

    assert store.collections.find("holiday", key_id="k1") == mine
    assert store.collections.find(other.id, key_id="k1") == other
    assert [each.id for each in store.collections.list(key_id="k2")] == [other.id]
    with pytest.raises(CollectionExists):
        make(store, key_id="k1")
    with pytest.raises(UnknownCollection):
        store.collections.find("holiday", key_id="k3")


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "ä", "x" * 65, "a" * 32, "two words", "a\n"])
def test_name_that_is_no_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidParams):
        make(store, name)


def test_numbers_of_collections_and_of_members_are_limited(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collections_module, "MAX_COLLECTIONS", 1)
    monkeypatch.setattr(collections_module, "MAX_MEMBERS", 2)
    collection = make(store)
    add(store, b"cat", collection)

    store.collections.check_room(collection, 1)
    with pytest.raises(TooManyMembers):
        store.collections.check_room(collection, 2)
    answer(store)
    owl = add(store, b"owl", collection)
    answer(store)
    with pytest.raises(TooManyMembers):
        store.collections.check_room(reread(store, collection), 1)
    store.collections.remove_member(collection, owl.id)
    store.collections.check_room(reread(store, collection), 1)
    with pytest.raises(TooManyCollections):
        make(store, "second")


def test_members_are_listed_in_pages(store: Store) -> None:
    collection = make(store)
    ids = [add(store, b"%d" % number, collection).id for number in range(5)]

    first = store.collections.members(collection, limit=3)
    second = store.collections.members(collection, before=first[-1].number, limit=3)

    assert [member.id for member in [*first, *second]] == ids[::-1]


@pytest.mark.parametrize("seed", range(2))
def test_cache_that_followed_any_changes_equals_one_made_from_the_rows(store: Store, tmp_path: Path, seed: int) -> None:
    chosen = random.Random(seed)
    collections = [make(store, "one"), make(store, "two")]
    expected: list[dict[str, bytes]] = [{}, {}]
    for _ in range(60):
        what, which = chosen.randrange(8), chosen.randrange(2)
        members = expected[which]
        image = b"%d" % chosen.randrange(40)
        if what < 4:
            request = add(store, image, collections[which], is_fresh=chosen.random() < 0.5)
            answer(store)
            if image not in members.values():
                members[request.id] = image
        elif what == 4 and members:
            id = chosen.choice(list(members))
            store.collections.remove_member(collections[which], id)
            del members[id]
        elif what == 5 and members:
            id = chosen.choice(list(members))
            store.requests.remove(id)
            for each in expected:
                each.pop(id, None)
        elif what == 6 and members:
            id = chosen.choice(list(members))
            store.collections.add_requests(collections[1 - which], [id])
            if members[id] not in expected[1 - which].values():
                expected[1 - which][id] = members[id]
        else:
            search(store, collections[which], image)

    for place, (collection, members) in enumerate(zip(collections, expected, strict=True)):
        collection = reread(store, collection)
        assert statuses(store, collection) == dict.fromkeys(members, "ready")
        followed = search(store, collection, b"anything", 1000)
        assert sorted(followed) == sorted(members)
        if collection.dimensions is None:
            continue
        fresh = VectorCache(tmp_path / f"fresh-{place}", DIMENSIONS)
        store.collections.update_cache(collection, fresh)
        query = vector_of(b"anything")
        one, other = (cache.search(query, 1000) for cache in (fresh, store.collections.cache(collection)))
        assert [match.number for match in one] == [match.number for match in other]
        assert [match.score for match in one] == pytest.approx([match.score for match in other], abs=1e-6)


def test_cache_that_is_ahead_of_the_rows_is_made_anew(store: Store) -> None:
    collection = make(store)
    cat, dog = add(store, b"cat", collection), add(store, b"dog", collection)
    answer(store)
    search(store, collection, b"cat")

    # As after the database was restored from a backup of before.
    store.database.execute("DELETE FROM collection_changes WHERE sequence = 2")
    store.database.execute("UPDATE collections SET sequence = 1")

    assert search(store, collection, b"dog") == [cat.id]
    assert dog.id in statuses(store, collection)
