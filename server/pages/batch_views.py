"""The pages of batches: all of one's own, and one with its progress and its pictures.

Registered by `api.py`. Like `pages.py` it only asks the store; what a batch's files look like is said in `batches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MlgError
from server.auth.guard import owned, visible_key_id
from server.context import Context
from server.endpoint import Field, operation
from server.pages.cards import card
from server.pages.render import page
from server.pages.views import CARDS_PER_PAGE, STATES, check_number, check_state, url_with_query
from store.batches import BatchProgress, BatchRecord
from store.cost_split import to_amount
from store.keys import Scope
from store.search import Query

#: Refused items on a page.
MAX_REFUSALS = 100
_HTML: dict[int, Any] = {200: {"type": "string"}}


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _BatchPageViews(context)
    for rule, methods, view in (
        ("/ui/batches", ["GET"], views.batches_page),
        ("/ui/batches/<id>", ["GET"], views.batch_page),
        ("/ui/batches/<id>/cancel", ["POST"], views.cancel_batch_form),
        ("/ui/batches/<id>/retry", ["POST"], views.retry_batch_form),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=methods)


class _BatchPageViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="The page of one's batches",
        scope=Scope.READ,
        tag="pages",
        query=(Field(name="before", help="Older than the batch with this number.", schema={"type": "integer"}),),
        content_type="text/html",
        responses=_HTML,
    )
    def batches_page(self) -> flask.Response:
        """List batches, newest first, with their progress."""
        before = check_number(flask.request.args.get("before", ""), "before")
        store = self._context.store
        found = store.list_batches(key_id=visible_key_id(), before=before, limit=CARDS_PER_PAGE + 1)
        summaries = [_batch_summary(batch, store.batch_progress(batch.id)) for batch in found[:CARDS_PER_PAGE]]
        return page(
            "batches.html",
            batches=summaries,
            is_live=before is None and any(batch["waiting"] for batch in summaries),
            is_later=before is not None,
            older=url_with_query("/ui/batches", {"before": str(found[CARDS_PER_PAGE - 1].number)})
            if len(found) > CARDS_PER_PAGE
            else None,
        )

    @operation(
        summary="The page of one batch",
        scope=Scope.READ,
        tag="pages",
        query=(
            Field(
                name="state",
                help="Only those in this state.",
                schema={"type": "string", "enum": [name for name, _ in STATES]},
            ),
            Field(name="after", help="Sent after the request with this number.", schema={"type": "integer"}),
            Field(name="before", help="Sent before the request with this number.", schema={"type": "integer"}),
        ),
        content_type="text/html",
        responses=_HTML,
    )
    def batch_page(self, id: str) -> flask.Response:
        """Show progress, refusals and pictures."""
        return self._render(self._get_owned(id))

    @operation(
        summary="The button that cancels a batch",
        scope=Scope.SUBMIT,
        tag="pages",
        content_type="text/html",
        responses=_HTML,
    )
    def cancel_batch_form(self, id: str) -> Response:
        """Cancel what waits of a batch and show it."""
        return self._apply(id, lambda: self._context.store.cancel_batch(id, now=self._context.clock()))

    @operation(
        summary="The button that tries a batch's failed requests again",
        scope=Scope.SUBMIT,
        tag="pages",
        content_type="text/html",
        responses=_HTML,
    )
    def retry_batch_form(self, id: str) -> Response:
        """Queue the failed requests of a batch again and show it."""
        return self._apply(id, lambda: self._context.store.retry_batch(id, now=self._context.clock()))

    def _get_owned(self, id: str) -> BatchRecord:
        return owned(self._context.store.get_batch, id)

    def _apply(self, id: str, change: Callable[[], int]) -> Response:
        batch = self._get_owned(id)
        try:
            change()
        except MlgError as error:
            return self._render(batch, notice=error.reason, code=409)
        return flask.redirect(f"/ui/batches/{id}", 303)

    def _render(self, batch: BatchRecord, *, notice: str | None = None, code: int = 200) -> flask.Response:
        store, fields = self._context.store, flask.request.args
        state = check_state(fields.get("state", ""))
        after, before = (check_number(fields.get(name, ""), name) for name in ("after", "before"))
        here = f"/ui/batches/{batch.id}"
        more: dict[str, str] | None = None
        if state is None:
            items = store.batch_items(batch.id, after=after or 0, limit=CARDS_PER_PAGE + 1)
            if len(items) > CARDS_PER_PAGE:
                items = items[:CARDS_PER_PAGE]
                more = {"after": str(items[-1].number)}
        else:
            found = store.find(Query(batch_id=batch.id, status=state), before=before, limit=CARDS_PER_PAGE)
            items = list(found.requests)
            more = None if found.next_before is None else {"state": state, "before": str(found.next_before)}
        progress = store.batch_progress(batch.id)
        counts = [(name, words, getattr(progress, name)) for name, words in STATES]
        wait = self._wait_of_last(batch.id, progress)
        return page(
            "batch.html",
            status=code,
            notice=notice,
            batch=_batch_summary(batch, progress),
            waiting_for=None if wait is None else wait.waiting_for,
            eta_seconds=None if wait is None else wait.eta_seconds,
            refused=store.refused_items(batch.id)[:MAX_REFUSALS] if batch.refused else [],
            downloads=[(f"/batches/{batch.id}/{name}", words) for name, words in _DOWNLOADS],
            items=[card(request) for request in items],
            state=state or "",
            states=[("", "all", batch.total), *(one for one in counts if one[2] or one[0] == state)],
            more=None if more is None else url_with_query(here, more),
            first=url_with_query(here, {"state": state} if state else {}),
            is_later=after is not None or before is not None,
        )

    def _wait_of_last(self, id: str, progress: BatchProgress) -> Any:
        """Say why the last request of a batch that waits does so; None when all have ended."""
        if progress.last_number is None:
            return None
        last = self._context.store.batch_items(id, after=progress.last_number - 1, limit=1)
        return self._context.estimate_wait(last[0]) if last else None


#: What can be had of a batch as files, below its address.
_DOWNLOADS = (
    ("results.jsonl", "Results as JSON lines"),
    ("results.csv", "Results as CSV"),
    ("contact-sheet.png", "Contact sheet"),
)


def _batch_summary(batch: BatchRecord, progress: BatchProgress) -> dict[str, Any]:
    counts = {name: getattr(progress, name) for name, _ in STATES}
    return {
        "id": batch.id,
        "name": batch.name,
        "model": batch.model,
        "created_at": batch.created_at,
        "total": batch.total,
        "refused": batch.refused,
        # Those that were deleted since have ended too.
        "ended": batch.total - progress.waiting,
        "waiting": progress.waiting,
        "cost": None if progress.cost is None else to_amount(progress.cost),
        "is_cost_final": progress.is_cost_final,
        **counts,
    }
