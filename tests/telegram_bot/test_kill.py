"""`mlg telegram` and `mlg serve` as processes that are killed: every photo is answered, once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from store.requests import Claim
from tests.conftest import ROOT, RunningServer
from tests.extensions import FOLDER
from tests.process_tree import ends_with_tests
from tests.telegram_bot.fake_bot_api import TOKEN, FakeBotApi
from tests.telegram_bot.test_bot import png
from tests.timing import until

COLORS = ("red", "green", "blue", "black")


async def start_bot(home: Path, base: str, api: FakeBotApi) -> asyncio.subprocess.Process:
    token = home.parent / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    with (home.parent / "bot.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *ends_with_tests(sys.executable, "-m", "mlg", "telegram", "--home", str(home), "--token-file", str(token)),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLG_URL": base, "MLG_TELEGRAM_API": api.base, "MLG_LOG_LEVEL": "DEBUG"},
            start_new_session=True,
        )


@pytest.mark.slow
async def test_a_bot_that_is_killed_like_its_server_answers_every_photo_once(
    tmp_path: Path,
    start_server: Callable[..., RunningServer],
    claim: Callable[[], list[Claim]],
    finish: Callable[..., Any],
) -> None:
    pressed: set[int] = set()
    answered = 0

    def live() -> bool:
        """Let users press what they see and a batcher answer, one request at a time; tell whether all is answered."""
        nonlocal answered
        for number, message in api.chats[42].items():
            if number not in pressed and any(label.startswith("Classification") for label, _ in message.buttons):
                pressed.add(number)
                api.press(42, number, "Classification")
        for one in claim():
            finish([one])
            answered += 1
        return sum("label 0" in text for text in api.texts(42)) == len(COLORS)

    server = await asyncio.to_thread(start_server, PYTHONPATH=str(FOLDER))
    async with FakeBotApi().running() as api:
        for color in COLORS:
            api.photo(42, png(color))
        # Killed when the menus are there, and when some answers are; the last one outlives the server.
        for is_enough in (lambda: live() or len(pressed) >= 2, lambda: live() or answered >= 2):
            bot = await start_bot(tmp_path / "bot", server.base, api)
            await until(is_enough)
            os.killpg(bot.pid, signal.SIGKILL)
            await bot.wait()
        bot = await start_bot(tmp_path / "bot", server.base, api)
        await until(lambda: live() or answered >= 3)
        server.stop(signal.SIGKILL)
        port = server.base.rpartition(":")[2]
        await asyncio.to_thread(start_server, f"--port={port}", PYTHONPATH=str(FOLDER))
        await until(live)
        os.killpg(bot.pid, signal.SIGKILL)
        await bot.wait()

    replies = [message.reply_to for message in api.chats[42].values() if "label 0" in message.text]
    assert len(set(replies)) == len(replies) == len(COLORS)
    assert answered == len(COLORS)
    assert TOKEN not in (tmp_path / "bot.log").read_text() and "[hidden]" in (tmp_path / "bot.log").read_text()
