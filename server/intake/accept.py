"""The one way in: a single item, a batch, and the form of the page all become requests here.

Called by the views that take images and other inputs, one Intake in each server process. In this order: the parameters
and options in the query, the model and its artefact, the backlog and the key's quota, and only then the body; each
input is checked as the model's service declares it and staged; the requests are added to the store. An item that cannot
be used is an error, in a batch it is refused and the others are accepted. It must not know how a view answers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

from flask import Request

from provider_image import errors
from provider_image.compiler import can_build_now
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelFacts
from provider_image.models.registry import find_row
from provider_image.service import Input, Service, are_inputs, check_params, primary_input
from provider_image.services import load_service
from server.auth.guard import current_key_id, quota_left
from server.auth.limits import FairSlots
from server.errors import BacklogFull, FetchingDisabled, TooManyUploads
from server.intake.batch_parser import BatchItem, SharedInputs, body_too_large, detect_format, parse_items, spool
from server.intake.client_kind import current_client_kind
from server.intake.faces import check_faces
from server.intake.quality_gate import QualityGate, take_limits
from server.intake.request_options import RequestOptions, parse_flag, read_request_options
from server.intake.staging import StagedItem, Stager, disk_reserved
from server.intake.uploads import (
    FORM_ALLOWANCE_BYTES,
    JSON_EXAMPLES,
    ActiveReads,
    Upload,
    add_fields,
    body_digest,
    clean_name,
    input_hint,
    read_json,
    read_upload,
)
from server.intake.url_fetcher import name_from_url
from server.settings import ServerSettings
from server.status.queue_stats import QueueStats
from server.webhooks import check_webhook
from store import new_id
from store.batches import BatchRecord
from store.clients.usage import ClientKind
from store.collections.collections import CollectionRecord
from store.errors import NotRetryable, QuotaReached
from store.images import StagedImage
from store.pipelines.definition import PIPELINE, Pipeline, PipelineService
from store.pipelines.folder import PipelineFolder
from store.requests import NewRequest, RequestRecord
from store.store import Store


@dataclass(frozen=True, kw_only=True)
class _Submission:
    """All that is known of a request apart from its inputs; a batch's requests share it."""

    row: ModelFacts
    service: Service
    #: None if the artefact is built on first use.
    digest: str | None
    options: RequestOptions
    #: Of the read-time parameters those that the client sent. They are not stored, as equal images share an answer.
    read_params: Mapping[str, Any]
    is_fresh: bool
    shares_answers: bool
    webhook: str | None
    key_id: str | None
    client: ClientKind
    params: Mapping[str, Any]
    #: What the images must be like, see `quality_gate.py`. They change no answer, so they are not stored.
    limits: Mapping[str, float]
    #: As text, if the row describes a pipeline.
    pipeline: str | None = None

    def new_request(self, *, created_at: datetime, name: str | None) -> NewRequest:
        return NewRequest(
            id=new_id(),
            service=self.row.service,
            model=self.row.name,
            params=self.params,
            name=name,
            digest=self.digest,
            is_fresh=self.is_fresh,
            shares_answers=self.shares_answers,
            webhook=self.webhook,
            key_id=self.key_id,
            client=self.client,
            created_at=created_at,
            pipeline=self.pipeline,
            **vars(self.options),
        )

    def new_batch(self, *, created_at: datetime, name: str | None) -> BatchRecord:
        return BatchRecord(
            id=new_id(),
            service=self.row.service,
            model=self.row.name,
            params=self.params,
            name=name,
            key_id=self.key_id,
            created_at=created_at,
            webhook=self.webhook,
            **vars(self.options),
        )


@dataclass(frozen=True, kw_only=True)
class ReceivedImage:
    """A request that was read and not yet checked."""

    submission: _Submission
    upload: Upload
    #: Of the first input, if the upload does not have it.
    url: str | None


@dataclass(frozen=True, kw_only=True)
class ReceivedBatch:
    """A batch that was read; its items are not yet checked."""

    submission: _Submission
    name: str | None
    file: IO[bytes]
    #: As `detect_format` returns it.
    kind: str
    boundary: str
    #: Of the whole body; None for a request without an idempotency key.
    digest: str | None


class Intake:
    """Accepts images in one server process.

    :param work_slots: taken while images are checked and staged. More threads read bodies than work at once.
    """

    def __init__(
        self,
        settings: ServerSettings,
        store: Store,
        *,
        queue_stats: QueueStats,
        active_reads: ActiveReads,
        work_slots: threading.BoundedSemaphore,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._store = store
        self._stager = Stager(settings, store.images)
        self._pipelines = PipelineFolder(settings.home, settings.models)
        self._queue_stats = queue_stats
        self._active_reads = active_reads
        self._work_slots = work_slots
        self._clock = clock
        # Fetching one image takes seconds and a batch of them minutes, so neither may hold up every thread.
        self._fetch_slots = FairSlots(settings.server_threads)
        # A batch keeps a work slot for long, so all together get half of them, and one client half of that.
        self._batch_slots = FairSlots(settings.server_threads // 2)
        self._batch_fetch_slots = FairSlots(settings.server_threads // 4)
        # An image that is measured waits for a process, without a work slot.
        self._measuring_slots = FairSlots(settings.server_threads // 2)
        self._quality_gate = QualityGate()

    def read_image(
        self, request: Request, model: str | None, *, query: tuple[dict[str, str], RequestOptions] | None = None
    ) -> ReceivedImage:
        """Read one image, the body's or the URL of one in its JSON, or the other inputs that the model takes.

        :param model: None when the form's field `model` has it, as on the page.
        :param query: what `read_request_options` returns, of a view with further parameters.
        :raises MlgError: the request cannot be accepted.
        """
        fields, options = read_request_options(request, self._clock()) if query is None else query
        submission = None if model is None else self._check(model, fields, options)
        # The page, whose form has the model, sends images only.
        inputs = (load_service("classification") if submission is None else submission.service).inputs
        is_json = request.mimetype == "application/json"
        if is_json and not self._settings.fetches_urls and not _json_inputs(inputs):
            raise FetchingDisabled()
        self.room()
        max_bytes, reads = self._settings.max_image_bytes, self._active_reads
        if is_json:
            upload, url = self._read_json_upload(request, inputs)
        else:
            upload, url = read_upload(request, inputs, max_image_bytes=max_bytes, active_reads=reads), None
        add_fields(fields, upload.fields.items())
        if submission is None:
            submission = self._check(fields.pop("model", ""), fields, options)
        elif upload.fields:
            submission = replace(submission, **self._check_fields(submission.service, fields))
        given = [*upload.inputs, *(() if url is None else (next(iter(inputs)),))]
        if not are_inputs(submission.service, given):
            names = ", ".join(f"`{name}`" for name in given)
            raise errors.MalformedRequest(f"The request has {names}. {input_hint(submission.service.inputs)}")
        return ReceivedImage(submission=submission, upload=upload, url=url)

    def add_image(self, received: ReceivedImage) -> tuple[RequestRecord, Mapping[str, Any]]:
        """Fetch the image if it was sent as a URL, check it and add its request.

        :return: after inputs and request are durable: the request, and the read-time parameters that were sent.
        :raises MlgError: nothing is kept.
        """
        submission, upload = received.submission, received.upload
        if received.url is not None:
            with _slot(
                self._fetch_slots,
                submission.key_id,
                "Too many images are being fetched already. Send the URL again later.",
            ):
                data = self._stager.fetch(received.url, self._settings.fetch_seconds)
            first = primary_input(submission.service)
            upload = replace(upload, inputs={first: data, **upload.inputs}, name=name_from_url(received.url))
        # The clock is read only now: a slow upload must not be dated back, lists are in the order of arrival.
        new = submission.new_request(created_at=self._clock(), name=upload.name)
        with self._work_slots:
            try:
                staged = self._stager.stage(upload.inputs, submission.row, submission.service)
            except errors.NotAnImage as error:
                if upload.is_plain_field:
                    raise errors.MalformedRequest(
                        "The field `image` holds text, not a file. With curl put an @ before the file's name: "
                        "curl -F image=@kitten.jpg URL"
                    ) from error
                raise
            if not submission.limits:
                return self._store.requests.add(new, staged), submission.read_params
        self._stager.check(staged, lambda staged: self._check_quality(staged, submission))
        with self._work_slots:
            return self._store.requests.add(new, staged), submission.read_params

    def _check_quality(self, staged: StagedImage, submission: _Submission) -> None:
        """Check an image against its limits. :raises MlgError: as `QualityGate.check`, or too many are measured."""
        with _slot(
            self._measuring_slots,
            submission.key_id,
            "Too many images are being measured already. Send it again in a moment, or without limits of quality.",
        ):
            self._quality_gate.check(staged, submission.limits)

    @contextlib.contextmanager
    def read_batch(
        self, request: Request, model: str, given: Mapping[str, str] | None = None
    ) -> Iterator[ReceivedBatch]:
        """Read the images of a batch: a form, a zip, or lines of URLs; or the first inputs of another service.

        The slot of the batch is kept until the block ends.

        :param given: the parameters of the batch, for a view whose query has others.
        :raises MlgError: the batch cannot be accepted.
        """
        fields, options = (
            read_request_options(request, self._clock()) if given is None else (dict(given), RequestOptions())
        )
        name = clean_name(fields.pop("name", None))
        submission = self._check(model, fields, options)
        service = submission.service
        kind, boundary = detect_format(request, service.inputs[primary_input(service)])
        if kind != "form":
            _check_shared(service, ())
        if kind == "urls" and not self._settings.fetches_urls:
            raise FetchingDisabled()
        room, is_full = self.room()
        max_bytes = self._settings.max_batch_bytes
        too_large: errors.MlgError = body_too_large(max_bytes)
        free_bytes = self._stager.free_bytes()
        if max_bytes > free_bytes:
            max_bytes, too_large = free_bytes, disk_reserved(self._settings.min_free_bytes)
        if max_bytes > room * (self._settings.max_image_bytes + FORM_ALLOWANCE_BYTES):
            # More bytes hold more images than may be accepted, or some that are too large.
            max_bytes, too_large = room * (self._settings.max_image_bytes + FORM_ALLOWANCE_BYTES), is_full
        with self.spool_body(request, max_bytes=max_bytes, too_large=too_large) as (file, digest):
            yield ReceivedBatch(
                submission=submission, name=name, file=file, kind=kind, boundary=boundary, digest=digest
            )

    @contextlib.contextmanager
    def spool_body(
        self, request: Request, *, max_bytes: int, too_large: errors.MlgError
    ) -> Iterator[tuple[IO[bytes], str | None]]:
        """Write a large body to a temporary file. Its slot is kept until the block ends.

        :param too_large: raised for a body of more than `max_bytes`.
        :return: the file, and the digest of the body; None for a request without an idempotency key.
        :raises TooManyUploads: there is no slot for this client.
        """
        digest = body_digest(request)
        with self._batch_slots.holding(current_key_id()) as is_held:
            if not is_held:
                raise TooManyUploads()
            with spool(
                request,
                folder=self._settings.home,
                max_bytes=max_bytes,
                too_large=too_large,
                active_reads=self._active_reads,
                digest=digest,
            ) as file:
                yield file, None if digest is None else digest.hexdigest()

    def add_stored_image(self, request: RequestRecord, model: str) -> RequestRecord:
        """Add a request for the image of another one, with another model.

        :raises BrokenImage: it is not kept any more. :raises MlgError: nothing is accepted now.
        """
        submission = self._check(model, {}, RequestOptions())
        self.room()
        new = submission.new_request(created_at=self._clock(), name=request.name)
        with self._work_slots:
            inputs = {primary_input(submission.service): self._read_stored(request)}
            return self._store.requests.add(new, self._stager.stage(inputs, submission.row, submission.service))

    def add_stored_batch(
        self, requests: Sequence[RequestRecord], collection: CollectionRecord, *, labels: Mapping[str, str]
    ) -> tuple[BatchRecord, Sequence[StagedItem]]:
        """Add requests for the images of others, with the model of a collection whose members they become.

        :return: as `add_batch`; an image that is not kept any more is refused.
        :raises MlgError: nothing is accepted now.
        """
        submission = self._check(collection.model, {}, RequestOptions(labels=labels))
        room, is_full = self.room()

        def items() -> Iterator[BatchItem]:
            for position, request in enumerate(requests):
                item = BatchItem(position=position, client_id=request.id, name=request.name)
                try:
                    yield replace(item, data=self._read_stored(request))
                except errors.BrokenImage as error:
                    yield replace(item, error=error)

        with self._batch_slots.holding(submission.key_id) as is_held:
            if not is_held:
                raise TooManyUploads()
            with self._work_slots:
                outcomes = self._stager.stage_items(
                    items(), submission.row, submission.service, room=room, is_full=is_full
                )
            return self._add_items(submission, None, outcomes, collection)

    def _read_stored(self, request: RequestRecord) -> bytes:
        """Read the image of a request. :raises BrokenImage: it is not kept any more."""
        try:
            if request.image_deleted_at is None:
                return self._store.images.read(request.image_sha256)
        except FileNotFoundError:
            pass  # deleted meanwhile
        raise errors.BrokenImage("The image is not kept any more. Send it again.")

    def add_batch(
        self,
        received: ReceivedBatch,
        collection: CollectionRecord | None = None,
        *,
        items: Iterator[BatchItem] | None = None,
        check: Callable[[Sequence[StagedItem]], None] = lambda outcomes: None,
    ) -> tuple[BatchRecord, Sequence[StagedItem]]:
        """Check the items of a batch and add their requests.

        :param collection: their images become members of it.
        :param items: what the body has, if it was parsed already.
        :param check: gets the items before their requests are added; what it raises refuses the batch.
        :return: after all inputs and requests are durable: the batch, and its items in the order of the body.
        :raises MlgError: the body cannot be read, or nothing is accepted now; nothing is kept.
        """
        submission, service = received.submission, received.submission.service
        first = primary_input(service)
        shared = SharedInputs(inputs={name: one for name, one in service.inputs.items() if name != first})
        room, is_full = self.room()
        with (
            _slot(
                self._batch_fetch_slots,
                submission.key_id,
                "Too many batches of URLs are being fetched already. Send it again later.",
            )
            if received.kind == "urls"
            else self._work_slots
        ):
            outcomes = self._stager.stage_items(
                items
                if items is not None
                else parse_items(
                    received.file,
                    received.kind,
                    received.boundary,
                    first,
                    service.inputs[first],
                    shared=shared,
                    folder=self._settings.home,
                    max_image_bytes=self._settings.max_image_bytes,
                    max_bytes=self._settings.max_batch_bytes,
                ),
                submission.row,
                service,
                room=room,
                is_full=is_full,
                check=self._quality_gate.batch_check(submission.limits) if submission.limits else None,
            )
            staged_shared: Mapping[str, StagedImage] = {}
            try:
                _check_shared(service, shared.data)
                staged_shared = self._stager.stage_shared(shared.data, submission.row, service)
                check(outcomes)
            except errors.MlgError:
                self._stager.discard(outcomes, staged_shared)
                raise
        return self._add_items(submission, received.name, outcomes, collection, staged_shared)

    def _add_items(
        self,
        submission: _Submission,
        name: str | None,
        outcomes: Sequence[StagedItem],
        collection: CollectionRecord | None,
        shared: Mapping[str, StagedImage] = {},
    ) -> tuple[BatchRecord, Sequence[StagedItem]]:
        # The clock is read only now, as above.
        batch = submission.new_batch(created_at=self._clock(), name=name)
        # A batch's webhook gets one message for all its requests.
        new = replace(
            submission.new_request(created_at=batch.created_at, name=None),
            webhook=None,
            batch_id=batch.id,
            collection=None if collection is None else collection.number,
        )
        staged = [
            (replace(new, id=new_id(), client_id=one.item.client_id, name=one.item.name), one.staged)
            for one in outcomes
            if one.staged is not None
        ]
        refused = [one.refused for one in outcomes if one.refused is not None]
        added = iter(self._store.batches.add(batch, staged, refused, shared=shared, client=submission.client))
        return batch, [one if one.staged is None else replace(one, request=next(added)) for one in outcomes]

    # Checks

    def check_retry(self, model: str, *, has_expired: bool = False) -> None:
        """Check that requests to a model may be tried again.

        :param has_expired: a request was cancelled because it had waited too long.
        :raises FacesDisabled: the operator has turned faces off since. :raises NotRetryable:
        """
        try:
            takes_faces = find_row(self._settings.models, model).takes_faces
        except errors.UnknownModel:
            pipeline = self._pipelines.find(model)
            takes_faces = pipeline is not None and pipeline.takes_faces
        if takes_faces:
            check_faces(self._settings, RequestOptions(), self._clock())
            if has_expired:
                raise NotRetryable("It has waited for as long as images of faces are kept. Send the image again.")

    def _check(self, model: str, fields: Mapping[str, str], options: RequestOptions) -> _Submission:
        try:
            row = find_row(self._settings.models, model)
        except errors.UnknownModel:
            pipeline = self._pipelines.find(model)
            if pipeline is None:
                raise
            return self._check_pipeline(pipeline, fields, options)
        service = load_service(row.service)
        checked = self._check_fields(service, fields)
        if row.takes_faces:
            options = check_faces(self._settings, options, self._clock())
            checked["shares_answers"] = False
        return _Submission(
            row=row,
            service=service,
            digest=artefact_digest(self._settings.models, row),
            options=options,
            key_id=current_key_id(),
            client=current_client_kind(),
            **checked,
        )

    def _check_pipeline(self, pipeline: Pipeline, fields: Mapping[str, str], options: RequestOptions) -> _Submission:
        """Check a request to a pipeline. :raises NotInstalled: a model of one of its steps is not."""
        if pipeline.takes_faces:
            options = check_faces(self._settings, options, self._clock())
        for step in pipeline.steps:
            artefact_digest(self._settings.models, find_row(self._settings.models, step.model))
        service = cast("Service", PipelineService(inputs=pipeline.inputs()))
        row = ModelFacts(
            name=pipeline.name, title=pipeline.title, service=PIPELINE, height=0, width=0, preprocessing="none"
        )
        checked = self._check_fields(service, fields)
        # Its steps reuse earlier answers, it does not.
        return _Submission(
            row=row,
            service=service,
            digest=None,
            options=options,
            key_id=current_key_id(),
            client=current_client_kind(),
            pipeline=pipeline.to_text(),
            **checked,
        )

    def _check_fields(self, service: Service, fields: Mapping[str, str]) -> dict[str, Any]:
        """Check what comes beside an image. :return: fields of a _Submission. :raises InvalidParams:"""
        raw = dict(fields)
        webhook = check_webhook(raw.pop("webhook", None), allows_private=self._settings.allows_private_webhooks)
        is_fresh = parse_flag("fresh", raw.pop("fresh", "0"))
        limits = take_limits(raw)
        if limits and service.inputs[primary_input(service)].kind != "image":
            raise errors.InvalidParams(f"{next(iter(limits))} is for images, and this model takes none.")
        params = check_params(service.params, raw)
        read_time = {param.name for param in service.params if param.is_read_time}
        return {
            "params": {name: value for name, value in params.items() if name not in read_time},
            "read_params": {name: value for name, value in params.items() if name in read_time and name in raw},
            "is_fresh": is_fresh,
            "shares_answers": self._settings.shares_answers,
            "webhook": webhook,
            "limits": limits,
        }

    def room(self) -> tuple[int, errors.MlgError]:
        """Count the requests that may be accepted now, so that no more are read than the store would take.

        :return: at least 1, and the error for more.
        :raises BacklogFull: :raises QuotaReached: :raises DiskFull:
        """
        self._stager.free_bytes()
        room, is_full = self._settings.max_backlog - self._queue_stats.waiting_sent(), BacklogFull()
        if room <= 0:
            raise is_full
        left = quota_left()
        return (room, is_full) if left is None or room < left else (left, QuotaReached())

    def _read_json_upload(self, request: Request, inputs: Mapping[str, Input]) -> tuple[Upload, str | None]:
        """Read the table rows and texts in a JSON body, or the URL of its image."""
        most = self._settings.max_image_bytes
        plain = {name: replace(one, max_bytes=min(one.max_bytes, most)) for name, one in _json_inputs(inputs).items()}
        fields, given, digest = read_json(request, active_reads=self._active_reads, inputs=plain)
        first = next(iter(inputs))
        if first in plain:
            if first not in given:
                raise errors.MalformedRequest(f"The JSON has no `{first}`. {input_hint(inputs)}")
            return Upload(inputs=given, fields=fields, digest=digest), None
        if not self._settings.fetches_urls:
            raise FetchingDisabled()
        url = fields.pop("url", None)
        if url is None:
            raise errors.MalformedRequest('The JSON has no `url`. Send {"url": "https://example.org/kitten.jpg"}')
        return Upload(inputs=given, fields=fields, digest=digest), url


def _check_shared(service: Service, given: Iterable[str]) -> None:
    """Check which inputs all requests of a batch have beside their own. :raises MalformedRequest: one is missing."""
    first = primary_input(service)
    if not are_inputs(service, [first, *given]):
        required = (name for name, one in service.inputs.items() if not one.is_optional)
        missing = " and ".join(f"`{name}`" for name in required if name not in (first, *given))
        raise errors.MalformedRequest(
            f"The batch lacks {missing}, which all its items share. Send a form with {missing} once, and with many "
            f"fields `{first}` or a zip in the field `archive`."
        )


def _json_inputs(inputs: Mapping[str, Input]) -> dict[str, Input]:
    return {name: one for name, one in inputs.items() if one.kind in JSON_EXAMPLES}


def artefact_digest(models: Path, row: ModelFacts) -> str | None:
    """Return the artefact's digest, None if it is built on first use. :raises NotInstalled: :raises ModelError:"""
    try:
        return find_artefact(models, row.name).digest
    except (errors.NotInstalled, errors.BrokenArtefact):
        if not can_build(row.name):
            raise
        return None


@functools.cache
def can_build(model: str) -> bool:
    """Tell whether a model of the catalogue is built on first use, with the packages that are installed now."""
    # Cached because looking for a package costs more than all other checks, and packages do not change under a server.
    row = CATALOGUE.get(model)
    return row is not None and can_build_now(row)


@contextlib.contextmanager
def _slot(slots: FairSlots, client: str | None, message: str) -> Iterator[None]:
    """Take a slot, without waiting for one. :raises BacklogFull: there is none for this client."""
    with slots.holding(client) as is_held:
        if not is_held:
            raise BacklogFull(message)
        yield
