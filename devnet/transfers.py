"""Carries files between the requestor and the activities' folders.

Used by `exe_unit.py`. What a URL stands for is looked up in the exchange, where the requestor's `gftp` program has
written it down. Other kinds of URL are refused: the devnet never leaves this machine.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from devnet import gftp


class TransferFailed(Exception):
    """A file could not be carried over."""


class Transfers:
    """Both directions.

    :param exchange: the folder that the `gftp` program was given.
    """

    def __init__(self, exchange: Path) -> None:
        self._exchange = exchange

    async def fetch(self, url: str, target: Path) -> int:
        """Copy a published file of the requestor's to a path here.

        :return: its size in bytes.
        :raises TransferFailed: the URL is not known, or the copying failed.
        """
        return await asyncio.to_thread(self._fetch, url, target)

    async def deliver(self, source: Path, url: str) -> int:
        """Copy a file from here to where the requestor waits for it.

        :return: its size in bytes.
        :raises TransferFailed: there is no such file, the URL is not known, or the copying failed.
        """
        return await asyncio.to_thread(self._deliver, source, url)

    def _fetch(self, url: str, target: Path) -> int:
        published = self._find(url)
        if published.is_target:
            raise TransferFailed(f"There is no file to read at {url}")
        try:
            return gftp.copy_file(published.file, target)
        except OSError as error:
            raise TransferFailed(f"{url} cannot be fetched: {error.strerror or error}") from error

    def _deliver(self, source: Path, url: str) -> int:
        published = self._find(url)
        if not published.is_target:
            raise TransferFailed(f"Nobody waits for a file at {url}")
        try:
            return gftp.copy_file(source, published.file)
        except OSError as error:
            raise TransferFailed(f"{source.name} cannot be delivered: {error.strerror or error}") from error

    def _find(self, url: str) -> gftp.PublishedFile:
        if not url.startswith("gftp://"):
            raise TransferFailed(f"The devnet carries files of gftp only, not {url}")
        try:
            return gftp.resolve_url(self._exchange, url)
        except gftp.UnknownUrl as error:
            raise TransferFailed(str(error)) from error

    def remove_dead_servers(self) -> None:
        """Remove what `gftp` programs that were killed have published; the daemon's last act."""
        gftp.remove_dead_servers(self._exchange)
