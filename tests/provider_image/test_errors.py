"""The codes of errors, which programs rely on."""

from __future__ import annotations

import pytest

from provider_image.errors import EmptyImage, ImageTooLarge, MlgError, NotAnImage
from server.errors import TooManyItems
from server.http_client import RequestFailed


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (MlgError, "error"),
        (EmptyImage, "empty_image"),
        (NotAnImage, "not_an_image"),
        (ImageTooLarge, "too_many_pixels"),
        (TooManyItems, "too_many_items"),
        (RequestFailed, "error"),
    ],
)
def test_an_error_has_its_name_as_code_unless_it_gives_another(kind: type[MlgError], code: str) -> None:
    assert kind.code == code
    assert kind("Message.").code == code
