"""The pages of batches, that is of images sent together: the list, and one batch with its progress and images.

The files to download are made by `server/api/views/batches.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MlgError
from server.api.query import parse_cursor
from server.auth.guard import visible_key_id
from server.context import Views
from server.endpoint import PAGES, operation
from server.pages.cards import STATE_LABELS
from server.pages.plain_inputs import read_excerpts
from server.pages.render import page, url_with_query
from server.pages.requests import CARDS_PER_PAGE, check_state
from store.batches import BatchRecord
from store.clients.keys import Scope
from store.search import Query

#: Rejected images that a page lists.
MAX_REJECTED = 100
#: File name below the batch's URL, label of the link.
_DOWNLOADS = (
    ("results.jsonl", "Results as JSON lines"),
    ("results.csv", "Results as CSV"),
    ("contact-sheet.png", "Contact sheet"),
)


class BatchPageViews(Views):
    """The pages of batches, and their buttons."""

    @operation("GET /ui/batches", "The list of batches", Scope.READ, tag=PAGES)
    def batches_page(self) -> flask.Response:
        """List batches, newest first, with their progress."""
        cursors = self._cursors("batches")
        before = parse_cursor(cursors, "before", flask.request.args.get("before") or None)
        store = self._store
        found = store.batches.list(key_id=visible_key_id(), before=before, limit=CARDS_PER_PAGE + 1)
        shown = [(batch, store.batches.progress(batch.id)) for batch in found[:CARDS_PER_PAGE]]
        return page(
            "batches.html",
            batches=shown,
            is_live=before is None and any(progress.waiting for _, progress in shown),
            is_later=before is not None,
            older=url_with_query("/ui/batches", {"before": cursors.write(found[CARDS_PER_PAGE - 1].number)})
            if len(found) > CARDS_PER_PAGE
            else None,
        )

    @operation("GET /ui/batches/<id>", "The page of one batch", Scope.READ, tag=PAGES)
    def batch_page(self, id: str) -> flask.Response:
        """Show the progress, the rejected images and the requests of a batch."""
        return self._render(self._get_batch(id))

    @operation("POST /ui/batches/<id>/cancel", "The button that cancels a batch", Scope.SUBMIT, tag=PAGES)
    def cancel_batch_form(self, id: str) -> Response:
        """Cancel the waiting requests of a batch."""
        return self._apply(id, lambda: self._store.batches.cancel(id, now=self._now()))

    @operation(
        "POST /ui/batches/<id>/retry", "The button that retries the failed requests of a batch", Scope.SUBMIT, tag=PAGES
    )
    def retry_batch_form(self, id: str) -> Response:
        """Queue the failed requests of a batch again."""

        def retry() -> int:
            self._context.intake.check_retry(self._get_batch(id).model)
            return self._store.batches.retry(id, now=self._now())

        return self._apply(id, retry)

    def _apply(self, id: str, change: Callable[[], int]) -> Response:
        batch = self._get_batch(id)
        try:
            change()
        except MlgError as error:
            return self._render(batch, notice=error.reason, code=409)
        return flask.redirect(f"/ui/batches/{id}", 303)

    def _render(self, batch: BatchRecord, *, notice: str | None = None, code: int = 200) -> flask.Response:
        store, fields, cursors = self._store, flask.request.args, self._cursors("requests")
        state = check_state(fields.get("state", ""))
        after, before = (parse_cursor(cursors, name, fields.get(name) or None) for name in ("after", "before"))
        url = f"/ui/batches/{batch.id}"
        more: dict[str, str] | None = None
        if state is None:
            items = store.batches.items(batch.id, after=after or 0, limit=CARDS_PER_PAGE + 1)
            if len(items) > CARDS_PER_PAGE:
                items = items[:CARDS_PER_PAGE]
                more = {"after": cursors.write(items[-1].number)}
        else:
            found = store.search.find(Query(batch_id=batch.id, status=state), before=before, limit=CARDS_PER_PAGE)
            items = list(found.requests)
            if found.next_before is not None:
                more = {"state": state, "before": cursors.write(found.next_before)}
        progress = store.batches.progress(batch.id)
        counts = [(name, label, getattr(progress, name)) for name, label in STATE_LABELS.items()]
        last = store.batches.last_unfinished(batch.id, progress)
        wait = None if last is None else self._context.estimate_wait(last)
        return page(
            "batch.html",
            status=code,
            notice=notice,
            batch=batch,
            progress=progress,
            waiting_for=None if wait is None else wait.waiting_for,
            eta_seconds=None if wait is None else wait.eta_seconds,
            rejected=store.batches.refused_items(batch.id)[:MAX_REJECTED] if batch.refused else [],
            downloads=[(f"/batches/{batch.id}/{name}", label) for name, label in _DOWNLOADS],
            items=items,
            excerpts=read_excerpts(self._context, items),
            unknown=self._context.find_unknown(items),
            state=state or "",
            states=[("", "all", batch.total), *(entry for entry in counts if entry[2] or entry[0] == state)],
            more=None if more is None else url_with_query(url, more),
            first=url_with_query(url, {"state": state} if state else {}),
            is_later=after is not None or before is not None,
        )
