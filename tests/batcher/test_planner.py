"""The planner, as properties for any mix of models, sizes, equal images and isolation."""

from __future__ import annotations

import random
from collections import Counter
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.planner import PlannedChunk, plan
from provider_image import services
from provider_image.service import OutputFile
from store.requests import ISOLATION_STEPS, Claim

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def claim(
    number: int,
    *,
    model: str = "resnet50",
    service: str = "classification",
    image: str | None = None,
    image_bytes: int = 100,
    isolation: int = 0,
    params: dict[str, int] | None = None,
) -> Claim:
    return Claim(
        number=number,
        id=f"id{number}",
        token=1,
        service=service,
        model=model,
        params=params or {},
        image_sha256=image or f"{number:064x}",
        image_bytes=image_bytes,
        attempts=0,
        isolation=isolation,
        created_at=NOON,
    )


#: Few models, images and parameters, so that some are equal; equal images have the same size.
parts = st.tuples(
    st.sampled_from(["resnet50", "vgg16", "densenet121"]),
    st.sampled_from(["classification", "style"]),
    st.one_of(st.none(), st.integers(0, 5)),
    st.integers(1, 400),
    st.integers(0, len(ISOLATION_STEPS) - 1),
    st.sampled_from([{}, {"size": 1}, {"size": 2}]),
)


@st.composite
def waiting(draw: st.DrawFn) -> list[Claim]:
    drawn = draw(st.lists(parts, max_size=80))
    numbers = draw(st.permutations(range(1, len(drawn) + 1)))
    return [
        claim(
            number,
            model=model,
            service=service,
            image=None if image is None else f"image{image}",
            image_bytes=size if image is None else 50 + image,
            isolation=isolation,
            params=params,
        )
        for number, (model, service, image, size, isolation, params) in zip(numbers, drawn, strict=True)
    ]


limits = {"max_items": st.integers(1, 16), "max_bytes": st.integers(1, 1000)}


def first_numbers(chunks: list[PlannedChunk]) -> list[int]:
    return [item.first.number for chunk in chunks for item in chunk.items]


@given(claims=waiting(), **limits)
def test_no_claim_is_lost_or_planned_twice(claims: list[Claim], max_items: int, max_bytes: int) -> None:
    chunks = plan(claims, max_items=max_items, max_bytes=max_bytes)

    planned = Counter(claim.number for chunk in chunks for claim in chunk.claims)
    assert planned == Counter(claim.number for claim in claims)


@given(claims=waiting(), **limits)
def test_limits_are_respected_and_only_a_single_item_may_exceed_the_bytes(
    claims: list[Claim], max_items: int, max_bytes: int
) -> None:
    chunks = plan(claims, max_items=max_items, max_bytes=max_bytes)

    for chunk in chunks:
        assert 1 <= len(chunk.items) <= max_items
        assert chunk.input_bytes <= max_bytes or len(chunk.items) == 1


@given(claims=waiting(), **limits)
def test_a_chunk_has_one_service_one_model_and_one_degree_of_isolation(
    claims: list[Claim], max_items: int, max_bytes: int
) -> None:
    chunks = plan(claims, max_items=max_items, max_bytes=max_bytes)

    for chunk in chunks:
        assert {(claim.service, claim.model, claim.isolation) for claim in chunk.claims} == {
            (chunk.service, chunk.model, chunk.isolation)
        }
        assert len(chunk.items) <= ISOLATION_STEPS[chunk.isolation]


@given(claims=waiting(), **limits)
def test_chunks_and_the_items_of_a_model_are_ordered_oldest_first(
    claims: list[Claim], max_items: int, max_bytes: int
) -> None:
    chunks = plan(claims, max_items=max_items, max_bytes=max_bytes)

    starts = [chunk.items[0].first.number for chunk in chunks]
    assert starts == sorted(starts)
    for kind in {(chunk.service, chunk.model, chunk.isolation) for chunk in chunks}:
        of_kind = [chunk for chunk in chunks if (chunk.service, chunk.model, chunk.isolation) == kind]
        assert first_numbers(of_kind) == sorted(first_numbers(of_kind))


@given(claims=waiting(), **limits)
def test_claims_share_an_item_exactly_when_they_are_equal_and_not_isolated(
    claims: list[Claim], max_items: int, max_bytes: int
) -> None:
    chunks = plan(claims, max_items=max_items, max_bytes=max_bytes)

    def key(claim: Claim) -> tuple[object, ...]:
        return claim.service, claim.model, claim.image_sha256, tuple(claim.params.items())

    items = [item for chunk in chunks for item in chunk.items]
    for item in items:
        assert len({key(claim) for claim in item.claims}) == 1
        assert len(item.claims) == 1 or all(claim.isolation == 0 for claim in item.claims)
    not_isolated = [key(item.first) for item in items if item.first.isolation == 0]
    assert len(not_isolated) == len(set(not_isolated))


@given(claims=waiting(), seed=st.integers(0, 1000), **limits)
def test_the_plan_does_not_depend_on_the_order_of_the_claims(
    claims: list[Claim], seed: int, max_items: int, max_bytes: int
) -> None:
    shuffled = random.Random(seed).sample(claims, len(claims))

    assert plan(shuffled, max_items=max_items, max_bytes=max_bytes) == plan(
        claims, max_items=max_items, max_bytes=max_bytes
    )


@given(count=st.integers(1, 60))
@settings(max_examples=20)
def test_no_more_chunks_are_made_than_the_items_need(count: int) -> None:
    chunks = plan([claim(number) for number in range(count)])

    assert len(chunks) == -(-count // 16)


def test_the_bytes_of_equal_images_count_once() -> None:
    claims = [claim(number, image="same", image_bytes=900) for number in range(40)]

    (chunk,) = plan(claims, max_bytes=1000)

    assert (len(chunk.items), len(chunk.claims), chunk.input_bytes) == (1, 40, 900)


def test_an_item_over_the_byte_limit_gets_its_own_chunk() -> None:
    sizes = [10, 5000, 10, 10]

    chunks = plan([claim(n, image_bytes=size) for n, size in enumerate(sizes)], max_bytes=1000)

    assert [[item.first.number for item in chunk.items] for chunk in chunks] == [[0], [1], [2, 3]]


def test_no_claims_give_no_chunks() -> None:
    assert plan([]) == []


def test_images_that_are_resized_count_with_what_they_are_in_the_chunk() -> None:
    claims = [claim(number, image_bytes=16 * 1024 * 1024) for number in range(16)]

    as_sent, resized = plan(claims), plan(claims, packed_bytes=lambda claim: 200_000)

    assert [len(chunk.items) for chunk in as_sent] == [4, 4, 4, 4]
    assert [len(chunk.items) for chunk in resized] == [16]


def test_images_that_take_long_are_sent_one_by_one() -> None:
    claims = [claim(number, service=service) for number in range(20) for service in ("image_to_image", "quality")]

    chunks = plan(claims)

    names = ("image_to_image", "quality")
    sizes = {name: [len(chunk.items) for chunk in chunks if chunk.service == name] for name in names}
    assert sizes == {"image_to_image": [1] * 20, "quality": [16, 4]}


@pytest.mark.parametrize(("megabytes", "items"), [(0, 16), (1, 16), (16, 4), (30, 2), (64, 1), (100, 1)])
def test_so_many_items_are_together_that_their_answers_fit_into_a_results_file(
    megabytes: int, items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OutputFile(help="A file.", media_type="application/octet-stream", max_bytes=megabytes << 20)
    service = SimpleNamespace(outputs={"file": file} if megabytes else {})
    monkeypatch.setattr(services, "load_service", lambda name: service)

    assert services.chunk_items("quality") == items
