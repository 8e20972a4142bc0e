"""The command `mlg telegram`: a Telegram bot that is a client of a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import click

from cli.options import environment, home_option, setting_option
from provider_image.errors import ConfigError


@click.command()
@home_option
@setting_option("--url", "MLG_URL", metavar="URL", help="Address of the server. [MLG_URL; http://127.0.0.1:5000]")
@setting_option(
    "--token-file",
    "MLG_TELEGRAM_TOKEN_FILE",
    metavar="FILE",
    help="File with the bot's token. [MLG_TELEGRAM_TOKEN_FILE]",
)
@setting_option(
    "--users",
    "MLG_TELEGRAM_USERS",
    metavar="FILE",
    help="File with the users who may use the bot, and their API keys. [MLG_TELEGRAM_USERS; everybody]",
)
@click.option("--ready-fd", type=int, hidden=True)
def telegram(ready_fd: int | None) -> None:
    """Run a Telegram bot that sends photos to a server and shows the answers, until Ctrl-C or SIGTERM.

    It may run anywhere from where it reaches the server and api.telegram.org. Its state is the file telegram.sqlite3 in
    the home. The token comes from @BotFather; write it to a file that only you can read.

    \b
    Example:
      mlg telegram --token-file ~/telegram-token
      mlg telegram --token-file ~/telegram-token --url https://mlg.example.org --users users.txt
    """
    try:
        from telegram_bot.bot import run_bot
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "telegram":
            raise
        raise ConfigError(
            "The bot needs python-telegram-bot, which is not installed. Install it: scripts/setup telegram"
        ) from error
    from cli.logs import configure_logging
    from telegram_bot.settings import TelegramSettings

    settings = TelegramSettings.from_env(environment())
    configure_logging()

    def announce(name: str) -> None:
        click.echo(f"mlg telegram serves @{name}", err=True)
        if ready_fd is not None:
            with os.fdopen(ready_fd, "w") as ready:
                ready.write(f"{name}\n")

    async def run() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await run_bot(settings, stop, on_ready=announce)

    with contextlib.closing(asyncio.Runner()) as runner:
        runner.run(run())
