"""The agreements: signed by the requestor, approved or rejected by the provider, terminated by either.

    Proposal -- confirm --> Pending -- approve --> Approved -- terminate --> Terminated
        `-- cancel, expire --'`-- reject, cancel, expire --> Rejected, Cancelled, Expired

Made by `MarketService` from what was negotiated there. The API calls it for the requestor, `provider/agent.py` for the
providers. It knows nothing of payments and activities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from devnet.errors import Conflict, Gone, NotFound, TimedOut
from devnet.records import Agreement, Demand, Proposal
from devnet.timing import ChangeNotifier, format_time, utc_now

if TYPE_CHECKING:
    from devnet.provider.agent import Provider

STATES = ("Proposal", "Pending", "Cancelled", "Rejected", "Approved", "Expired", "Terminated")
#: States of an agreement that is in effect or may come into effect.
LIVE_STATES = ("Proposal", "Pending", "Approved")


class Agreements(dict[str, Agreement]):
    """All agreements of a devnet: id -> agreement, oldest first. Made by `MarketService`."""

    def __init__(self, *, providers: Mapping[str, Provider], on_change: Callable[[], None]) -> None:
        super().__init__()
        self._notifier = ChangeNotifier()
        self._providers = providers
        self._on_change = on_change

    # The requestor's side

    def create(self, demand: Demand, counter: Proposal, draft: Proposal, valid_to: datetime) -> Agreement:
        """Make an agreement from a provider's draft and the counter-proposal that it answers, unless there is one."""
        self._expire()
        if any(each.proposal_id == draft.proposal_id and each.state in LIVE_STATES for each in self.values()):
            raise Conflict(f"There is already an agreement on the proposal {draft.proposal_id}.")
        agreement = Agreement(
            proposal_id=draft.proposal_id,
            provider_id=draft.issuer_id,
            # The requestor's side is its demand with the properties and constraints of its last proposal.
            demand={**demand.to_api(), "properties": counter.properties, "constraints": counter.constraints},
            offer={
                "offerId": draft.offer_id,
                "providerId": draft.issuer_id,
                "timestamp": format_time(draft.created_at),
                "properties": draft.properties,
                "constraints": draft.constraints,
            },
            valid_to=valid_to,
            state="Proposal",
        )
        self[agreement.agreement_id] = agreement
        self._on_change()
        return agreement

    def find(self, agreement_id: str) -> Agreement:
        """Return an agreement. :raises NotFound: there is none."""
        self._expire()
        agreement = self.get(agreement_id)
        if agreement is None:
            raise NotFound(f"There is no agreement {agreement_id}.")
        return agreement

    def list_all(self) -> list[Agreement]:
        """List all agreements, oldest first."""
        self._expire()
        return list(self.values())

    def confirm(self, agreement_id: str) -> None:
        """Sign an agreement for the requestor and send it to the provider."""
        agreement = self.find(agreement_id)
        if agreement.state != "Proposal":
            raise Gone(agreement.state)
        agreement.state = "Pending"
        self._on_change()
        provider = self._providers.get(agreement.provider_id)
        if provider is not None:
            provider.agreement_confirmed(agreement)

    async def wait_for_approval(self, agreement_id: str, seconds: float | None) -> None:
        """Wait until the provider approves; without a limit if `seconds` is None. :raises ApiError: it does not."""
        agreement = self.find(agreement_id)
        if agreement.state == "Proposal":
            raise Conflict("The agreement has not been confirmed yet.")
        left = max(0.0, (agreement.valid_to - utc_now()).total_seconds())
        await self._notifier.wait_until(
            lambda: agreement.state != "Pending", left if seconds is None else min(seconds, left)
        )
        self._expire()
        if agreement.state == "Pending":
            raise TimedOut("The provider has not approved the agreement yet.")
        if agreement.state != "Approved":
            raise Gone(agreement.state)

    def cancel(self, agreement_id: str, reason: dict[str, Any] | None) -> None:
        """Cancel an agreement for the requestor, before it is approved."""
        agreement = self.find(agreement_id)
        if agreement.state not in ("Proposal", "Pending"):
            raise Gone(agreement.state)
        self._end(agreement, "Cancelled", reason)

    # The provider's side

    def approve(self, agreement: Agreement) -> bool:
        """Approve an agreement for the provider. :return: False if it no longer waits for approval."""
        self._expire()
        if agreement.state != "Pending":
            return False
        agreement.state, agreement.approved_at = "Approved", utc_now()
        self._changed()
        return True

    def reject(self, agreement: Agreement, message: str) -> None:
        """Reject an agreement for the provider."""
        if agreement.state == "Pending":
            self._end(agreement, "Rejected", {"message": message})

    # Both sides

    def terminate(self, agreement_id: str, reason: dict[str, Any] | None) -> None:
        """Terminate an approved agreement."""
        agreement = self.find(agreement_id)
        if agreement.state in ("Proposal", "Pending"):
            raise Conflict(f"The agreement has not been approved yet: {agreement.state}.")
        if agreement.state != "Approved":
            raise Gone(agreement.state)
        self._end(agreement, "Terminated", reason)

    # Changes

    def _expire(self) -> None:
        now = utc_now()
        for agreement in self.values():
            if agreement.state in ("Proposal", "Pending") and agreement.valid_to <= now:
                self._end(agreement, "Expired", None)

    def _end(self, agreement: Agreement, state: str, reason: dict[str, Any] | None) -> None:
        agreement.state, agreement.reason = state, reason
        self._changed()
        provider = self._providers.get(agreement.provider_id)
        if provider is not None:
            provider.agreement_ended(agreement)

    def _changed(self) -> None:
        self._notifier.notify()
        self._on_change()
