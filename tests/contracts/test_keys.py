"""Contract of API keys. A new backend adds a parameter to `store`, not tests."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from store import new_id
from store.clients.keys import KeyNameTaken, KeyRecord, Scope, UnknownKey, hash_key, key_id_of, make_key, verify_key
from store.errors import QuotaReached
from store.requests import NewRequest, RequestRecord
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MINUTE = int(NOW.timestamp()) // 60


def record(name: str = "alice", id: str = "alice0000000", **changes: object) -> KeyRecord:
    made = KeyRecord(id=id, name=name, sha256="0" * 64, scopes=frozenset({Scope.SUBMIT, Scope.READ}), created_at=NOW)
    return replace(made, **changes)  # type: ignore[arg-type]


def send(store: Store, key_id: str | None, *, now: datetime = NOW) -> RequestRecord:
    new = NewRequest(id=new_id(), service="classification", model="resnet50", key_id=key_id, created_at=now)
    return store.requests.add(new, store.images.stage(new.id.encode()))


# Key format


def test_a_key_is_recognised_by_its_hash_only() -> None:
    id, key = make_key()
    kept = record(id=id, sha256=hash_key(key))

    assert key_id_of(key) == id
    assert verify_key(key, kept)
    assert not verify_key(key[:-1] + ("a" if key[-1] != "a" else "b"), kept)
    assert not verify_key(key, None)
    assert key[len("mlg_") + 13 :] not in repr(kept) + kept.sha256


def test_two_keys_share_nothing() -> None:
    made = [make_key() for _ in range(50)]

    assert len({id for id, _ in made}) == 50
    assert len({key[-43:] for _, key in made}) == 50


@pytest.mark.parametrize(
    "text", ["", "mlg_", "mlg_short_x", "MLG_abcdefghijkl_" + "x" * 43, "mlg_abcdefghijkl_" + "x" * 31, "é" * 60]
)
def test_text_that_is_not_a_key_has_no_id(text: str) -> None:
    assert key_id_of(text) is None
    assert not verify_key(text, record())


@pytest.mark.parametrize(
    ("changes", "is_usable"),
    [
        ({}, True),
        ({"expires_at": NOW + timedelta(seconds=1)}, True),
        ({"expires_at": NOW}, False),
        ({"revoked_at": NOW}, False),
    ],
)
def test_a_key_is_usable_until_it_expires_or_is_revoked(changes: dict[str, object], is_usable: bool) -> None:
    assert record(**changes).is_usable(NOW) is is_usable


def test_the_operator_scope_includes_every_other_and_no_other_scope_does() -> None:
    operator, reader = record(scopes=frozenset({Scope.OPERATE})), record(scopes=frozenset({Scope.READ}))

    assert all(operator.has_scope(scope) for scope in Scope)
    assert [scope for scope in Scope if reader.has_scope(scope)] == [Scope.READ]


# Storing keys


def test_a_key_is_found_as_it_was_added(store: Store) -> None:
    key = record(images_per_day=10, requests_per_minute=5, expires_at=NOW + timedelta(days=90))

    store.keys.add(key)

    assert store.keys.find(key.id) == key
    assert store.keys.find("unknown00000") is None
    assert store.keys.list() == [key]


def test_keys_are_listed_oldest_first_revoked_ones_too(store: Store) -> None:
    store.keys.add(record("late", "late00000000", created_at=NOW + timedelta(days=1)))
    store.keys.add(record("early", "early0000000"))
    store.keys.revoke("early", now=NOW)

    assert [key.name for key in store.keys.list()] == ["early", "late"]


def test_a_name_is_free_again_once_its_key_is_revoked(store: Store) -> None:
    store.keys.add(record())
    with pytest.raises(KeyNameTaken):
        store.keys.add(record(id="alice0000001"))

    store.keys.revoke("alice", now=NOW)
    store.keys.add(record(id="alice0000001"))

    assert [key.revoked_at for key in store.keys.list()] == [NOW, None]


@pytest.mark.parametrize("named", ["alice", "alice0000000"])
def test_a_key_is_revoked_once_by_name_or_id(store: Store, named: str) -> None:
    store.keys.add(record())
    store.keys.add(record("bob", "bob000000000"))

    revoked = store.keys.revoke(named, now=NOW)

    assert (revoked.id, revoked.revoked_at) == ("alice0000000", NOW)
    assert store.keys.find("bob000000000") == record("bob", "bob000000000")
    with pytest.raises(UnknownKey):
        store.keys.revoke(named, now=NOW)


def test_revoking_prefers_an_id_to_an_equal_name_of_another_key(store: Store) -> None:
    store.keys.add(record("alice", "alice0000000"))
    store.keys.add(record("alice0000000", "mallory00000"))

    assert store.keys.revoke("alice0000000", now=NOW).id == "alice0000000"


def test_there_were_keys_even_after_the_last_one_is_revoked(store: Store) -> None:
    before = store.keys.has_any()
    store.keys.add(record())
    store.keys.revoke("alice", now=NOW)

    assert (before, store.keys.has_any()) == (False, True)


def test_the_last_use_is_recorded_once_a_minute(store: Store) -> None:
    store.keys.add(record())
    seen = []

    for seconds in (0, 30, 59, 61):
        store.keys.touch("alice0000000", now=NOW + timedelta(seconds=seconds))
        found = store.keys.find("alice0000000")
        assert found is not None and found.last_used_at is not None
        seen.append((found.last_used_at - NOW).total_seconds())

    assert seen == [0, 0, 0, 61]


# Images a day


def test_a_quota_is_exact_and_starts_again_each_day(store: Store) -> None:
    store.keys.add(record(images_per_day=2))
    send(store, "alice0000000")
    send(store, "alice0000000")

    with pytest.raises(QuotaReached):
        send(store, "alice0000000")
    send(store, "alice0000000", now=NOW + timedelta(days=1))

    assert store.keys.images_used("alice0000000", now=NOW) == 2
    assert store.keys.images_used_by_key(now=NOW + timedelta(days=1)) == {"alice0000000": 1}


def test_a_request_over_the_quota_leaves_neither_row_nor_image(store: Store) -> None:
    store.keys.add(record(images_per_day=1))
    send(store, "alice0000000")

    with pytest.raises(QuotaReached):
        send(store, "alice0000000")

    assert len(store.requests.list()) == 1
    assert len([path for path in store.images.folder.rglob("*") if path.is_file()]) == 1


def test_many_threads_together_cannot_exceed_the_quota(store: Store) -> None:
    store.keys.add(record(images_per_day=10))
    refused = []

    def work() -> None:
        for _ in range(5):
            try:
                send(store, "alice0000000")
            except QuotaReached:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (len(store.requests.list()), len(refused)) == (10, 20)
    assert store.keys.images_used("alice0000000", now=NOW) == 10


def test_images_are_counted_for_keys_without_a_quota_and_not_without_a_key(store: Store) -> None:
    store.keys.add(record())
    for _ in range(3):
        send(store, "alice0000000")
    send(store, None)

    assert store.keys.images_used_by_key(now=NOW) == {"alice0000000": 3}


# Requests a minute


def test_grants_of_a_minute_add_up_to_the_limit(store: Store) -> None:
    store.keys.add(record(requests_per_minute=10))

    def take(minute: int = MINUTE) -> tuple[int, int]:
        taken = store.keys.grant_requests("alice0000000", minute=minute, limit=4, per_minute=10)
        return taken.granted, taken.left

    assert [take(), take(), take(), take()] == [(4, 6), (4, 2), (2, 0), (0, 0)]
    assert take(MINUTE + 1) == (4, 6)


def test_a_late_process_is_granted_requests_of_the_current_minute(store: Store) -> None:
    store.keys.add(record(requests_per_minute=10))
    store.keys.grant_requests("alice0000000", minute=MINUTE + 1, limit=9, per_minute=10)

    late = store.keys.grant_requests("alice0000000", minute=MINUTE, limit=4, per_minute=10)

    assert (late.granted, late.left) == (1, 0)


def test_a_clock_that_was_set_back_starts_again(store: Store) -> None:
    store.keys.add(record(requests_per_minute=10))
    store.keys.grant_requests("alice0000000", minute=MINUTE + 500, limit=10, per_minute=10)

    assert store.keys.grant_requests("alice0000000", minute=MINUTE, limit=4, per_minute=10).granted == 4


def test_an_unknown_key_is_granted_nothing(store: Store) -> None:
    assert store.keys.grant_requests("unknown00000", minute=MINUTE, limit=4, per_minute=10).granted == 0
