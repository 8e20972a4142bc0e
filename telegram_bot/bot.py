"""The whole bot: its parts, and how they are started and stopped.

Called by `mlg telegram`, tests and benchmarks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import telegram
from telegram.request import HTTPXRequest

from mlg_client import ClientError, Request, uses_proxies
from provider_image.errors import ConfigError, MlgError
from telegram_bot import redaction
from telegram_bot.accounts import Accounts
from telegram_bot.catalogue import ModelMenu
from telegram_bot.conversation import Conversation, day_of
from telegram_bot.jobs import JobRunner
from telegram_bot.publisher import Pace, Publisher
from telegram_bot.receiver import KINDS, Receiver, new_secret
from telegram_bot.settings import Secret, TelegramSettings, Users, read_users
from telegram_bot.state import BotState
from telegram_bot.texts import LANGUAGES, say
from telegram_bot.watcher import Watcher

log = logging.getLogger(__name__)

#: Connections to the Bot API, and how long one may take.
_CONNECTIONS, _TIMEOUT_SECONDS, _UPLOAD_SECONDS = 32, 20.0, 60.0
_PURGE_SECONDS = 3600.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.5, 30.0


@dataclass(frozen=True, kw_only=True)
class BotTimings:
    """Intervals in seconds that are no settings."""

    #: Between two reads of the server's models, and while it does not answer.
    models: float = 30.0
    models_retry: float = 5.0


async def run_bot(
    settings: TelegramSettings,
    stop: asyncio.Event,
    *,
    on_ready: Callable[[str], None],
    timings: BotTimings | None = None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Run the bot until `stop` is set.

    :param on_ready: called with the bot's name and, with a webhook, the port, once updates are taken.
    :raises ConfigError: a setting, the token or the file with users cannot be used.
    :raises StateInUse: another bot runs with this home.
    """
    token, users = settings.read_token(), read_users(settings.users_file)
    secret = new_secret()
    undo = redaction.install([*_secrets(settings, users), token.reveal(), secret])
    try:
        await _run(settings, token, users, secret, stop, on_ready, timings or BotTimings(), clock)
    except (ExceptionGroup, telegram.error.InvalidToken, sqlite3.Error) as error:
        causes = error if isinstance(error, ExceptionGroup) else ExceptionGroup("", [error])
        if causes.subgroup(telegram.error.InvalidToken) is not None:
            # Without the error itself, which quotes the token.
            raise ConfigError("Telegram does not accept the token. Ask @BotFather for a new one: /token.") from None
        if causes.subgroup(sqlite3.Error) is not None:
            raise MlgError(f"{settings.database} cannot be read or written. Is the disk full?") from error
        raise
    finally:
        undo()


async def _run(
    settings: TelegramSettings,
    token: Secret,
    users: Users,
    secret: str,
    stop: asyncio.Event,
    on_ready: Callable[[str], None],
    timings: BotTimings,
    clock: Callable[[], float],
) -> None:
    async with AsyncExitStack() as stack:
        state = BotState(settings.database)
        stack.callback(state.close)
        accounts = Accounts(settings, users)
        stack.push_async_callback(accounts.close)
        bot = _make_bot(settings, token)
        stack.push_async_callback(bot.shutdown)
        conversation = Conversation(state, accounts, clock)
        publisher = Publisher(state, bot, accounts, clock, Pace(settings.rate))

        def record(request: Request) -> None:
            runner.record(request)

        watcher = Watcher(accounts, record)
        stack.push_async_callback(watcher.close)
        runner = JobRunner(state, bot, accounts, conversation, clock, on_change=publisher.wake, on_request=watcher.add)

        def on_update(chat_id: int) -> None:
            publisher.wake(chat_id)
            runner.wake()

        receiver = Receiver(state, bot, conversation, clock, on_update=on_update)
        port = None
        if settings.webhook:
            port = await stack.enter_async_context(receiver.listening(settings, settings.webhook, secret))
        if not await _start(bot, stop, is_polling=port is None):
            return
        # Before updates are taken, so that the first menu is not delayed.
        pause = await _read_models(conversation, accounts, publisher, timings)
        for chat_id, request_id in state.waiting_requests():
            watcher.add(accounts.account(chat_id), request_id)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (
                    _keep_models(conversation, accounts, publisher, runner, timings, pause),
                    _purge(state, clock),
                    runner.run(),
                    publisher.run(),
                    receiver.acknowledge_presses(),
                )
            ]
            if settings.webhook and port is not None:
                tasks.append(group.create_task(_keep_webhook(bot, settings.webhook, secret)))
                on_ready(f"{bot.username} {port}")
            else:
                tasks.append(group.create_task(receiver.poll()))
                on_ready(bot.username)
            await stop.wait()
            for task in tasks:
                task.cancel()


def _make_bot(settings: TelegramSettings, token: Secret) -> telegram.Bot:
    # The library then gives durations as timedelta, without a warning.
    os.environ.setdefault("PTB_TIMEDELTA", "1")

    def request(connections: int) -> HTTPXRequest:
        return HTTPXRequest(
            connection_pool_size=connections,
            connect_timeout=_TIMEOUT_SECONDS,
            read_timeout=_TIMEOUT_SECONDS,
            write_timeout=_TIMEOUT_SECONDS,
            media_write_timeout=_UPLOAD_SECONDS,
            pool_timeout=_UPLOAD_SECONDS,
            httpx_kwargs={"trust_env": uses_proxies(settings.api_url)},
        )

    return telegram.Bot(
        token.reveal(),
        base_url=f"{settings.api_url}/bot",
        base_file_url=f"{settings.api_url}/file/bot",
        request=request(_CONNECTIONS),
        get_updates_request=request(2),
    )


async def _start(bot: telegram.Bot, stop: asyncio.Event, *, is_polling: bool) -> bool:
    """Log in, waiting for Telegram as long as it does not answer. :return: False if the bot is stopped meanwhile."""
    pause = _FIRST_PAUSE_SECONDS
    while not stop.is_set():
        try:
            await bot.initialize()
            if is_polling:
                await bot.delete_webhook()  # while there is one, Telegram lets nobody fetch updates
            for language in LANGUAGES:
                await bot.set_my_commands(_command_list(language), language_code=language)
            await bot.set_my_commands(_command_list("en"))
            return True
        except telegram.error.InvalidToken:
            raise
        except telegram.error.TelegramError as error:
            log.warning("Telegram does not answer: %s", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await stop.wait()
        pause = min(_MAX_PAUSE_SECONDS, pause * 2)
    return False


def _command_list(language: str) -> list[tuple[str, str]]:
    """Return the commands with their explanations, which are those of the welcome."""
    lines = (line.removeprefix("/").partition(" – ") for line in say(language, "welcome").splitlines())
    return [(name, text) for name, _, text in lines if text]


async def _keep_webhook(bot: telegram.Bot, url: str, secret: str) -> None:
    """Tell Telegram where to deliver updates, until it has heard."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            # One at a time, because their order matters.
            await bot.set_webhook(url, secret_token=secret, max_connections=1, allowed_updates=KINDS)
            return
        except telegram.error.InvalidToken:
            raise
        except telegram.error.TelegramError as error:
            log.warning("Telegram does not take the webhook: %s", error)
        await asyncio.sleep(pause)
        pause = min(_MAX_PAUSE_SECONDS, pause * 2)


async def _keep_models(
    conversation: Conversation,
    accounts: Accounts,
    publisher: Publisher,
    runner: JobRunner,
    timings: BotTimings,
    pause: float,
) -> None:
    """Keep the list of models up to date. :param pause: seconds until the first read."""
    while True:
        await asyncio.sleep(pause)
        pause = await _read_models(conversation, accounts, publisher, timings)
        runner.wake()


async def _read_models(
    conversation: Conversation, accounts: Accounts, publisher: Publisher, timings: BotTimings
) -> float:
    """Read the server's models once. :return: seconds until the next time."""
    try:
        models = await accounts.client(0).models()
    except ClientError as error:
        log.warning("the server does not list its models: %s", error.reason, extra={"code": error.code})
        return timings.models_retry
    for chat_id in conversation.set_menu(ModelMenu(models)):
        publisher.wake(chat_id)
    return timings.models


async def _purge(state: BotState, clock: Callable[[], float]) -> None:
    while True:
        now = clock()
        state.purge(now, day_of(now))
        await asyncio.sleep(_PURGE_SECONDS)


def _secrets(settings: TelegramSettings, users: Users) -> list[str]:
    """List the API keys of the server that the bot has."""
    return [key.reveal() for key in (settings.api_key, *users.keys.values()) if key is not None]
