"""The clock of leases: all processes of this machine share it, and neither suspending it nor setting its time moves it.

The batcher gives its claims an end on this clock, and judges others' claims by it. It is the kernel's monotonic clock,
counted from a time that the first process after a start of the machine writes into the table `lease_clocks`. So it
shows about the real time, and goes on from one process to the next.

Weakness: it is a clock of one machine, as the store is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from store.database import Database, Transaction
from store.rows import from_text, to_text

_ADD = "INSERT OR IGNORE INTO lease_clocks (boot_id, zero_at) VALUES (?, ?)"
_FIND = "SELECT zero_at FROM lease_clocks WHERE boot_id = ?"


def read_boot_id(file: Path = Path("/proc/sys/kernel/random/boot_id")) -> str:
    """Return the kernel's random name of the time since the machine started; the same each time where it has none."""
    try:
        return file.read_text().strip()
    except OSError:
        # After a restart the clock then shows a time before all leases, which `requests.py` takes for ended ones.
        return "unknown"


class LeaseClock:
    """The time by which leases end.

    :param boot_id: differs after each start of the machine.
    :param monotonic: seconds since the machine started, without the time that it was suspended.
    :param wall: the system's time.
    """

    def __init__(
        self,
        database: Database,
        *,
        boot_id: Callable[[], str] = read_boot_id,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._database = database
        self._boot_id = boot_id
        self._monotonic = monotonic
        self._wall = wall
        self._zero_at: datetime | None = None

    def now(self) -> datetime:
        """Return the time. :raises StoreError: it is the first call, and the store does not respond."""
        if self._zero_at is None:
            self._zero_at = self._database.write(self._find)
        return self._zero_at + timedelta(seconds=self._monotonic())

    def _find(self, transaction: Transaction) -> datetime:
        boot_id = self._boot_id()
        zero_at = self._wall() - timedelta(seconds=self._monotonic())
        transaction.execute(_ADD, (boot_id, to_text(zero_at)))
        return from_text(transaction.execute(_FIND, (boot_id,)).fetchone()[0])
