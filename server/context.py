"""What the views of one server process share, and what every group of views is made of.

Created by `server/app.py`. It must not keep anything between two requests that another server process would need.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import flask

from provider_image.models.artefact import installed_digest
from provider_image.models.catalogue import CATALOGUE, install_command
from server.auth.cursors import CursorCodec, Cursors
from server.auth.guard import current_key_id, owned, visible_key_id
from server.auth.limits import FairSlots
from server.auth.memory import hold_bytes
from server.endpoint import get_operation
from server.errors import TooManyDownloads
from server.intake.accept import Intake, can_build
from server.intake.idempotency import Repetitions, is_repeatable
from server.intake.redo import Redo
from server.intake.trainings import TrainingIntake
from server.intake.uploads import ActiveReads
from server.live.changes import ChangeDispatcher
from server.live.long_poll import LongPoller
from server.serializers import Thresholds, parse_read_params, serialize_request, serialize_training
from server.settings import ServerSettings
from server.similarity import Similarity
from server.status.dashboard import Dashboard
from server.status.eta import EtaInputs, WaitEstimate, estimate
from server.status.queue_stats import QueueStats
from server.thumbnails import Thumbnails
from store.batches import BatchRecord
from store.collections.collections import CollectionRecord
from store.errors import ImageGone
from store.pipelines.definition import Pipeline
from store.pipelines.folder import PipelineFolder
from store.pipelines.runs import PipelineRun
from store.requests import RequestRecord
from store.store import Store
from store.trainings.records import TrainingRecord, TrainingState


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What the views of one server process share."""

    settings: ServerSettings
    store: Store
    intake: Intake
    training_intake: TrainingIntake
    #: Holds reads until their request is final.
    long_poller: LongPoller
    #: Notifies event streams and held reads of changes.
    change_dispatcher: ChangeDispatcher
    #: Positions in lists and streams, as clients get them.
    cursors: Cursors
    #: The threads that read bodies.
    active_reads: ActiveReads
    clock: Callable[[], datetime]
    queue_stats: QueueStats
    dashboard: Dashboard
    #: Bodies are read by more threads than work at once, so that slow clients do not block the others.
    work_slots: threading.BoundedSemaphore
    #: Answers requests that are sent again.
    repetitions: Repetitions
    thumbnails: Thumbnails
    #: Searches in collections.
    similarity: Similarity
    #: Does requests again with another model.
    redo: Redo
    #: Taken meanwhile: it keeps a thread for some seconds.
    redo_slots: FairSlots

    @classmethod
    def create(cls, settings: ServerSettings, store: Store, clock: Callable[[], datetime]) -> Context:
        """Create the context of one server process."""
        active_reads = ActiveReads(settings.reading_threads)
        queue_stats = QueueStats(store)
        work_slots = threading.BoundedSemaphore(settings.server_threads)
        change_dispatcher = ChangeDispatcher(store.changes, store.progress, capacity=settings.max_streams)
        intake = Intake(
            settings, store, queue_stats=queue_stats, active_reads=active_reads, work_slots=work_slots, clock=clock
        )
        return cls(
            settings=settings,
            store=store,
            intake=intake,
            training_intake=TrainingIntake(settings, store, intake, clock),
            long_poller=LongPoller(change_dispatcher, store.requests, capacity=settings.max_held_reads),
            change_dispatcher=change_dispatcher,
            cursors=Cursors(settings.home),
            active_reads=active_reads,
            clock=clock,
            queue_stats=queue_stats,
            dashboard=Dashboard(store, queue_stats, clock),
            work_slots=work_slots,
            repetitions=Repetitions(
                store.idempotency, active_reads=active_reads, max_body_bytes=settings.max_batch_bytes, clock=clock
            ),
            redo=Redo(settings, store, clock),
            redo_slots=FairSlots(settings.server_threads // 4),
            thumbnails=Thumbnails(store.images, max_waiting=max(2, settings.server_threads // 2)),
            similarity=Similarity(store.collections, max_waiting=max(2, settings.server_threads // 4)),
        )

    def serialize(self, request: RequestRecord, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Build a request's JSON, with the reason why it waits.

        :param params: the service's read-time parameters, checked; None for the defaults.
        """
        return self.serialize_list([request], params)[0]

    def serialize_list(
        self, requests: Iterable[RequestRecord], params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """See `serialize`. What requests of the same service or model have in common is found once for all of them."""
        thresholds = Thresholds(self.settings.models)
        defaults = functools.cache(lambda service: parse_read_params(service, {}))
        return [
            serialize_request(
                each,
                defaults(each.service) if params is None else params,
                self.estimate_wait(each),
                thresholds=thresholds,
            )
            for each in requests
        ]

    def pipelines_of_images(self) -> list[Pipeline]:
        """List the pipelines that an image can be sent to, without those of faces, whose pages ask for consent."""
        files = PipelineFolder(self.settings.home, self.settings.models).list_files()
        found = [file.pipeline for file in files if file.pipeline is not None]
        return [one for one in found if one.takes_image and not one.takes_faces]

    def find_unknown(self, requests: Iterable[RequestRecord]) -> set[str]:
        """Return the ids of those whose first label is less probable than the threshold of its model."""
        thresholds = Thresholds(self.settings.models)
        found = ((each, thresholds.find(each)) for each in requests)
        return {each.id for each, threshold in found if threshold and each.output[0][2] < threshold}

    def serialize_training(self, training: TrainingRecord, *, is_whole: bool = False) -> dict[str, Any]:
        """Build a training's JSON, with the reason why it waits. :param is_whole: with its figures."""
        has_progress = training.batch_id is not None and (is_whole or not training.state.is_final)
        progress = self.store.batches.progress(training.batch_id or "") if has_progress else None
        waiting_for = None
        if training.state is TrainingState.WAITING:
            waiting_for = "The batcher will begin to fit in a moment."
            if not self.queue_stats.batchers():
                waiting_for = "Nothing is processed now: no batcher is running. Start one: mlg batch (or mlg up)."
            if training.batch_id is not None and progress is not None and progress.waiting:
                last = self.store.batches.last_unfinished(training.batch_id, progress)
                wait = None if last is None else self.estimate_wait(last)
                waiting_for = waiting_for if wait is None else wait.waiting_for
        is_used = training.digest is not None and training.digest == installed_digest(
            self.settings.models, training.name
        )
        return serialize_training(training, progress, waiting_for, is_used=is_used, is_whole=is_whole)

    def read_image(self, request: RequestRecord) -> bytes:
        """Read the image of a request. :raises ImageGone: it was deleted. :raises TooManyDownloads:"""
        if request.image_deleted_at is not None:
            raise ImageGone()
        return self.read_stored(request.image_sha256, request.image_bytes)

    def read_stored(self, sha256: str, size_bytes: int) -> bytes:
        """Read what is stored under a hash. :raises ImageGone: it was deleted. :raises TooManyDownloads:"""
        hold_bytes(size_bytes, TooManyDownloads())
        try:
            return self.store.images.read(sha256)
        except FileNotFoundError as error:
            raise ImageGone() from error

    def estimate_wait(self, request: RequestRecord) -> WaitEstimate | None:
        """Estimate why a request waits and how long; None if it is final."""
        if request.state.is_final:
            return None
        if request.run is not None:
            return self._estimate_steps(request.run)
        inputs = EtaInputs(
            batchers=self.queue_stats.batchers(),
            backlog=self.queue_stats.backlog(),
            throughput=self.queue_stats.throughput(request.model),
            unavailable_reason=self._unavailable_reason(request.model),
        )
        return estimate(request, inputs, self.clock())

    def _estimate_steps(self, run: PipelineRun) -> WaitEstimate:
        """Tell why a request to a pipeline has not ended: by the first of its steps that has not."""
        for child in run.children.values():
            wait = self.estimate_wait(child)
            if wait is not None:
                return WaitEstimate(waiting_for=f"Step {child.step}: {wait.waiting_for}", eta_seconds=None)
        waiting_for = "Its next step begins in a moment." if run.has_steps else "Its steps are in progress."
        if not self.queue_stats.batchers():
            waiting_for = "Nothing is processed now: no batcher is running. Start one: mlg batch (or mlg up)."
        return WaitEstimate(waiting_for=waiting_for, eta_seconds=None)

    def _unavailable_reason(self, model: str) -> str | None:
        """Return why no batcher can run a model that requests wait for."""
        if installed_digest(self.settings.models, model) is not None or can_build(model):
            return None
        if model not in CATALOGUE:
            return (
                f"The model {model} is not installed any more and is not in the catalogue. If it is a custom model, "
                f"install it again: {install_command(model)}; else cancel the request."
            )
        return f"The model {model} is not installed any more. Install it: {install_command(model)}"


class Views:
    """Views that share a context: the methods of a subclass that have an operation."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store
        self._now = context.clock

    def _get_request(self, id: str) -> RequestRecord:
        """Return a request of the caller's. :raises UnknownRequest:"""
        return owned(self._store.requests.get, id)

    def _get_batch(self, id: str) -> BatchRecord:
        """Return a batch of the caller's. :raises UnknownBatch:"""
        return owned(self._store.batches.get, id)

    def _get_training(self, id: str) -> TrainingRecord:
        """Return a training of the caller's. :raises UnknownTraining:"""
        return owned(self._store.trainings.get, id)

    def _get_collection(self, name: str) -> CollectionRecord:
        """Return a collection of the caller's by its name, or by its id. :raises UnknownCollection:"""
        return owned(lambda text: self._store.collections.find(text, key_id=current_key_id()), name)

    def _cursors(self, list_name: str) -> CursorCodec:
        """Return what writes and reads the cursors of a list for the caller."""
        return self._context.cursors.codec(list_name, visible_key_id())

    def register(self, app: flask.Flask) -> None:
        """Add the views to an application, in the order in which they are defined."""
        for name in vars(type(self)):
            view = getattr(self, name)
            declared = get_operation(view)
            if declared is not None:
                if is_repeatable(declared) and not declared.body:
                    view = self._context.repetitions.wrap(view)
                app.add_url_rule(declared.path, name, view, methods=declared.methods)
