"""Doing answered requests again with another model: which ones, at what cost, and the batches of the new requests.

Used by `server/api/views/requests.py` and by `mlg requests redo`. A new request has the stored inputs of the earlier
one, its owner, labels, retention time and, for the same service, its parameters; the earlier one keeps its answer.
`store/batches.py` adds them. Nothing is kept between two calls: a call finds by the store what is done again already.

The same model twice does those requests again that another version of it answered. What may be done with inputs of
another service is only that they are of the same kind; the service itself refuses a row that lacks its columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

from provider_image.errors import MlgError, UnknownModel
from provider_image.models.catalogue import ModelFacts
from provider_image.models.registry import find_row
from provider_image.models.speed import read_speed
from provider_image.service import Service, are_inputs, check_params, primary_input
from provider_image.services import REGISTRY, load_service
from server.intake.accept import artefact_digest
from server.intake.faces import check_faces
from server.intake.request_options import RequestOptions
from server.settings import ServerSettings
from server.status.eta import ALIVE_SECONDS
from store import new_id
from store.batches import BatchRecord
from store.clients.usage import ClientKind
from store.requests import NewRequest, RequestRecord
from store.search import Query
from store.states import RequestState
from store.store import Store

#: Requests that one call does again.
MAX_REQUESTS = 10_000
#: Requests that are read from the store at once, and how often one call reads.
_PAGE_SIZE = 500
_MAX_READS = 100


@dataclass(frozen=True, kw_only=True)
class RedoTarget:
    """The model that answers again."""

    row: ModelFacts
    service: Service
    #: None if the artefact is built on first use.
    digest: str | None


@dataclass(kw_only=True)
class RedoPlan:
    """Requests that can be done again, and counts of those that cannot."""

    #: The new requests, in the order of the earlier ones; they have no batch yet.
    new: list[NewRequest] = field(default_factory=list)
    #: Done again with the model already, or answered by its present version.
    existing: int = 0
    #: Their inputs were deleted.
    without_inputs: int = 0
    #: Their inputs are of another kind than the model takes.
    unsuitable: int = 0
    #: Number below which the next call goes on; None at the end.
    next_before: int | None = None


@dataclass(frozen=True, kw_only=True)
class RedoReport:
    """What was added."""

    #: Each batch with its requests, one for each owner.
    batches: Sequence[BatchRecord]
    #: Why some were not added.
    stopped_by: MlgError | None

    @property
    def added(self) -> int:
        """Count the new requests."""
        return sum(batch.total for batch in self.batches)


@dataclass(frozen=True, kw_only=True)
class RedoEstimate:
    """How long requests will take, and what they cost; None where nothing is known of the model yet."""

    seconds: float | None
    #: In GLM, by what images of the model have cost so far on rented computers.
    cost: Decimal | None


class Redo:
    """Does requests again. May be used from any thread."""

    def __init__(self, settings: ServerSettings, store: Store, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock

    def find_target(self, model: str) -> RedoTarget:
        """Find the model that is to answer. :raises UnknownModel: :raises NotInstalled: :raises ModelError:"""
        row = find_row(self._settings.models, model)
        if row.takes_faces:
            check_faces(self._settings, RequestOptions(), self._clock())
        digest = artefact_digest(self._settings.models, row)
        return RedoTarget(row=row, service=load_service(row.service), digest=digest)

    def plan(self, query: Query, target: RedoTarget, *, before: int | None, limit: int) -> RedoPlan:
        """Find answered requests, newest first, that can be done again. Only reads.

        :param query: its model and filters; the state is done.
        :param before: `next_before` of the previous call.
        :param limit: finds at most so many, and looks at a limited number of others.
        """
        plan = RedoPlan(next_before=before)
        query = replace(query, status=str(RequestState.DONE))
        for _ in range(_MAX_READS):
            page = self._store.search.find(query, before=plan.next_before, limit=min(_PAGE_SIZE, limit - len(plan.new)))
            replaced = self._store.requests.list_replaced((one.id for one in page.requests), target.row.name)
            for request in page.requests:
                if request.id in replaced or (request.model == target.row.name and request.digest == target.digest):
                    plan.existing += 1
                elif request.image_deleted_at is not None:
                    plan.without_inputs += 1
                elif not _is_suitable(request, target.service):
                    plan.unsuitable += 1
                else:
                    plan.new.append(self._new_request(request, target))
            plan.next_before = page.next_before
            if page.next_before is None or len(plan.new) >= limit:
                break
        plan.new.reverse()
        return plan

    def add(
        self,
        plan: RedoPlan,
        target: RedoTarget,
        *,
        name: str,
        webhook: str | None,
        charged_key_id: str | None,
        client: ClientKind,
    ) -> RedoReport:
        """Add the requests of a plan, as a batch for each owner of earlier ones. What is there already is left out.

        :param name: of the batches.
        :param webhook: URL that is notified of the end of each batch.
        :param charged_key_id: the key whose quota and usage count the requests.
        :param client: the program that asks for it.
        :raises StoreError: what was added before stays.
        """
        owned: dict[str | None, list[NewRequest]] = defaultdict(list)
        for one in plan.new:
            owned[one.key_id].append(one)
        batches: list[BatchRecord] = []
        first_stop: MlgError | None = None
        for key_id, requests in owned.items():
            batch = BatchRecord(
                id=new_id(),
                service=target.row.service,
                model=target.row.name,
                params=_default_params(target.service),
                name=name,
                key_id=key_id,
                created_at=self._clock(),
                webhook=webhook,
            )
            added, stopped_by = self._store.batches.add_replacements(
                batch, _in_batch(requests, batch), charged_key_id=charged_key_id, client=client
            )
            batches += [replace(batch, total=added)] if added else []
            first_stop = first_stop or stopped_by
        return RedoReport(batches=batches, stopped_by=first_stop)

    def estimate(self, target: RedoTarget, count: int) -> RedoEstimate:
        """Estimate the time and cost of so many requests, after those of the model that are queued already."""
        name = target.row.name
        throughput = self._store.chunks.throughput(name)
        speed = None if target.digest is None else read_speed(self._settings.models, name, target.digest)
        if throughput is not None:
            alive = self._store.batchers.list(seen_since=self._clock() - timedelta(seconds=ALIVE_SECONDS))
            per_second = throughput.items_per_second * max(1, sum(batcher.capacity for batcher in alive))
        else:
            per_second = 0.0 if speed is None else speed.images_per_second
        waiting = sum(one.waiting + one.claimed for one in self._store.requests.backlog() if one.model == name)
        prices = [row.per_1000_images for row in self._store.ledger.costs("model") if row.key == name]
        return RedoEstimate(
            seconds=round((count + waiting) / per_second, 1) if per_second > 0 else None,
            cost=round(prices[0] * count / 1000, 6) if prices and prices[0] is not None else None,
        )

    def _new_request(self, earlier: RequestRecord, target: RedoTarget) -> NewRequest:
        is_same_service = earlier.service == target.row.service
        # A step of a pipeline is kept as long as the request to it.
        kept = earlier if earlier.parent is None else self._store.requests.get(earlier.parent)
        options = RequestOptions(labels=earlier.labels, keep_seconds=kept.keep_seconds)
        if target.row.takes_faces:
            options = check_faces(self._settings, options, self._clock())
        return NewRequest(
            id=new_id(),
            service=target.row.service,
            model=target.row.name,
            params=earlier.params if is_same_service else _default_params(target.service),
            name=earlier.name,
            labels=options.labels,
            key_id=earlier.key_id,
            keep_seconds=options.keep_seconds,
            deadline_at=options.deadline_at,
            created_at=self._clock(),
            client_id=earlier.client_id,
            replaces=earlier.id,
            digest=target.digest,
            shares_answers=self._settings.shares_answers and not target.row.takes_faces,
        )


def default_name(model: str | None, target: RedoTarget) -> str:
    """Return the name of a batch that got none."""
    return f"{model} again with {target.row.name}"


def known_model(models: Path, name: str) -> str:
    """Return a model's canonical name; the name as given for one that is not installed any more."""
    try:
        return find_row(models, name).name
    except UnknownModel:
        return name


def _in_batch(requests: Sequence[NewRequest], batch: BatchRecord) -> list[NewRequest]:
    """Put requests into a batch. Where one has no client id, or a second the same, it gets the earlier request's id."""
    taken: set[str | None] = {None}
    placed = []
    for one in requests:
        client_id = one.replaces if one.client_id in taken else one.client_id
        taken.add(client_id)
        placed.append(replace(one, batch_id=batch.id, client_id=client_id))
    return placed


def _is_suitable(request: RequestRecord, service: Service) -> bool:
    """Tell whether a service takes the inputs of a request."""
    if request.service == service.name:
        return True
    if request.service not in REGISTRY:
        return False
    earlier = load_service(request.service)
    first = primary_input(service)
    is_same_kind = earlier.inputs[primary_input(earlier)].kind == service.inputs[first].kind
    return is_same_kind and are_inputs(service, [first, *request.inputs])


def _default_params(service: Service) -> dict[str, object]:
    """Return the parameters that are stored when a client sends none."""
    stored = [param for param in service.params if not param.is_read_time]
    return check_params(tuple(stored), {})
