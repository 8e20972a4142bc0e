"""The pages of collections: the list, and one collection with its images, searches, near-duplicates and groups.

They show what the API of `server/api/views/collections.py` returns. An image to search with becomes a request for the
collection's model, by a form or by the API; the page of the search then has its id in the URL.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flask
from werkzeug.http import parse_options_header
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams, MlgError
from provider_image.services.embedding import Embedding
from server.api.query import parse_cursor
from server.api.views.collections import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    MAX_MATCHES,
    CollectionViews,
    parse_filter,
    parse_threshold,
    parse_whole,
    serialize_group,
    serialize_member,
)
from server.auth.guard import caller_check, current_key, current_key_id, visible_key_id
from server.context import Context, Views
from server.endpoint import PAGES, operation
from server.errors import ModelChanged, NotEmbedded, SearchBusy, http_status
from server.intake.request_options import RequestOptions
from server.intake.uploads import read_fields
from server.pages.login import safe_next_page
from server.pages.render import page, url_with_query
from server.pages.requests import CARDS_PER_PAGE
from server.serializers import is_image, serialize_models
from store.clients.keys import Scope
from store.collections.collections import CollectionRecord, UnknownMember
from store.collections.likeness import MAX_GROUPS, Group
from store.errors import ImageGone
from store.requests import RequestRecord

#: Batches to choose from, and collections that a list to choose from has.
_MAX_CHOICES = 50
#: Images of each group in the list of groups, and of one group or one search on a page.
_SHOWN_IMAGES, _IMAGES_PER_PAGE = 6, 48
_GROUPS_PER_PAGE = 12
#: Labels that the field to filter by proposes.
_MAX_PROPOSED = 30
#: Seconds that a form with an image is held for its vector. After that the page waits.
_WAIT_SECONDS = 15.0


class CollectionPageViews(Views):
    """The pages of collections, and their forms."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._api = CollectionViews(context)

    # The list

    @operation("GET /ui/collections", "The list of collections", Scope.READ, tag=PAGES)
    def collections_page(self) -> flask.Response:
        """List collections, newest first, and create one."""
        return self._render_list()

    @operation("POST /ui/collections", "The form that creates a collection", Scope.SUBMIT, tag=PAGES)
    def create_collection_form(self) -> Response:
        """Create a collection, with the image of a request if one is named, and redirect to its page."""
        fields = self._read_fields()
        image = self._get_request(fields["image"]) if fields.get("image") else None
        name = fields.get("name", "").strip()
        try:
            collection = self._store.collections.add(
                self._api.new_collection(name, fields.get("model") or DEFAULT_MODEL)
            )
        except MlgError as error:
            return self._render_list(name=name, notice=error)
        if image is not None:
            self._api.add_stored(collection, {"req_ids": [image.id]}, {})
        return flask.redirect(_url(collection), 303)

    @operation(
        "GET /ui/requests/<id>/similar", "The link to images that are similar to a request's", Scope.READ, tag=PAGES
    )
    def similar_page(self, id: str) -> Response:
        """Redirect to the search for an image in the caller's newest collection, or offer to create one."""
        request = self._get_image(id)
        found = self._choices()
        if not found:
            return self._render_list(image=request)
        return flask.redirect(url_with_query(f"{_url(found[0])}/search", {"image": request.id}), 303)

    # One collection

    @operation("GET /ui/collections/<name>", "The page of one collection", Scope.READ, tag=PAGES)
    def collection_page(self, name: str) -> flask.Response:
        """Show the images of a collection, the last added first."""
        return self._render_images(self._get_collection(name))

    @operation(
        "POST /ui/collections/<name>/images", "The form that adds images to a collection", Scope.SUBMIT, tag=PAGES
    )
    def add_images_form(self, name: str) -> Response:
        """Add images from a browser without JavaScript."""
        collection = self._api.get_own_collection(name)
        with self._context.intake.read_batch(flask.request, collection.model) as received:
            batch, items = self._context.intake.add_batch(received, collection)
        # The page of the batch tells why images were refused.
        is_refused = any(item.request is None for item in items)
        return flask.redirect(f"/ui/batches/{batch.id}" if is_refused else _url(collection), 303)

    @operation(
        "POST /ui/collections/<name>/batch",
        "The form that adds the images of a batch to a collection",
        Scope.SUBMIT,
        tag=PAGES,
    )
    def add_batch_form(self, name: str) -> Response:
        """Add the images of a batch."""
        collection = self._api.get_own_collection(name)
        try:
            _, added = self._api.add_stored(collection, {"batch_id": self._read_fields().get("batch", "")}, {})
        except MlgError as error:
            return self._render_images(collection, notice=error)
        refused = [item["reason"] for item in added if item["req_id"] is None]
        if refused:
            reason = f"{len(refused)} of {len(added)} images cannot be added: {refused[0]}"
            return self._render_images(collection, notice=InvalidParams(reason))
        return flask.redirect(_url(collection), 303)

    @operation(
        "POST /ui/collections/<name>/images/<id>/remove",
        "The button that removes an image from a collection",
        Scope.SUBMIT,
        tag=PAGES,
    )
    def remove_image_form(self, name: str, id: str) -> Response:
        """Remove an image and go back to the page with the button."""
        collection = self._get_collection(name)
        back = safe_next_page(self._read_fields().get("next", ""))
        with contextlib.suppress(UnknownMember):  # it was removed since the page was loaded
            self._store.collections.remove_member(collection, id)
        return flask.redirect(_url(collection) if back == "/" else back, 303)

    @operation("POST /ui/collections/<name>/delete", "The button that deletes a collection", Scope.SUBMIT, tag=PAGES)
    def delete_collection_form(self, name: str) -> Response:
        """Delete a collection and redirect to the list."""
        self._store.collections.remove(self._get_collection(name), now=self._now())
        return flask.redirect("/ui/collections", 303)

    # Searching

    @operation("GET /ui/collections/<name>/search", "The page of a search in a collection", Scope.READ, tag=PAGES)
    def search_page(self, name: str) -> flask.Response:
        """Show the images that are most similar to that of a request."""
        collection = self._get_collection(name)
        fields = {field: flask.request.args.get(field, "").strip() for field in ("image", "label", "threshold", "k")}
        image = self._get_image(fields["image"]) if fields["image"] else None
        matches: Sequence[dict[str, Any]] | None = None
        recall, notice = None, None
        is_waiting = needs_vector = False
        try:
            threshold = parse_threshold(fields["threshold"] or "-1")
            k = parse_whole("k", fields["k"] or str(CARDS_PER_PAGE), MAX_MATCHES)
            vector, without = None, None
            if image is not None:
                member = self._store.collections.find_image(collection, image.image_sha256)
                if member is not None:
                    without, vector = member
                elif image.model != collection.model:
                    needs_vector = True
                elif image.state.is_final:
                    vector = self._api.read_answer(collection, image)
                else:
                    is_waiting = True
            if vector is not None:
                found = self._context.similarity.search(
                    collection,
                    vector,
                    k,
                    threshold=threshold,
                    labels=[parse_filter(fields["label"])] if fields["label"] else (),
                    without=without,
                    client=current_key_id(),
                )
                matches = [{**serialize_member(member), "score": score} for member, score in found.matches]
                recall = found.recall
        except MlgError as error:
            notice = error
        wait = self._context.estimate_wait(image) if image is not None and is_waiting else None
        return self._page(
            "collection_search.html",
            collection,
            notice=notice,
            image=image,
            matches=matches,
            recall=recall,
            needs_vector=needs_vector,
            is_waiting=is_waiting,
            waiting_for=None if wait is None else wait.waiting_for,
            is_temporary=isinstance(notice, SearchBusy),
            fields=fields,
            proposed=_count_labels(matches or ()),
            # What follows from the image is shown as it is, so that a page that waits shows it too.
            status=200 if isinstance(notice, NotEmbedded | ModelChanged | ImageGone) else None,
            others=[(one.name, _url(one)) for one in self._choices() if one.id != collection.id],
        )

    @operation(
        "POST /ui/collections/<name>/search", "The form that searches a collection by an image", Scope.SUBMIT, tag=PAGES
    )
    def search_form(self, name: str) -> Response:
        """Compute the vector of an image and redirect to its search: of an uploaded one, or of that of a request."""
        collection, intake = self._get_collection(name), self._context.intake
        kind = parse_options_header(flask.request.environ.get("CONTENT_TYPE", ""))[0].lower()
        if kind == "multipart/form-data":
            query: tuple[dict[str, str], RequestOptions] = ({}, RequestOptions())
            request, _ = intake.add_image(intake.read_image(flask.request, collection.model, query=query))
        else:
            request = self._get_image(self._read_fields().get("image", ""))
            if request.model != collection.model:
                request = intake.add_stored_image(request, collection.model)
        request = self._context.long_poller.wait_until_final(
            request,
            min(_WAIT_SECONDS, self._context.settings.max_hold_seconds),
            client=current_key_id(),
            is_allowed=caller_check(),
        )
        return flask.redirect(url_with_query(f"{_url(collection)}/search", {"image": request.id}), 303)

    @operation(
        "GET /ui/collections/<name>/duplicates", "The page of a collection's near-duplicates", Scope.READ, tag=PAGES
    )
    def duplicates_page(self, name: str) -> flask.Response:
        """Show groups of near-duplicates, the largest first."""
        collection = self._get_collection(name)
        text = flask.request.args.get("threshold", "").strip() or str(DEFAULT_THRESHOLD)

        def find() -> Sequence[Group]:
            threshold = parse_threshold(text)
            return self._context.similarity.near_duplicates(collection, threshold, client=current_key_id())

        return self._render_groups("collection_duplicates.html", collection, find, {"threshold": text})

    @operation(
        "GET /ui/collections/<name>/groups", "The page of a collection's groups by likeness", Scope.READ, tag=PAGES
    )
    def groups_page(self, name: str) -> flask.Response:
        """Show the images of a collection in groups by likeness, the largest first."""
        collection = self._get_collection(name)
        text = flask.request.args.get("count", "").strip()

        def find() -> Sequence[Group]:
            count = parse_whole("count", text, MAX_GROUPS) if text else None
            return self._context.similarity.groups(collection, count, client=current_key_id())

        return self._render_groups("collection_groups.html", collection, find, {"count": text})

    # Parts of these

    def _render_list(
        self, *, name: str = "", notice: MlgError | None = None, image: RequestRecord | None = None
    ) -> flask.Response:
        cursors = self._cursors("collections")
        before = parse_cursor(cursors, "before", flask.request.args.get("before") or None)
        store = self._store.collections
        found = store.list(key_id=visible_key_id(), before=before, limit=CARDS_PER_PAGE + 1)
        shown = found[:CARDS_PER_PAGE]
        is_cut = len(found) > CARDS_PER_PAGE
        models = [
            model
            for model in serialize_models(self._context.settings.models)
            if model["service"] == Embedding.name and (model["installed"] or model["builds_on_first_use"])
        ]
        return page(
            "collections.html",
            status=200 if notice is None else http_status(type(notice)),
            collections=[(one, _url(one), store.count(one), store.members(one, limit=_SHOWN_IMAGES)) for one in shown],
            name=name,
            notice=None if notice is None else notice.reason,
            image=image,
            models=[model["name"] for model in models],
            model=DEFAULT_MODEL,
            can_submit=_can_submit(),
            is_later=before is not None,
            older=url_with_query("/ui/collections", {"before": cursors.write(shown[-1].number)}) if is_cut else None,
        )

    def _render_images(self, collection: CollectionRecord, *, notice: MlgError | None = None) -> flask.Response:
        cursors = self._cursors(f"collection {collection.id}")
        before = parse_cursor(cursors, "before", flask.request.args.get("before") or None)
        found = self._store.collections.members(collection, before=before, limit=_IMAGES_PER_PAGE + 1)
        shown = found[:_IMAGES_PER_PAGE]
        more = {"before": cursors.write(shown[-1].number)} if len(found) > _IMAGES_PER_PAGE else None
        is_own = collection.key_id == current_key_id()
        batches = self._store.batches.list(key_id=visible_key_id(), limit=_MAX_CHOICES)
        return self._page(
            "collection.html",
            collection,
            notice=notice,
            images=[serialize_member(member) for member in shown],
            can_add=is_own and _can_submit(),
            batches=[batch for batch in batches if batch.total and is_image(batch)],
            is_later=before is not None,
            more=None if more is None else url_with_query(_url(collection), more),
        )

    def _render_groups(
        self,
        template: str,
        collection: CollectionRecord,
        find: Callable[[], Sequence[Group]],
        fields: dict[str, str],
    ) -> flask.Response:
        """Render groups, or with `group` in the query all images of one, on as many pages as it takes."""
        notice: MlgError | None = None
        groups: Sequence[Group] = ()
        chosen, first = None, 0
        try:
            groups = find()
            first = self._parse_first()
            if flask.request.args.get("group"):
                chosen = parse_whole("group", flask.request.args["group"], 99_999)
                if chosen > len(groups):
                    raise InvalidParams("There is no such group any more.")
        except MlgError as error:
            notice, chosen = error, None
        shown: Sequence[tuple[int, Group]]
        if chosen is None:
            size, total = _GROUPS_PER_PAGE, len(groups)
            shown, count = list(enumerate(groups[first : first + size], start=first + 1)), _SHOWN_IMAGES
        else:
            size, total, count = _IMAGES_PER_PAGE, len(groups[chosen - 1].numbers), _IMAGES_PER_PAGE
            one, part = groups[chosen - 1], slice(first, first + size)
            shown = [(chosen, Group(numbers=one.numbers[part], scores=one.scores[part]))]
        members = self._store.collections.get_members([n for _, group in shown for n in group.numbers[:count]])
        url = f"{_url(collection)}/{flask.request.path.rpartition('/')[2]}"
        kept = {name: value for name, value in fields.items() if value}
        here = {**kept, **({} if chosen is None else {"group": str(chosen)})}
        serialized = [(number, serialize_group(group, members, count)) for number, group in shown]
        labels = _distinctive_labels([group["images"] for _, group in serialized])
        return self._page(
            template,
            collection,
            notice=notice,
            groups=[
                {
                    **group,
                    "label": label,
                    "size": len(groups[number - 1].numbers),
                    "number": number,
                    "url": url_with_query(url, {**kept, "group": str(number)}),
                }
                for (number, group), label in zip(serialized, labels, strict=True)
            ],
            chosen=chosen,
            total=len(groups),
            fields=fields,
            all_groups=url_with_query(url, kept),
            first=url_with_query(url, here) if first else None,
            more=url_with_query(url, {**here, "first": str(first + size)}) if first + size < total else None,
        )

    @staticmethod
    def _parse_first() -> int:
        """Read the position of the first group or image on the page, from 0."""
        text = flask.request.args.get("first", "")
        return parse_whole("first", text, 99_999) if text else 0

    def _page(
        self,
        template: str,
        collection: CollectionRecord,
        *,
        notice: MlgError | None,
        status: int | None = None,
        **variables: Any,
    ) -> flask.Response:
        return page(
            template,
            status=status or (200 if notice is None else http_status(type(notice))),
            notice=None if notice is None else notice.reason,
            collection=collection,
            url=_url(collection),
            counts=self._store.collections.count(collection),
            can_change=_can_submit(),
            max_bytes=self._context.settings.max_image_bytes,
            here=flask.request.full_path.rstrip("?") if flask.request.method == "GET" else _url(collection),
            **variables,
        )

    def _choices(self) -> Sequence[CollectionRecord]:
        """List the caller's own collections to search in, newest first."""
        return self._store.collections.list(key_id=current_key_id(), limit=_MAX_CHOICES)

    def _get_image(self, id: str) -> RequestRecord:
        """Return a request of the caller's that has an image. :raises UnknownRequest: :raises InvalidParams:"""
        request = self._get_request(id)
        if not is_image(request):
            raise InvalidParams("This request has no image.")
        return request

    def _read_fields(self) -> dict[str, str]:
        return read_fields(flask.request, active_reads=self._context.active_reads)


def _url(collection: CollectionRecord) -> str:
    """Return the path of a collection's page: with its name if it is the caller's, else with its id."""
    is_own = collection.key_id == current_key_id()
    return f"/ui/collections/{collection.name if is_own else collection.id}"


def _can_submit() -> bool:
    key = current_key()
    return key is None or key.has_scope(Scope.SUBMIT)


def _count_labels(images: Sequence[dict[str, Any]]) -> Sequence[str]:
    """List the most frequent labels of images."""
    counted = Counter(value for image in images for value in image["labels"].values())
    return [value for value, _ in counted.most_common(_MAX_PROPOSED)]


def _distinctive_labels(groups: Sequence[Sequence[dict[str, Any]]]) -> Sequence[str | None]:
    """Return the label of each group that is more frequent in it than in all of them together; None without one."""
    counts = [Counter(value for image in images for value in set(image["labels"].values())) for images in groups]
    total, size = sum(counts, Counter()), sum(map(len, groups))

    def distinctive(count: Counter[str], images: Sequence[dict[str, Any]]) -> str | None:
        gains = {value: number / len(images) - total[value] / size for value, number in count.items()}
        best = max(gains, key=gains.__getitem__, default=None)
        return best if best is not None and gains[best] > 0 else None

    return [distinctive(count, images) for count, images in zip(counts, groups, strict=True)]
