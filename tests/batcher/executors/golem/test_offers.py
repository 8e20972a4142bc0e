"""Rating of offers: prices, speeds, bans, limits. Each case is a table row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from batcher.executors.golem.ledger_writer import LedgerWriter
from batcher.executors.golem.offers import BadOffer, Price, provider_name
from batcher.executors.golem.provider_records import _MAX_FORGIVEN, EXPECTED_IMAGES, ProviderRecords
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timings import GolemTimings, idle_seconds
from store.amounts import EXACT, to_amount, total
from store.store import Store

MODEL = "efficientnet_lite0"
SETTINGS = GolemSettings(max_price_hour=Decimal("0.5"), max_price_start=Decimal("0.01"))


def offer(start: float = 0.001, cpu: float = 0.0001, second: float = 0.00002, **changes: Any) -> dict[str, Any]:
    return {
        "golem.node.id.name": "alpha",
        "golem.com.pricing.model": "linear",
        "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
        "golem.com.pricing.model.linear.coeffs": [cpu, second, start],
        "golem.inf.cpu.threads": 1,
        **changes,
    }


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_records(store: Store, settings: GolemSettings = SETTINGS, **options: Any) -> ProviderRecords:
    return ProviderRecords(store.providers, settings, LedgerWriter(GolemTimings()), **options)


@pytest.fixture
def provider_records(store: Store) -> ProviderRecords:
    return make_records(store, monotonic=Time())


def test_a_price_is_read_from_an_offer_whatever_the_order_of_its_counters() -> None:
    properties = offer()
    properties["golem.com.usage.vector"].reverse()
    properties["golem.com.pricing.model.linear.coeffs"] = [0.00002, 0.0001, 0.001]

    price = Price.from_offer(properties)

    assert price == Price.from_offer(offer())
    assert (price.start, price.cpu_second, price.second) == (Decimal("0.001"), Decimal("0.0001"), Decimal("0.00002"))
    assert price.per_hour == 3600 * Decimal("0.00012")
    assert price.max_cost(10) == Decimal("0.0022")


@pytest.mark.parametrize(
    "change",
    [
        {"golem.com.pricing.model": "auction"},
        {"golem.com.pricing.model.linear.coeffs": [0.1, 0.1]},
        {"golem.com.pricing.model.linear.coeffs": [0.1, -0.1, 0.1]},
        {"golem.com.pricing.model.linear.coeffs": [float("nan"), 0.1, 0.1]},
        {"golem.com.pricing.model.linear.coeffs": "free"},
        {"golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.moonlight"]},
        {"golem.com.usage.vector": None},
        {"golem.com.usage.vector": ["golem.usage.duration_sec", "golem.usage.duration_sec"]},
        {"golem.com.pricing.model.linear.coeffs": ["1e999999", 0.1, 0.1]},
        {"golem.com.pricing.model.linear.coeffs": [float("inf"), 0.1, 0.1]},
    ],
)
def test_an_offer_with_unreadable_prices_is_rejected(change: dict[str, Any], provider_records: ProviderRecords) -> None:
    with pytest.raises(BadOffer):
        Price.from_offer(offer(**change))

    assert provider_records.rate_offer(MODEL, "0x1", offer(**change)) < 0


@pytest.mark.parametrize("tiny", [1e-300, "1e-999999", "0.1" + "1" * 1000])
def test_a_price_of_many_digits_leaves_sums_exact(tiny: object) -> None:
    price = Price.from_offer(offer(**{"golem.com.pricing.model.linear.coeffs": [tiny, tiny, tiny]}))

    cost = GolemTimings().cost_limit(price, 12.345678)

    assert total([cost, Decimal(10**9)]) == EXACT.add(cost, Decimal(10**9))
    assert len(to_amount(price.second)) < 50


async def test_a_chunk_without_a_computed_image_does_not_change_the_speed(provider_records: ProviderRecords) -> None:
    worker: Any = SimpleNamespace(model=MODEL, provider_id="0x1")
    provider_records.record_success(worker, images=16, seconds=2.0, speed=8.0)

    provider_records.record_success(worker, images=0, seconds=0.001, speed=0.0)

    assert provider_records.speed(MODEL, "0x1") == 8.0


async def test_bans_for_proven_lies_are_not_lifted_when_a_chunk_fails_elsewhere_too(
    provider_records: ProviderRecords,
) -> None:
    queued_job: Any = SimpleNamespace(failed_on=set(), proven_wrong=set())
    for provider_id in ("0xliar", "0xother", "0x1", "0x2"):
        worker: Any = SimpleNamespace(model=MODEL, provider_id=provider_id)
        provider_records.record_failure(worker, queued_job, "it failed", 1.0)
    queued_job.proven_wrong = {"0xliar", "0xother"}

    provider_records.lift_bans(queued_job)

    assert provider_records.banned.keys() == {"0xliar", "0xother"}


def test_an_unknown_counter_with_price_zero_is_accepted() -> None:
    properties = offer()
    properties["golem.com.usage.vector"].append("golem.usage.moonlight")
    properties["golem.com.pricing.model.linear.coeffs"] = [0.0001, 0.00002, 0.0, 0.001]

    assert Price.from_offer(properties) == Price.from_offer(offer())


async def test_the_price_per_hour_counts_one_thread_in_the_limit_and_in_the_list(store: Store) -> None:
    four_threads = offer(**{"golem.inf.cpu.threads": 4})
    limit = Price.from_offer(four_threads).per_hour
    accepting = make_records(store, replace(SETTINGS, max_price_hour=limit))
    rejecting = make_records(store, replace(SETTINGS, max_price_hour=limit - Decimal("1e-9")))

    accepting._ledger_writer.start()
    accepting.record_offer("0x1", four_threads)
    await accepting._ledger_writer.close()

    assert accepting.rate_offer(MODEL, "0x1", four_threads) > 0 > rejecting.rate_offer(MODEL, "0x1", four_threads)
    (listed,) = store.providers.list()
    assert listed.price_per_hour == limit == Decimal("0.432")


def test_the_lowest_cost_per_image_wins_over_the_lowest_price_per_hour(provider_records: ProviderRecords) -> None:
    provider_records.speeds[MODEL] = {"0xfast": 40.0, "0xslow": 4.0}

    fast = provider_records.rate_offer(MODEL, "0xfast", offer(cpu=0.0001))
    slow = provider_records.rate_offer(MODEL, "0xslow", offer(cpu=0.00005))

    assert fast > slow > 0


def test_the_price_of_the_start_is_shared_by_the_images() -> None:
    price = Price.from_offer(offer())

    assert price.per_image(40, 1) > price.per_image(40, EXPECTED_IMAGES) > price.per_image(80, EXPECTED_IMAGES)


def test_a_reliable_provider_wins_over_an_unreliable_one_at_the_same_price(provider_records: ProviderRecords) -> None:
    provider_records.reliability = {"0xgood": 1.0, "0xbad": 0.2}

    assert (
        provider_records.rate_offer(MODEL, "0xgood", offer()) > provider_records.rate_offer(MODEL, "0xbad", offer()) > 0
    )


def test_a_new_provider_is_assumed_to_be_as_fast_as_the_mean_of_the_others(provider_records: ProviderRecords) -> None:
    provider_records.speeds[MODEL] = {"0x1": 10.0, "0x2": 30.0}

    assert provider_records.speed(MODEL, "0xnew") == 20.0
    assert provider_records.speed("vgg16", "0x1") is None


@pytest.mark.parametrize(
    ("prepare", "properties", "words"),
    [
        (
            lambda provider_records: provider_records.banned.update({"0x1": "It sent wrong results."}),
            offer(),
            "1 banned",
        ),
        (lambda provider_records: provider_records.record_not_signed("0x1"), offer(), "1 did not sign recently"),
        (lambda provider_records: None, offer(start=0.02), "1 above 0.01 GLM per start (MLG_MAX_PRICE_START)"),
        (lambda provider_records: None, offer(second=0.001), "1 above 0.5 GLM per hour (MLG_MAX_PRICE_HOUR)"),
        (
            lambda provider_records: None,
            offer(**{"golem.com.usage.vector": []}),
            "1 with unreadable prices",
        ),
        (lambda provider_records: None, offer(), "1 busy or not responding"),
    ],
)
def test_the_reason_for_no_provider_is_one_sentence_with_counts(
    prepare: Callable[[ProviderRecords], object],
    properties: dict[str, Any],
    words: str,
    provider_records: ProviderRecords,
) -> None:
    prepare(provider_records)
    provider_records.rate_offer(MODEL, "0x1", properties)

    reason = provider_records.unavailable_reason(MODEL)
    assert reason == (f"No provider is available: of 1 offer, {words}. The search continues. See: mlg providers list")
    assert provider_records.unavailable_reason("vgg16") == (
        "No provider on the market offers what the model needs. The search continues; "
        "MLG_EXECUTOR=golem,local uses this machine meanwhile."
    )


def test_a_provider_that_does_not_sign_is_skipped_longer_each_time_until_it_signs(store: Store) -> None:
    time = Time()
    provider_records = make_records(store, monotonic=time)
    waits = []
    for _ in range(3):
        provider_records.record_not_signed("0x1")
        started_at = time.now
        while provider_records.rate_offer(MODEL, "0x1", offer()) < 0:
            time.now += 1
        waits.append(time.now - started_at)
    provider_records.record_signed("0x1")
    provider_records.record_not_signed("0x1")
    time.now += waits[0]

    assert waits == sorted(set(waits))
    assert provider_records.rate_offer(MODEL, "0x1", offer()) > 0


async def test_offers_of_addresses_that_are_gone_are_forgotten(store: Store) -> None:
    now = Time()
    records = make_records(store, monotonic=now)
    for number in range(9):
        records.record_offer(f"0x{number}", offer())
        records.rate_offer(MODEL, f"0x{number}", offer())
        records.record_not_signed(f"0x{number}")
    records.forget_old()
    kept = len(records._offers), len(records._recent), len(records._unsigned)
    now.now += 7200

    records.forget_old()

    assert kept == (9, 9, 9)
    assert not records._offers and not records._recent and not records._unsigned


def test_without_price_limits_any_price_is_accepted(store: Store) -> None:
    provider_records = make_records(store, replace(SETTINGS, max_price_hour=None, max_price_start=None))

    assert provider_records.rate_offer(MODEL, "0x1", offer(start=9.0, cpu=1.0)) > 0


def test_a_provider_name_is_limited_to_printable_characters() -> None:
    assert provider_name({"golem.node.id.name": "evil\x1b[2J" + "x" * 100}, "0x1") == "evil[2J" + "x" * 53
    assert provider_name({}, "0x0123456789") == "0x01234567"


def test_a_chunk_timeout_depends_on_its_size_and_the_measured_speed() -> None:
    def limit(**changes: Any) -> float:
        return GolemTimings().chunk_timeout(
            **{"items": 16, "size_bytes": 0, "images_per_second": 16.0, "max_seconds": 120.0, **changes}
        )

    assert limit() == 35.0
    assert limit(size_bytes=2_000_000) == 45.0
    assert limit(images_per_second=0.1) == limit(images_per_second=None) == 120.0
    # However short the limit, the largest chunk gets the time to be sent at the lowest speed.
    assert (
        limit(size_bytes=64_000_000, images_per_second=None)
        == limit(size_bytes=64_000_000, images_per_second=0.1)
        == 440.0
    )


def test_a_chunk_is_a_straggler_only_if_the_speed_is_known() -> None:
    assert GolemTimings().straggler_seconds(items=16, images_per_second=16.0) == 5.0
    assert GolemTimings().straggler_seconds(items=16, images_per_second=None) == float("inf")


def test_an_idle_worker_is_kept_until_idling_has_cost_as_much_as_a_start() -> None:
    price = Price.from_offer(offer(start=0.001, second=0.0001))

    assert idle_seconds(price, start_seconds=2.0, max_seconds=60.0) == 12.0
    assert idle_seconds(price, start_seconds=2.0, max_seconds=5.0) == 5.0
    assert idle_seconds(Price.from_offer(offer(second=0.0)), start_seconds=2.0, max_seconds=60.0) == 60.0


async def test_providers_that_only_ever_fail_together_stay_banned(provider_records: ProviderRecords) -> None:
    workers: list[Any] = [SimpleNamespace(model=MODEL, provider_id=each) for each in ("0x1", "0x2", "0x3")]

    def fail_everywhere() -> set[str]:
        """Let a chunk fail on all providers. :return: those that are banned then."""
        queued_job: Any = SimpleNamespace(failed_on=set(), proven_wrong=set())
        for worker in workers:
            provider_records.record_failure(worker, queued_job, "It fails.", 1.0)
        provider_records.lift_bans(queued_job)
        return set(provider_records.banned)

    for _ in range(_MAX_FORGIVEN):
        assert fail_everywhere() == set(), "the chunk may be at fault"
    provider_records.record_success(workers[0], images=16, seconds=1.0, speed=16.0)

    assert fail_everywhere() == {"0x2", "0x3"}
