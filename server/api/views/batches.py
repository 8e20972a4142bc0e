"""Views of batches: send many images, progress, results as they arrive, cancel, retry, delete.

Each image is checked like a single one. Those that cannot be used are refused and the others accepted; only a body that
cannot be read is refused as a whole, and then nothing of it is kept.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import flask

from server.api.query import CURSOR, LIMIT, WAIT, PageQuery, check_names, parse_number, parse_wait_seconds, to_cursor
from server.api.responses import json_response, set_headers
from server.api.thumbnails import SHEET_ITEMS, SheetItem, contact_sheet
from server.auth.guard import owned
from server.context import Context
from server.endpoint import Field, operation, service_fields
from server.intake.accept import AcceptedItem
from server.intake.batch_parser import MAX_ITEMS
from server.intake.request_options import FRESH, REQUEST_OPTIONS, WEBHOOK
from server.intake.uploads import query_fields
from server.serializers import parse_read_params
from store.batches import BatchRecord, RefusedItem
from store.cost_split import to_amount
from store.keys import Scope
from store.requests import RequestRecord
from store.rows import to_text
from store.states import RequestState

#: Results that are read from the store in one query.
RESULTS_PER_READ = 200
_CSV_COLUMNS = (
    "client_id", "req_id", "name", "status", "label_id", "label", "probability", "code", "reason", "cached",
    "provider", "seconds", "cost", "finished_at", "cursor",
)  # fmt: skip
_BATCH = "Batch"
_NAME = Field(name="name", help="Your name for the batch; only shown.")
_AFTER = Field(name="after", help="The `cursor` of the last line that you have: only what ended after it.")
_BINARY = {"type": "string", "format": "binary"}


def register(app: flask.Flask, context: Context) -> None:
    """Add the views to an application."""
    views = _BatchViews(context)
    for rule, method, view in (
        ("/requestPredictions/<model>", "POST", views.request_predictions),
        ("/batches", "GET", views.list_batches),
        ("/batches/<id>", "GET", views.show_batch),
        ("/batches/<id>", "DELETE", views.remove_batch),
        ("/batches/<id>/results.jsonl", "GET", views.results_jsonl),
        ("/batches/<id>/results.csv", "GET", views.results_csv),
        ("/batches/<id>/contact-sheet.png", "GET", views.contact_sheet),
        ("/batches/<id>/cancel", "POST", views.cancel_batch),
        ("/batches/<id>/retry", "POST", views.retry_batch),
    ):
        app.add_url_rule(rule, view.__name__, view, methods=[method])


class _BatchViews:
    def __init__(self, context: Context) -> None:
        self._context = context

    @operation(
        summary="Send many images",
        scope=Scope.SUBMIT,
        tag="batches",
        query=(*service_fields(), FRESH, _NAME, WEBHOOK, *REQUEST_OPTIONS),
        body={
            "multipart/form-data": {
                "type": "object",
                "properties": {
                    "image": {"type": "array", "items": _BINARY, "maxItems": MAX_ITEMS},
                    "client_id": {"type": "array", "items": {"type": "string"}},
                    "archive": _BINARY,
                },
            },
            "application/zip": _BINARY,
            "application/jsonl": {
                "type": "object",
                "properties": {"client_id": {"type": "string"}, "url": {"type": "string", "format": "uri"}},
                "required": ["url"],
            },
        },
        responses={202: "BatchSubmitted"},
    )
    def request_predictions(self, model: str) -> flask.Response:
        """Accept many images: 202 when all that are accepted are durable, with an id or a reason for each."""
        accepted = self._context.intake.accept_batch(flask.request, model)
        items = [_show_item(item) for item in accepted.items]
        status_url = f"/batches/{accepted.batch.id}"
        count = sum(item.request is not None for item in accepted.items)
        return json_response(
            {
                "success": True,
                "batch_id": accepted.batch.id,
                "status_url": status_url,
                "results_url": f"{status_url}/results.jsonl",
                "model": accepted.batch.model,
                "accepted": count,
                "refused": len(items) - count,
                "items": items,
            },
            202,
            {"Location": status_url},
        )

    @operation(
        summary="List batches, newest first",
        scope=Scope.READ,
        tag="batches",
        query=(CURSOR, LIMIT),
        responses={200: "Batches"},
    )
    def list_batches(self) -> flask.Response:
        """List batches, newest first."""
        page = PageQuery.from_request(flask.request)
        found = self._context.store.batches.list(key_id=page.key_id, before=page.before, limit=page.limit + 1)
        shown = [self._serialize(batch) for batch in found[: page.limit]]
        following = to_cursor(found[page.limit - 1].number) if len(found) > page.limit else None
        return json_response({"success": True, "batches": shown, "next": following})

    @operation(
        summary="Read the progress of a batch", scope=Scope.READ, tag="batches", query=(WAIT,), responses={200: _BATCH}
    )
    def show_batch(self, id: str) -> flask.Response:
        """Show the progress of a batch, after holding the response until it has ended if the client asks for it."""
        batch = self._get_owned(id)
        fields = query_fields(flask.request)
        check_names(fields, ("wait",))
        give_up_at = time.monotonic() + parse_wait_seconds(fields.get("wait"), self._context.settings.max_hold_seconds)
        progress = self._context.store.batches.progress(id)
        while progress.waiting and (seconds := give_up_at - time.monotonic()) > 0:
            last = self._context.store.batches.last_unfinished(batch.id, progress)
            if last is None or not self._context.long_poller.wait_until_final(last, seconds).state.is_final:
                break  # the time is over, or no more reads are held
            progress = self._context.store.batches.progress(id)
        return json_response({"success": True, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Results of a batch as JSON lines, in the order in which they ended",
        scope=Scope.READ,
        tag="batches",
        query=(_AFTER, *service_fields(is_read=True)),
        responses={200: {"type": "string"}},
        content_type="application/jsonl",
    )
    def results_jsonl(self, id: str) -> flask.Response:
        """Write the requests that have ended, one line each."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            for number, request in self._results(batch, after):
                shown = {**self._context.serialize(request, params), "cursor": number}
                yield json.dumps(shown, separators=(",", ":"), ensure_ascii=False) + "\n"

        return _download(lines(), "application/jsonl")

    @operation(
        summary="Results of a batch as CSV, in the order in which they ended",
        scope=Scope.READ,
        tag="batches",
        query=(_AFTER, *service_fields(is_read=True)),
        responses={200: {"type": "string"}},
        content_type="text/csv",
    )
    def results_csv(self, id: str) -> flask.Response:
        """Write the requests that have ended, one row each, with the most likely label."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            yield _csv_line(_CSV_COLUMNS)
            for number, request in self._results(batch, after):
                shown = {**self._context.serialize(request, params), "cursor": number}
                shown |= dict(zip(("label_id", "label", "probability"), _top_prediction(shown["preds"]), strict=True))
                yield _csv_line(["" if (cell := shown.get(name)) is None else cell for name in _CSV_COLUMNS])

        return _download(lines(), "text/csv; charset=utf-8")

    @operation(
        summary="A contact sheet of the first hundred images of a batch with their labels",
        scope=Scope.READ,
        tag="batches",
        responses={200: _BINARY},
        content_type="image/png",
    )
    def contact_sheet(self, id: str) -> flask.Response:
        """Draw the first images of a batch, with their most likely labels."""
        self._get_owned(id)
        found = self._context.store.batches.items(id, limit=SHEET_ITEMS)
        items = [
            SheetItem(
                read=functools.partial(self._read_image, request),
                lines=_sheet_lines(request, self._context.serialize(request)["preds"]),
            )
            for request in found
        ]
        with self._context.work_slots:
            sheet = contact_sheet(items, self._context.settings.max_pixels)
        return _download(iter((sheet,)), "image/png")

    @operation(
        summary="Cancel the queued requests of a batch", scope=Scope.SUBMIT, tag="batches", responses={200: _BATCH}
    )
    def cancel_batch(self, id: str) -> flask.Response:
        """Cancel the requests that have not been dispatched."""
        self._get_owned(id)
        count = self._context.store.batches.cancel(id, now=self._context.clock())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Queue the failed requests of a batch again", scope=Scope.SUBMIT, tag="batches", responses={200: _BATCH}
    )
    def retry_batch(self, id: str) -> flask.Response:
        """Queue the failed requests again whose image is still there."""
        self._get_owned(id)
        count = self._context.store.batches.retry(id, now=self._context.clock())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Delete a batch that has ended, with its images and answers",
        scope=Scope.SUBMIT,
        tag="batches",
        responses={200: {"type": "object", "required": ["success", "deleted"]}, 409: "Error"},
    )
    def remove_batch(self, id: str) -> flask.Response:
        """Delete a batch, unless some of its requests have not ended."""
        self._get_owned(id)
        return json_response({"success": True, "deleted": self._context.store.batches.remove(id)})

    # Serialisation

    def _get_owned(self, id: str) -> BatchRecord:
        return owned(self._context.store.batches.get, id)

    def _serialize(self, batch: BatchRecord, *, is_whole: bool = False) -> dict[str, Any]:
        """Build a batch's JSON. :param is_whole: with the refused items, and why it waits."""
        progress = self._context.store.batches.progress(batch.id)
        is_running = bool(progress.claimed or progress.ended)
        shown: dict[str, Any] = {
            "batch_id": batch.id,
            "status": "ended" if not progress.waiting else "running" if is_running else "queued",
            "name": batch.name,
            "model": batch.model,
            "service": batch.service,
            "labels": dict(batch.labels),
            "created_at": to_text(batch.created_at),
            "total": batch.total,
            "counts": {
                "queued": progress.queued,
                "claimed": progress.claimed,
                "done": progress.done,
                "failed": progress.failed,
                "cancelled": progress.cancelled,
                "expired": progress.expired,
                "refused": batch.refused,
                # Deleted since by retention, or by its owner.
                "deleted": max(0, batch.total - progress.waiting - progress.ended),
            },
            "progress": 1.0 if not batch.total else round(1 - progress.waiting / batch.total, 4),
            "cost": None if progress.cost is None else to_amount(progress.cost),
            "cost_is_final": progress.is_cost_final,
            "results_url": f"/batches/{batch.id}/results.jsonl",
        }
        for name, moment in (("deadline_at", batch.deadline_at), ("cancelled_at", batch.cancelled_at)):
            if moment is not None:
                shown[name] = to_text(moment)
        if batch.keep_seconds is not None:
            shown["keep_seconds"] = batch.keep_seconds
        if is_whole:
            last = self._context.store.batches.last_unfinished(batch.id, progress)
            wait = None if last is None else self._context.estimate_wait(last)
            shown["eta_seconds"] = 0.0 if not progress.waiting else None if wait is None else wait.eta_seconds
            if wait is not None:
                shown["waiting_for"] = wait.waiting_for
            shown["failures"] = dict(progress.failures)
            shown["refused"] = [_show_refused_item(one) for one in self._context.store.batches.refused_items(batch.id)]
        return shown

    def _parse_results_query(self, id: str) -> tuple[BatchRecord, int, dict[str, Any]]:
        batch = self._get_owned(id)
        fields = query_fields(flask.request)
        after = parse_number("after", fields.pop("after", "0"))
        return batch, after, parse_read_params(batch.service, fields)

    def _results(self, batch: BatchRecord, after: int) -> Iterator[tuple[int, RequestRecord]]:
        while found := self._context.store.batches.results(batch.id, after=after, limit=RESULTS_PER_READ):
            yield from found
            after = found[-1][0]

    def _read_image(self, request: RequestRecord) -> bytes | None:
        if request.image_deleted_at is not None:
            return None
        try:
            return self._context.store.images.read(request.image_sha256)
        except FileNotFoundError:
            return None


def _show_item(item: AcceptedItem) -> dict[str, Any]:
    if item.request is None:
        assert item.refused is not None
        return {**_show_refused_item(item.refused), "req_id": None, "status": "refused"}
    return {
        "client_id": item.client_id,
        "position": item.position,
        "req_id": item.request.id,
        "status": item.request.status,
        "code": None,
        "reason": None,
    }


def _show_refused_item(refused_item: RefusedItem) -> dict[str, Any]:
    return {
        "client_id": refused_item.client_id,
        "position": refused_item.position,
        "code": refused_item.code,
        "reason": refused_item.reason,
    }


def _top_prediction(preds: Any) -> tuple[Any, Any, Any]:
    """Return the first row of a classification; three times None if it is not a list of rows of three."""
    if isinstance(preds, list) and preds and isinstance(preds[0], list | tuple) and len(preds[0]) == 3:
        return preds[0][0], preds[0][1], preds[0][2]
    return None, None, None


def _sheet_lines(request: RequestRecord, preds: Any) -> list[str]:
    _, label, probability = _top_prediction(preds)
    if request.state is RequestState.DONE and label is not None:
        return [f"{label}", f"{float(probability):.2f} {request.client_id or ''}"]
    return [request.status, request.client_id or ""]


def _csv_line(cells: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def _download(pieces: Iterator[str] | Iterator[bytes], kind: str) -> flask.Response:
    return set_headers(flask.Response(pieces, content_type=kind))
