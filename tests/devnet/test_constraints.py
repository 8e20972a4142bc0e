"""The constraint language: matching and syntax errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devnet.constraints import parse
from devnet.errors import ApiError

PROPERTIES = {
    "golem.runtime.name": "mlg",
    "golem.runtime.capabilities": ["vpn", "inet"],
    "golem.inf.mem.gib": 8.0,
    "golem.inf.cpu.cores": 10,
    "golem.node.id.name": "alpha (a*b)",
    "golem.srv.caps.multi-activity": True,
    "golem.com.payment.protocol.version": "3",
}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "()",
        "(&)",
        "(golem.runtime.name=mlg)",
        "( golem.runtime.name = mlg )",
        "(golem.runtime.name=m*)",
        "(golem.runtime.name=*)",
        "(golem.runtime.name=*l*)",
        "(golem.runtime.capabilities=inet)",
        "(golem.runtime.capabilities=vp*)",
        "(golem.inf.mem.gib=8)",
        "(golem.inf.mem.gib>=8)",
        "(golem.inf.cpu.cores>9)",  # as text, "10" would be less
        "(golem.inf.cpu.cores<=10.0)",
        "(golem.com.payment.protocol.version>1)",
        "(golem.srv.caps.multi-activity=true)",
        "(golem.node.id.name=alpha \\28a\\2ab\\29)",
        "(golem.node.id.name>alpha)",
        "(!(golem.runtime.name=vm))",
        "(!(absent=1))",
        "(&(golem.runtime.name=mlg)\n\t(|(golem.inf.mem.gib>100)\n\t(golem.inf.cpu.cores<11)))",
    ],
)
def test_a_constraint_matches(text: str) -> None:
    assert parse(text)(PROPERTIES)


@pytest.mark.parametrize(
    "text",
    [
        "(|)",
        "(absent=*)",
        "(absent<5)",
        "(golem.runtime.name=ml)",
        "(golem.runtime.name=*x)",
        "(golem.runtime.capabilities=net)",
        "(golem.inf.mem.gib<8)",
        "(golem.inf.cpu.cores<9)",
        "(!(&))",
        "(&(golem.runtime.name=mlg)(golem.runtime.name=vm))",
    ],
)
def test_a_constraint_does_not_match(text: str) -> None:
    assert not parse(text)(PROPERTIES)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("golem.runtime.name=vm", "'\\('"),
        ("(golem.runtime.name=vm", "at its end"),
        ("(golem.runtime.name)", "a comparison"),
        ("(=vm)", "a comparison"),
        ("(golem.runtime.name=)", "nothing to compare"),
        ("(a=b)(c=d)", "more after"),
        ("(!)", "'\\('"),
        ("(&(a=b)", "'\\)'"),
        ("(&a=b)", "'\\)'"),
        ("(" * 1000, "a comparison"),
        ("(!" * 1000, "nested"),
    ],
)
def test_a_syntax_error_has_a_position(text: str, reason: str) -> None:
    with pytest.raises(ApiError, match=reason):
        parse(text)


names = st.from_regex(r"[a-z]{1,5}(\.[a-z]{1,5}){0,2}", fullmatch=True)
plain = st.from_regex(r"[a-zA-Z0-9_\-]{1,8}", fullmatch=True)
leaves = st.builds("({}={})".format, names, plain)
constraints = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda parts: f"(&{''.join(parts)})", st.lists(inner, max_size=3)),
        st.builds(lambda parts: f"(|{' '.join(parts)})", st.lists(inner, max_size=3)),
        st.builds("(!{})".format, inner),
    ),
    max_leaves=8,
)
properties = st.dictionaries(names, st.one_of(plain, st.integers(), st.booleans(), st.lists(plain, max_size=3)))


@given(constraints, properties)
def test_a_negation_is_the_opposite(text: str, given_properties: dict[str, object]) -> None:
    assert parse(f"(!{text})")(given_properties) is not parse(text)(given_properties)


@given(constraints, constraints, properties)
def test_and_and_or_combine_their_parts(left: str, right: str, given_properties: dict[str, object]) -> None:
    either, both = [parse(each)(given_properties) for each in (left, right)], parse(f"(&{left}{right})")

    assert both(given_properties) is all(either)
    assert parse(f"(|{left}{right})")(given_properties) is any(either)


@given(st.text(alphabet="()&|!=<>*ab.1 \\", max_size=30), properties)
def test_any_text_is_parsed_or_rejected(text: str, given_properties: dict[str, object]) -> None:
    try:
        parse(text)(given_properties)
    except ApiError as error:
        assert "wrong" in str(error)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_numbers_are_compared_as_numbers(given_number: int, wanted: int) -> None:
    assert parse(f"(n>={wanted})")({"n": given_number}) is (given_number >= wanted)
    assert parse(f"(n<{wanted}.0)")({"n": str(given_number)}) is (given_number < wanted)
