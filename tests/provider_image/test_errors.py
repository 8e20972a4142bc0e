"""The codes of errors, which programs rely on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from provider_image.errors import (
    BrokenArtefact,
    BrokenImage,
    ChunkError,
    EmptyImage,
    ImageTooLarge,
    InferenceFailed,
    MlgError,
    NotAnImage,
    TooManyBytes,
    error_from_reply,
)
from provider_image.schemas import _WORD
from server.errors import TooManyItems
from server.http_client import RequestFailed
from tests.conftest import ROOT


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


def test_an_error_of_a_package_that_is_not_loaded_here_keeps_its_type_as_an_error_of_this_project() -> None:
    code = """if True:
        import json
        from provider_image.errors import BrokenArtefact, BrokenImage, InferenceFailed
        class TornPetal(BrokenImage): pass
        class Rotten(TornPetal): pass
        class NoSoil(BrokenArtefact): code = "dry"
        class Withered(InferenceFailed): code = "w" * 60
        print(json.dumps([kind("Why.").to_reply() for kind in (TornPetal, Rotten, NoSoil, Withered, BrokenImage)]))
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    replies = json.loads(run.stdout)

    errors = [error_from_reply(reply) for reply in replies]

    assert [type(error) for error in errors] == [BrokenImage, BrokenImage, BrokenArtefact, InferenceFailed, BrokenImage]
    assert {error.reason for error in errors} == {"Why."}
    for reply in replies:
        assert _WORD.fullmatch(reply["code"]), reply


def test_an_error_of_another_package_is_itself_where_it_is_loaded() -> None:
    assert type(error_from_reply(TooManyItems("No.").to_reply())) is TooManyItems
    assert type(error_from_reply({"code": "too_many_items"})) is TooManyItems
    assert type(error_from_reply({"code": "too_large__of_another_version"})) is TooManyBytes
    assert type(error_from_reply({"code": "__"})) is ChunkError
