"""What the views of one server process share: settings, store, figures, and the work that is limited.

Made by `api.py`. It must not keep anything between two requests that another server process would have to know.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import flask

from provider_image import errors
from provider_image.compiler import can_build_now
from provider_image.models.artefact import find_artefact, installed_digest
from provider_image.models.catalogue import CATALOGUE, ModelRow, custom_install_command, install_command
from provider_image.services import load_service
from server.api.responses import json_response
from server.api.serializers import serialize_request
from server.errors import BacklogFull
from server.intake.uploads import ActiveReads
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.settings import ServerSettings
from server.status.eta import EtaInputs, WaitEstimate, estimate
from server.status.queue_stats import QueueStats
from store.records import RequestRecord
from store.sqlite import SqliteStore


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """See the module."""

    settings: ServerSettings
    store: SqliteStore
    #: Holds reads.
    long_poller: LongPoller
    #: Tells listeners what changes.
    change_dispatcher: ChangeDispatcher
    #: Where reads of slow bodies are noted.
    active_reads: ActiveReads
    #: Gives the time.
    clock: Callable[[], datetime]
    #: Figures that many requests share.
    queue_stats: QueueStats
    #: Bodies are read by more threads than work at once, so that slow clients do not keep the quick ones out.
    work_slots: threading.BoundedSemaphore

    def request_response(self, request: RequestRecord, params: Mapping[str, Any] | None = None) -> flask.Response:
        """Answer with a request's JSON. :param params: the service's read-time parameters, checked."""
        return json_response({"success": True, **self.serialize(request, params)})

    def serialize(self, request: RequestRecord, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Build a request's JSON, with why it waits."""
        if params is None:
            params = parse_read_params(request.service, {})
        return serialize_request(request, params, self.estimate_wait(request))

    def estimate_wait(self, request: RequestRecord) -> WaitEstimate | None:
        """Say why a request waits and how long; None if it waits no more."""
        if request.state.is_final:
            return None
        inputs = EtaInputs(
            batchers=self.queue_stats.batchers(),
            backlog=self.queue_stats.backlog(),
            throughput=self.queue_stats.throughput(request.model),
            unavailable_reason=self._unavailable_reason(request.model),
        )
        return estimate(request, inputs, self.clock())

    def get_artefact_digest(self, row: ModelRow) -> str | None:
        """Return the artefact's digest, None if it will be built on first use.

        :raises NotInstalled: :raises ModelError:
        """
        try:
            return find_artefact(self.settings.models, row.name).digest
        except (errors.NotInstalled, errors.BrokenArtefact):
            if not _can_build(row.name):
                raise
            return None

    def check_backlog(self, new_requests: int = 1) -> None:
        """Refuse when too much waits already.

        :param new_requests: requests that are to be added.
        :raises BacklogFull:
        """
        if self.queue_stats.waiting() + new_requests > self.settings.max_backlog:
            raise BacklogFull()

    def _unavailable_reason(self, model: str) -> str | None:
        """Say why nobody can work on a model that requests wait for."""
        if installed_digest(self.settings.models, model) is not None or _can_build(model):
            return None
        row = CATALOGUE.get(model)
        if row is None:
            return (
                f"The model {model} is not installed any more and is not in the catalogue. If it is one of your own, "
                f"install it again: {custom_install_command(model)}; else cancel the request."
            )
        return f"The model {model} is not installed any more. Install it: {install_command(row)}"


@functools.cache
def _can_build(model: str) -> bool:
    # Looking for a package costs more than all else at the door, and packages do not come and go under a server.
    row = CATALOGUE.get(model)
    return row is not None and can_build_now(row)


def parse_read_params(service_name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Check the fields of a read. :raises InvalidParams:"""
    service = load_service(service_name)
    read_time = {param.name for param in service.params if param.is_read_time}
    for name in fields:
        if name not in read_time:
            raise errors.InvalidParams(
                f"A read has no parameter {name[:64]!r}. Parameters: {', '.join(sorted(read_time | {'wait'}))}."
            )
    checked = service.check_params(dict(fields))
    return {name: value for name, value in checked.items() if name in read_time}
