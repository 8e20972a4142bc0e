"""How a request looks to a client: the JSON of one request, and of the catalogue.

Called by the views and, for `--json`, by `commands.py`. Pictures, tokens and leases are nobody's business and stay out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provider_image.compiler import can_build_now
from provider_image.errors import ModelError, NotInstalled
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import ModelRow, install_command
from provider_image.models.registry import list_rows
from provider_image.models.speed import read_speed
from provider_image.services import load_service
from server.status.eta import WaitEstimate
from store.cost_split import to_amount
from store.records import RequestRecord, RequestState, to_text


def serialize_request(request: RequestRecord, params: Mapping[str, Any], wait: WaitEstimate | None) -> dict[str, Any]:
    """Build a request's JSON.

    `cost` is in GLM, and a string because a JSON number would lose digits; null where nothing is paid. It is an
    estimate until `cost_is_final`.

    :param params: the service's read-time parameters, checked.
    """
    result: dict[str, Any] = {
        "req_id": request.id,
        "status": request.status,
        "preds": None,
        "model": request.model,
        "service": request.service,
        "name": request.name,
        "created_at": to_text(request.created_at),
        "attempts": request.attempts,
    }
    for name, value in (("batch_id", request.batch_id), ("client_id", request.client_id), ("labels", request.labels)):
        if value:
            result[name] = dict(value) if isinstance(value, Mapping) else value
    if request.state is RequestState.DONE:
        result["preds"] = load_service(request.service).view(request.output, {**request.params, **params})
        result["cached"] = request.is_cached
        result["provider"] = request.provider
        result["seconds"] = request.seconds
        result["digest"] = request.digest
        result["cost"] = None if request.cost is None else to_amount(request.cost)
        if request.cost is not None:
            result["cost_is_final"] = request.is_cost_final
    if request.finished_at is not None:
        result["finished_at"] = to_text(request.finished_at)
    if wait is not None:
        result["waiting_for"] = wait.waiting_for
        result["eta_seconds"] = wait.eta_seconds
        if wait.ahead is not None:
            result["ahead"] = wait.ahead
    if request.state is not RequestState.DONE and request.reason is not None:
        # Also while it is queued again: why the last attempt failed.
        result["reason"] = request.reason
        result["code"] = request.code
    return result


def serialize_models(models: Path) -> list[dict[str, Any]]:
    """List the catalogue with what is installed in a models folder, then the installed models of users' own.

    Costs some stats and small files, as it is often asked.

    `images_per_second` is what a check measured of this very artefact on this machine, None if none did.
    """
    return [_serialize_model(models, row) for row in list_rows(models)]


def _serialize_model(models: Path, row: ModelRow) -> dict[str, Any]:
    try:
        artefact = find_artefact(models, row.name)
    except (NotInstalled, ModelError):
        artefact = None
    speed = None if artefact is None else read_speed(models, row.name, artefact.digest)
    return {
        "name": row.name,
        "title": row.title,
        "service": row.service,
        # Installed with other weights than the published ones, a model of the catalogue is the operator's own as well.
        "source": row.source if artefact is None else artefact.source,
        "height": row.height,
        "width": row.width,
        "installed": artefact is not None,
        "builds_on_first_use": artefact is None and can_build_now(row),
        "digest": None if artefact is None else artefact.digest,
        "size_bytes": None if artefact is None else artefact.size_bytes,
        "storage": None if artefact is None else artefact.storage.kept,
        "images_per_second": None if speed is None else speed.images_per_second,
        "install": install_command(row),
    }
