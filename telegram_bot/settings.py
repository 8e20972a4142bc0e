"""The settings of the bot, and its secrets.

Read once by `from_env` in the command and passed on. Every field is a row of docs/settings.md.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from provider_image.environment import Settings, home_setting, setting
from provider_image.errors import ConfigError

#: What BotFather gives: the bot's number and its secret.
_TOKEN = re.compile(r"\d{1,20}:[A-Za-z0-9_-]{20,100}")
_MAX_FILE_BYTES = 1024 * 1024


class Secret:
    """A text that is not shown when the record with it is."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "Secret(***)"

    def reveal(self) -> str:
        """Return the text."""
        return self._text


def _secret(variable: str, text: str) -> Secret:
    return Secret(text)


def _path(variable: str, text: str) -> Path:
    return Path(text).expanduser().absolute()


def _address(variable: str, text: str) -> str:
    """Read an address without a slash at its end."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"{variable}={text!r} is not an address such as https://bot.example.org/telegram.")
    return text.rstrip("/")


@dataclass(frozen=True, kw_only=True)
class TelegramSettings(Settings):
    """What `mlg telegram` needs."""

    #: Folder of the file in which the bot keeps its state, `telegram.sqlite3`.
    home: Path = home_setting()
    #: Token of the bot, from BotFather, if it is not in a file. MLG_TELEGRAM_TOKEN. Defaults to none.
    token: Secret | None = setting("MLG_TELEGRAM_TOKEN", None, parse=_secret)
    #: File with the token. MLG_TELEGRAM_TOKEN_FILE. Defaults to none.
    token_file: Path | None = setting("MLG_TELEGRAM_TOKEN_FILE", None, parse=_path)
    #: Address of the server: MLG_URL.
    server_url: str = setting("MLG_URL", "http://127.0.0.1:5000", parse=_address)
    #: API key for users without one of their own: MLG_API_KEY.
    api_key: Secret | None = setting("MLG_API_KEY", None, parse=_secret)
    #: File with the users who may use the bot, one number a line, each with an API key of the server if the user has
    #: one. A line `*`, or no file, lets everybody in. MLG_TELEGRAM_USERS. Defaults to none.
    users_file: Path | None = setting("MLG_TELEGRAM_USERS", None, parse=_path)
    #: Photos that a user without an API key of the own may send in a day (UTC); 0 is no limit.
    #: MLG_TELEGRAM_QUOTA. Defaults to 50.
    quota: int = setting("MLG_TELEGRAM_QUOTA", 50, minimum=0, maximum=1_000_000)
    #: Messages that are sent or edited in a second, over all chats. Telegram allows about 30.
    #: MLG_TELEGRAM_RATE. Defaults to 25.
    rate: float = setting("MLG_TELEGRAM_RATE", 25.0, minimum=0.1, maximum=10_000)
    #: Public address at which Telegram delivers updates; without one the bot fetches them.
    #: MLG_TELEGRAM_WEBHOOK. Defaults to none.
    webhook: str | None = setting("MLG_TELEGRAM_WEBHOOK", None, parse=_address)
    #: Address on which the bot listens for them. MLG_TELEGRAM_WEBHOOK_HOST. Defaults to 127.0.0.1.
    webhook_host: str = setting("MLG_TELEGRAM_WEBHOOK_HOST", "127.0.0.1")
    #: Port on which the bot listens for them; 0 takes a free one. MLG_TELEGRAM_WEBHOOK_PORT. Defaults to 8081.
    webhook_port: int = setting("MLG_TELEGRAM_WEBHOOK_PORT", 8081, minimum=0, maximum=65535)
    #: Address of the Bot API, for a server of one's own. MLG_TELEGRAM_API. Defaults to https://api.telegram.org.
    api_url: str = setting("MLG_TELEGRAM_API", "https://api.telegram.org", parse=_address)

    @property
    def database(self) -> Path:
        """The file with the bot's state."""
        return self.home / "telegram.sqlite3"

    def read_token(self) -> Secret:
        """Return the token. :raises ConfigError: there is none, or it is not one; does not quote it."""
        if self.token is not None:
            text, source = self.token.reveal(), "MLG_TELEGRAM_TOKEN"
        elif self.token_file is not None:
            text, source = _read_private(self.token_file).strip(), str(self.token_file)
        else:
            raise ConfigError(
                "The bot has no token. Ask @BotFather in Telegram for one, write it to a file that only you can read, "
                "and set MLG_TELEGRAM_TOKEN_FILE to its path."
            )
        if not _TOKEN.fullmatch(text):
            raise ConfigError(f"{source} has no token of a bot. It looks like 123456:ABC-DEF, as @BotFather wrote it.")
        return Secret(text)


@dataclass(frozen=True, kw_only=True)
class Users:
    """Who may use the bot."""

    #: Number of each user that is named -> the user's API key; None uses the bot's.
    keys: dict[int, Secret | None]
    #: Whether the others may use it too.
    is_open: bool

    def is_allowed(self, user_id: int) -> bool:
        """Tell whether a user may use the bot."""
        return self.is_open or user_id in self.keys


def read_users(file: Path | None) -> Users:
    """Read the file with users; without one everybody may use the bot.

    :raises ConfigError: it cannot be read, or others can read the keys in it; names the line.
    """
    return Users(keys={}, is_open=True) if file is None else _parse_users(_read_private(file).splitlines(), file)


def _parse_users(lines: Iterable[str], file: Path) -> Users:
    keys: dict[int, Secret | None] = {}
    is_open = False
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words == ["*"]:
            is_open = True
        elif words:
            if len(words) > 2 or not re.fullmatch(r"\d{1,18}", words[0]):
                raise ConfigError(f"{file}, line {number}: write a user's number, and an API key if the user has one.")
            keys[int(words[0])] = Secret(words[1]) if len(words) == 2 else None
    return Users(keys=keys, is_open=is_open)


def _read_private(file: Path) -> str:
    """Read a small file with secrets. :raises ConfigError: it cannot be read, or others can."""
    try:
        with file.open(encoding="utf-8") as opened:
            if stat.S_IMODE(os.fstat(opened.fileno()).st_mode) & 0o007:
                raise ConfigError(f"Everybody on this machine can read {file}. Run: chmod 600 {file}")
            return opened.read(_MAX_FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"{file} cannot be read: {reason}.") from error
