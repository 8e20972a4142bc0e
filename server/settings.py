"""The settings of the server: where it listens, what it accepts, its limits.

Read once by `from_env` in the command and passed on. Every field is a row of docs/settings.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from provider_image.environment import setting
from provider_image.errors import ConfigError
from provider_image.images.headers import MAX_PIXELS
from store.settings import HomeSettings


def _hosts(variable: str, text: str) -> frozenset[str]:
    """Read host names with commas between."""
    words = (word.strip().lower() for word in text.split(","))
    names = frozenset() if text == "none" else frozenset(word for word in words if word)
    for name in names:
        if not re.fullmatch(r"[a-z0-9_.-]+|\[[0-9a-f:.]+\]", name):
            raise ConfigError(f"{variable}: {name!r} is not a host name. Leave out scheme and port.")
    return names


@dataclass(frozen=True, kw_only=True)
class ServerSettings(HomeSettings):
    """What `mlg serve` needs."""

    #: Address to listen on. MLG_HOST. Defaults to 127.0.0.1.
    host: str = setting("MLG_HOST", "127.0.0.1")
    #: Port to listen on; 0 takes a free one. MLG_PORT. Defaults to 5000.
    port: int = setting("MLG_PORT", 5000, minimum=0, maximum=65535)
    #: Server processes. MLG_SERVER_PROCESSES. Defaults to 1.
    server_processes: int = setting("MLG_SERVER_PROCESSES", 1, minimum=1, maximum=64)
    #: Requests that one server process works on at once. MLG_SERVER_THREADS. Defaults to 32.
    server_threads: int = setting("MLG_SERVER_THREADS", 32, minimum=2, maximum=1024)
    #: Largest image in bytes. MLG_MAX_IMAGE_BYTES. Defaults to 16777216 (16 MB).
    max_image_bytes: int = setting("MLG_MAX_IMAGE_BYTES", 16 * 1024 * 1024, minimum=1024, maximum=64 * 1024 * 1024)
    #: Largest body of a batch in bytes, and of what a zip in it unpacks to.
    #: MLG_MAX_BATCH_BYTES. Defaults to 2147483648 (2 GB).
    max_batch_bytes: int = setting("MLG_MAX_BATCH_BYTES", 2 * 1024**3, minimum=1024, maximum=1024**4)
    #: Most pixels an image may declare, at most what is decoded. MLG_MAX_PIXELS. Defaults to 36000000.
    max_pixels: int = setting("MLG_MAX_PIXELS", MAX_PIXELS, minimum=1, maximum=MAX_PIXELS)
    #: Bytes that uploads leave free on the home's disk, for answers and the database; else they are refused with 507.
    #: MLG_MIN_FREE_BYTES. Defaults to 1073741824 (1 GB).
    min_free_bytes: int = setting("MLG_MIN_FREE_BYTES", 1024**3, minimum=0, maximum=1024**5)
    #: Requests that may be queued before new ones are refused with 503. One to a pipeline counts as one, whatever steps
    #: it has. MLG_MAX_BACKLOG. Defaults to 1000000.
    max_backlog: int = setting("MLG_MAX_BACKLOG", 1_000_000, minimum=1, maximum=1_000_000_000)
    #: Longest time in seconds that `?wait=` holds an answer. MLG_MAX_HOLD_SECONDS. Defaults to 60 seconds.
    max_hold_seconds: float = setting("MLG_MAX_HOLD_SECONDS", 60.0, minimum=0, maximum=3600)
    #: Serve everybody on any address while there are no API keys. MLG_OPEN. Defaults to 0.
    is_open: bool = setting("MLG_OPEN", False)
    #: Host names, with commas between, by which a server without API keys is reached beside this machine's own.
    #: MLG_ALLOWED_HOSTS. Defaults to none.
    allowed_hosts: frozenset[str] = setting("MLG_ALLOWED_HOSTS", frozenset(), parse=_hosts)
    #: Fetch images by URL for clients. MLG_FETCH_URLS. Defaults to 0.
    fetches_urls: bool = setting("MLG_FETCH_URLS", False)
    #: Reuse an earlier answer to the same image also for another API key, whose owner can then tell that the image was
    #: sent before. MLG_SHARE_ANSWERS. Defaults to 0.
    shares_answers: bool = setting("MLG_SHARE_ANSWERS", False)
    #: Seconds that fetching one image may take. MLG_FETCH_SECONDS. Defaults to 10 seconds.
    fetch_seconds: float = setting("MLG_FETCH_SECONDS", 10.0, minimum=0.1, maximum=60)
    #: Event streams that one server process keeps open, at most half of them for one API key.
    #: MLG_MAX_STREAMS. Defaults to 256.
    max_streams: int = setting("MLG_MAX_STREAMS", 256, minimum=1, maximum=10_000)
    #: Models that one API key may train; those that only another version is trained of count once.
    #: MLG_MAX_TRAINED_MODELS. Defaults to 50.
    max_trained_models: int = setting("MLG_MAX_TRAINED_MODELS", 50, minimum=0, maximum=100_000)
    #: Accept requests to models that take images of faces, which are biometric data: see docs/faces.md.
    #: MLG_FACES. Defaults to 0.
    faces: bool = setting("MLG_FACES", False)
    #: Seconds that such requests are kept at most, with their images, crops and vectors, also in collections.
    #: MLG_FACES_RETENTION. Defaults to 86400 (a day).
    faces_seconds: float = setting("MLG_FACES_RETENTION", 86400.0, minimum=0, maximum=3.2e9)
    #: Send webhooks also to private addresses and without TLS. MLG_WEBHOOKS_PRIVATE. Defaults to 0.
    allows_private_webhooks: bool = setting("MLG_WEBHOOKS_PRIVATE", False)

    @property
    def reading_threads(self) -> int:
        """Threads of a process that read bodies: more than work, so that slow clients do not block the others."""
        return 8 * self.server_threads

    @property
    def max_held_reads(self) -> int:
        """Reads with `?wait=` that a process holds at once."""
        return 4 * self.server_threads
