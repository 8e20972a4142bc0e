"""Fetches an image by its URL.

Called by `server/intake/accept.py`. What is safe to connect to is decided by `server/http_client.py`; a redirect is
followed to the same host only, checked like the first URL. Errors name no addresses and repeat nothing of the response.
"""

from __future__ import annotations

import http.client
import time
from urllib.parse import unquote, urljoin, urlsplit

from server.errors import FetchFailed, UrlRefused
from server.http_client import HttpClient, RequestFailed, check_url
from server.intake.uploads import clean_name, too_many_bytes

#: Redirects that are followed.
MAX_REDIRECTS = 3
_BUFFER_BYTES = 64 * 1024
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


def fetch(url: str, *, max_image_bytes: int, seconds: float, http_client: HttpClient | None = None) -> bytes:
    """Fetch an image.

    :param seconds: limit for everything, redirects included.
    :raises UrlRefused: :raises FetchFailed: :raises TooManyBytes:
    """
    give_up_at = time.monotonic() + seconds
    http_client = http_client or HttpClient()
    host = check_url(url).host
    for _ in range(MAX_REDIRECTS + 1):
        try:
            with http_client.request("GET", url, give_up_at=give_up_at) as response:
                found = _read(response, max_image_bytes)
        except RequestFailed as error:
            raise FetchFailed(f"The image could not be fetched. {error.reason}") from error
        if isinstance(found, bytes):
            return found
        try:
            url = urljoin(url, found)
        except ValueError as error:
            raise UrlRefused("The host redirects to something that is not a URL.") from error
        if check_url(url).host != host:
            raise UrlRefused("The URL redirects to another host. Send the URL that it leads to.")
    raise FetchFailed(f"The URL redirects more than {MAX_REDIRECTS} times.")


def name_from_url(url: str) -> str | None:
    """Return the file name in a URL's path, cleaned; None if there is none."""
    try:
        return clean_name(unquote(urlsplit(url).path))
    except ValueError:
        return None


def _read(response: http.client.HTTPResponse, max_image_bytes: int) -> bytes | str:
    """Read a response. :return: the body, or where it redirects to."""
    location = response.headers.get("Location")
    if response.status in _REDIRECTS and location is not None:
        return location
    if response.status != 200:
        raise FetchFailed(f"The URL's host answers with status {response.status}.")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchFailed("The URL's host sends the image in a Content-Encoding that was not requested.")
    if (response.length or 0) > max_image_bytes:
        raise too_many_bytes(max_image_bytes)
    pieces: list[bytes] = []
    size = 0
    while piece := response.read(_BUFFER_BYTES):
        size += len(piece)
        if size > max_image_bytes:
            raise too_many_bytes(max_image_bytes)
        pieces.append(piece)
    if response.length:
        raise FetchFailed("The URL's host ended the connection in the middle of the image.")
    return b"".join(pieces)
