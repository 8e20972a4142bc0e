"""The requestor's wallet: its funds, and the allocations that reserve parts of them.

Made by `PaymentService`, which spends from it. All amounts are exact decimals; no money is transferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from devnet.errors import ApiError, Gone, NotFound
from devnet.gftp import REQUESTOR_ID
from devnet.records import Allocation, format_amount, parse_decimal
from devnet.timing import read_time

#: The payment platforms of the simulated accounts: testnets only.
PLATFORMS = ("erc20-holesky-tglm", "erc20-hoodi-tglm", "erc20-amoy-tglm")


@dataclass(kw_only=True)
class Wallet:
    """All allocations of a devnet."""

    #: The initial balance, in GLM.
    funds: Decimal
    on_change: Callable[[], None]
    allocations: dict[str, Allocation] = field(default_factory=dict)

    @property
    def free_funds(self) -> Decimal:
        """Return what is neither spent nor allocated."""
        spent = sum((each.spent for each in self.allocations.values()), Decimal(0))
        reserved = (each.remaining for each in self.allocations.values() if not each.is_released)
        return self.funds - spent - sum(reserved, Decimal(0))

    def allocate(self, body: Mapping[str, Any]) -> Allocation:
        """Allocate an amount. :raises ApiError: the body is invalid, or the funds are not enough."""
        total = parse_amount(body.get("totalAmount"), "totalAmount")
        if total > self.free_funds:
            raise ApiError(
                f"Not enough funds. Free: {format_amount(self.free_funds)} GLM, requested: {format_amount(total)} GLM."
            )
        if body.get("timeout") is not None:
            read_time("timeout", body["timeout"])
        allocation = Allocation(
            address=str(body.get("address") or REQUESTOR_ID),
            platform=_platform(body.get("paymentPlatform")),
            total=total,
            extra={key: body[key] for key in ("timeout", "extendTimeout", "deposit") if body.get(key) is not None},
        )
        self.allocations[allocation.allocation_id] = allocation
        self.on_change()
        return allocation

    def find(self, allocation_id: str, error: type[ApiError] = NotFound) -> Allocation:
        """Return an allocation. :raises ApiError: it does not exist or was released."""
        allocation = self.allocations.get(allocation_id)
        if allocation is None or allocation.is_released:
            raise error(f"There is no allocation {allocation_id}.")
        return allocation

    def list_active(self) -> list[Allocation]:
        """List the allocations that have not been released."""
        return [each for each in self.allocations.values() if not each.is_released]

    def release(self, allocation_id: str) -> Allocation:
        """Release the remaining amount of an allocation."""
        allocation = self.allocations.get(allocation_id)
        if allocation is None:
            raise NotFound(f"There is no allocation {allocation_id}.")
        if allocation.is_released:
            raise Gone(f"The allocation {allocation_id} has already been released.")
        allocation.is_released = True
        self.on_change()
        return allocation

    def decorations(self, allocation_ids: Iterable[str]) -> dict[str, Any]:
        """Return the properties and constraints of a demand that is to be paid from these allocations."""
        platforms: dict[str, str] = {}
        for allocation_id in allocation_ids:
            allocation = self.find(allocation_id, ApiError)
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
        """List the requestor's accounts, one per platform."""
        accounts = []
        for platform in PLATFORMS:
            driver, network, token = platform.split("-")
            account = {"platform": platform, "address": REQUESTOR_ID, "driver": driver, "network": network}
            accounts.append({**account, "token": token, "send": True, "receive": False})
        return accounts


def parse_amount(value: object, name: str) -> Decimal:
    """Parse an amount. :raises ApiError: the value is not a decimal number of 0 or more."""
    amount = parse_decimal(value)
    if amount is None or amount < 0:
        raise ApiError(f"{name} must be a decimal number, 0 or more, not {value!r}.")
    return amount


def _platform(value: object) -> str:
    if value is None:
        return PLATFORMS[0]
    if isinstance(value, Mapping):
        driver, network, token = PLATFORMS[0].split("-")
        chosen = {"driver": driver, "network": network, "token": token, **value}
        value = "{driver}-{network}-{token}".format_map(chosen)
    if value not in PLATFORMS:
        raise ApiError(f"There is no account on {value!r}. Known: {', '.join(PLATFORMS)}.")
    return str(value)
