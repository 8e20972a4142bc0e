"""The calls of /payment-api/v1 that a requestor makes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

from devnet.api import read_max_items, read_object, read_time, read_timeout_seconds
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.payments import PaymentService
from devnet.provider.agent import Provider
from devnet.records import Bill, format_amount

_ROOT = "/payment-api/v1"
_Handler = Callable[[web.Request], Awaitable[web.Response]]


class PaymentRoutes:
    """The handlers of the payment API.

    :param providers: node id -> provider.
    :param report: receives a line of text about each important event.
    """

    def __init__(
        self,
        payment: PaymentService,
        market: MarketService,
        providers: dict[str, Provider],
        report: Callable[[str], None],
    ) -> None:
        self._payment = payment
        self._market = market
        self._providers = providers
        self._report = report

    def routes(self) -> list[web.RouteDef]:
        """List the routes."""
        allocation = f"{_ROOT}/allocations/{{allocation_id}}"
        invoice = f"{_ROOT}/invoices/{{bill_id}}"
        note = f"{_ROOT}/debitNotes/{{bill_id}}"
        return [
            web.post(f"{_ROOT}/allocations", self._allocate),
            web.get(f"{_ROOT}/allocations", self._allocations),
            web.get(allocation, self._allocation),
            web.put(allocation, self._amend),
            web.delete(allocation, self._release),
            web.get(f"{_ROOT}/demandDecorations", self._decorations),
            web.get(f"{_ROOT}/requestorAccounts", self._accounts),
            web.get(f"{_ROOT}/invoiceEvents", self._poll("invoice")),
            web.get(f"{_ROOT}/debitNoteEvents", self._poll("debit note")),
            web.get(f"{_ROOT}/payments", self._poll("payment")),
            web.get(f"{_ROOT}/payments/status", self._status),
            web.get(f"{_ROOT}/payments/{{payment_id}}", self._payment_by_id),
            web.get(f"{_ROOT}/invoices", self._invoices),
            web.get(invoice, self._invoice),
            web.post(f"{invoice}/accept", self._accept_invoice),
            web.post(f"{invoice}/reject", self._reject_invoice),
            web.get(f"{_ROOT}/debitNotes", self._debit_notes),
            web.get(note, self._debit_note),
            web.post(f"{note}/accept", self._accept_debit_note),
            web.post(f"{note}/reject", self._reject_debit_note),
        ]

    # Allocations

    async def _allocate(self, request: web.Request) -> web.Response:
        allocation = self._payment.wallet.allocate(await read_object(request, "totalAmount"))
        self._report(f"the requestor allocates {format_amount(allocation.total)} GLM")
        return web.json_response(allocation.to_api(), status=201)

    async def _allocations(self, request: web.Request) -> web.Response:
        return web.json_response([allocation.to_api() for allocation in self._payment.wallet.list_active()])

    async def _allocation(self, request: web.Request) -> web.Response:
        return web.json_response(self._payment.wallet.find(request.match_info["allocation_id"]).to_api())

    async def _amend(self, request: web.Request) -> web.Response:
        body = await read_object(request)
        return web.json_response(self._payment.wallet.amend(request.match_info["allocation_id"], body).to_api())

    async def _release(self, request: web.Request) -> web.Response:
        allocation = self._payment.wallet.allocations.get(request.match_info["allocation_id"])
        self._payment.wallet.release(request.match_info["allocation_id"])
        if allocation is not None:
            self._report(
                f"the requestor releases an allocation: {format_amount(allocation.spent)} GLM spent, "
                f"{format_amount(allocation.remaining)} GLM left"
            )
        return web.json_response(None)

    async def _decorations(self, request: web.Request) -> web.Response:
        ids = [each for each in request.query.get("allocationIds", "").split(",") if each]
        if not ids:
            raise ApiError("allocationIds must name at least one allocation.")
        return web.json_response(self._payment.wallet.decorations(ids))

    async def _accounts(self, request: web.Request) -> web.Response:
        return web.json_response(self._payment.wallet.accounts())

    # Bills

    async def _invoices(self, request: web.Request) -> web.Response:
        return _list_response(request, self._payment.invoices.values())

    async def _invoice(self, request: web.Request) -> web.Response:
        return web.json_response(self._payment.invoice(request.match_info["bill_id"]).to_api())

    async def _accept_invoice(self, request: web.Request) -> web.Response:
        acceptance = await read_object(request, "totalAmountAccepted", "allocationId")
        invoice = self._payment.invoice(request.match_info["bill_id"])
        is_new = invoice.status != "ACCEPTED"
        self._payment.accept_invoice(invoice.bill_id, acceptance)
        if is_new:
            provider = self._providers.get(invoice.issuer_id)
            name = provider.plan.name if provider is not None else invoice.issuer_id
            self._report(f"the requestor pays {name} {format_amount(invoice.amount)} GLM")
        return web.json_response(None)

    async def _reject_invoice(self, request: web.Request) -> web.Response:
        self._payment.reject_invoice(request.match_info["bill_id"], await _rejection(request))
        return web.json_response(None)

    async def _debit_notes(self, request: web.Request) -> web.Response:
        return _list_response(request, self._payment.debit_notes.values())

    async def _debit_note(self, request: web.Request) -> web.Response:
        return web.json_response(self._payment.debit_note(request.match_info["bill_id"]).to_api())

    async def _accept_debit_note(self, request: web.Request) -> web.Response:
        acceptance = await read_object(request, "totalAmountAccepted", "allocationId")
        note = self._payment.debit_note(request.match_info["bill_id"])
        self._payment.accept_debit_note(note.bill_id, acceptance)
        provider = self._providers.get(note.issuer_id)
        if provider is not None and provider.agreement is self._market.agreements.get(note.agreement_id):
            provider.record_contact()
        return web.json_response(None)

    async def _reject_debit_note(self, request: web.Request) -> web.Response:
        self._payment.reject_debit_note(request.match_info["bill_id"], await _rejection(request))
        return web.json_response(None)

    # Events

    def _poll(self, kind: str) -> _Handler:
        async def handle(request: web.Request) -> web.Response:
            session_id = request.query.get("appSessionId")
            platform = "-".join(filter(None, (request.query.get("driver"), request.query.get("network"))))

            def is_wanted(item: dict[str, Any]) -> bool:
                return self._is_of_session(item, session_id) and platform in item.get("paymentPlatform", platform)

            items = await self._payment.poll(
                kind,
                read_time(request, "afterTimestamp"),
                read_timeout_seconds(request),
                read_max_items(request, "maxEvents"),
                is_wanted,
            )
            return web.json_response(items)

        return handle

    def _is_of_session(self, item: dict[str, Any], session_id: str | None) -> bool:
        if session_id is None:
            return True
        bills = {**self._payment.invoices, **self._payment.debit_notes}
        bill = bills.get(item.get("invoiceId") or item.get("debitNoteId") or "")
        agreement = self._market.agreements.get(bill.agreement_id) if bill is not None else None
        return agreement is not None and agreement.session_id == session_id

    async def _status(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def _payment_by_id(self, request: web.Request) -> web.Response:
        for payment in self._payment.payments:
            if payment["paymentId"] == request.match_info["payment_id"]:
                return web.json_response(payment)
        raise NotFound(f"There is no payment {request.match_info['payment_id']}.")


async def _rejection(request: web.Request) -> dict[str, Any]:
    return await read_object(request, "rejectionReason", "totalAmountAccepted")


def _list_response(request: web.Request, bills: Iterable[Bill]) -> web.Response:
    after, max_items = read_time(request, "afterTimestamp"), read_max_items(request, "maxItems")
    chosen = [bill.to_api() for bill in bills if after is None or bill.created_at > after]
    return web.json_response(chosen[:max_items])
