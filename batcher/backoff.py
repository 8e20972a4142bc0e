"""Pauses between attempts that fail, each longer than the one before. Pure; used by everything that tries again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait before another attempt."""

    #: The pause after the first failure.
    first_seconds: float
    #: The longest pause.
    max_seconds: float
    #: Each pause is this many times as long as the one before.
    factor: float = 2.0

    def after(self, failures: int) -> float:
        """Return the pause in seconds after this many failures in a row, at least 1."""
        return min(self.max_seconds, self.first_seconds * self.factor ** min(failures - 1, 64))
