"""The requestor's wallet: how much there is, and what is set aside in allocations for which work.

Made by `payment.Payment`, which spends from it. All amounts are exact decimals; no money moves anywhere.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from devnet.errors import ApiError, Gone, NotFound
from devnet.records import Allocation, format_amount, from_row, to_row
from devnet.timing import Clock, parse_time

#: What can be paid with here: testnets only.
PLATFORMS = ("erc20-holesky-tglm", "erc20-hoodi-tglm", "erc20-amoy-tglm")


class Wallet:
    """All allocations of a devnet.

    :param requestor_id: whose it is; also its address, unless an allocation names another.
    :param funds: what it holds at the beginning.
    :param on_change: called after every change.
    """

    def __init__(self, *, requestor_id: str, funds: Decimal, clock: Clock, on_change: Callable[[], None]) -> None:
        self.allocations: dict[str, Allocation] = {}
        self._requestor_id = requestor_id
        self._funds = funds
        self._clock = clock
        self._changed = on_change

    @property
    def free_funds(self) -> Decimal:
        """Return what is neither spent nor set aside."""
        spent = sum((each.spent for each in self.allocations.values()), Decimal(0))
        reserved = (each.remaining for each in self.allocations.values() if not each.is_released)
        return self._funds - spent - sum(reserved, Decimal(0))

    def allocate(self, body: Mapping[str, Any]) -> Allocation:
        """Set money aside."""
        total = parse_amount(body.get("totalAmount"), "totalAmount")
        if total > self.free_funds:
            raise ApiError(
                f"Not enough funds. Free: {format_amount(self.free_funds)} GLM, asked for: {format_amount(total)} GLM."
            )
        timeout = body.get("timeout")
        if timeout is not None:
            _require_time(timeout, "timeout")
        allocation = Allocation(
            allocation_id=str(uuid.uuid4()),
            address=str(body.get("address") or self._requestor_id),
            platform=_platform(body.get("paymentPlatform")),
            total=total,
            created_at=self._clock(),
            extra={key: body[key] for key in ("timeout", "extendTimeout", "deposit") if body.get(key) is not None},
        )
        self.allocations[allocation.allocation_id] = allocation
        self._changed()
        return allocation

    def find(self, allocation_id: str) -> Allocation:
        """Find an allocation that was not released."""
        allocation = self.allocations.get(allocation_id)
        if allocation is None or allocation.is_released:
            raise NotFound(f"There is no allocation {allocation_id}.")
        return allocation

    def list_active(self) -> list[Allocation]:
        """List the allocations that were not released."""
        return [each for each in self.allocations.values() if not each.is_released]

    def amend(self, allocation_id: str, body: Mapping[str, Any]) -> Allocation:
        """Change an allocation's amount or timeout."""
        allocation = self.find(allocation_id)
        total = allocation.total
        if body.get("totalAmount") is not None:
            total = parse_amount(body["totalAmount"], "totalAmount")
        if total < allocation.spent:
            raise ApiError(
                f"{format_amount(allocation.spent)} GLM of this allocation are spent; it cannot be "
                f"{format_amount(total)}."
            )
        if total - allocation.total > self.free_funds:
            raise ApiError(f"Not enough funds. Free: {format_amount(self.free_funds)} GLM.")
        if body.get("timeout") is not None:
            _require_time(body["timeout"], "timeout")
            allocation.extra["timeout"] = body["timeout"]
        allocation.total = total
        self._changed()
        return allocation

    def release(self, allocation_id: str) -> None:
        """Give back what remains of an allocation."""
        allocation = self.allocations.get(allocation_id)
        if allocation is None:
            raise NotFound(f"There is no allocation {allocation_id}.")
        if allocation.is_released:
            raise Gone(f"The allocation {allocation_id} is released already.")
        allocation.is_released = True
        self._changed()

    def decorations(self, allocation_ids: Iterable[str]) -> dict[str, Any]:
        """Return what a demand must say, so that it can be paid from these allocations."""
        platforms: dict[str, str] = {}
        for allocation_id in allocation_ids:
            try:
                allocation = self.find(allocation_id)
            except NotFound as error:
                raise ApiError(str(error)) from error
            platforms[allocation.platform] = allocation.address
        keys = {f"golem.com.payment.platform.{name}.address": address for name, address in platforms.items()}
        properties = {**keys, "golem.com.payment.protocol.version": "3"}
        return {
            "properties": [{"key": key, "value": value} for key, value in properties.items()],
            "constraints": [
                "(|" + "".join(f"({key}=*)" for key in keys) + ")",
                "(golem.com.payment.protocol.version>1)",
            ],
        }

    def accounts(self) -> list[dict[str, Any]]:
        """List the requestor's wallets, one a platform."""
        accounts = []
        for platform in PLATFORMS:
            driver, network, token = platform.split("-")
            account = {"platform": platform, "address": self._requestor_id, "driver": driver, "network": network}
            accounts.append({**account, "token": token, "send": True, "receive": False})
        return accounts

    # Across restarts

    def dump(self) -> list[dict[str, Any]]:
        """Return all of it as JSON's values."""
        return [to_row(each) for each in self.allocations.values()]

    def load(self, dumped: Iterable[Mapping[str, Any]]) -> None:
        """Take in what `dump` returned."""
        self.allocations = {each["allocation_id"]: from_row(Allocation, each) for each in dumped}


def parse_amount(value: object, name: str) -> Decimal:
    """Read an amount of the API. :raises ApiError: it is none."""
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        raise ApiError(f"{name} must be a decimal number, 0 or more, not {value!r}.")
    return amount


def _require_time(value: object, name: str) -> datetime:
    try:
        return parse_time(str(value))
    except ValueError as error:
        raise ApiError(f"{name} is no date in ISO 8601: {value!r}.") from error


def _platform(value: object) -> str:
    if value is None:
        return PLATFORMS[0]
    if isinstance(value, Mapping):
        driver, network, token = PLATFORMS[0].split("-")
        chosen = {"driver": driver, "network": network, "token": token, **value}
        value = "{driver}-{network}-{token}".format_map(chosen)
    if value not in PLATFORMS:
        raise ApiError(f"There is no account on {value!r}; there are {', '.join(PLATFORMS)}.")
    return str(value)
