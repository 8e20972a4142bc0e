"""The address of a server: how it is reached, as a URL, and whether only this machine reaches it.

Used by the server for its own probe, by the guard, and by the commands.
"""

from __future__ import annotations

import functools
import ipaddress

#: Wildcard address -> the loopback address.
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable_host(host: str) -> str:
    """Return the host by which this machine reaches a server that listens on `host`."""
    return _WILDCARD_HOSTS.get(host, host)


def base_url(host: str, port: int) -> str:
    """Return the URL of a server that listens there."""
    host = reachable_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@functools.lru_cache(maxsize=16)  # few: the header Host of a stranger may be long
def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a server that listens there; of names, only localhost is certain."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
