"""Which offers are taken: prices, speeds, bans, caps. Pure, so every case is a table row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from batcher.executors.golem.offers import EXPECTED_IMAGES, OfferEvaluator
from batcher.executors.golem.prices import BadOffer, Price, provider_name
from batcher.executors.golem.settings import GolemSettings
from batcher.executors.golem.timeouts import chunk_timeout, idle_seconds, straggler_seconds

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


@pytest.fixture
def offer_evaluator() -> OfferEvaluator:
    return OfferEvaluator(SETTINGS, monotonic=Time())


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
        {"golem.inf.cpu.threads": "many"},
    ],
)
def test_an_offer_that_cannot_be_understood_is_refused(change: dict[str, Any], offer_evaluator: OfferEvaluator) -> None:
    with pytest.raises(BadOffer):
        Price.from_offer(offer(**change))

    assert offer_evaluator.rate_offer(MODEL, "0x1", offer(**change)).score < 0


def test_a_counter_that_costs_nothing_may_be_unknown() -> None:
    properties = offer()
    properties["golem.com.usage.vector"].append("golem.usage.moonlight")
    properties["golem.com.pricing.model.linear.coeffs"] = [0.0001, 0.00002, 0.0, 0.001]

    assert Price.from_offer(properties) == Price.from_offer(offer())


def test_all_threads_count_for_what_an_hour_may_cost(offer_evaluator: OfferEvaluator) -> None:
    assert offer_evaluator.rate_offer(MODEL, "0x1", offer()).score > 0
    assert offer_evaluator.rate_offer(MODEL, "0x1", offer(**{"golem.inf.cpu.threads": 8})).score < 0


def test_the_cheapest_picture_wins_over_the_cheapest_hour(offer_evaluator: OfferEvaluator) -> None:
    offer_evaluator.update_speeds(MODEL, {"0xquick": 40.0, "0xslow": 4.0})

    quick = offer_evaluator.rate_offer(MODEL, "0xquick", offer(cpu=0.0001))
    slow = offer_evaluator.rate_offer(MODEL, "0xslow", offer(cpu=0.00005))

    assert quick.score > slow.score > 0


def test_a_cheap_start_wins_where_few_pictures_come_to_a_start() -> None:
    price = Price.from_offer(offer())

    assert price.per_image(40, 1) > price.per_image(40, EXPECTED_IMAGES) > price.per_image(80, EXPECTED_IMAGES)


def test_a_provider_that_keeps_its_word_wins_over_an_equal_one_that_does_not(offer_evaluator: OfferEvaluator) -> None:
    offer_evaluator.update_providers(banned={}, reliability={"0xgood": 1.0, "0xbad": 0.2})

    assert (
        offer_evaluator.rate_offer(MODEL, "0xgood", offer()).score
        > offer_evaluator.rate_offer(MODEL, "0xbad", offer()).score
        > 0
    )


def test_a_new_provider_is_taken_to_be_as_quick_as_the_others(offer_evaluator: OfferEvaluator) -> None:
    offer_evaluator.update_speeds(MODEL, {"0x1": 10.0, "0x2": 30.0})

    assert offer_evaluator.speed(MODEL, "0xnew") == 20.0
    assert offer_evaluator.speed("vgg16", "0x1") is None


@pytest.mark.parametrize(
    ("prepare", "properties", "words"),
    [
        (lambda offer_evaluator: offer_evaluator.ban("0x1", "It lied."), offer(), "1 banned"),
        (lambda offer_evaluator: offer_evaluator.record_not_signed("0x1"), offer(), "1 did not sign lately"),
        (lambda offer_evaluator: None, offer(start=0.02), "1 dearer than 0.01 GLM a start (MLG_MAX_PRICE_START)"),
        (lambda offer_evaluator: None, offer(second=0.001), "1 dearer than 0.5 GLM an hour (MLG_MAX_PRICE_HOUR)"),
        (
            lambda offer_evaluator: None,
            offer(**{"golem.com.usage.vector": []}),
            "1 with prices that cannot be understood",
        ),
        (lambda offer_evaluator: None, offer(), "1 busy or not answering"),
    ],
)
def test_why_nobody_works_is_said_in_a_sentence(
    prepare: Callable[[OfferEvaluator], object], properties: dict[str, Any], words: str, offer_evaluator: OfferEvaluator
) -> None:
    prepare(offer_evaluator)
    offer_evaluator.rate_offer(MODEL, "0x1", properties)

    assert offer_evaluator.unavailable_reason(MODEL) == f"No provider takes it: 1 offered to, of which {words}."
    assert offer_evaluator.unavailable_reason("vgg16") == "No provider on the market offers what the model needs."


def test_who_does_not_sign_is_left_alone_longer_each_time_until_it_signs() -> None:
    time = Time()
    offer_evaluator = OfferEvaluator(SETTINGS, monotonic=time)
    waits = []
    for _ in range(3):
        offer_evaluator.record_not_signed("0x1")
        began = time.now
        while offer_evaluator.rate_offer(MODEL, "0x1", offer()).score < 0:
            time.now += 1
        waits.append(time.now - began)
    offer_evaluator.record_signed("0x1")
    offer_evaluator.record_not_signed("0x1")
    time.now += waits[0]

    assert waits == sorted(set(waits))
    assert offer_evaluator.rate_offer(MODEL, "0x1", offer()).score > 0


def test_without_caps_any_price_is_taken() -> None:
    offer_evaluator = OfferEvaluator(replace(SETTINGS, max_price_hour=None, max_price_start=None))

    assert offer_evaluator.rate_offer(MODEL, "0x1", offer(start=9.0, cpu=1.0)).score > 0


def test_a_name_is_made_harmless() -> None:
    assert provider_name({"golem.node.id.name": "evil\x1b[2J" + "x" * 100}, "0x1") == "evil[2J" + "x" * 53
    assert provider_name({}, "0x0123456789") == "0x01234567"


def test_a_chunk_gets_time_by_its_size_and_the_measured_speed() -> None:
    def limit(**facts: Any) -> float:
        return chunk_timeout(**{"items": 16, "size_bytes": 0, "images_per_second": 16.0, "max_seconds": 120.0, **facts})

    assert limit() == 35.0
    assert limit(size_bytes=2_000_000) == 45.0
    assert limit(images_per_second=0.1) == limit(images_per_second=None) == 120.0


def test_a_chunk_is_late_only_when_it_is_known_how_long_it_should_take() -> None:
    assert straggler_seconds(items=16, images_per_second=16.0) == 5.0
    assert straggler_seconds(items=16, images_per_second=None) is None


def test_an_idle_computer_is_kept_until_it_has_cost_a_start() -> None:
    price = Price.from_offer(offer(start=0.001, second=0.0001))

    assert idle_seconds(price, start_seconds=2.0, max_seconds=60.0) == 12.0
    assert idle_seconds(price, start_seconds=2.0, max_seconds=5.0) == 5.0
    assert idle_seconds(Price.from_offer(offer(second=0.0)), start_seconds=2.0, max_seconds=60.0) == 60.0
