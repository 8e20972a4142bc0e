"""Webhook deliveries as a sender claims and finishes them."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from store.clients.webhooks import DeliveryRecord, DeliveryResult
from store.store import Store


def claim_due(
    store: Store,
    *,
    now: datetime,
    lease_ends_at: datetime | None = None,
    limit: int = 100,
    per_owner: int = 100,
    sending: Collection[tuple[str, str]] = (),
    payload: str | None = None,
) -> list[DeliveryRecord]:
    """Claim deliveries that are due. :param payload: the body of each. :param lease_ends_at: None is in a minute."""
    due = store.webhooks.list_due(now=now, limit=limit, per_owner=per_owner, sending=sending)
    payloads = {one.id: payload for one in due}
    lease_ends_at = lease_ends_at or now + timedelta(seconds=60)
    return store.webhooks.claim_deliveries(payloads, now=now, lease_ends_at=lease_ends_at)


def finish(
    store: Store, delivery: DeliveryRecord, *, now: datetime, status: int = 204, error: str | None = None
) -> bool:
    """Record that a delivery arrived, or with an error that it is given up. :return: whether that counts."""
    result = DeliveryResult(delivery=delivery, ended_at=now, status=status, error=error)
    return store.webhooks.finish_deliveries([result]) == [True]
