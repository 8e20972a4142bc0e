"""The ledger: what the work cost, and what is known about those who do it.

Executors that pay write here; budgets and commands read. An agreement costs

- its accepted invoice;
- nothing, when its invoice was refused;
- until then the larger of its accepted debit notes (the latest of each activity) and the estimated costs of its chunks.
  An invoice that was neither accepted nor refused yet changes nothing.

Money counts at the moment when its invoice was accepted; what is not settled yet counts now, whatever the period that
is asked for. So each amount belongs to exactly one day, or is open, and the days and the open add up to the total.

An accepted invoice is split over the finished chunks of its agreement, in proportion to their seconds, so that the
shares add up to it exactly; a chunk that finishes later causes a new split. Without chunks the money stays with the
agreement.

Promises beside those of `Store`: every method may be called again with the same, and may come late or out of order.
An invoice may come before its agreement is known, and what was accepted never becomes unaccepted.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Protocol

from provider_image.errors import MlgError

if TYPE_CHECKING:
    from store.ledger_records import (
        ActivityRecord,
        AgreementRecord,
        AllocationRecord,
        CostRow,
        DebitNoteRecord,
        InvoiceRecord,
        ProviderRecord,
        SpeedRecord,
    )

#: What costs can be added up by.
COSTS_BY = ("day", "model", "provider", "total")


class UnknownProvider(MlgError):
    """There is no such provider. `mlg providers list` shows those that made offers."""

    code = "unknown_provider"
    permanent = True


class Ledger(Protocol):
    """The money."""

    def record_allocation(self, allocation: AllocationRecord) -> None:
        """Note money that is kept ready, or that its amount has changed. A release stays."""

    def release_allocation(self, id: str, *, now: datetime) -> None:
        """Note that the money is not kept ready any more. The first release counts."""

    def record_agreement(self, agreement: AgreementRecord) -> None:
        """Note an agreement; nothing happens when it is known."""

    def end_agreement(self, id: str, *, reason: str, now: datetime) -> None:
        """Note why an agreement ended. The first end counts."""

    def record_activity(self, activity: ActivityRecord) -> None:
        """Note an activity, its end, or what it used. What is None changes nothing."""

    def record_debit_note(self, note: DebitNoteRecord) -> None:
        """Note a debit note, or what became of it."""

    def record_invoice(self, invoice: InvoiceRecord) -> None:
        """Note an invoice, or what became of it; split it over the agreement's chunks once it is accepted."""

    def allocations(self, *, is_open: bool | None = None) -> list[AllocationRecord]:
        """List allocations, oldest first; with `is_open` only those not released, or only those released."""

    def agreements(self, *, is_open: bool | None = None, is_settled: bool | None = None) -> list[AgreementRecord]:
        """List agreements, oldest first.

        :param is_open: True for those in force, False for those that ended.
        :param is_settled: True for those that ended and have an accepted or refused invoice, False for the others.
        """

    def spent(self, *, since: datetime | None = None, batcher_id: str | None = None) -> Decimal:
        """Add up what was paid since then, and what is not settled yet.

        :param batcher_id: only agreements paid from this batcher's allocations.
        """

    def costs(self, by: str) -> list[CostRow]:
        """Add up all costs, sorted by key. :param by: one of COSTS_BY; "total" gives one row, also when it is zero."""


class Providers(Protocol):
    """What is known about those who do the work."""

    def record_offer(
        self,
        id: str,
        *,
        name: str,
        start_price: Decimal,
        price_per_cpu_second: Decimal,
        price_per_second: Decimal,
        now: datetime,
    ) -> None:
        """Note that a provider offers itself for these prices."""

    def record_work(
        self, provider_id: str, *, model: str, images: int, seconds: float, is_failure: bool, now: datetime
    ) -> None:
        """Note how a chunk ended there: changes its score, and unless it failed its speed.

        Nothing happens when the provider was never noted.
        """

    def ban_provider(
        self, id_or_name: str, *, until: datetime | None, reason: str, by_operator: bool
    ) -> ProviderRecord:
        """Give a provider no more work until then; for good with None.

        A batcher's ban never makes an operator's shorter.

        :param id_or_name: the address, its unambiguous beginning, or an unambiguous name.
        :raises UnknownProvider: none or several are meant.
        """

    def unban_provider(self, id_or_name: str) -> ProviderRecord:
        """Lift a ban. :raises UnknownProvider:"""

    def list_providers(self) -> list[ProviderRecord]:
        """List the providers, those seen last first."""

    def banned(self, now: datetime) -> dict[str, str]:
        """Tell who is banned now: address -> reason."""

    def speed(self, model: str) -> dict[str, float]:
        """Tell how many images a second each provider answered lately: address -> speed."""

    def speeds(self) -> list[SpeedRecord]:
        """List the speeds of all providers with all models."""
