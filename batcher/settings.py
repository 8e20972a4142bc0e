"""The settings of the batcher: when chunks are due, how large they are, where they run.

Read once by `from_env` in `cli/batch.py` and passed on. Executors read their own settings. Each field is a row in
docs/settings.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batcher.backoff import Backoff
from provider_image.cores import default_decoders
from provider_image.environment import Settings, home_setting, setting
from provider_image.schemas import MAX_BYTES, MAX_CHUNK_SECONDS, MAX_ITEMS

#: Values of MLG_SHRINK.
SHRINK_CHOICES = ("auto", "on", "off", "uncompressed")


@dataclass(frozen=True, kw_only=True)
class BatcherTimings:
    """Intervals and limits of the scheduler and the cycle, in seconds. No settings; tests shorten them."""

    #: Pauses while the store does not respond.
    store_backoff: Backoff = Backoff(first_seconds=0.2, max_seconds=5.0)
    #: Interval at which expired leases are released.
    lease_check_seconds: float = 1.0
    #: When the batcher stops, limit for writing the remaining results.
    final_write_seconds: float = 5.0
    #: Least time between two records of what workers report of items under way.
    progress_seconds: float = 0.5
    #: Interval of the heartbeat.
    heartbeat_seconds: float = 2.0
    #: Interval at which the operator's controls are read.
    controls_poll_seconds: float = 0.5
    #: Interval at which expired data is deleted.
    purge_seconds: float = 3600.0
    #: Interval at which trainings whose features are there are looked for, and the running one is looked at.
    training_poll_seconds: float = 1.0
    #: Interval at which requests to pipelines that can go on are looked for.
    pipeline_poll_seconds: float = 0.1
    #: Longest time of one training's process.
    training_seconds: float = 3600.0
    #: With `--once`: interval at which the end of back-offs is checked.
    once_poll_seconds: float = 0.25
    #: With `--once`: interval at which the models with requests from before the start are read.
    once_backlog_seconds: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BatcherSettings(Settings):
    """Settings of `mlg batch`, in addition to those of the home."""

    #: Folder of temporary chunk files; in the home.
    work: Path = home_setting("work")
    #: Folder of model artefacts; in the home.
    models: Path = home_setting("models")
    #: Where chunks run: local, golem, or golem,local. MLG_EXECUTOR. Defaults to local.
    executor: str = setting("MLG_EXECUTOR", "local")
    #: Seconds between two cycles that process all waiting requests. MLG_EVERY_SECONDS. Defaults to 600 seconds.
    every_seconds: float = setting("MLG_EVERY_SECONDS", 600.0, minimum=0.05, maximum=86400)
    #: A request waits at most this long for its chunk to fill. MLG_MAX_WAIT_SECONDS. Defaults to 600 seconds.
    max_wait_seconds: float = setting("MLG_MAX_WAIT_SECONDS", 600.0, minimum=0, maximum=86400)
    #: Seconds between two checks for due chunks. MLG_POLL_SECONDS. Defaults to 1 second.
    poll_seconds: float = setting("MLG_POLL_SECONDS", 1.0, minimum=0.01, maximum=3600)
    #: Maximum number of items in a chunk. MLG_CHUNK_ITEMS. Defaults to 16.
    chunk_items: int = setting("MLG_CHUNK_ITEMS", MAX_ITEMS, minimum=1, maximum=MAX_ITEMS)
    #: Maximum bytes of images in a chunk. MLG_CHUNK_BYTES. Defaults to 67108864 (64 MB).
    chunk_bytes: int = setting("MLG_CHUNK_BYTES", MAX_BYTES, minimum=65536, maximum=MAX_BYTES)
    #: Seconds after which a claim that is not renewed returns to the queue; the time during which the machine was
    #: suspended does not count. MLG_LEASE_SECONDS. Defaults to 30 seconds.
    lease_seconds: float = setting("MLG_LEASE_SECONDS", 30.0, minimum=1, maximum=59)
    #: Seconds that a chunk may take before its worker is stopped. MLG_CHUNK_TIMEOUT_SECONDS. Defaults to 120 seconds.
    chunk_timeout_seconds: float = setting("MLG_CHUNK_TIMEOUT_SECONDS", 120.0, minimum=0.1, maximum=MAX_CHUNK_SECONDS)
    #: Seconds for chunks under way to finish when the batcher stops. MLG_DRAIN_SECONDS. Defaults to 10 seconds.
    drain_seconds: float = setting("MLG_DRAIN_SECONDS", 10.0, minimum=0, maximum=3600)
    #: Number of resizing processes: MLG_WORKERS, else one a core, as far as there are 320 MB of memory for each.
    resizers: int = setting("MLG_WORKERS", 1, unset=default_decoders, minimum=1, maximum=256)
    #: Whether images are resized to the model's input before they are sent: on, off, or auto, which resizes if chunks
    #: leave this machine, and compresses them unless transfers prove to be quick. on always compresses, uncompressed
    #: never does, which takes less time and more bytes. MLG_SHRINK. Defaults to auto.
    shrink: str = setting("MLG_SHRINK", "auto", choices=SHRINK_CHOICES)
