"""The pages for people with a browser: the first one, one's requests, and one of them. Batches are in `batch_pages.py`.

Registered by `api.py`; the pages are filled in by `server/pages/render.py`. Whatever a page does goes through the store
as the API does, and everything works without JavaScript. An error under /ui/ is a page too, not JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import flask
from werkzeug.wrappers import Response

from provider_image.errors import InvalidParams, MlgError
from provider_image.images.headers import read_header
from provider_image.models.registry import find_row
from provider_image.services import load_service
from server.api.endpoint import Field, operation
from server.api.responses import json_response
from server.api.serializers import serialize_models
from server.auth.guard import check_owner, check_quota, current_key_id
from server.context import Context
from server.intake.uploads import read_upload
from server.pages.cards import card, timeline, top_classes
from server.pages.render import page, static_file, wants_page
from store import new_id
from store.keys import Scope
from store.records import NewRequest, RequestRecord
from store.search import Query

#: Cards on a page.
CARDS_PER_PAGE = 24
#: The filter's states, with the words for them.
STATES = (
    ("queued", "waiting"),
    ("claimed", "in work"),
    ("done", "done"),
    ("failed", "failed"),
    ("cancelled", "cancelled"),
    ("expired", "expired"),
)
#: A search looks at so many pages of the store's before it shows an empty one.
MAX_SEARCH_READS = 4
_HTML: dict[int, Any] = {200: {"type": "string"}}
_FILTER = (
    Field(name="q", help="Part of the file name."),
    Field(
        name="state", help="Only those in this state.", schema={"type": "string", "enum": [name for name, _ in STATES]}
    ),
    Field(name="model", help="Only those for this model."),
    Field(name="before", help="Older than the request with this number.", schema={"type": "integer"}),
)


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _PageViews(context)
    for rule, methods, view in (
        ("/static/<digest>/<path:name>", ["GET"], views.static),
        ("/ui/login", ["GET"], views.login_page),
        ("/ui/send", ["POST"], views.send_form),
        ("/ui/requests", ["GET"], views.requests_page),
        ("/ui/requests/<id>", ["GET"], views.request_page),
        ("/ui/requests/<id>/cancel", ["POST"], views.cancel_form),
        ("/ui/requests/<id>/retry", ["POST"], views.retry_form),
        ("/ui/requests/<id>/delete", ["POST"], views.delete_form),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)
    app.after_request(_render_error)


def home_page(context: Context) -> flask.Response:
    """Show the first page. Called by the view of `/` for browsers."""
    models = serialize_models(context.settings.models)
    ready = sorted(
        (model for model in models if model["installed"] or model["builds_on_first_use"]),
        key=lambda model: not model["installed"],
    )
    return page(
        "home.html",
        ready=ready,
        missing=[model for model in models if model not in ready],
        chosen=ready[0]["name"] if ready else "",
        batchers=context.queue_stats.batchers(),
        most_bytes=context.settings.max_image_bytes,
        base=flask.request.host_url.rstrip("/"),
    )


class _PageViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="A file that the pages are made of", scope=None, tag="pages", content_type="*/*", responses=_HTML
    )
    def static(self, digest: str, name: str) -> flask.Response:
        """Answer with a style, a script or an icon."""
        found = static_file(digest, name)
        if found is None:
            return json_response({"success": False, "reason": "There is no such file.", "code": "not_found"}, 404)
        return found

    @operation(summary="The page to sign in", scope=None, tag="pages", content_type="text/html", responses=_HTML)
    def login_page(self) -> flask.Response:
        """Show the form for the key."""
        return page("login.html", notice=None, next=_local_url(flask.request.args.get("next", "")))

    @operation(
        summary="The form that sends a picture",
        scope=Scope.SUBMIT,
        tag="pages",
        body={"multipart/form-data": {"type": "object", "required": ["image", "model"]}},
        content_type="text/html",
        responses=_HTML,
    )
    def send_form(self) -> Response:
        """Take a picture from a browser without JavaScript and go to its page; with it, the API's own view is used."""
        context = self._context
        context.check_backlog()
        check_quota()
        upload = read_upload(
            flask.request, max_image_bytes=context.settings.max_image_bytes, active_reads=context.active_reads
        )
        row = find_row(context.settings.models, upload.fields.get("model", ""))
        service = load_service(row.service)
        read_time = {param.name for param in service.params if param.is_read_time}
        new = NewRequest(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={name: value for name, value in service.check_params({}).items() if name not in read_time},
            name=upload.name,
            digest=context.get_artefact_digest(row),
            key_id=current_key_id(),
            created_at=context.clock(),
        )
        with context.work_slots:
            read_header(upload.data, context.settings.max_pixels)
            request = context.store.add(new, context.store.images.stage(upload.data))
        return flask.redirect(f"/ui/requests/{request.id}", 303)

    @operation(
        summary="The page of one's requests",
        scope=Scope.READ,
        tag="pages",
        query=_FILTER,
        content_type="text/html",
        responses=_HTML,
    )
    def requests_page(self) -> flask.Response:
        """Show a gallery, newest first."""
        fields = {name: flask.request.args.get(name, "").strip() for name in ("q", "state", "model", "before")}
        query = Query(
            key_id=visible_key_id(),
            status=check_state(fields["state"]),
            model=fields["model"] or None,
            text=fields["q"][:200] or None,
        )
        shown, next_before = self._find(query, check_number(fields["before"], "before"))
        filters = {name: fields[name] for name in ("q", "state", "model") if fields[name]}
        older = None if next_before is None else url_with_query("/ui/requests", {**filters, "before": str(next_before)})
        return page(
            "requests.html",
            items=[card(request) for request in shown],
            q=fields["q"],
            state=fields["state"],
            model=fields["model"],
            states=STATES,
            models=sorted(
                {model["name"] for model in serialize_models(self._context.settings.models)} | {fields["model"]} - {""}
            ),
            is_filtered=bool(filters),
            is_later=bool(fields["before"]),
            live=[] if fields["before"] else [request.id for request in shown if not request.state.is_final],
            newest=url_with_query("/ui/requests", filters),
            older=older,
        )

    @operation(
        summary="The page of one request", scope=Scope.READ, tag="pages", content_type="text/html", responses=_HTML
    )
    def request_page(self, id: str) -> flask.Response:
        """Show the picture, the answer, and what happened."""
        request = self._context.store.get(id)
        check_owner(request)
        return self._render(request)

    @operation(
        summary="The button that cancels", scope=Scope.SUBMIT, tag="pages", content_type="text/html", responses=_HTML
    )
    def cancel_form(self, id: str) -> Response:
        """Cancel a queued request and show it."""
        check_owner(self._context.store.get(id))
        return self._apply(id, lambda: self._context.store.cancel(id, now=self._context.clock()))

    @operation(
        summary="The button that tries again",
        scope=Scope.SUBMIT,
        tag="pages",
        content_type="text/html",
        responses=_HTML,
    )
    def retry_form(self, id: str) -> Response:
        """Queue a failed or cancelled request again and show it."""
        check_owner(self._context.store.get(id))
        return self._apply(id, lambda: self._context.store.retry(id, now=self._context.clock()))

    @operation(
        summary="The button that deletes", scope=Scope.SUBMIT, tag="pages", content_type="text/html", responses=_HTML
    )
    def delete_form(self, id: str) -> Response:
        """Delete a request that has ended, and its picture, and go back to the others."""
        check_owner(self._context.store.get(id))
        return self._apply(id, lambda: self._context.store.remove(id), "/ui/requests")

    def _find(self, query: Query, before: int | None) -> tuple[Sequence[RequestRecord], int | None]:
        """Look for the requests of one page. A rare thing may take several looks, or be on a later page."""
        found: list[RequestRecord] = []
        for _ in range(MAX_SEARCH_READS):
            some = self._context.store.find(query, before=before, limit=CARDS_PER_PAGE - len(found))
            found += some.requests
            before = some.next_before
            if before is None or len(found) >= CARDS_PER_PAGE:
                break
        return found, before

    def _apply(self, id: str, change: Callable[[], Any], then: str | None = None) -> Response:
        try:
            change()
        except MlgError as error:
            # For example: it was dispatched while its owner read the page. The page says so and how it stands now.
            return self._render(self._context.store.get(id), notice=error.reason, code=409)
        return flask.redirect(then or f"/ui/requests/{id}", 303)

    def _render(self, request: RequestRecord, *, notice: str | None = None, code: int = 200) -> flask.Response:
        shown = self._context.serialize(request)
        return page(
            "request.html",
            status=code,
            notice=notice,
            item={
                "id": request.id,
                "name": request.name,
                "model": request.model,
                "status": request.status,
                "is_final": request.state.is_final,
                "preds": top_classes(request),
                "reason": request.reason,
                "waiting_for": shown.get("waiting_for", "It waits."),
                "eta_seconds": shown.get("eta_seconds"),
                "batch_id": request.batch_id,
                "has_image": request.image_deleted_at is None,
                "bytes": request.image_bytes,
                "provider": request.provider,
                "cost": shown.get("cost"),
                "is_cost_final": request.is_cost_final,
                "labels": request.labels,
            },
            timeline=timeline(request, shown),
            raw=json.dumps({"success": True, **shown}, indent=2, ensure_ascii=False),
        )


def visible_key_id() -> str | None:
    """Return the key whose things a page shows; None for everybody's: no keys are asked for, or an operator looks."""
    key = flask.g.get("key")
    return None if key is None or key.is_operator else current_key_id()


def _render_error(response: flask.Response) -> Any:
    """Turn an error's JSON into a page for browsers that asked for one."""
    path = flask.request.path
    if response.status_code < 400 or not response.is_json or not (path.startswith("/ui/") and wants_page()):
        return response
    if response.status_code == 401 and path != "/ui/login":
        next_page = path if flask.request.method == "GET" else ""
        return _with_error_headers(
            response, flask.redirect(url_with_query("/ui/login", {"next": next_page} if next_page else {}), 303)
        )
    body = response.get_json(silent=True) or {}
    titles = {401: "Sign in", 403: "Not allowed", 404: "Not found", 429: "Too many requests", 503: "Not now"}
    shown = page(
        "error.html",
        status=response.status_code,
        title=titles.get(response.status_code, "That did not work"),
        reason="There is nothing here." if body.get("code") == "not_found" else body.get("reason", "Something failed."),
    )
    return _with_error_headers(response, shown)


def _with_error_headers(old: flask.Response, new: Response) -> Any:
    """Keep what an error says in its headers."""
    for name in ("Retry-After", "WWW-Authenticate", "Allow"):
        if name in old.headers:
            new.headers[name] = old.headers[name]
    return new


def _local_url(address: str) -> str:
    """Return an address if it leads to a page of this server; else the first page. Nobody is sent elsewhere."""
    is_own = address.startswith("/ui/") and "\\" not in address and "//" not in address
    return address if is_own and address.isprintable() else "/"


def url_with_query(path: str, fields: Mapping[str, str]) -> str:
    """Return a path with its query."""
    return f"{path}?{urlencode(fields)}" if fields else path


def check_state(value: str) -> str | None:
    """Check the state that a page is to show; None is all. :raises InvalidParams:"""
    if value and value not in dict(STATES):
        raise InvalidParams(f"state takes one of: {', '.join(name for name, _ in STATES)}.")
    return value or None


def check_number(value: str, name: str) -> int | None:
    """Check where a page begins. :raises InvalidParams:"""
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise InvalidParams(f"{name} takes the number that the link to the next page has.")
    return int(value)
