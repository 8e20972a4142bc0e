"""The calls of /payment-api/v1 that a requestor makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from devnet.api import IncomingCall, Routes
from devnet.errors import ApiError, NotFound
from devnet.market import MarketService
from devnet.payments import PaymentService
from devnet.records import Bill, format_amount
from devnet.timing import EventFeed


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

    def add_bill_routes(name: str, bills: Mapping[str, Bill]) -> None:
        """Add the routes of the invoices or the debit notes."""

        def find(call: IncomingCall) -> Bill:
            if call["bill_id"] not in bills:
                raise NotFound(f"There is no bill {call['bill_id']}.")
            return bills[call["bill_id"]]

        def list_bills(call: IncomingCall) -> list[dict[str, Any]]:
            after, max_items = call.time("afterTimestamp"), call.max_items("maxItems")
            return [bill.to_api() for bill in bills.values() if after is None or bill.created_at > after][:max_items]

        def reject(call: IncomingCall) -> None:
            payment.reject(find(call), call.object("rejectionReason", "totalAmountAccepted"))

        routes.add("GET", f"/{name}", list_bills)
        routes.add("GET", f"/{name}/{{bill_id}}", lambda call: find(call).to_api())
        routes.add("POST", f"/{name}/{{bill_id}}/accept", lambda call: accept(call, find(call)))
        routes.add("POST", f"/{name}/{{bill_id}}/reject", reject)

    def poll(feed: EventFeed) -> Callable[[IncomingCall], Any]:
        def handle(call: IncomingCall) -> Any:
            session_id = call.query("appSessionId")
            platform = "-".join(filter(None, (call.query("driver"), call.query("network"))))

            def is_wanted(item: dict[str, Any]) -> bool:
                return is_of_session(item, session_id) and platform in item.get("paymentPlatform", platform)

            return feed.poll(*call.polling(), is_wanted)

        return handle

    def is_of_session(item: dict[str, Any], session_id: str | None) -> bool:
        if session_id is None:
            return True
        bills = {**payment.invoices, **payment.debit_notes}
        bill = bills.get(item.get("invoiceId") or item.get("debitNoteId") or "")
        agreement = market.agreements.get(bill.agreement_id) if bill is not None else None
        return agreement is not None and agreement.session_id == session_id

    def payment_by_id(call: IncomingCall) -> dict[str, Any]:
        for each in payment.payments:
            if each["paymentId"] == call["payment_id"]:
                return each
        raise NotFound(f"There is no payment {call['payment_id']}.")

    routes = Routes("/payment-api/v1")
    routes.add("POST", "/allocations", allocate, 201)
    routes.add("GET", "/allocations", lambda call: [each.to_api() for each in wallet.list_active()])
    allocation = "/allocations/{allocation_id}"
    routes.add("GET", allocation, lambda call: wallet.find(call["allocation_id"]).to_api())
    routes.add("PUT", allocation, lambda call: wallet.amend(call["allocation_id"], call.object()).to_api())
    routes.add("DELETE", allocation, release)
    routes.add("GET", "/demandDecorations", decorations)
    routes.add("GET", "/requestorAccounts", lambda call: wallet.accounts())
    routes.add("GET", "/invoiceEvents", poll(payment.invoice_events))
    routes.add("GET", "/debitNoteEvents", poll(payment.debit_note_events))
    routes.add("GET", "/payments", poll(payment.payments))
    routes.add("GET", "/payments/status", lambda call: [])
    routes.add("GET", "/payments/{payment_id}", payment_by_id)
    add_bill_routes("invoices", payment.invoices)
    add_bill_routes("debitNotes", payment.debit_notes)
    return routes
