"""Contract of controls, pauses and runs. A new backend adds a parameter to `store`."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

from store.processes.controls import PAUSE, ControlState, Mode
from store.store import Store
from tests.contracts.conftest import OpenStore

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def test_there_are_no_controls_at_first(store: Store) -> None:
    assert store.controls.list() == []
    assert store.controls.state() == ControlState(pause=None, run_token=None)


def test_a_control_has_its_latest_value_and_who_set_it(store: Store) -> None:
    store.controls.set("light", {"colour": "red"}, by="ann", now=NOW)
    later = NOW + timedelta(seconds=1)
    changed = store.controls.set("light", {"colour": "grün"}, by="bob", now=later)

    assert store.controls.list() == [changed]
    assert (changed.value, changed.changed_by, changed.changed_at) == ({"colour": "grün"}, "bob", later)


def test_controls_are_seen_by_other_processes(store: Store, open_store: OpenStore, tmp_path: Path) -> None:
    other = open_store(tmp_path / "home")
    store.controls.set("light", {"colour": "red"}, by="ann", now=NOW)

    assert [control.value for control in other.controls.list()] == [{"colour": "red"}]
    other.close()


def test_many_threads_may_change_a_control_at_once(store: Store) -> None:
    threads = [
        threading.Thread(target=store.controls.set, args=("n", {"n": n}), kwargs={"by": str(n), "now": NOW})
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (control,) = store.controls.list()

    assert control.value == {"n": int(control.changed_by)}


def test_a_pause_tells_who_when_and_why_until_work_is_resumed(store: Store) -> None:
    paused = store.controls.pause(Mode.PAUSED, by="ann", now=NOW, reason="new\nkernel")

    assert store.controls.state().pause == paused
    assert (paused.mode, paused.by, paused.since, paused.reason) == (Mode.PAUSED, "ann", NOW, "new kernel")
    for words in ("paused", "ann", "2026-11-21 12:00:00 UTC", "new kernel"):
        assert words in paused.notice

    store.controls.pause(Mode.DRAINING, by="bob", now=NOW)
    draining = store.controls.state().pause
    assert draining is not None and draining.mode is Mode.DRAINING and draining.reason is None

    store.controls.resume(by="bob", now=NOW)
    assert store.controls.state().pause is None
    assert [control.changed_by for control in store.controls.list()] == ["bob"]


def test_each_run_now_is_a_new_one(store: Store) -> None:
    tokens = {store.controls.run_now(by="ann", now=NOW) for _ in range(3)}

    assert len(tokens) == 3
    assert store.controls.state().run_token in tokens


def test_an_invalid_value_pauses_nothing(store: Store) -> None:
    store.controls.set(PAUSE, {"mode": "sideways"}, by="ann", now=NOW)

    assert store.controls.state().pause is None
