"""A cache of the API keys in one server process.

Used by `guard.py`. It saves a read of the database with every request; in return a key that is revoked, or the first
key that closes an open server, takes effect FRESH_SECONDS later at the latest. Only keys that exist are cached, so that
guessing fills no memory. It is not a StaleCache: a key must never be used while it is refreshed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

from store.clients.keys import TOUCH_SECONDS, KeyRecord, Keys, key_id_of, verify_key
from store.errors import StoreError

log = logging.getLogger(__name__)

#: Cached keys are used for this long.
FRESH_SECONDS = 3.0


class KeyCache:
    """Finds keys. May be used from any thread: at worst two threads look the same key up."""

    def __init__(self, keys: Keys, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._monotonic = monotonic
        #: id -> (when it was looked up, record)
        self._records: dict[str, tuple[float, KeyRecord]] = {}
        #: id -> when its use was last written to the store.
        self._touched: dict[str, float] = {}
        #: When the store was asked whether there are keys, and its answer.
        self._has_keys: tuple[float, bool] | None = None

    def has_keys(self) -> bool:
        """Tell whether there was ever a key. :raises StoreError:"""
        cached = self._has_keys
        if cached is None or (not cached[1] and self._monotonic() - cached[0] > FRESH_SECONDS):
            cached = (self._monotonic(), self._keys.has_any())
            self._has_keys = cached
        return cached[1]

    def find(self, key: str, now: datetime) -> KeyRecord | None:
        """Find the record of a valid key; None if it is not valid. :raises StoreError:"""
        id = key_id_of(key)
        record = None if id is None else self.find_by_id(id, now)
        return record if verify_key(key, record) else None

    def find_by_id(self, id: str, now: datetime) -> KeyRecord | None:
        """Find a valid key by its id, for a caller who has proved in another way that it is theirs."""
        record = self._look_up(id)
        return record if record is not None and record.is_usable(now) else None

    def touch(self, record: KeyRecord, now: datetime) -> None:
        """Write to the store, once a minute at most, that a key was used. An error of the store is only logged."""
        now_seconds = self._monotonic()
        if now_seconds - self._touched.get(record.id, -TOUCH_SECONDS) < TOUCH_SECONDS:
            return
        self._touched[record.id] = now_seconds
        try:
            self._keys.touch(record.id, now=now)
        except StoreError as error:
            log.warning("cannot write the use of the key %s: %s", record.id, error)

    def _look_up(self, id: str) -> KeyRecord | None:
        cached = self._records.get(id)
        if cached is not None and self._monotonic() - cached[0] <= FRESH_SECONDS:
            return cached[1]
        looked_up_at = self._monotonic()
        record = self._keys.find(id)
        if record is not None:
            self._records[id] = (looked_up_at, record)
        return record
