"""A client of the HTTP API: sends a picture, reads an answer, and is patient with a server that is busy or away.

Used by `submit.py` from several threads at once.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from provider_image.errors import MlgError, ServerUnreachable

#: A server may come back from these.
_PASSING = frozenset({429, 502, 503, 504, 507})
#: Codes that pass for nobody: no other picture would fare better, so the whole run ends.
_HOPELESS = frozenset({"not_installed", "unknown_model", "broken_artefact", "model_error"})
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.2, 10.0


class Refused(MlgError):
    """The server does not take this picture."""

    code = "refused"
    permanent = True

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code


class Stopped(MlgError):
    """The run was stopped."""

    code = "stopped"


class Client:
    """One server and one model.

    :param patience_seconds: how long to try again when the server is busy or away.
    """

    def __init__(self, url: str, model: str, *, connections: int, patience_seconds: float) -> None:
        self._url = url.rstrip("/")
        self._model = model
        self._patience_seconds = patience_seconds
        self.stopping = threading.Event()
        # A proxy from the environment is not meant for this very machine.
        is_here = urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
        self._http = httpx.Client(
            timeout=httpx.Timeout(30.0, connect=5.0),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            verify=ssl.create_default_context(),
            trust_env=not is_here,
        )

    def send(self, data: bytes, name: str) -> str:
        """Send a picture. :return: its id. :raises Refused: this picture. :raises ServerUnreachable: all of them."""
        answer = self._ask(
            "POST",
            f"/requestPrediction/{quote(self._model, safe='')}",
            files={"image": (name, data, "application/octet-stream")},
        )
        return str(answer["req_id"])

    def read(self, req_id: str, *, top: int, hold_seconds: float = 0.0) -> dict[str, Any]:
        """Read an answer. :raises Refused: with code unknown_request when the server does not know the id."""
        params = {"top": top, "wait": hold_seconds} if hold_seconds else {"top": top}
        return self._ask("GET", f"/readPrediction/{quote(req_id, safe='')}", params=params)

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        give_up_at = time.monotonic() + self._patience_seconds
        delay = _FIRST_DELAY_SECONDS
        while not self.stopping.is_set():
            asked_for = 0.0
            try:
                response = self._http.request(method, self._url + path, **options)
            except httpx.TransportError as error:
                failure: MlgError = ServerUnreachable(
                    f"The server at {self._url} does not answer ({error or type(error).__name__}). "
                    "Start it with mlg serve, or name another with --url."
                )
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ServerUnreachable(f"{self._url} is not a server's address ({error}).") from error
            else:
                answer = _parse(response)
                if response.is_success and answer.get("success") is True:
                    return answer
                reason = str(answer.get("reason") or f"The server answered {response.status_code}.")
                code = str(answer.get("code") or f"http_{response.status_code}")
                if code in _HOPELESS:
                    raise ServerUnreachable(reason)
                if response.status_code not in _PASSING:
                    raise Refused(reason, code)
                failure = ServerUnreachable(reason)
                asked_for = _retry_after(response)
            # Spread out, so that the threads of a run do not all come back at the same moment.
            pause = max(asked_for, delay * random.uniform(0.5, 1.0))
            if time.monotonic() + pause > give_up_at:
                raise failure
            self.stopping.wait(pause)
            delay = min(delay * 2, _LONGEST_DELAY_SECONDS)
        raise Stopped()


def _parse(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0
