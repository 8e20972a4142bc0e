"""The settings of the server room: where the home is, what the server takes, how long things are kept.

Read once by `from_env` in `commands.py` and passed on. Every field is a row of the README's settings table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_image.environment import Environment
from provider_image.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What `mlg serve` and every command on a home needs."""

    #: Folder that holds the database, the pictures and the models. MLG_HOME. Defaults to ~/.mlg.
    home: Path
    #: Address to listen on. MLG_HOST. Defaults to 127.0.0.1.
    host: str = "127.0.0.1"
    #: Port to listen on; 0 takes a free one. MLG_PORT. Defaults to 5000.
    port: int = 5000
    #: Server processes. MLG_SERVER_PROCESSES. Defaults to 1.
    server_processes: int = 1
    #: Requests that one server process works on at once. MLG_SERVER_THREADS. Defaults to 32.
    server_threads: int = 32
    #: Largest picture in bytes. MLG_MAX_IMAGE_BYTES. Defaults to 2097152 (2 MB).
    max_image_bytes: int = 2 * 1024 * 1024
    #: Largest body of a batch in bytes, and of what a zip in it unpacks to.
    #: MLG_MAX_BATCH_BYTES. Defaults to 2147483648 (2 GB).
    max_batch_bytes: int = 2 * 1024**3
    #: Most pixels a picture may declare. MLG_MAX_PIXELS. Defaults to 36000000.
    max_pixels: int = 36_000_000
    #: Requests that may wait before new ones are refused with 503. MLG_MAX_BACKLOG. Defaults to 1000000.
    max_backlog: int = 1_000_000
    #: Longest time in seconds that `?wait=` holds an answer. MLG_MAX_HOLD_SECONDS. Defaults to 60 seconds.
    max_hold_seconds: float = 60.0
    #: Serve everybody on any address while there are no API keys. MLG_OPEN. Defaults to 0.
    is_open: bool = False
    #: Host names, with commas between, by which a server without API keys is reached beside this machine's own.
    #: MLG_ALLOWED_HOSTS. Defaults to none.
    allowed_hosts: frozenset[str] = frozenset()
    #: Fetch pictures by URL for clients. MLG_FETCH_URLS. Defaults to 0.
    fetches_urls: bool = False
    #: Seconds that fetching one picture may take. MLG_FETCH_SECONDS. Defaults to 10 seconds.
    fetch_seconds: float = 10.0
    #: Streams of events that one server process keeps open. MLG_MAX_STREAMS. Defaults to 256.
    max_streams: int = 256
    #: Send webhooks also to private addresses and without TLS. MLG_WEBHOOKS_PRIVATE. Defaults to 0.
    webhooks_private: bool = False
    #: Seconds to wait for a locked database. MLG_BUSY_SECONDS. Defaults to 5 seconds.
    busy_seconds: float = 5.0
    #: Seconds that pictures of finished requests are kept. MLG_KEEP_PICTURES_SECONDS. Defaults to 604800 (7 days).
    keep_pictures_seconds: float = 7 * 86400.0
    #: Seconds that finished requests are kept. MLG_KEEP_RESULTS_SECONDS. Defaults to 2592000 (30 days).
    keep_results_seconds: float = 30 * 86400.0

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.home / "mlg.db"

    @property
    def blobs(self) -> Path:
        """The folder of pictures."""
        return self.home / "blobs"

    @property
    def models(self) -> Path:
        """The folder of model artefacts."""
        return self.home / "models"

    @property
    def work(self) -> Path:
        """The folder of chunk files under way."""
        return self.home / "work"

    @classmethod
    def from_env(cls, variables: Mapping[str, str]) -> ServerSettings:
        """Read the settings. :raises ConfigError: a value cannot be used; names the variable."""
        env = Environment(variables)
        return cls(
            home=env.path("MLG_HOME", "~/.mlg"),
            host=env.text("MLG_HOST", cls.host),
            port=env.whole("MLG_PORT", cls.port, minimum=0, maximum=65535),
            server_processes=env.whole("MLG_SERVER_PROCESSES", cls.server_processes, minimum=1, maximum=64),
            server_threads=env.whole("MLG_SERVER_THREADS", cls.server_threads, minimum=2, maximum=1024),
            max_image_bytes=env.whole(
                "MLG_MAX_IMAGE_BYTES", cls.max_image_bytes, minimum=1024, maximum=64 * 1024 * 1024
            ),
            max_batch_bytes=env.whole("MLG_MAX_BATCH_BYTES", cls.max_batch_bytes, minimum=1024, maximum=1024**4),
            max_pixels=env.whole("MLG_MAX_PIXELS", cls.max_pixels, minimum=1, maximum=170_000_000),
            max_backlog=env.whole("MLG_MAX_BACKLOG", cls.max_backlog, minimum=1, maximum=1_000_000_000),
            max_hold_seconds=env.number("MLG_MAX_HOLD_SECONDS", cls.max_hold_seconds, minimum=0, maximum=3600),
            is_open=env.yes_or_no("MLG_OPEN", cls.is_open),
            allowed_hosts=_hosts(env.text("MLG_ALLOWED_HOSTS", "none")),
            fetches_urls=env.yes_or_no("MLG_FETCH_URLS", cls.fetches_urls),
            fetch_seconds=env.number("MLG_FETCH_SECONDS", cls.fetch_seconds, minimum=0.1, maximum=60),
            max_streams=env.whole("MLG_MAX_STREAMS", cls.max_streams, minimum=1, maximum=10_000),
            webhooks_private=env.yes_or_no("MLG_WEBHOOKS_PRIVATE", cls.webhooks_private),
            busy_seconds=env.number("MLG_BUSY_SECONDS", cls.busy_seconds, minimum=0.01, maximum=300),
            keep_pictures_seconds=env.number(
                "MLG_KEEP_PICTURES_SECONDS", cls.keep_pictures_seconds, minimum=0, maximum=3.2e9
            ),
            keep_results_seconds=env.number(
                "MLG_KEEP_RESULTS_SECONDS", cls.keep_results_seconds, minimum=0, maximum=3.2e9
            ),
        )


def _hosts(text: str) -> frozenset[str]:
    """Read host names with commas between."""
    words = (word.strip().lower() for word in text.split(","))
    names = frozenset() if text == "none" else frozenset(word for word in words if word)
    for name in names:
        if not re.fullmatch(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]", name):
            raise ConfigError(f"MLG_ALLOWED_HOSTS: {name!r} is not a host name. Leave scheme and port out.")
    return names
