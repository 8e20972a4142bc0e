"""Contract of progress: the latest report of each claim, which is gone when the claim ends, however it ends."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from store import new_id
from store.database import Transaction
from store.processes.progress import BYTES_PER_COMMIT, NewProgress
from store.requests import Answer, Blame, Claim, NewRequest, RequestRecord
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
MODEL = "m"


def add_and_claim(store: Store, count: int = 1) -> list[Claim]:
    for _ in range(count):
        new = NewRequest(id=new_id(), service="s", model=MODEL, created_at=NOW)
        store.requests.add(new, store.images.stage(new.id.encode()))
    return claim(store)


def claim(store: Store) -> list[Claim]:
    lease_ends_at = NOW + timedelta(seconds=30)
    return store.requests.claim(models=[MODEL], limit=100, now=NOW, lease_ends_at=lease_ends_at, oldest_before=None)


def report(claimed: Claim, fraction: float, preview: bytes | None = None) -> NewProgress:
    return NewProgress(number=claimed.number, token=claimed.token, fraction=fraction, preview=preview)


def read(store: Store, claimed: Claim) -> RequestRecord:
    return store.requests.get(claimed.id)


def count_rows(store: Store) -> int:
    return int(store.database.row("SELECT count(*) FROM progress")[0])


def test_the_latest_report_of_each_request_is_kept_in_one_row(store: Store) -> None:
    first, second = add_and_claim(store, 2)

    store.progress.record([report(first, 0.1, b"early"), report(second, 0.5)])
    store.progress.record([report(first, 0.2, b"late")])
    store.progress.record([report(first, 0.3)])

    progress = read(store, first).progress
    assert progress is not None
    assert (progress.id, progress.fraction, progress.previews) == (first.id, 0.3, 2)
    assert store.progress.preview(first.number) == b"late"
    assert store.progress.preview(second.number) is None
    assert count_rows(store) == 2


def test_a_reader_gets_what_is_new_since_it_read(store: Store) -> None:
    first, second = add_and_claim(store, 2)
    store.progress.record([report(first, 0.1), report(second, 0.1)])
    seen = store.progress.latest()

    store.progress.record([report(second, 0.2)])
    store.progress.record([report(second, 0.3)])

    assert [(one.number, one.fraction) for one in store.progress.list(seen)] == [(second.number, 0.3)]
    assert store.progress.list(store.progress.latest()) == []


def test_many_large_previews_are_recorded_in_several_commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = add_and_claim(store, 5)
    commits: list[int] = []
    write = store.database.write

    def count(function: Callable[[Transaction], None]) -> None:
        commits.append(1)
        write(function)

    monkeypatch.setattr(store.database, "write", count)
    store.progress.record([report(one, 0.5, bytes(BYTES_PER_COMMIT // 2)) for one in claims])
    store.progress.record([report(one, 0.6) for one in claims])

    assert len(commits) == 3 + 1
    assert {read(store, one).progress.fraction for one in claims} == {0.6}  # type: ignore[union-attr]


def test_numbers_of_reports_are_never_used_again(store: Store) -> None:
    (claimed,) = add_and_claim(store)
    store.progress.record([report(claimed, 0.1)])
    seen = store.progress.latest()
    store.requests.fail([claimed], code="x", reason="y", now=NOW)
    (later,) = add_and_claim(store)

    store.progress.record([report(later, 0.2)])

    assert [one.number for one in store.progress.list(seen)] == [later.number]


ENDS: dict[str, Callable[[Store, Claim], object]] = {
    "answered": lambda store, claimed: store.requests.finish(
        [Answer(claim=claimed, output=1, digest="d", chunk_id="c", provider="p", seconds=0.1)], now=NOW
    ),
    "failed": lambda store, claimed: store.requests.fail([claimed], code="x", reason="y", now=NOW),
    "released": lambda store, claimed: store.requests.release(
        [claimed], blame=Blame.NOBODY, code="x", reason="y", now=NOW
    ),
    "left by a killed batcher": lambda store, claimed: store.requests.release_expired(NOW + timedelta(seconds=31)),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_nothing_is_left_when_a_claim_ends(store: Store, end: Callable[[Store, Claim], object]) -> None:
    ended, other = add_and_claim(store, 2)
    store.progress.record([report(ended, 0.4, b"preview")])

    end(store, ended)

    assert store.progress.preview(ended.number) is None
    assert read(store, ended).progress is None
    assert read(store, other).progress is None
    assert count_rows(store) == 0


def test_a_report_of_an_older_claim_is_dropped(store: Store) -> None:
    (old,) = add_and_claim(store)
    store.requests.release([old], blame=Blame.NOBODY, code="x", reason="y", now=NOW)
    store.progress.record([report(old, 0.9)])
    (new,) = claim(store)

    store.progress.record([report(old, 0.9)])
    before = read(store, new).progress
    store.progress.record([report(new, 0.1)])

    assert before is None
    progress = read(store, new).progress
    assert progress is not None and progress.fraction == 0.1
