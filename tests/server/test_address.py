"""Addresses as URLs."""

from __future__ import annotations

import pytest

from server.address import base_url


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:5000"),
        ("0.0.0.0", "http://127.0.0.1:5000"),
        ("::", "http://[::1]:5000"),
        ("fe80::1", "http://[fe80::1]:5000"),
        ("example.org", "http://example.org:5000"),
    ],
)
def test_a_wildcard_address_is_reached_on_this_machine(host: str, url: str) -> None:
    assert base_url(host, 5000) == url
