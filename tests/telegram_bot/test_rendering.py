"""Answers as text, secrets in logs, and settings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mlg_client import Request
from provider_image.errors import ConfigError
from telegram_bot import redaction
from telegram_bot.rendering import MAX_CAPTION, album_text, answer_text, file_of, progress_text, shorten, values_text
from telegram_bot.settings import Secret, TelegramSettings, read_users
from telegram_bot.state import Photo
from telegram_bot.texts import duration
from tests.telegram_bot.fake_bot_api import TOKEN


@pytest.mark.parametrize(
    ("preds", "lines"),
    [
        ([["n1", "tiger_cat", 0.5]], ["tiger cat", "██████░░░░░░ 50 %"]),
        ([["good", 1.0], ["bad", 0.004]], ["good", "████████████ 100 %", "bad", "░░░░░░░░░░░░ 0.4 %"]),
        ({"labels": [["good", 0.75]], "words": []}, ["good", "█████████░░░ 75 %"]),
        ({"value": 3.72}, ["value: 3.72"]),
        ({"dimensions": 1280}, ["dimensions: 1280"]),
        (
            {"faces": [{"box": {"left": 1, "top": 2}, "score": 0.91234}]},
            ["faces (1)", "  1", "    box", "      left: 1", "      top: 2", "    score: 0.9123"],
        ),
        ({"deep": [[[[[1, 2]]]]]}, ["deep (1)", "  1 (1)", "    1 (1)", "      1: (1)"]),
        ([], [" (0)"]),
        (None, []),
        ("text", ["text"]),
    ],
)
def test_values_of_any_answer_are_written_as_lines(preds: Any, lines: list[str]) -> None:
    assert values_text(preds).splitlines() == lines


def test_endings_without_an_answer_say_why() -> None:
    failed = answer_text({"status": "failed", "reason": "Too dark."}, "en", "Lite")
    refused = answer_text({"status": "refused", "reason": "No image."}, "de", "Lite")
    lost = answer_text({"status": "failed", "code": "unknown_request", "reason": "x"}, "en", "Lite")

    assert failed == "It failed: Too dark."
    assert refused == "Der Server kann es nicht verwenden: No image."
    assert "no longer has the result" in lost


def test_an_album_lists_its_photos_by_number() -> None:
    answers: list[dict[str, Any] | None] = [
        {"status": "done", "preds": [["n1", "cat", 0.9]]},
        None,
        {"status": "failed", "reason": "Broken."},
        {"status": "done", "preds": {"value": 2}},
    ]
    photos = [
        Photo(file_id="f", name="n", size_bytes=1, position=number, answer=one) for number, one in enumerate(answers)
    ]

    assert album_text(photos, "en", "Lite").splitlines() == [
        "Lite",
        "",
        "1. cat 90 %",
        "3. It failed: Broken.",
        "4. value: 2",
    ]


def test_a_job_says_how_far_it_is() -> None:
    def text(status: str, count: int = 1, **more: Any) -> str:
        request = Request.from_answer({"req_id": "r", "status": status, **more})
        return progress_text(request, "en", done=0, count=count)

    assert progress_text(None, "de", done=0, count=1) == "Eingereiht."
    assert text("queued", eta_seconds=40.2) == "Queued, about 40 s."
    assert text("queued", count=3) == "Queued. Answered: 0 of 3."
    assert text("claimed", eta_seconds=1.0) == "In progress."
    assert text("claimed", progress=0.4567) == "In progress: 46 %."


def test_texts_are_cut_where_telegram_would_refuse_them() -> None:
    # An emoji counts as two.
    text = "😀" * MAX_CAPTION

    assert len(shorten(text, MAX_CAPTION).encode("utf-16-le")) // 2 <= MAX_CAPTION
    assert shorten("short", MAX_CAPTION) == "short"
    assert shorten("half \ud83d", MAX_CAPTION) == "half ?"


def test_the_image_of_an_answer_is_preferred_to_its_other_files() -> None:
    assert file_of({"a.bin": "application/octet-stream", "z.png": "image/png"}) == ("z.png", "image/png")
    assert file_of({"a.png": "image/png", "image": "image/jpeg"}) == ("image", "image/jpeg")
    assert file_of({"vector": "application/octet-stream"}) == ("vector", "application/octet-stream")
    assert file_of({}) is None


def test_durations_are_short() -> None:
    assert [duration(seconds) for seconds in (0.2, 42, 89, 600, 7200)] == ["1 s", "42 s", "89 s", "10 min", "2 h"]


# Secrets


def test_secrets_are_removed_from_records_and_tracebacks(caplog: pytest.LogCaptureFixture) -> None:
    undo = redaction.install([TOKEN])
    try:
        log = logging.getLogger("anything")
        log.warning("at %s and %r", f"/bot{TOKEN}/x", {"secret": TOKEN.partition(":")[2]})
        log.warning("mismatched %d", TOKEN)
        try:
            raise ValueError(f"the token {TOKEN} was rejected")
        except ValueError:
            log.exception("failed")
        log.warning("harmless %s", 5)
    finally:
        undo()
    lines = [logging.Formatter().format(record) for record in caplog.records]

    assert len(lines) == 4
    assert not [line for line in lines if TOKEN in line or TOKEN.partition(":")[2] in line]
    assert "the token [hidden] was rejected" in lines[2] and "ValueError" in lines[2]
    assert lines[3] == "harmless 5"


def test_the_record_of_settings_does_not_show_secrets(tmp_path: Path) -> None:
    settings = TelegramSettings.from_env({"MLG_TELEGRAM_TOKEN": TOKEN, "MLG_API_KEY": "mlg_secret"})

    assert settings.read_token().reveal() == TOKEN
    assert TOKEN not in repr(settings) and "mlg_secret" not in repr(settings)


def test_the_token_comes_from_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o604)
    settings = TelegramSettings.from_env({"MLG_TELEGRAM_TOKEN_FILE": str(file)})
    with pytest.raises(ConfigError, match="chmod 600"):
        settings.read_token()
    file.chmod(0o640)

    assert settings.read_token().reveal() == TOKEN


@pytest.mark.parametrize("text", ["", "nonsense", "123:short", f"{TOKEN} x"])
def test_what_is_no_token_is_refused_without_being_quoted(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ConfigError) as error:
        TelegramSettings.from_env({"MLG_TELEGRAM_TOKEN_FILE": str(file)}).read_token()

    assert not text or text not in str(error.value)


def test_without_a_token_the_error_says_how_to_get_one() -> None:
    with pytest.raises(ConfigError, match="@BotFather"):
        TelegramSettings.from_env({}).read_token()


def test_the_file_with_users_names_them_and_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text("# the family\n42 mlg_key  # Alice\n43\n\n")
    file.chmod(0o600)
    users = read_users(file)
    file.write_text("42\n*\n")
    opened = read_users(file)

    assert {id: key.reveal() if key else None for id, key in users.keys.items()} == {42: "mlg_key", 43: None}
    assert [users.is_allowed(42), users.is_allowed(44), opened.is_allowed(44)] == [True, False, True]


@pytest.mark.parametrize("line", ["alice", "42 key more", "-5", "4.2"])
def test_a_wrong_line_in_the_file_with_users_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "users"
    file.write_text(f"41\n{line}\n")
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="line 2"):
        read_users(file)


@pytest.mark.parametrize("text", ["bot.example.org", "ftp://x", "https://x/?a=1"])
def test_an_address_that_cannot_be_used_names_its_variable(text: str) -> None:
    with pytest.raises(ConfigError, match="MLG_TELEGRAM_WEBHOOK"):
        TelegramSettings.from_env({"MLG_TELEGRAM_WEBHOOK": text})


def test_secrets_do_not_show_themselves() -> None:
    assert "abc" not in f"{Secret('abc')!r} {Secret('abc')}"
