"""What one client may take: requests by the minute, images by the day, and slots of a server process.

The first two are applied by `guard.py`, and reported in headers:

- Images per day (UTC). The store counts them in the commit that adds them, so the quota is exact for any number of
  server processes; here it is checked early, before an upload is read in vain.
- Requests per minute, in fixed windows that all server processes share. A process takes a grant from the store, a tenth
  of the minute's limit, and counts against that: ten small commits a minute instead of one per request. Together the
  processes never exceed the limit. Weaknesses: what one process was granted and does not use, no other can use in
  that minute; and around the end of a minute twice the limit may pass within moments.

Header names and syntax are those of the IETF's draft-ietf-httpapi-ratelimit-headers. Its registry has no unit for
images, so the names of the limits contain what they count.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from server.errors import RateLimited
from store.clients.keys import KeyRecord, Keys

#: Names of the limits in the headers.
REQUESTS_PER_MINUTE, IMAGES_PER_DAY = "requests-per-minute", "pictures-per-day"
_MINUTE_SECONDS, _DAY_SECONDS = 60, 86400
#: A grant is the limit divided by this, and at least one request.
GRANTS_PER_MINUTE = 10


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The state of one limit of a key."""

    #: Its name in the headers.
    name: str
    quota: int
    window_seconds: int
    left: int
    #: Until the next window.
    reset_seconds: int


@dataclass(kw_only=True)
class _MinuteGrants:
    """The grants of a process for one key in the current minute."""

    minute: int
    granted_left: int = 0
    left_elsewhere: int = 0


def network_of(address: str) -> str:
    """Return what tells clients without a key apart: the address, or the /64 of one of IPv6, which one client may own.

    :param address: as the connection gives it; any other text is returned as it is.
    """
    try:
        parsed = ipaddress.IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(parsed) >> 64 << 64))


class FairSlots:
    """Slots of one server process, for example to read bodies, that its clients share; or bytes, each of them a slot.

    A client gets more only if it then holds no more than are free: one alone takes at most half of them, and what
    several take always leaves some to the next.
    """

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._free = max(1, capacity)
        self._held: Counter[str | None] = Counter()

    def acquire(self, client: str | None, count: int = 1) -> bool:
        """Take slots, without waiting for them.

        :param client: None if all callers are one client, as on a server without keys; it may take all slots.
        :return: whether there are so many for this client.
        """
        with self._lock:
            if self._free - count < (0 if client is None else self._held[client]):
                return False
            self._free -= count
            self._held[client] += count
            return True

    def release(self, client: str | None, count: int = 1) -> None:
        """Give back slots that the client has taken."""
        with self._lock:
            self._free += count
            self._held[client] -= count
            if not self._held[client]:
                del self._held[client]

    def count_held(self) -> int:
        """Count the slots that are taken."""
        with self._lock:
            return self._held.total()

    @contextlib.contextmanager
    def holding(self, client: str | None) -> Iterator[bool]:
        """Hold a slot inside of the `with` statement, which gets whether there is one."""
        is_held = self.acquire(client)
        try:
            yield is_held
        finally:
            if is_held:
                self.release(client)


class Limits:
    """The limits of all keys, as one server process applies them."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._grants: dict[str, _MinuteGrants] = {}

    def count_request(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Count a request; None if the key has no limit per minute. :raises RateLimited: :raises StoreError:"""
        per_minute = key.requests_per_minute
        if per_minute is None:
            return None
        minute = int(now.timestamp()) // _MINUTE_SECONDS
        while True:
            with self._lock:
                grants = self._grants.get(key.id)
                if grants is None or grants.minute != minute:
                    grants = self._grants[key.id] = _MinuteGrants(minute=minute, left_elsewhere=per_minute)
                if grants.granted_left:
                    grants.granted_left -= 1
                    return _minute_limit(per_minute, grants.granted_left + grants.left_elsewhere, now)
                if not grants.left_elsewhere:
                    raise RateLimited()
            # Without the lock, so that a busy store blocks no other thread; several threads may take a grant each.
            grant = max(1, per_minute // GRANTS_PER_MINUTE)
            taken = self._keys.grant_requests(key.id, minute=minute, limit=grant, per_minute=per_minute)
            with self._lock:
                grants.granted_left += taken.granted
                grants.left_elsewhere = taken.left

    def exhausted(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Return the limit per minute of a key that has used it up; None if it has none."""
        return None if key.requests_per_minute is None else _minute_limit(key.requests_per_minute, 0, now)

    def daily_limit(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Return the state of the key's daily quota of images; None if it has none. :raises StoreError:"""
        if key.images_per_day is None:
            return None
        now = now.astimezone(UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        return Limit(
            name=IMAGES_PER_DAY,
            quota=key.images_per_day,
            window_seconds=_DAY_SECONDS,
            left=max(0, key.images_per_day - self._keys.images_used(key.id, now=now)),
            reset_seconds=max(1, math.ceil((midnight - now).total_seconds())),
        )


def limit_headers(limits: list[Limit], *, refused_by: str | None = None) -> dict[str, str]:
    """Return limits as headers. :param refused_by: name of the limit that was exceeded; adds Retry-After."""
    if not limits:
        return {}
    headers = {
        "RateLimit-Policy": ", ".join(f'"{limit.name}";q={limit.quota};w={limit.window_seconds}' for limit in limits),
        "RateLimit": ", ".join(f'"{limit.name}";r={limit.left};t={limit.reset_seconds}' for limit in limits),
    }
    for limit in limits:
        if limit.name == refused_by:
            headers["Retry-After"] = str(limit.reset_seconds)
    return headers


def _minute_limit(per_minute: int, left: int, now: datetime) -> Limit:
    seconds = _MINUTE_SECONDS - int(now.timestamp()) % _MINUTE_SECONDS
    return Limit(
        name=REQUESTS_PER_MINUTE, quota=per_minute, window_seconds=_MINUTE_SECONDS, left=left, reset_seconds=seconds
    )
