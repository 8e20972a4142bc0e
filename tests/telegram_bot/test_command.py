"""The command `mlg telegram`: what it says when it cannot start."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from provider_image.errors import ConfigError
from telegram_bot.state import _SCHEMA, BotState
from tests.conftest import ROOT
from tests.telegram_bot.fake_bot_api import TOKEN
from tests.timing import DEADLINE_SECONDS


def run(home: Path, code: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process that runs some code first."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MLG_")}
    return subprocess.run(
        [sys.executable, "-c", f"{code}\nimport mlg; mlg.main()", "telegram", "--home", str(home), *arguments],
        cwd=ROOT,
        env={**variables, "MLG_TELEGRAM_API": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys; sys.modules['telegram'] = None", "scripts/setup telegram"),
        ("", "@BotFather"),
        ("import os; os.environ['MLG_TELEGRAM_TOKEN'] = 'abcdefgh'", "MLG_TELEGRAM_TOKEN has no token"),
        (
            f"import os; os.environ['MLG_TELEGRAM_TOKEN'] = '{TOKEN}'; os.environ['MLG_TELEGRAM_RATE'] = '0'",
            "MLG_TELEGRAM_RATE",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_that_says_what_to_do(tmp_path: Path, code: str, says: str) -> None:
    result = run(tmp_path / "home", code)

    assert result.returncode == 2
    assert says in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "home").exists()


def test_a_state_that_is_no_database_or_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "telegram.sqlite3"
    file.write_text("no database at all, but long enough to be read as one" * 100)
    with pytest.raises(ConfigError, match="is not a state"):
        BotState(file)
    file.unlink()
    BotState(file).close()
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer version"):
        BotState(file)


def test_a_state_of_the_first_version_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "telegram.sqlite3"
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.executescript(f"{_SCHEMA}PRAGMA user_version = 1;")
        database.execute(
            "INSERT INTO jobs (chat_id, state, key, reply_to, due_at, created_at) VALUES (42, 'sending', 'k', 1, 0, 0)"
        )
        database.commit()

    with contextlib.closing(BotState(file)) as state:
        (job,) = state.open_jobs(42)

    assert (job.key, job.is_begun, job.counted_on) == ("k", False, None)


def test_the_state_is_private_and_is_opened_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "telegram.sqlite3"
    with contextlib.closing(BotState(file)) as state:
        state.see_chat(42, "de", 0.0)
    with contextlib.closing(BotState(file)) as state:
        chat = state.chat(42)

    assert chat is not None and chat.language == "de"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
