"""A devnet in the event loop of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from devnet.api.application import ApiCall
from devnet.daemon import Devnet
from devnet.scenario import Scenario


@asynccontextmanager
async def run_devnet(
    folder: Path, scenario: Scenario, *, models: Path | None = None, **options: Any
) -> AsyncIterator[Devnet]:
    """Run a devnet until the block ends.

    :param folder: for everything that it needs; it continues with the state of an earlier one there if asked to.
    :param models: the folder of artefacts, for the providers.
    :param options: of `Devnet`.
    """
    if models is not None:
        options["home"] = folder / "providers"
        options["home"].mkdir()
        (options["home"] / "models").symlink_to(models)
    async with Devnet(scenario, folder=folder / "devnet", **options) as devnet:
        yield devnet


def paid(devnet: Devnet) -> dict[str, Decimal]:
    """Return what is paid of each agreement. A debit note without a due date is only accepted; the invoice pays it."""
    bills = [*devnet.payment.invoices.values(), *devnet.payment.debit_notes.values()]
    payers = [bill.agreement_id for bill in bills if bill.status == "ACCEPTED" and bill.due_at is not None]
    return {agreement_id: devnet.payment.accepted(agreement_id) for agreement_id in payers}


def calls_matching(devnet: Devnet, pattern: str) -> list[ApiCall]:
    """Return the calls whose "METHOD /path" matches a glob, oldest first."""
    return [call for call in devnet.journal.calls if fnmatchcase(f"{call.method} {call.path}", pattern)]


def failed_calls(devnet: Devnet) -> list[ApiCall]:
    """Return the calls that were answered with an error, except waits that timed out."""
    return [
        call for call in devnet.journal.calls if call.status is not None and call.status >= 400 and call.status != 408
    ]
