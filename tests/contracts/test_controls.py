"""Contract of controls, pauses and runs. A new backend adds a parameter to `store`."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from store.controls import PAUSE, ControlState, Mode, pause, read_control_state, resume, run_now
from store.settings import HomeSettings
from store.sqlite import SqliteStore

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def test_there_are_no_controls_at_first(store: SqliteStore) -> None:
    assert store.controls() == {}
    assert read_control_state(store) == ControlState(pause=None, run_token=None)


def test_a_control_has_its_latest_value_and_who_set_it(store: SqliteStore) -> None:
    store.set_control("light", {"colour": "red"}, by="ann", now=NOW)
    later = NOW + timedelta(seconds=1)
    changed = store.set_control("light", {"colour": "grün"}, by="bob", now=later)

    assert store.controls() == {"light": changed}
    assert (changed.value, changed.changed_by, changed.changed_at) == ({"colour": "grün"}, "bob", later)


def test_controls_are_seen_by_other_processes(store: SqliteStore, settings: HomeSettings) -> None:
    other = SqliteStore(settings)
    store.set_control("light", {"colour": "red"}, by="ann", now=NOW)

    assert other.controls()["light"].value == {"colour": "red"}
    other.close()


def test_many_threads_may_change_a_control_at_once(store: SqliteStore) -> None:
    threads = [
        threading.Thread(target=store.set_control, args=("n", {"n": n}), kwargs={"by": str(n), "now": NOW})
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    control = store.controls()["n"]

    assert control.value == {"n": int(control.changed_by)}


def test_a_pause_tells_who_when_and_why_until_work_is_resumed(store: SqliteStore) -> None:
    paused = pause(store, Mode.PAUSED, by="ann", now=NOW, reason="new\nkernel")

    assert read_control_state(store).pause == paused
    assert (paused.mode, paused.by, paused.since, paused.reason) == (Mode.PAUSED, "ann", NOW, "new kernel")
    for words in ("paused", "ann", "2026-11-21 12:00:00 UTC", "new kernel"):
        assert words in paused.notice

    pause(store, Mode.DRAINING, by="bob", now=NOW)
    draining = read_control_state(store).pause
    assert draining is not None and draining.mode is Mode.DRAINING and draining.reason is None

    resume(store, by="bob", now=NOW)
    assert read_control_state(store).pause is None
    assert store.controls()[PAUSE].changed_by == "bob"


def test_each_run_now_is_a_new_one(store: SqliteStore) -> None:
    tokens = {run_now(store, by="ann", now=NOW) for _ in range(3)}

    assert len(tokens) == 3
    assert read_control_state(store).run_token in tokens


def test_an_invalid_value_pauses_nothing(store: SqliteStore) -> None:
    store.set_control(PAUSE, {"mode": "sideways"}, by="ann", now=NOW)

    assert read_control_state(store).pause is None
