"""How an address that is listened on is reached and written: for welcome lines, clients and the server's own probe."""

from __future__ import annotations

import ipaddress

#: An address that means "all of them" -> one of them on this machine.
_WILDCARD_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def reachable_host(host: str) -> str:
    """Return the host under which a server that listens on this one is reached from this machine."""
    return _WILDCARD_HOSTS.get(host, host)


def base_url(host: str, port: int) -> str:
    """Return the URL of a server that listens there."""
    host = reachable_host(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a server that listens there; a name other than localhost might be any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
