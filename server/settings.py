"""The settings of the server room: where the home is, what the server takes, how long things are kept.

Read once by `from_env` in `commands.py` and passed on. Every field is a row of the README's settings table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from provider_image.environment import Environment


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
    #: Most pixels a picture may declare. MLG_MAX_PIXELS. Defaults to 36000000.
    max_pixels: int = 36_000_000
    #: Requests that may wait before new ones are refused with 503. MLG_MAX_BACKLOG. Defaults to 1000000.
    max_backlog: int = 1_000_000
    #: Longest time in seconds that `?wait=` holds an answer. MLG_MAX_HOLD_SECONDS. Defaults to 60 seconds.
    max_hold_seconds: float = 60.0
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
            max_pixels=env.whole("MLG_MAX_PIXELS", cls.max_pixels, minimum=1, maximum=170_000_000),
            max_backlog=env.whole("MLG_MAX_BACKLOG", cls.max_backlog, minimum=1, maximum=1_000_000_000),
            max_hold_seconds=env.number("MLG_MAX_HOLD_SECONDS", cls.max_hold_seconds, minimum=0, maximum=3600),
            busy_seconds=env.number("MLG_BUSY_SECONDS", cls.busy_seconds, minimum=0.01, maximum=300),
            keep_pictures_seconds=env.number(
                "MLG_KEEP_PICTURES_SECONDS", cls.keep_pictures_seconds, minimum=0, maximum=3.2e9
            ),
            keep_results_seconds=env.number(
                "MLG_KEEP_RESULTS_SECONDS", cls.keep_results_seconds, minimum=0, maximum=3.2e9
            ),
        )
