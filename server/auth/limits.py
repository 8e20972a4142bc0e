"""What a key may do in a minute and in a day, and the headers that tell its owner.

Used by `access.py`. Two limits:

- Pictures a day (UTC). The store counts them in the commit that adds them, so the quota is exact whatever number of
  server processes there are; here it is looked at early, so that nobody uploads in vain.
- Requests a minute, in fixed windows that all server processes share. A process takes a slice of the minute from the
  store, a tenth of it at least, and answers from that without asking: ten small commits a minute instead of one a
  request. Together the processes never answer more than the limit. Weaknesses: what one process has taken and does
  not use, no other can use in that minute; and around the turn of a minute twice the limit may pass in a moment.

Header names and syntax are those of the IETF's draft-ietf-httpapi-ratelimit-headers. Its registry has no unit for
pictures, so the names of the limits say what they count.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from server.errors import QuotaReached, RateLimited
from store.keys import KeyRecord, Keys

#: Names of the limits in the headers.
REQUESTS, PICTURES = "requests-per-minute", "pictures-per-day"
_MINUTE_SECONDS, _DAY_SECONDS = 60, 86400
#: A slice is the limit divided by this, and at least one request.
SLICES = 10


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How far one limit of a key is used up."""

    #: Its name in the headers.
    name: str
    #: What is allowed in a window.
    quota: int
    #: Length of the window.
    window_seconds: int
    #: What is left of it.
    left: int
    #: Until the next window.
    reset_seconds: int


@dataclass(kw_only=True)
class _Held:
    """A process' slices of the present minute for one key."""

    minute: int
    own: int = 0
    left_elsewhere: int = 0


class Limits:
    """The limits of all keys, as one server process applies them."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._lock = threading.Lock()
        self._held: dict[str, _Held] = {}

    def take(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Count a request; None if the key has no limit by the minute. :raises RateLimited: :raises StoreError:"""
        per_minute = key.requests_per_minute
        if per_minute is None:
            return None
        minute = int(now.timestamp()) // _MINUTE_SECONDS
        while True:
            with self._lock:
                held = self._held.get(key.id)
                if held is None or held.minute != minute:
                    held = self._held[key.id] = _Held(minute=minute, left_elsewhere=per_minute)
                if held.own:
                    held.own -= 1
                    return _minute_limit(per_minute, held.own + held.left_elsewhere, now)
                if not held.left_elsewhere:
                    raise RateLimited()
            # Without the lock, so that a busy store holds up nobody else; several threads may take a slice each.
            most = max(1, per_minute // SLICES)
            taken = self._keys.take_requests(key.id, minute=minute, most=most, per_minute=per_minute)
            with self._lock:
                held.own += taken.granted
                held.left_elsewhere = taken.left

    def refused(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Describe the limit by the minute of a key that has used it up."""
        return None if key.requests_per_minute is None else _minute_limit(key.requests_per_minute, 0, now)

    def day(self, key: KeyRecord, now: datetime) -> Limit | None:
        """Tell how far the key's pictures of the day are used up; None if it may send any number.

        :raises StoreError:
        """
        if key.pictures_per_day is None:
            return None
        now = now.astimezone(UTC)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        return Limit(
            name=PICTURES,
            quota=key.pictures_per_day,
            window_seconds=_DAY_SECONDS,
            left=max(0, key.pictures_per_day - self._keys.pictures_used(key.id, now=now)),
            reset_seconds=_seconds_until(midnight, now),
        )

    def check_pictures(self, key: KeyRecord | None, count: int, now: datetime) -> None:
        """Refuse early what the store would refuse later. :raises QuotaReached: :raises StoreError:"""
        limit = None if key is None else self.day(key, now)
        if limit is not None and count > limit.left:
            raise QuotaReached()


def headers_of(limits: list[Limit], *, refused_by: str | None = None) -> dict[str, str]:
    """Write limits as headers. :param refused_by: name of the limit that refused the request; adds the time to wait."""
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
    return Limit(name=REQUESTS, quota=per_minute, window_seconds=_MINUTE_SECONDS, left=left, reset_seconds=seconds)


def _seconds_until(moment: datetime, now: datetime) -> int:
    return max(1, int((moment - now).total_seconds() + 0.999))
