"""Settings of a home: where it is, and how long data is kept in it.

A command reads them once with `from_env` and passes them on. The server's settings extend them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from provider_image.environment import Settings, home_setting, setting


@dataclass(frozen=True, kw_only=True)
class HomeSettings(Settings):
    """The settings that every command on a home needs."""

    #: Folder that holds the database, the images and the models. MLG_HOME. Defaults to ~/.mlg.
    home: Path = home_setting()
    #: Seconds to wait for a locked database. MLG_BUSY_SECONDS. Defaults to 5 seconds.
    busy_seconds: float = setting("MLG_BUSY_SECONDS", 5.0, minimum=0.01, maximum=300)
    #: Seconds that images of finished requests are kept. MLG_KEEP_PICTURES_SECONDS. Defaults to 604800 (7 days).
    keep_images_seconds: float = setting("MLG_KEEP_PICTURES_SECONDS", 7 * 86400.0, minimum=0, maximum=3.2e9)
    #: Seconds that finished requests are kept. MLG_KEEP_RESULTS_SECONDS. Defaults to 2592000 (30 days).
    keep_results_seconds: float = setting("MLG_KEEP_RESULTS_SECONDS", 30 * 86400.0, minimum=0, maximum=3.2e9)

    #: Seconds that the usage of API keys is kept. MLG_KEEP_USAGE_SECONDS. Defaults to 34560000 (400 days).
    keep_usage_seconds: float = setting("MLG_KEEP_USAGE_SECONDS", 400 * 86400.0, minimum=2 * 86400, maximum=3.2e9)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.home / "mlg.db"

    @property
    def images(self) -> Path:
        """The folder of images."""
        return self.home / "blobs"

    @property
    def collections(self) -> Path:
        """The folder of the files that collections are searched with; made again from the database when it is gone."""
        return self.home / "collections"

    @functools.cached_property
    def models(self) -> Path:
        """The folder of model artefacts."""
        return self.home / "models"

    @property
    def work(self) -> Path:
        """The folder of chunk files in progress."""
        return self.home / "work"
