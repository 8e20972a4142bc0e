"""The clock of leases: neither a suspended machine nor a change of the system's time moves it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from store.processes.lease_clock import LeaseClock, read_boot_id
from store.store import Store

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


class Machine:
    """A machine's two clocks, and processes on it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.wall = NOON
        self.monotonic = 1000.0
        self.boot_id = "first"

    def process(self) -> LeaseClock:
        return LeaseClock(
            self.store.database,
            boot_id=lambda: self.boot_id,
            monotonic=lambda: self.monotonic,
            wall=lambda: self.wall,
        )

    def run(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += timedelta(seconds=seconds)

    def suspend(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)


def test_it_shows_the_time_and_goes_on_in_other_processes(store: Store) -> None:
    machine = Machine(store)
    first = machine.process()

    shown = first.now()
    machine.run(10)

    assert shown == NOON
    assert first.now() == machine.process().now() == NOON + timedelta(seconds=10)


def test_suspending_the_machine_or_setting_its_time_does_not_move_it(store: Store) -> None:
    machine = Machine(store)
    first = machine.process()
    first.now()

    machine.suspend(3600)
    machine.run(5)
    machine.wall -= timedelta(days=2)

    assert first.now() == machine.process().now() == NOON + timedelta(seconds=5)


def test_after_a_restart_of_the_machine_it_begins_with_the_systems_time(store: Store) -> None:
    machine = Machine(store)
    machine.process().now()

    machine.suspend(60)
    machine.boot_id, machine.monotonic = "second", 3.0

    assert machine.process().now() == NOON + timedelta(seconds=60)


def test_a_sandbox_without_a_boot_id_has_a_clock_too(store: Store, tmp_path: Path) -> None:
    machine = Machine(store)
    machine.boot_id = read_boot_id(tmp_path / "missing")
    machine.process().now()

    machine.wall, machine.monotonic = NOON + timedelta(days=1), 3.0

    assert machine.process().now() == NOON - timedelta(seconds=997)


def test_the_clocks_of_this_machine_are_used_by_default(store: Store) -> None:
    before = datetime.now(UTC)

    shown = store.lease_clock.now()

    assert abs(shown - before) < timedelta(minutes=5)
    assert store.database.row("SELECT boot_id FROM lease_clocks")[0] == read_boot_id()
