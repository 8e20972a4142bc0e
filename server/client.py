"""One server and one model, as `mlg submit` sees them: patient with a server that is busy or away, until it is stopped.

Used by `submit.py` from several threads at once. All that is HTTP is in `mlg_client.py`, which is everybody's; here its
errors become those of the command line.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import mlg_client
from provider_image.errors import MlgError, ServerUnreachable

#: Codes that pass for nobody: no other picture would fare better, so the whole run ends.
_HOPELESS = frozenset(
    {
        "not_installed",
        "unknown_model",
        "broken_artefact",
        "model_error",
        "key_missing",
        "key_refused",
        "scope_missing",
        "quota_reached",
    }
)


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
        self._model = model
        self.stopping = threading.Event()
        self._calls = mlg_client.Client(
            url, patience_seconds=patience_seconds, connections=connections, pause=self._pause
        )

    def send(self, data: bytes, name: str) -> str:
        """Send a picture. :return: its id. :raises Refused: this picture. :raises ServerUnreachable: all of them."""
        with self._translated():
            return self._calls.submit(data, self._model, name=name).id

    def read(self, req_id: str, *, top: int, hold_seconds: float = 0.0) -> dict[str, Any]:
        """Read an answer. :raises Refused: with code unknown_request when the server does not know the id."""
        with self._translated():
            return dict(self._calls.read(req_id, hold_seconds=hold_seconds, top=top).raw)

    def _pause(self, seconds: float) -> None:
        if self.stopping.wait(seconds):
            raise Stopped()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        if self.stopping.is_set():
            raise Stopped()
        try:
            yield
        except mlg_client.Unreachable as error:
            raise ServerUnreachable(f"{error.reason} Start it with mlg serve, or name another with --url.") from error
        except mlg_client.ClientError as error:
            if isinstance(error, mlg_client.Unavailable) or error.code in _HOPELESS:
                raise ServerUnreachable(error.reason) from error
            raise Refused(error.reason, error.code) from error
