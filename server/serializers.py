"""The JSON of a request, of the models and of a webhook delivery.

Used by the views, by webhooks and, for `--json`, by the commands. Images, tokens and leases stay out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provider_image.compiler import can_build_now
from provider_image.errors import InvalidParams, ModelError, NotInstalled, UnknownModel
from provider_image.models.artefact import Artefact, find_artefact
from provider_image.models.catalogue import ModelFacts, install_command
from provider_image.models.quickest import find_quickest
from provider_image.models.registry import list_rows
from provider_image.models.speed import read_speed
from provider_image.service import IMAGE_ANSWER, check_params, primary_input
from provider_image.services import REGISTRY, load_service
from server.record_json import fields, given_fields
from server.status.eta import WaitEstimate
from store.batches import BatchProgress, BatchRecord
from store.clients.webhooks import DeliveryRecord
from store.files import StoredFile
from store.pipelines.runs import PipelineRun
from store.processes.progress import ProgressRecord
from store.requests import RequestRecord
from store.states import RequestState
from store.trainings.records import TrainingRecord


def serialize_request(
    request: RequestRecord,
    params: Mapping[str, Any],
    wait: WaitEstimate | None,
    *,
    thresholds: Thresholds | None = None,
) -> dict[str, Any]:
    """Build a request's JSON.

    `cost` is in GLM, and a string because a JSON number would lose digits; null where nothing is paid. It is an
    estimate until `cost_is_final`.

    :param params: the service's read-time parameters, checked.
    :param thresholds: where the threshold of the model is looked up; None leaves `unknown` out.
    """
    result: dict[str, Any] = {
        "req_id": request.id,
        "status": request.status,
        "preds": None,
        **fields(request, "model service name created_at attempts"),
        **given_fields(request, "batch_id client_id labels replaces parent step position"),
    }
    if request.replaced_by is not None:
        result["replaced_by"] = {
            "req_id": request.replaced_by.id,
            "model": request.replaced_by.model,
            "status_url": f"/readPrediction/{request.replaced_by.id}",
        }
    if request.state is RequestState.DONE:
        is_known = request.service in REGISTRY  # the package that has it may have been removed
        params = {**request.params, **params}
        result["preds"] = load_service(request.service).view(request.output, params) if is_known else request.output
        result |= {"cached": request.is_cached, **fields(request, "provider seconds digest cost")}
        threshold = 0.0 if thresholds is None else thresholds.find(request)
        if threshold:
            result |= {"unknown": request.output[0][2] < threshold, "unknown_below": threshold}
        if request.cost is not None:
            result["cost_is_final"] = request.is_cost_final
    if request.progress is not None:
        result |= serialize_progress(request.progress)
    if IMAGE_ANSWER in request.files:
        result["image_url"] = f"/requests/{request.id}/image"
    if request.run is not None and request.run.has_steps:
        result["steps"] = serialize_steps(request.run)
    if request.files:
        result["files"] = _serialize_files(request.id, request.files)
    result |= given_fields(request, "finished_at")
    if wait is not None:
        result |= {**fields(wait, "waiting_for eta_seconds"), **given_fields(wait, "ahead")}
    if request.state is not RequestState.DONE and request.reason is not None:
        # Also while it is queued again: why the last attempt failed.
        result |= fields(request, "reason code")
    return result


def serialize_progress(progress: ProgressRecord) -> dict[str, Any]:
    """Build the JSON of what a worker reported of a request."""
    # Each has another address, so that browsers load it.
    preview_url = f"/requests/{progress.id}/preview?number={progress.previews}" if progress.previews else None
    return {"progress": round(progress.fraction, 4), "preview_url": preview_url}


def _serialize_files(id: str, files: Mapping[str, StoredFile]) -> dict[str, Any]:
    return {
        name: {"url": f"/requests/{id}/files/{name}", "media_type": one.media_type, "bytes": one.size_bytes}
        for name, one in files.items()
    }


def serialize_steps(run: PipelineRun) -> dict[str, Any]:
    """Build the answers of a pipeline's steps, as far as they are: step -> one, or a list with one for each item.

    The place of an answer in its list is that of the item in the list that the step runs for.
    """
    shown: dict[str, Any] = {}
    for step in run.pipeline.steps:
        places = [position for name, position in (*run.children, *run.outcomes) if name == step.name]
        entries = [_serialize_step(run, step.name, position) for position in range(max(places, default=-1) + 1)]
        shown[step.name] = entries if step.for_each is not None else (entries or [{"status": "waiting"}])[0]
    return shown


def _serialize_step(run: PipelineRun, name: str, position: int) -> dict[str, Any]:
    outcome, child = run.outcomes.get((name, position)), run.children.get((name, position))
    if outcome is not None:
        return fields(outcome, "status code reason")
    if child is None:
        return {"status": "waiting"}
    shown: dict[str, Any] = {"status": child.status, "req_id": child.id, "model": child.model}
    if child.state is RequestState.DONE:
        is_known = child.service in REGISTRY
        shown["preds"] = load_service(child.service).view(child.output, child.params) if is_known else child.output
        if child.files:
            shown["files"] = _serialize_files(child.id, child.files)
    elif child.reason is not None:
        shown |= fields(child, "code reason")
    return shown


class Thresholds:
    """The probabilities below which the answers of models are unknown, each looked up once, for one list of answers."""

    def __init__(self, models: Path) -> None:
        self._models = models
        #: Model -> digest and threshold of what is installed; None where nothing is.
        self._known: dict[str, tuple[str, float] | None] = {}

    def find(self, request: RequestRecord) -> float:
        """Return the threshold of the model that gave an answer; 0 without one, or if it is not installed any more."""
        if request.state is not RequestState.DONE or request.service != "classification" or not request.output:
            return 0.0
        if request.model not in self._known:
            self._known[request.model] = self._read(request.model)
        found = self._known[request.model]
        return 0.0 if found is None or found[0] != request.digest else found[1]

    def _read(self, model: str) -> tuple[str, float] | None:
        try:
            artefact = find_artefact(self._models, model)
        except (NotInstalled, ModelError, UnknownModel):
            return None
        return artefact.digest, artefact.unknown_below


def input_kind(request: RequestRecord | BatchRecord) -> str | None:
    """Return the kind of the first input of a request, or of those of a batch; None if its service is not installed."""
    if isinstance(request, RequestRecord) and request.run is not None:
        pipeline = request.run.pipeline
        is_known = all(step.service in REGISTRY for step in pipeline.steps)
        return next(iter(pipeline.inputs().values())).kind if is_known else None
    return _input_kind(request.service) if request.service in REGISTRY else None


def is_image(request: RequestRecord | BatchRecord) -> bool:
    """Tell whether the first input of a request, or of those of a batch, is an image."""
    return input_kind(request) == "image"


def _input_kind(service_name: str) -> str:
    service = load_service(service_name)
    return service.inputs[primary_input(service)].kind


def parse_read_params(service_name: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """Check the parameters of a read. :return: all that the service has, with defaults. :raises InvalidParams:"""
    service_params = load_service(service_name).params if service_name in REGISTRY else ()
    read_time = {param.name for param in service_params if param.is_read_time}
    for name in fields:
        if name not in read_time:
            raise InvalidParams(
                f"A read has no parameter {name[:64]!r}. Parameters: {', '.join(sorted(read_time | {'wait'}))}."
            )
    checked = check_params(service_params, fields)
    return {name: value for name, value in checked.items() if name in read_time}


def serialize_models(models: Path) -> list[dict[str, Any]]:
    """List the catalogue with what is installed in a models folder, then the installed custom models.

    `images_per_second` is what a check measured of this artefact on this machine; None without a check.
    """
    return [_serialize_model(models, row) for row in list_rows(models)]


def _serialize_model(models: Path, row: ModelFacts) -> dict[str, Any]:
    try:
        artefact = find_artefact(models, row.name)
    except (NotInstalled, ModelError):
        artefact = None
    speed = None if artefact is None else read_speed(models, row.name, artefact.digest)
    return {
        **fields(row, "name title service"),
        # Installed with other weights than the published ones, a model of the catalogue is a custom one too.
        "source": row.source if artefact is None else artefact.source,
        **fields(row, "height width base"),
        "dimensions": row.dimensions or None,
        "input": _input_kind(row.service),
        "inputs": {
            name: {"kind": one.kind, "is_optional": one.is_optional, "help": one.help}
            for name, one in load_service(row.service).inputs.items()
        },
        "answers_with_image": IMAGE_ANSWER in load_service(row.service).outputs,
        "takes_faces": row.takes_faces,
        "columns": list(row.columns),
        "installed": artefact is not None,
        "builds_on_first_use": artefact is None and can_build_now(row),
        "digest": None if artefact is None else artefact.digest,
        "size_bytes": None if artefact is None else artefact.size_bytes,
        "storage": None if artefact is None else artefact.precision,
        "images_per_second": None if speed is None else speed.images_per_second,
        "reduced": None if artefact is None or artefact.reduced is None else _serialize_reduced(models, artefact),
        "install": install_command(row.name) if artefact is None else artefact.install_command,
    }


def _serialize_reduced(models: Path, copy: Artefact) -> dict[str, Any]:
    """Build the JSON of what a copy in another precision was judged by."""
    reduced = copy.reduced
    assert reduced is not None
    try:
        is_quickest = find_quickest(models, find_artefact(models, reduced.base)).digest == copy.digest
    except (NotInstalled, UnknownModel, ModelError):
        is_quickest = False
    names = (
        "base precision layers layers_in_f32 calibration_images images same_first_label agreement_low agreement_high"
    )
    more = "largest_difference median_difference bound processor speedup figures"
    return {**fields(reduced, f"{names} {more}"), "is_quickest": is_quickest}


def serialize_training(
    training: TrainingRecord,
    progress: BatchProgress | None,
    waiting_for: str | None,
    *,
    is_used: bool,
    is_whole: bool,
) -> dict[str, Any]:
    """Build a training's JSON.

    :param progress: of the requests for features, if there are any.
    :param is_used: the model that it made is the one that is installed.
    :param is_whole: with the figures; else only the most important ones.
    """
    shown: dict[str, Any] = {
        "training_id": training.id,
        "name": training.name,
        "kind": str(training.kind),
        "state": str(training.state),
        **fields(training, "backbone target seed examples created_at"),
        **given_fields(training, "batch_id options step started_at ended_at version digest reason code"),
        "is_used": is_used,
        "figures": {
            name: value
            for name, value in training.figures.items()
            if is_whole or name in ("kind", "count", "accuracy", "accuracy_low", "accuracy_high", "mae", "rmse")
        },
        "files": {
            name: {"url": f"/trainings/{training.id}/files/{name}", "media_type": kind}
            for name, kind in training.files.items()
        },
    }
    if progress is not None:
        shown["features"] = fields(progress, "queued claimed done failed cancelled expired")
    return shown if waiting_for is None else {**shown, "waiting_for": waiting_for}


def serialize_delivery(delivery: DeliveryRecord) -> dict[str, Any]:
    """Build a webhook delivery's JSON, without its body."""
    return {
        **fields(delivery, "id endpoint_id url event subject"),
        "state": delivery.status,
        **fields(delivery, "attempts created_at next_at delivered_at dead_at last_status last_error"),
    }
