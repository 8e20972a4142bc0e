"""The plan of a load: when each request is sent, to which address, with which image. Pure, except for reading images.

Every other module of this folder works from it, and `jmeter.py` writes the same plan for another program.
"""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, urlsplit

from provider_image.errors import ConfigError

#: Limits of a plan: this runs on the machine of whoever starts it, often beside the server.
MAX_RATE, MAX_SECONDS, MAX_REQUESTS = 10_000.0, 86_400.0, 1_000_000
MAX_IMAGES, MAX_IMAGE_BYTES = 1000, 256 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class LoadImage:
    """An image, with the form that sends it."""

    path: Path
    body: bytes = field(repr=False)
    content_type: str

    @classmethod
    def read(cls, path: Path) -> LoadImage:
        """Read an image. :raises OSError:"""
        boundary = secrets.token_hex(16)
        name = quote(os.fsencode(path.name), safe=".-_ ")
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = b"%b%b\r\n--%b--\r\n" % (head.encode(), path.read_bytes(), boundary.encode())
        return cls(path=path, body=body, content_type=f"multipart/form-data; boundary={boundary}")


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """What is sent."""

    #: Address of the server, without a slash at its end.
    url: str
    model: str
    #: Requests a second, after the ramp.
    rate: float
    #: Seconds in which the rate grows evenly from 0; a part of `seconds`.
    ramp_seconds: float
    seconds: float
    #: Taken in turn.
    images: Sequence[LoadImage] = field(repr=False)
    #: Whether a request counts until its answer, not only until it is accepted.
    waits: bool = False
    #: Whether equal images are computed each time.
    is_fresh: bool = True
    #: Seconds after which a request that was sent counts as failed.
    timeout_seconds: float = 30.0
    #: Requests that may be in progress; one that would be more is not sent and counts as failed.
    max_in_flight: int = 1000

    @property
    def path(self) -> str:
        """The path of the uploads, with the query."""
        return f"/requestPrediction/{quote(self.model, safe='')}{'?fresh=1' if self.is_fresh else ''}"

    @property
    def count(self) -> int:
        """How many requests are sent."""
        return math.ceil(self.rate * (self.seconds - self.ramp_seconds / 2) - 1e-9)

    def offsets(self) -> Iterator[float]:
        """Yield when each request is sent: seconds after the start, at even distances once the ramp is over."""
        in_ramp = self.rate * self.ramp_seconds / 2
        for index in range(self.count):
            if index < in_ramp:
                yield math.sqrt(2 * self.ramp_seconds * index / self.rate)
            else:
                yield self.ramp_seconds + (index - in_ramp) / self.rate

    def check(self) -> None:
        """Check the numbers. :raises ConfigError:"""
        if not 0 < self.rate <= MAX_RATE:
            raise ConfigError(f"--rate takes requests a second, more than 0 and at most {MAX_RATE:g}.")
        if not 0 < self.seconds <= MAX_SECONDS:
            raise ConfigError(f"--seconds takes more than 0 and at most {MAX_SECONDS:g} seconds.")
        if not 0 <= self.ramp_seconds <= self.seconds:
            raise ConfigError("--ramp is a part of --seconds, so it must not be longer.")
        if self.count > MAX_REQUESTS:
            raise ConfigError(f"{self.count} requests are too many, at most {MAX_REQUESTS}: lower --rate or --seconds.")


def check_host(url: str, allowed_host: str | None) -> None:
    """Refuse a server that is not on this machine, unless its host is named once more. :raises ConfigError:"""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # which checks the port
        # The report shows the address, so it must have no password.
        is_plain = parts.scheme in ("http", "https") and not (parts.username or parts.query or parts.fragment)
    except ValueError:
        is_plain, host = False, None
    if not is_plain or not host:
        raise ConfigError(f"{url!r} is not the address of a server. Write for example http://127.0.0.1:5000")
    if host == "localhost" or _is_loopback(host) or (allowed_host or "").lower() == host:
        return
    raise ConfigError(
        f"{host} is not this machine. A load may stop a server for all its users, so send it only to your own: "
        f"if {host} is yours, add --allow-host {host}"
    )


def read_images(folder: Path) -> list[LoadImage]:
    """Read an image, or those of a folder and its subfolders, in the order of their names.

    :raises ConfigError: there are none, or too many.
    """
    from mlg_client.uploads import find_images

    images: list[LoadImage] = []
    size_bytes = 0
    try:
        for path in [folder] if folder.is_file() else find_images(folder):
            size_bytes += path.stat().st_size
            if len(images) == MAX_IMAGES or size_bytes > MAX_IMAGE_BYTES:
                raise ConfigError(
                    f"--images: {folder} has more than {MAX_IMAGES} images or {MAX_IMAGE_BYTES >> 20} MB. They are all "
                    "kept in memory: choose a smaller folder."
                )
            images.append(LoadImage.read(path))
    except FileNotFoundError as error:
        raise ConfigError(f"--images: there is no image in {folder}.") from error
    except OSError as error:
        raise ConfigError(f"--images: {error.filename} cannot be read: {error.strerror}.") from error
    return images


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
