"""The commands `mlg costs`, `mlg bills` and `mlg providers`, and the cost in `mlg requests show`."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cli.rentals.bills import bills
from cli.rentals.costs import costs
from cli.rentals.providers import providers
from cli.requests import requests
from provider_image.errors import ConfigError
from store import new_id
from store.amounts import format_amount
from store.chunks import ChunkRecord
from store.rentals.decisions import BillKind, DecisionRecord
from store.rentals.ledger import AgreementRecord, AllocationRecord, BillState, InvoiceRecord
from store.rentals.providers import UnknownProvider
from store.requests import Answer, NewRequest
from store.store import Store

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ALPHA, BETA = "0xa1fa000000000000000000000000000000000001", "0xbe7a000000000000000000000000000000000002"
PRICES = {
    "start_price": Decimal("0.01"),
    "price_per_cpu_second": Decimal("0.0001"),
    "price_per_second": Decimal("0.00005"),
}
OUTPUT = [["n02123159", "tiger_cat", 0.408]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command on the home. Errors of mlg are raised; `mlg.py` turns them into one line."""
    monkeypatch.setenv("MLG_HOME", str(home))

    def invoke(command: click.Command, *arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(command, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result.output

    return invoke


def answer_chunk(store: Store, chunk_id: str, agreement_id: str, count: int, *, cost: str) -> list[str]:
    store.chunks.start(
        ChunkRecord(
            id=chunk_id, batcher_id="b1", executor="golem", provider=None, service="classification", model="resnet50",
            items=count, bytes_sent=1, bytes_received=None, dispatched_at=NOW, finished_at=None, seconds=None,
            done=None, failed=None, cost=None, code=None, reason=None,
        )
    )  # fmt: skip
    for _ in range(count):
        new = NewRequest(id=new_id(), service="classification", model="resnet50", created_at=NOW)
        store.requests.add(new, store.images.stage(b"image"))
    claims = store.requests.claim(
        models=["resnet50"], limit=100, now=NOW, lease_ends_at=NOW + timedelta(seconds=9), oldest_before=None
    )
    store.requests.finish(
        [
            Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id=chunk_id, provider="alpha", seconds=0.1)
            for claim in claims
        ],
        now=NOW,
    )
    store.chunks.finish(
        chunk_id, provider="alpha", bytes_received=1, seconds=2.0, done=count, failed=0, cost=cost, code=None,
        reason=None, now=NOW, agreement_id=agreement_id, activity_id="ac", provider_id=ALPHA,
    )  # fmt: skip
    return [claim.id for claim in claims]


@pytest.fixture
def history(store: Store) -> list[str]:
    """Two providers, with a paid, an open and a refused invoice. :return: the ids of the requests."""
    store.providers.record_offer(ALPHA, name="alpha", now=NOW, **PRICES)
    store.providers.record_offer(BETA, name="be\x1b[31mta", now=NOW + timedelta(seconds=1), **PRICES)
    store.providers.record_work(ALPHA, model="resnet50", images=16, seconds=2.0, is_failure=False, now=NOW)
    store.ledger.record_allocation(
        AllocationRecord(
            id="al1", batcher_id="b1", platform="erc20-test", address="0xme", amount=Decimal(5), created_at=NOW
        )
    )
    for id, provider_id, name in (("paid", ALPHA, "alpha"), ("open", ALPHA, "alpha"), ("refused", BETA, "beta")):
        store.ledger.record_agreement(
            AgreementRecord(
                id=id,
                allocation_id="al1",
                provider_id=provider_id,
                provider_name=name,
                model="resnet50",
                created_at=NOW,
                **PRICES,
            )
        )
    ids = answer_chunk(store, "c1", "paid", 3, cost="0.2")
    ids += answer_chunk(store, "c2", "open", 1, cost="0.05")
    for id, amount, state in (("paid", "0.1", BillState.ACCEPTED), ("refused", "9", BillState.REFUSED)):
        store.ledger.record_invoice(
            InvoiceRecord(
                id=f"i-{id}", agreement_id=id, amount=Decimal(amount), state=state, received_at=NOW, settled_at=NOW
            )
        )
    return ids


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_costs_by_day_include_a_total_and_the_open_allocations(run: Callable[..., str], history: list[str]) -> None:
    shown = run(costs)

    rows = [line.split() for line in shown.splitlines()]
    assert rows[1] == ["2026-11-20", "3", "1", "0.100000", "0.000000", "9.000000", "33.333333"]
    assert rows[2] == ["open", "1", "1", "0.000000", "0.050000", "0.000000", "50.000000"]
    assert rows[3] == ["total", "4", "2", "0.100000", "0.050000", "9.000000", "37.500000"]
    assert "al1" in rows[-1]
    assert "5.000000" in rows[-1]


def test_costs_in_json_are_exact(run: Callable[..., str], history: list[str]) -> None:
    alpha, beta, total, allocation = lines(run(costs, "--by", "provider", "--json"))

    assert (alpha["key"], alpha["name"], alpha["paid"], alpha["open"]) == (ALPHA, "alpha", "0.1", "0.05")
    assert (beta["paid"], beta["refused"], beta["per_1000_images"]) == ("0", "9", None)
    assert (total["by"], total["images"], total["chunks"], total["paid"]) == ("total", 4, 2, "0.1")
    assert (allocation["by"], allocation["key"], allocation["amount"]) == ("allocation", "al1", "5")


def test_open_agreements_are_listed_and_written_off(run: Callable[..., str], store: Store, history: list[str]) -> None:
    with pytest.raises(ConfigError, match="has not ended without a settled invoice"):
        run(bills, "write-off", "open")
    store.ledger.end_agreement("open", reason="done", now=NOW)

    shown, (listed, *_) = run(bills, "open"), lines(run(bills, "open", "--json"))
    run(bills, "write-off", "open", "--all", status=2)
    with pytest.raises(ConfigError, match="has not ended"):
        run(bills, "write-off", "paid")
    done = run(bills, "write-off", "op")

    # "paid" and "refused" have decided invoices, but nobody has seen their end.
    assert [line.split()[0] for line in shown.splitlines()[1:]] == ["open", "paid", "refused"]
    assert (listed["id"], listed["provider_name"], listed["reserved"]) == ("open", "alpha", None)
    assert done == "open\twritten off\n"
    assert run(bills, "write-off", "--all") == ""
    (total, _) = lines(run(costs, "--json"))[-2:]
    assert (total["open"], total["paid"]) == ("0", "0.1")


def test_refused_bills_are_listed_with_the_reason(run: Callable[..., str], store: Store) -> None:
    store.decisions.decide(
        DecisionRecord(
            bill_id="i1",
            kind=BillKind.INVOICE,
            agreement_id="a1",
            amount=Decimal(9),
            max_amount=Decimal("0.5"),
            is_refused=True,
            reason="too\x1b much",
            decided_at=NOW,
        )
    )

    row = run(bills, "refused").splitlines()[-1]
    (listed,) = lines(run(bills, "refused", "--json"))

    assert row.split()[:4] == ["i1", "invoice", "9.000000", "0.500000"] and row.endswith("not yet")
    assert "\x1b" not in row
    assert (listed["max_amount"], listed["finished_at"]) == ("0.5", None)


def test_costs_of_a_home_without_any_are_zero(run: Callable[..., str], store: Store) -> None:
    (total,) = lines(run(costs, "--by", "model", "--json"))

    assert (total["by"], total["paid"], total["per_1000_images"]) == ("total", "0", None)
    assert "total" in run(costs)


def test_costs_do_not_create_a_home(run: Callable[..., str], home: Path) -> None:
    with pytest.raises(ConfigError, match="mlg migrate"):
        run(costs)

    assert not home.exists()


def test_a_small_amount_is_not_shown_as_zero() -> None:
    assert format_amount(Decimal("1e-18")) == "<0.000001"
    assert format_amount(Decimal(0)) == "0.000000"
    assert format_amount(Decimal(10) ** 40) == "1" + "0" * 40 + ".000000"


def test_providers_are_listed_with_prices_work_and_cost(run: Callable[..., str], history: list[str]) -> None:
    shown = run(providers, "list")
    beta, alpha = lines(run(providers, "list", "--json"))

    assert alpha["per_hour"] == "0.54"  # 3600 * (0.0001 + 0.00005)
    assert (alpha["done"], alpha["images_per_second"], alpha["spent"]) == (1, {"resnet50": 8.0}, "0.15")
    assert (beta["id"], beta["spent"], beta["is_banned"]) == (BETA, "0", False)
    row = next(line.split() for line in shown.splitlines() if line.startswith("alpha"))
    assert row[:8] == ["alpha", "0xa1fa0000…", "0.540000", "0.010000", "1", "0", "0.60", "0.150000"]
    assert "resnet50 8.0" in shown
    assert "\x1b" not in shown


def test_a_provider_is_banned_with_or_without_an_end_and_unbanned(
    run: Callable[..., str], store: Store, history: list[str]
) -> None:
    before = datetime.now(UTC)

    output = run(providers, "ban", "alpha", "--for", "2h", "--reason", "too slow")
    run(providers, "ban", BETA[:10] + "…")  # copied from the list

    alpha, beta = sorted(store.providers.list(), key=lambda provider: provider.id)
    assert ALPHA in output
    assert alpha.banned_until is not None
    # The store rounds times to milliseconds.
    assert timedelta(hours=2, seconds=-1) < alpha.banned_until - before < timedelta(hours=2, seconds=60)
    assert alpha.is_banned_by_operator
    assert beta.banned_until is None
    assert "too slow" in run(providers, "list")
    assert "for good" in run(providers, "list")
    assert "not banned" in run(providers, "unban", "alpha")
    assert store.providers.banned(before) == {BETA: "An operator banned it."}


def test_an_unknown_provider_and_an_invalid_duration_are_rejected(run: Callable[..., str], store: Store) -> None:
    with pytest.raises(UnknownProvider, match="mlg providers list"):
        run(providers, "ban", "nobody")
    for duration in ("2", "h", "-2h", "0h", "2 weeks", "1e9h"):
        assert "not a duration" in run(providers, "ban", "nobody", "--for", duration, status=2)


def test_requests_show_and_list_include_the_cost(run: Callable[..., str], history: list[str]) -> None:
    table = run(requests, "show", history[0])
    (paid,) = lines(run(requests, "show", history[0], "--json"))
    listed = {line["req_id"]: line["cost"] for line in lines(run(requests, "list", "--json"))}

    assert (paid["cost"], paid["cost_is_final"]) == ("0.033333333333333334", True)
    assert "0.033333333333333334" in table
    assert sum(Decimal(listed[id]) for id in history[:3]) == Decimal("0.1")
    assert listed[history[3]] == "0.05"
