"""Asks systemd for time to stop, as much as the settings grant: a unit file cannot know them.

Called by `batcher.scheduler`. The protocol is that of sd_notify; the unit file must allow it (`NotifyAccess=main`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)


def extend_stop_timeout(seconds: float, environment: Mapping[str, str]) -> None:
    """Ask for this much time from now on; does nothing in a process that systemd did not start."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as opened:
            opened.sendto(b"EXTEND_TIMEOUT_USEC=%d" % int(seconds * 1_000_000), address)
    except OSError as error:
        log.warning("systemd cannot be asked for time to stop: %s", error)
