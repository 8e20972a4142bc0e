"""Views of collections: create, add images, search, near-duplicates, groups, remove.

The image of a search becomes an ordinary request for the collection's model: one that was answered before costs
nothing, any other goes through the queue while the response is held.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flask
from werkzeug.http import parse_options_header
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams, MalformedRequest
from provider_image.models.registry import find_row
from provider_image.services.embedding import VECTOR, Embedding
from server.api.query import (
    CURSOR,
    LIMIT,
    WAIT,
    PageQuery,
    check_names,
    limit_field,
    parse_limit,
    parse_wait_seconds,
    read_query,
)
from server.api.responses import json_response
from server.api.views.batches import BINARY, MANY_IMAGES, show_item
from server.auth.guard import caller_check, current_key_id
from server.context import Views
from server.endpoint import Field, operation
from server.errors import AccessRefused, ModelChanged, NotEmbedded
from server.intake.accept import ReceivedBatch
from server.intake.batch_parser import MAX_ITEMS
from server.intake.request_options import REQUEST_OPTIONS, RequestOptions, parse_labels
from server.intake.uploads import query_fields, read_bytes, read_object
from server.record_json import fields, given_fields
from store import new_id
from store.batches import BatchRecord
from store.clients.keys import Scope
from store.collections.collections import NAME_PATTERN, CollectionRecord, MemberRecord
from store.collections.likeness import MAX_GROUPS, Group
from store.errors import UnknownRequest
from store.requests import RequestRecord
from store.states import RequestState

#: The model of a collection that names none.
DEFAULT_MODEL = "efficientnet_lite0_embedding"
#: Images that one search returns, and one group shows.
MAX_MATCHES, MAX_SHOWN = 1000, 1000
_DEFAULT_MATCHES, _DEFAULT_SHOWN = 10, 12
#: Similarity of near-duplicates.
DEFAULT_THRESHOLD = 0.95
#: Seconds that a search by image is held if the client says nothing else.
_DEFAULT_WAIT_SECONDS = 30.0
#: Bytes of a body with a vector or with ids.
_MAX_JSON_BYTES = 1024 * 1024
#: Labels that one search filters by. Each may be that of every image.
_MAX_FILTERS = 4
_K = Field(
    name="k",
    help="How many images at most.",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_MATCHES, "default": _DEFAULT_MATCHES},
)
_THRESHOLD = Field(
    name="threshold",
    help="Least similarity, the cosine of the angle between two vectors.",
    schema={"type": "number", "minimum": -1, "maximum": 1},
)
_FILTER = Field(
    name="label",
    help=f"Only images with this label, as name:value, or as value under any name; at most {_MAX_FILTERS} times.",
    schema={"type": "array", "items": {"type": "string"}},
)
_COUNT = Field(
    name="count",
    help="How many groups; chosen by the number of images if it is left out.",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_GROUPS},
)
_SHOWN = Field(
    name="images",
    help="How many images of each group are listed.",
    schema={"type": "integer", "minimum": 1, "maximum": MAX_SHOWN, "default": _DEFAULT_SHOWN},
)
_COLLECTION = "Collection"
_operation = functools.partial(operation, tag="collections")


@dataclass(frozen=True, kw_only=True)
class _SearchQuery:
    """The parameters of a search."""

    k: int
    threshold: float
    labels: Sequence[tuple[str | None, str]]
    wait_seconds: float


class CollectionViews(Views):
    """The views of collections."""

    @_operation(
        "POST /collections",
        "Create a collection",
        Scope.SUBMIT,
        body={
            "application/json": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "pattern": f"^{NAME_PATTERN}$", "examples": ["holiday"]},
                    "model": {"type": "string", "default": DEFAULT_MODEL},
                },
            }
        },
        responses={201: _COLLECTION},
        errors=(404,),
    )
    def create_collection(self) -> Response:
        """Create an empty collection, for the vectors of one model."""
        read_query(flask.request)
        given, digest = self._read_object()
        check_names(given, ("name", "model"))
        name, model = given.get("name"), given.get("model", DEFAULT_MODEL)
        if not isinstance(name, str) or not isinstance(model, str):
            raise InvalidParams("`name` and `model` take a text.")
        new = self.new_collection(name, model)
        return self._context.repetitions.once(
            digest,
            lambda: json_response(
                {"success": True, **self._serialize(self._store.collections.add(new))},
                201,
                {"Location": f"/collections/{new.name}"},
            ),
        )

    def new_collection(self, name: str, model: str) -> CollectionRecord:
        """Return a collection of the caller's that is not added yet. :raises InvalidParams: :raises UnknownModel:"""
        row = find_row(self._context.settings.models, model)
        if row.service != Embedding.name:
            raise InvalidParams(
                f"The model {row.name} returns no vectors. A collection takes a model whose service is "
                f"{Embedding.name}, see GET /models."
            )
        return CollectionRecord(id=new_id(), name=name, key_id=current_key_id(), model=row.name, created_at=self._now())

    @_operation(
        "GET /collections", "List collections, newest first", Scope.READ, returns="Collections", query=(CURSOR, LIMIT)
    )
    def list_collections(self) -> flask.Response:
        """List collections, newest first."""
        page = PageQuery.from_request(flask.request, self._cursors("collections"))
        found = self._store.collections.list(key_id=page.key_id, before=page.before, limit=page.limit + 1)
        shown = [self._serialize(collection) for collection in found[: page.limit]]
        last = found[page.limit - 1].number if len(found) > page.limit else None
        return json_response({"success": True, "collections": shown, "next": page.next_cursor(last)})

    @_operation("GET /collections/<name>", "Read what a collection has", Scope.READ, returns=_COLLECTION)
    def show_collection(self, name: str) -> flask.Response:
        """Show how many images have a vector, wait for one, or failed, and how well a search finds them."""
        return json_response({"success": True, **self._serialize(self._get_collection(name))})

    @_operation(
        "DELETE /collections/<name>",
        "Delete a collection",
        Scope.SUBMIT,
        returns={"type": "object", "required": ["success", "name"]},
    )
    def remove_collection(self, name: str) -> flask.Response:
        """Delete a collection with its vectors. Its requests stay, and are deleted when they are old enough."""
        collection = self._get_collection(name)
        self._store.collections.remove(collection, now=self._now())
        return json_response({"success": True, "name": collection.name, "status": "deleted"})

    @_operation(
        "POST /collections/<name>/images",
        "Add images to a collection",
        Scope.SUBMIT,
        query=REQUEST_OPTIONS,
        body={
            **MANY_IMAGES,
            "application/jsonl": {
                "type": "object",
                "properties": {"client_id": {"type": "string"}, "url": {"type": "string", "format": "uri"}},
                "required": ["url"],
            },
            "application/json": {
                "type": "object",
                "properties": {
                    "req_ids": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_ITEMS},
                    "batch_id": {"type": "string"},
                },
                "examples": [{"req_ids": ["01a21cafe51d24a7e2a895bc53889c9f"]}],
            },
        },
        responses={202: "CollectionAdded"},
        errors=(411,),
    )
    def add_to_collection(self, name: str) -> Response:
        """Add images: new ones like those of a batch, or those of requests that are there already.

        202 when all that are accepted are durable. An image is a member once it has its vector; one that is a member
        already is not added again, but gets the labels.
        """
        collection = self.get_own_collection(name)
        if flask.request.mimetype == "application/json":
            query = query_fields(flask.request, repeatable="label")
            check_names(query, ())
            labels = parse_labels(flask.request.args.getlist("label"))
            given, digest = self._read_object()
            return self._context.repetitions.once(digest, lambda: self._add_stored(collection, given, labels))
        with self._context.intake.read_batch(flask.request, collection.model) as received:
            return self._context.repetitions.once(received.digest, lambda: self._add(collection, received))

    def get_own_collection(self, name: str) -> CollectionRecord:
        """Return a collection that the caller may add images to.

        :raises UnknownCollection: :raises AccessRefused: it belongs to another key. :raises TooManyMembers:
        """
        collection = self._get_collection(name)
        if collection.key_id != current_key_id():
            raise AccessRefused("Only the API key that a collection belongs to can add images to it.")
        self._store.collections.check_room(collection, 1)
        return collection

    def _add(self, collection: CollectionRecord, received: ReceivedBatch) -> flask.Response:
        batch, items = self._context.intake.add_batch(received, collection)
        return _added(collection, batch, [show_item(item) for item in items])

    def _add_stored(
        self, collection: CollectionRecord, given: Mapping[str, Any], labels: Mapping[str, str]
    ) -> flask.Response:
        return _added(collection, *self.add_stored(collection, given, labels))

    def add_stored(
        self, collection: CollectionRecord, given: Mapping[str, Any], labels: Mapping[str, str]
    ) -> tuple[BatchRecord | None, list[dict[str, Any]]]:
        """Add the images of requests.

        :param given: `{"req_ids": [...]}` or `{"batch_id": ...}`.
        :return: the batch of those that had no vector, and the JSON of each.
        """
        ids = self._read_ids(given)
        self._store.collections.check_room(collection, len(ids))
        known: list[RequestRecord] = []
        shown: list[dict[str, Any]] = []
        for position, id in enumerate(ids):
            entry = {"client_id": id, "position": position, "req_id": None, "status": "refused"}
            try:
                known.append(self._get_request(id))
                shown.append({**entry, "req_id": id, "status": known[-1].status, "code": None, "reason": None})
            except UnknownRequest as error:
                shown.append({**entry, "code": error.code, "reason": error.reason})
        added = self._store.collections.add_requests(collection, [request.id for request in known], labels)
        others = [request for request in known if request.id not in added]
        batch = None
        if others:
            batch, items = self._context.intake.add_stored_batch(others, collection, labels=labels)
            by_id = {item.item.client_id: show_item(item) for item in items}
            shown = [{**entry, **by_id.get(entry["client_id"], {}), "position": entry["position"]} for entry in shown]
        return batch, shown

    def _read_ids(self, given: Mapping[str, Any]) -> list[str]:
        """Return the ids in a body, each once. :raises MalformedRequest: :raises UnknownBatch:"""
        ids, batch_id = given.get("req_ids"), given.get("batch_id")
        if isinstance(batch_id, str) and ids is None:
            batch = self._get_batch(batch_id)
            ids = [request.id for request in self._store.batches.items(batch.id, limit=MAX_ITEMS)]
        elif not isinstance(ids, list) or not all(isinstance(id, str) for id in ids) or batch_id is not None:
            raise MalformedRequest('The body takes {"req_ids": ["..."]} or {"batch_id": "..."}.')
        if not 0 < len(ids) <= MAX_ITEMS:
            raise MalformedRequest(f"The body takes 1 to {MAX_ITEMS} ids.")
        return list(dict.fromkeys(ids))

    @_operation(
        "GET /collections/<name>/images",
        "List the images of a collection, the last added first",
        Scope.READ,
        returns="Members",
        query=(CURSOR, LIMIT),
    )
    def list_members(self, name: str) -> flask.Response:
        """List images with their status: `ready`, `pending` while there is no vector yet, or `failed`."""
        collection = self._get_collection(name)
        page = PageQuery.from_request(flask.request, self._cursors(f"collection {collection.id}"))
        found = self._store.collections.members(collection, before=page.before, limit=page.limit + 1)
        last = found[page.limit - 1].number if len(found) > page.limit else None
        shown = [serialize_member(member) for member in found[: page.limit]]
        return json_response({"success": True, "images": shown, "next": page.next_cursor(last)})

    @_operation(
        "DELETE /collections/<name>/images/<id>",
        "Remove an image from a collection",
        Scope.SUBMIT,
        returns={"type": "object", "required": ["success", "req_id"]},
    )
    def remove_member(self, name: str, id: str) -> flask.Response:
        """Remove the image of a request with its vector. The request stays; to delete it removes the image too."""
        self._store.collections.remove_member(self._get_collection(name), id)
        return json_response({"success": True, "req_id": id, "status": "removed"})

    @_operation(
        "POST /collections/<name>/search",
        "Find the most similar images of a collection",
        Scope.SUBMIT,
        query=(_K, _THRESHOLD, _FILTER, WAIT),
        body={
            "multipart/form-data": {"type": "object", "required": ["image"], "properties": {"image": BINARY}},
            "image/*": BINARY,
            "application/json": {
                "type": "object",
                "properties": {
                    "req_id": {"type": "string"},
                    "vector": {"type": "array", "items": {"type": "number"}},
                },
                "examples": [{"req_id": "01a21cafe51d24a7e2a895bc53889c9f"}],
            },
            "application/octet-stream": {**BINARY, "description": "A vector: f32 values, little-endian."},
        },
        responses={200: "Matches", 202: "Submitted"},
        errors=(410,),
    )
    def search_collection(self, name: str) -> Response:
        """Find the images that are most similar to an image, to the image of a request, or to a vector.

        202 with the id of a request if the vector of the image is not there in time; search by that id then.
        """
        collection = self._get_collection(name)
        query = self._parse_search(query_fields(flask.request, repeatable="label"))
        reads = self._context.active_reads
        kind = parse_options_header(flask.request.environ.get("CONTENT_TYPE", ""))[0].lower()
        if kind == "application/octet-stream":
            data, _ = read_bytes(flask.request, _MAX_JSON_BYTES, active_reads=reads)
            return self._found(collection, query, _parse_vector(collection, data))
        if kind == "application/json":
            return self._search_by_json(collection, query, *self._read_object())
        received = self._context.intake.read_image(flask.request, collection.model, query=({}, RequestOptions()))
        return self._search_by_new_request(
            collection, query, received.upload.digest, lambda: self._context.intake.add_image(received)[0]
        )

    def _search_by_json(
        self, collection: CollectionRecord, query: _SearchQuery, given: Mapping[str, Any], digest: str | None
    ) -> Response:
        check_names(given, ("req_id", "vector"))
        if set(given) == {"vector"}:
            return self._found(collection, query, _parse_vector(collection, _pack_vector(given["vector"])))
        if set(given) != {"req_id"} or not isinstance(given["req_id"], str):
            raise MalformedRequest('The body takes {"req_id": "..."} or {"vector": [0.1, ...]}.')
        request = self._get_request(given["req_id"])
        member = self._store.collections.find_image(collection, request.image_sha256)
        if member is not None:
            return self._found(collection, query, member[1], request=request, without=member[0])
        if request.model == collection.model:
            return self._search_by_request(collection, query, request)
        return self._search_by_new_request(
            collection, query, digest, lambda: self._context.intake.add_stored_image(request, collection.model)
        )

    def _search_by_new_request(
        self, collection: CollectionRecord, query: _SearchQuery, digest: str | None, add: Callable[[], RequestRecord]
    ) -> Response:
        """Search with the vector of a request that is added for it, once under an idempotency key.

        A repetition gets the id of the request. What was found is not kept: it tells of images that may be deleted.
        """
        added: list[RequestRecord] = []

        def work() -> flask.Response:
            added.append(add())
            return _submitted(added[0])

        response = self._context.repetitions.once(digest, work)
        return self._search_by_request(collection, query, added[0]) if added else response

    def _search_by_request(
        self, collection: CollectionRecord, query: _SearchQuery, request: RequestRecord
    ) -> flask.Response:
        """Search with the vector of a request for the collection's model, after holding the response for it."""
        request = self._context.long_poller.wait_until_final(
            request, query.wait_seconds, client=current_key_id(), is_allowed=caller_check()
        )
        if not request.state.is_final:
            return _submitted(request)
        collection = self._get_collection(collection.id)  # it may have got its first vector meanwhile
        return self._found(collection, query, self.read_answer(collection, request), request=request)

    def read_answer(self, collection: CollectionRecord, request: RequestRecord) -> bytes:
        """Read the vector that an ended request was answered with.

        :raises NotEmbedded: :raises ModelChanged: :raises ImageGone:
        """
        if request.state is not RequestState.DONE or VECTOR not in request.files:
            raise NotEmbedded(f"There is no vector of the image: {request.reason or request.status}")
        if collection.digest not in (None, request.digest):
            raise ModelChanged()
        file = request.files[VECTOR]
        return self._context.read_stored(file.sha256, file.size_bytes)

    def _found(
        self,
        collection: CollectionRecord,
        query: _SearchQuery,
        vector: bytes,
        *,
        request: RequestRecord | None = None,
        without: int | None = None,
    ) -> flask.Response:
        found = self._context.similarity.search(
            collection,
            vector,
            query.k,
            threshold=query.threshold,
            labels=query.labels,
            without=without,
            client=current_key_id(),
        )
        return json_response(
            {
                "success": True,
                "collection": collection.name,
                "req_id": None if request is None else request.id,
                "matches": [{**serialize_member(member), "score": round(score, 6)} for member, score in found.matches],
                "recall": found.recall,
            }
        )

    @_operation(
        "GET /collections/<name>/duplicates",
        "Find near-duplicates in a collection",
        Scope.READ,
        returns="Groups",
        query=(
            Field(**{**vars(_THRESHOLD), "schema": {**_THRESHOLD.schema, "default": DEFAULT_THRESHOLD}}),
            limit_field(MAX_SHOWN),
            _SHOWN,
        ),
        errors=(409,),
    )
    def collection_duplicates(self, name: str) -> flask.Response:
        """Find groups of images that are connected by similarities of at least the threshold, the largest first.

        The scores are the similarities to the first image of the group, which was added first.
        """
        given = read_query(flask.request, "threshold", "limit", "images")
        limit, shown = _parse_sizes(given)
        threshold = parse_threshold(given.get("threshold", str(DEFAULT_THRESHOLD)))
        collection = self._get_collection(name)
        found = self._context.similarity.near_duplicates(collection, threshold, client=current_key_id())
        return self._groups(collection, found, limit, shown)

    @_operation(
        "GET /collections/<name>/groups",
        "Divide the images of a collection into groups by likeness",
        Scope.READ,
        returns="Groups",
        query=(_COUNT, limit_field(MAX_SHOWN), _SHOWN),
    )
    def collection_groups(self, name: str) -> flask.Response:
        """Divide the images into groups by k-means, the largest first. The same images give the same groups.

        The scores are the similarities to the centre of the group, whose most similar images come first.
        """
        given = read_query(flask.request, "count", "limit", "images")
        limit, shown = _parse_sizes(given)
        count = None if "count" not in given else parse_whole("count", given["count"], MAX_GROUPS)
        collection = self._get_collection(name)
        return self._groups(
            collection, self._context.similarity.groups(collection, count, client=current_key_id()), limit, shown
        )

    # Serialisation

    def _groups(self, collection: CollectionRecord, groups: Sequence[Group], limit: int, shown: int) -> flask.Response:
        numbers = [number for group in groups[:limit] for number in group.numbers[:shown]]
        members = self._store.collections.get_members(numbers)
        return json_response(
            {
                "success": True,
                "collection": collection.name,
                "total": len(groups),
                "groups": [serialize_group(group, members, shown) for group in groups[:limit]],
            }
        )

    def _serialize(self, collection: CollectionRecord) -> dict[str, Any]:
        counts = self._store.collections.count(collection)
        return {
            **fields(collection, "id name model dimensions digest created_at"),
            "counts": fields(counts, "ready pending failed"),
            "recall": self._context.similarity.recall(collection),
        }

    def _read_object(self) -> tuple[dict[str, Any], str | None]:
        return read_object(flask.request, _MAX_JSON_BYTES, active_reads=self._context.active_reads)

    def _parse_search(self, given: Mapping[str, str]) -> _SearchQuery:
        check_names(given, ("k", "threshold", "label", "wait"))
        k = given.get("k")
        most = self._context.settings.max_hold_seconds
        labels: list[tuple[str | None, str]] = []
        for text in flask.request.args.getlist("label")[: _MAX_FILTERS + 1]:
            labels.append(parse_filter(text))
        if len(labels) > _MAX_FILTERS:
            raise InvalidParams(f"A search takes at most {_MAX_FILTERS} labels.")
        return _SearchQuery(
            k=_DEFAULT_MATCHES if k is None else parse_whole("k", k, MAX_MATCHES),
            threshold=parse_threshold(given.get("threshold", "-1")),
            labels=labels,
            wait_seconds=min(_DEFAULT_WAIT_SECONDS, most)
            if "wait" not in given
            else parse_wait_seconds(given["wait"], most),
        )


def _submitted(request: RequestRecord) -> flask.Response:
    status_url = f"/readPrediction/{request.id}"
    shown = {"req_id": request.id, "status": request.status, "status_url": status_url, "model": request.model}
    return json_response({"success": True, **shown, "cached": request.is_cached}, 202, {"Location": status_url})


def _added(
    collection: CollectionRecord, batch: BatchRecord | None, items: Sequence[Mapping[str, Any]]
) -> flask.Response:
    accepted = sum(item["req_id"] is not None for item in items)
    status_url = f"/collections/{collection.name}"
    return json_response(
        {
            "success": True,
            "collection": collection.name,
            "status_url": status_url,
            "batch_id": None if batch is None else batch.id,
            "model": collection.model,
            "accepted": accepted,
            "refused": len(items) - accepted,
            "items": list(items),
        },
        202,
        {"Location": status_url},
    )


def parse_filter(text: str) -> tuple[str | None, str]:
    """Read the label that a search filters by: its name, None for any, and its value."""
    name, colon, value = text.partition(":")
    return (name, value) if colon else (None, text)


def serialize_member(member: MemberRecord) -> dict[str, Any]:
    """Return the JSON of an image of a collection."""
    return {
        "req_id": member.id,
        **fields(member, "name status labels created_at"),
        "picture_url": f"/requests/{member.id}/picture",
        **given_fields(member, "reason"),
    }


def serialize_group(group: Group, members: Mapping[int, MemberRecord], shown: int) -> dict[str, Any]:
    """Return the JSON of a group. :param members: its first ones. :param shown: how many of them are listed."""
    found = zip(group.numbers[:shown], group.scores[:shown], strict=True)
    images = [{**serialize_member(members[number]), "score": score} for number, score in found if number in members]
    labels = Counter(value for image in images for value in image["labels"].values())
    return {"size": len(group.numbers), "label": labels.most_common(1)[0][0] if labels else None, "images": images}


def _parse_sizes(given: Mapping[str, str]) -> tuple[int, int]:
    """Read how many groups are listed, and how many images of each."""
    shown = given.get("images")
    return parse_limit(given.get("limit"), MAX_SHOWN), (
        _DEFAULT_SHOWN if shown is None else parse_whole("images", shown, MAX_SHOWN)
    )


def parse_whole(name: str, text: str, most: int) -> int:
    """Read a whole number from 1. :raises InvalidParams:"""
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= most):
        raise InvalidParams(f"{name} takes a whole number from 1 to {most}.")
    return int(text)


def parse_threshold(text: str) -> float:
    """Read a similarity. :raises InvalidParams:"""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not -1 <= value <= 1:
        raise InvalidParams("threshold takes a number from -1 to 1.")
    return value


def _pack_vector(values: Any) -> bytes:
    import numpy as np

    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise MalformedRequest("`vector` takes a list of numbers.")
    try:
        with np.errstate(over="ignore"):  # it is infinite then, and refused below
            return np.asarray(values, "<f8").astype("<f4").tobytes()
    except OverflowError as error:
        raise MalformedRequest("`vector` has a number that is too large.") from error


def _parse_vector(collection: CollectionRecord, data: bytes) -> bytes:
    """Return a vector of unit length. :raises MalformedRequest: it cannot be compared with those of the collection."""
    import numpy as np

    if collection.dimensions is None:
        raise NotEmbedded("The collection has no vector yet that one could be compared with. Add images first.")
    if len(data) != 4 * collection.dimensions:
        raise MalformedRequest(f"A vector of this collection has {collection.dimensions} f32 values.")
    values = np.frombuffer(data, "<f4").astype(np.float64)
    length = float(np.linalg.norm(values)) if bool(np.isfinite(values).all()) else 0.0
    if not length:
        raise MalformedRequest("The values of a vector are finite numbers, and not all 0.")
    return (values / length).astype("<f4").tobytes()
