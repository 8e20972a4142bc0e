"""The calls of /payment-api/v1 that a requestor makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from devnet.api import IncomingCall, Routes
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.payments import PaymentService
from devnet.records import Bill, format_amount


def payment_routes(payment: PaymentService, market: MarketService, report: Callable[[str], None]) -> Routes:
    """List the routes of the payment API, which also report important events as lines of text."""
    wallet = payment.wallet

    def allocate(call: IncomingCall) -> dict[str, Any]:
        allocation = wallet.allocate(call.object("totalAmount"))
        report(f"the requestor allocates {format_amount(allocation.total)} GLM")
        return allocation.to_api()

    def release(call: IncomingCall) -> None:
        allocation = wallet.release(call["allocation_id"])
        report(
            f"the requestor releases an allocation: {format_amount(allocation.spent)} GLM spent, "
            f"{format_amount(allocation.remaining)} GLM left"
        )

    def decorations(call: IncomingCall) -> dict[str, Any]:
        ids = [each for each in (call.query("allocationIds") or "").split(",") if each]
        if not ids:
            raise ApiError("allocationIds must name at least one allocation.")
        return wallet.decorations(ids)

    def accept(call: IncomingCall, bill: Bill) -> None:
        is_new = payment.accept(bill, call.object("totalAmountAccepted", "allocationId"))
        provider = market.providers.get(bill.issuer_id)
        if bill.usage is None and is_new:
            name = provider.plan.name if provider is not None else bill.issuer_id
            report(f"the requestor pays {name} {format_amount(bill.amount)} GLM")
        agreement = market.agreements.get(bill.agreement_id)
        if bill.usage is not None and provider is not None and provider.agreement is agreement:
            provider.record_contact()

    def reject(call: IncomingCall, bill: Bill) -> None:
        payment.reject(bill, call.object("rejectionReason", "totalAmountAccepted"))
        if bill.usage is None:
            report(f"the requestor rejects an invoice for {format_amount(bill.amount)} GLM")

    def add_bill_routes(name: str, bills: Mapping[str, Bill]) -> None:
        """Add the routes of the invoices or the debit notes."""

        def find(call: IncomingCall) -> Bill:
            if call["bill_id"] not in bills:
                raise NotFound(f"There is no bill {call['bill_id']}.")
            return bills[call["bill_id"]]

        def list_bills(call: IncomingCall) -> list[dict[str, Any]]:
            after, max_items = call.time("afterTimestamp"), call.max_items("maxItems")
            return [bill.to_api() for bill in bills.values() if after is None or bill.created_at > after][:max_items]

        routes.add("GET", f"/{name}", list_bills)
        routes.add("GET", f"/{name}/{{bill_id}}", lambda call: find(call).to_api())
        routes.add("POST", f"/{name}/{{bill_id}}/accept", lambda call: accept(call, find(call)))
        routes.add("POST", f"/{name}/{{bill_id}}/reject", lambda call: reject(call, find(call)))

    routes = Routes("/payment-api/v1")
    routes.add("POST", "/allocations", allocate, 201)
    routes.add("GET", "/allocations", lambda call: [each.to_api() for each in wallet.list_active()])
    allocation = "/allocations/{allocation_id}"
    routes.add("GET", allocation, lambda call: wallet.find(call["allocation_id"]).to_api())
    routes.add("DELETE", allocation, release)
    routes.add("GET", "/demandDecorations", decorations)
    routes.add("GET", "/requestorAccounts", lambda call: wallet.accounts())
    routes.add("GET", "/invoiceEvents", lambda call: payment.invoice_events.poll(*call.polling()))
    routes.add("GET", "/debitNoteEvents", lambda call: payment.debit_note_events.poll(*call.polling()))
    add_bill_routes("invoices", payment.invoices)
    add_bill_routes("debitNotes", payment.debit_notes)
    return routes
