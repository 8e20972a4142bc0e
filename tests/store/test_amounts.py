"""Splitting amounts of money: not the smallest unit is lost."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.amounts import equal_share, split, to_amount, total

UNIT = Decimal("1e-18")

amounts = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places), st.integers(0, 10**27), st.sampled_from([0, 2, 18, 20])
)
weights = st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(amount=amounts, weights=weights)
def test_shares_add_up_to_the_amount_and_are_off_by_less_than_a_unit(amount: Decimal, weights: list[float]) -> None:
    shares = split(amount, weights)

    assert total(shares) == amount
    assert len(shares) == len(weights)
    whole = sum(map(Decimal, weights))
    with localcontext(prec=100):
        for share, weight in zip(shares, weights, strict=True):
            assert share >= 0
            ideal = amount * Decimal(weight) / sum(map(Decimal, weights)) if whole else amount / len(weights)
            assert abs(share - ideal) < UNIT * Decimal("1.0000001")


@settings(max_examples=100, deadline=None)
@given(amount=amounts, count=st.integers(1, 40))
def test_equal_shares_add_up_and_equal_a_split_by_equal_weights(amount: Decimal, count: int) -> None:
    shares = [equal_share(amount, count, position) for position in range(count)]

    assert total(shares) == amount
    assert shares == split(amount, [1.0] * count)


@settings(max_examples=100, deadline=None)
@given(amount=amounts)
def test_an_amount_is_read_back_as_it_was_written(amount: Decimal) -> None:
    text = to_amount(amount)

    assert Decimal(text) == amount
    assert "E" not in text.upper()
    assert text == "0" or not text.startswith("00")


@settings(max_examples=50, deadline=None)
@given(each=st.lists(amounts, max_size=30), seed=st.randoms())
def test_a_total_does_not_depend_on_the_order_nor_on_the_context(each: list[Decimal], seed: object) -> None:
    shuffled = list(each)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]

    with localcontext(prec=3):
        assert total(each) == total(shuffled)


def test_thirds_leave_a_unit_for_the_first() -> None:
    shares = split(Decimal(1), [5.0, 5.0, 5.0])

    assert [to_amount(share) for share in shares] == [
        "0.333333333333333334",
        "0.333333333333333333",
        "0.333333333333333333",
    ]


def test_the_remaining_unit_goes_to_the_share_that_lost_most() -> None:
    # 10 units by 1 : 2 are 3.33 and 6.67.
    assert split(10 * UNIT, [1.0, 2.0]) == [3 * UNIT, 7 * UNIT]


@pytest.mark.parametrize("useless", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_a_positive_number_counts_as_zero(useless: float) -> None:
    assert split(Decimal(6), [useless, 2.0, 1.0]) == [0, 4, 2]
    assert split(Decimal(6), [useless, useless]) == [3, 3]


def test_a_split_without_weights_is_empty() -> None:
    assert split(Decimal(6), []) == []


@pytest.mark.parametrize("text", ["-1", "NaN", "Infinity", "-1e-30"])
def test_a_value_that_is_not_an_amount_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="not an amount"):
        to_amount(Decimal(text))


@pytest.mark.parametrize(
    ("written", "plain"), [("1E-7", "0.0000001"), ("1.500", "1.5"), ("10", "10"), ("1E+2", "100"), ("0E-18", "0")]
)
def test_an_amount_is_written_without_exponent_or_trailing_zeros(written: str, plain: str) -> None:
    assert to_amount(Decimal(written)) == plain
