"""The pages of requests: the list with its filter, and one request with its result, history and buttons."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams, MlgError
from provider_image.services.embedding import VECTOR, Embedding, read_vector
from server.api.query import parse_cursor
from server.auth.guard import visible_key_id
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.cards import STATE_LABELS, deciding_words, timeline, top_classes
from server.pages.plain_inputs import read_excerpts, read_plain_input
from server.pages.render import page, url_with_query
from server.serializers import serialize_models
from store.clients.keys import Scope
from store.errors import ImageGone
from store.pipelines.runs import PipelineRun
from store.requests import RequestRecord
from store.search import Query

CARDS_PER_PAGE = 24
#: Values of a vector that the page of a request shows.
SHOWN_VALUES = 8
#: Labels of a step that the page of a request to a pipeline shows.
STEP_CLASSES = 3
#: Reads of the store for one page of a search; each read may find fewer requests than fit on the page.
MAX_SEARCH_READS = 4


class RequestPageViews(Views):
    """The pages of requests, and their buttons."""

    @operation("GET /ui/requests", "The list of requests", Scope.READ, tag=PAGES)
    def requests_page(self) -> flask.Response:
        """List the requests that match the filter, newest first."""
        fields = {name: flask.request.args.get(name, "").strip() for name in ("q", "state", "model", "before")}
        query = Query(
            key_id=visible_key_id(),
            status=check_state(fields["state"]),
            model=fields["model"] or None,
            text=fields["q"][:200] or None,
        )
        cursors = self._cursors("requests")
        shown, next_before = self._find(query, parse_cursor(cursors, "before", fields["before"] or None))
        filters = {name: fields[name] for name in ("q", "state", "model") if fields[name]}
        more = None if next_before is None else {**filters, "before": cursors.write(next_before)}
        return page(
            "requests.html",
            items=shown,
            excerpts=read_excerpts(self._context, shown),
            unknown=self._context.find_unknown(shown),
            q=fields["q"],
            state=fields["state"],
            model=fields["model"],
            states=STATE_LABELS.items(),
            models=self._model_groups(fields["model"]),
            is_filtered=bool(filters),
            is_later=bool(fields["before"]),
            live=[] if fields["before"] else [request.id for request in shown if not request.state.is_final],
            newest=url_with_query("/ui/requests", filters),
            older=None if more is None else url_with_query("/ui/requests", more),
        )

    @operation("GET /ui/requests/<id>", "The page of one request", Scope.READ, tag=PAGES)
    def request_page(self, id: str) -> flask.Response:
        """Show the image, the result and the history of a request."""
        return self._render(self._get_request(id))

    @operation("POST /ui/requests/<id>/cancel", "The button that cancels a request", Scope.SUBMIT, tag=PAGES)
    def cancel_form(self, id: str) -> Response:
        """Cancel a queued request."""
        return self._apply(id, lambda: self._store.requests.cancel(id, now=self._now()))

    @operation("POST /ui/requests/<id>/retry", "The button that retries a request", Scope.SUBMIT, tag=PAGES)
    def retry_form(self, id: str) -> Response:
        """Queue a failed or cancelled request again."""
        return self._apply(id, lambda: self._store.requests.retry(id, now=self._now()))

    @operation("POST /ui/requests/<id>/delete", "The button that deletes a request", Scope.SUBMIT, tag=PAGES)
    def delete_form(self, id: str) -> Response:
        """Delete a finished request and its image, and redirect to the list."""
        return self._apply(id, lambda: self._store.requests.remove(id), "/ui/requests")

    def _model_groups(self, chosen: str) -> Mapping[str, Sequence[str]]:
        """Return the names of models to filter by, in groups. :param chosen: the present filter, which is one of them.

        Embeddings that are not installed have answered nothing, or at least nothing lately.
        """
        models = serialize_models(self._context.settings.models)
        embeddings = {
            model["name"]
            for model in models
            if model["base"] is not None
            and (model["installed"] or model["builds_on_first_use"] or model["name"] == chosen)
        }
        others = {model["name"] for model in models if model["base"] is None} | {chosen} - {""}
        return {"Models": sorted(others - embeddings), "Embeddings": sorted(embeddings)}

    def _find(self, query: Query, before: int | None) -> tuple[Sequence[RequestRecord], int | None]:
        """Find the requests of one page. :return: the requests, and where the next page starts or None."""
        found: list[RequestRecord] = []
        for _ in range(MAX_SEARCH_READS):
            part = self._store.search.find(query, before=before, limit=CARDS_PER_PAGE - len(found))
            found += part.requests
            before = part.next_before
            if before is None or len(found) >= CARDS_PER_PAGE:
                break
        return found, before

    def _apply(self, id: str, change: Callable[[], Any], then: str | None = None) -> Response:
        self._get_request(id)
        try:
            change()
        except MlgError as error:
            # For example, the request was dispatched after the page was loaded. Show the error and the present state.
            return self._render(self._store.requests.get(id), notice=error.reason, code=409)
        return flask.redirect(then or f"/ui/requests/{id}", 303)

    def _render(self, request: RequestRecord, *, notice: str | None = None, code: int = 200) -> flask.Response:
        shown = self._context.serialize(request)
        return page(
            "request.html",
            status=code,
            notice=notice,
            item=request,
            preds=top_classes(request),
            words=deciding_words(request),
            plain=read_plain_input(self._context, request),
            output=json.dumps(shown["preds"], indent=2, ensure_ascii=False),
            is_unknown=shown.get("unknown", False),
            files=shown.get("files", {}),
            image_url=shown.get("image_url"),
            preview_url=shown.get("preview_url"),
            steps=shown.get("steps", {}),
            step_labels={} if request.run is None else self._top_labels(request.run),
            vector=self._first_values(request),
            waiting_for=shown.get("waiting_for", "Waiting."),
            eta_seconds=shown.get("eta_seconds"),
            timeline=timeline(request, shown),
            raw=json.dumps({"success": True, **shown}, indent=2, ensure_ascii=False),
        )

    def _top_labels(self, run: PipelineRun) -> Mapping[str, Sequence[tuple[str, str, float]]]:
        """Return the most likely labels of each step, by the id of its request; none for other answers."""
        return {child.id: top_classes(child, STEP_CLASSES) for child in run.children.values()}

    def _first_values(self, request: RequestRecord) -> list[str]:
        """Return the first values of the vector that a request was answered with, as text; none without one."""
        file = request.files.get(VECTOR)
        if request.service != Embedding.name or file is None:
            return []
        with contextlib.suppress(ImageGone):  # deleted in this moment
            vector = read_vector(self._context.read_stored(file.sha256, file.size_bytes))
            return [f"{value:.4f}" for value in vector[:SHOWN_VALUES]]
        return []


def check_state(value: str) -> str | None:
    """Check the state to filter by. :return: None for all states. :raises InvalidParams:"""
    if value and value not in STATE_LABELS:
        raise InvalidParams(f"state must be one of: {', '.join(STATE_LABELS)}.")
    return value or None
