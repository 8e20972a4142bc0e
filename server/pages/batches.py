"""The pages of batches, that is of images sent together: the list, and one batch with its progress and images.

Registered by `server/app.py`. The files to download are made by `server/api/views/batches.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MlgError
from server.auth.guard import owned, visible_key_id
from server.context import Context
from server.pages.cards import STATE_LABELS, card
from server.pages.render import page, page_operation, url_with_query
from server.pages.requests import CARDS_PER_PAGE, check_number, check_state
from store.batches import BatchProgress, BatchRecord
from store.cost_split import to_amount
from store.keys import Scope
from store.search import Query

#: Rejected images that a page lists.
MAX_REJECTED = 100
#: File name below the batch's URL, label of the link.
_DOWNLOADS = (
    ("results.jsonl", "Results as JSON lines"),
    ("results.csv", "Results as CSV"),
    ("contact-sheet.png", "Contact sheet"),
)


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

    @page_operation("The list of batches", scope=Scope.READ)
    def batches_page(self) -> flask.Response:
        """List batches, newest first, with their progress."""
        before = check_number(flask.request.args.get("before", ""), "before")
        store = self._context.store
        found = store.batches.list(key_id=visible_key_id(), before=before, limit=CARDS_PER_PAGE + 1)
        summaries = [_batch_summary(batch, store.batches.progress(batch.id)) for batch in found[:CARDS_PER_PAGE]]
        return page(
            "batches.html",
            batches=summaries,
            is_live=before is None and any(batch["waiting"] for batch in summaries),
            is_later=before is not None,
            older=url_with_query("/ui/batches", {"before": str(found[CARDS_PER_PAGE - 1].number)})
            if len(found) > CARDS_PER_PAGE
            else None,
        )

    @page_operation("The page of one batch", scope=Scope.READ)
    def batch_page(self, id: str) -> flask.Response:
        """Show the progress, the rejected images and the requests of a batch."""
        return self._render(self._get_owned(id))

    @page_operation("The button that cancels a batch", scope=Scope.SUBMIT)
    def cancel_batch_form(self, id: str) -> Response:
        """Cancel the waiting requests of a batch."""
        return self._apply(id, lambda: self._context.store.batches.cancel(id, now=self._context.clock()))

    @page_operation("The button that retries the failed requests of a batch", scope=Scope.SUBMIT)
    def retry_batch_form(self, id: str) -> Response:
        """Queue the failed requests of a batch again."""
        return self._apply(id, lambda: self._context.store.batches.retry(id, now=self._context.clock()))

    def _get_owned(self, id: str) -> BatchRecord:
        return owned(self._context.store.batches.get, id)

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
        url = f"/ui/batches/{batch.id}"
        more: dict[str, str] | None = None
        if state is None:
            items = store.batches.items(batch.id, after=after or 0, limit=CARDS_PER_PAGE + 1)
            if len(items) > CARDS_PER_PAGE:
                items = items[:CARDS_PER_PAGE]
                more = {"after": str(items[-1].number)}
        else:
            found = store.search.find(Query(batch_id=batch.id, status=state), before=before, limit=CARDS_PER_PAGE)
            items = list(found.requests)
            more = None if found.next_before is None else {"state": state, "before": str(found.next_before)}
        progress = store.batches.progress(batch.id)
        counts = [(name, label, getattr(progress, name)) for name, label in STATE_LABELS.items()]
        last = store.batches.last_unfinished(batch.id, progress)
        wait = None if last is None else self._context.estimate_wait(last)
        return page(
            "batch.html",
            status=code,
            notice=notice,
            batch=_batch_summary(batch, progress),
            waiting_for=None if wait is None else wait.waiting_for,
            eta_seconds=None if wait is None else wait.eta_seconds,
            rejected=store.batches.refused_items(batch.id)[:MAX_REJECTED] if batch.refused else [],
            downloads=[(f"/batches/{batch.id}/{name}", label) for name, label in _DOWNLOADS],
            items=[card(request) for request in items],
            state=state or "",
            states=[("", "all", batch.total), *(entry for entry in counts if entry[2] or entry[0] == state)],
            more=None if more is None else url_with_query(url, more),
            first=url_with_query(url, {"state": state} if state else {}),
            is_later=after is not None or before is not None,
        )


def _batch_summary(batch: BatchRecord, progress: BatchProgress) -> dict[str, Any]:
    counts = {name: getattr(progress, name) for name in STATE_LABELS}
    return {
        "id": batch.id,
        "name": batch.name,
        "model": batch.model,
        "created_at": batch.created_at,
        "total": batch.total,
        "rejected": batch.refused,
        # Deleted requests have ended too.
        "ended": batch.total - progress.waiting,
        "waiting": progress.waiting,
        "cost": None if progress.cost is None else to_amount(progress.cost),
        "is_cost_final": progress.is_cost_final,
        **counts,
    }
