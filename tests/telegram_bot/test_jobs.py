"""The runner of jobs, without a network."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
import telegram

from telegram_bot.accounts import Accounts
from telegram_bot.conversation import Conversation
from telegram_bot.jobs import JobRunner
from telegram_bot.settings import TelegramSettings, Users
from telegram_bot.state import BotState
from tests.telegram_bot.fake_bot_api import TOKEN
from tests.timing import DEADLINE_SECONDS


@pytest.mark.parametrize("turns", range(3))
async def test_the_runner_stops_also_in_the_moment_in_which_it_is_woken(tmp_path: Path, turns: int) -> None:
    settings = TelegramSettings(home=tmp_path)
    accounts = Accounts(settings, Users(keys={}, is_open=True))
    with contextlib.closing(BotState(settings.database)) as state:
        conversation = Conversation(state, accounts, time.time)
        runner = JobRunner(
            state,
            telegram.Bot(TOKEN),
            accounts,
            conversation,
            time.time,
            on_change=lambda chat_id: None,
            on_request=lambda account, id: None,
        )
        task = asyncio.create_task(runner.run())
        await asyncio.sleep(0.01)
        runner.wake()
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=DEADLINE_SECONDS)

        assert done and task.cancelled()
