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
from werkzeug.wrappers import Response

from provider_image.images.thumbnails import SHEET_ITEMS
from provider_image.service import IMAGE_ANSWER
from server.api.query import CURSOR, LIMIT, WAIT, PageQuery, parse_number, parse_wait_seconds, read_query
from server.api.responses import json_response, set_headers
from server.auth.guard import caller_check, current_key_id
from server.context import Views
from server.csv_cells import to_cell
from server.endpoint import Field, operation, service_fields
from server.intake.accept import ReceivedBatch
from server.intake.batch_parser import MAX_ITEMS
from server.intake.quality_gate import QUALITY_LIMITS
from server.intake.request_options import FRESH, NAME, REQUEST_OPTIONS, WEBHOOK
from server.intake.staging import StagedItem
from server.intake.uploads import query_fields
from server.record_json import fields, given_fields, to_json
from server.serializers import is_image, parse_read_params
from store.batches import BatchRecord
from store.clients.keys import Scope
from store.requests import RequestRecord
from store.states import RequestState

#: Results that are read from the store in one query.
RESULTS_PER_READ = 200
_CSV_COLUMNS = (
    "client_id", "req_id", "name", "status", "label_id", "label", "probability", "code", "reason", "cached",
    "provider", "seconds", "cost", "finished_at", "cursor", "value", "unknown",
)  # fmt: skip
_BATCH = "Batch"
_AFTER = Field(name="after", help="The `cursor` of the last line that you have: only what ended after it.")
#: Fields of a refused image.
_REFUSED = "client_id position code reason"
BINARY = {"type": "string", "format": "binary"}
#: Bodies that bring many images.
MANY_IMAGES = {
    "multipart/form-data": {
        "type": "object",
        "properties": {
            "image": {"type": "array", "items": BINARY, "maxItems": MAX_ITEMS},
            "client_id": {"type": "array", "items": {"type": "string"}},
            "archive": BINARY,
        },
    },
    "application/zip": BINARY,
}
_operation = functools.partial(operation, tag="batches")
_results_operation = functools.partial(_operation, scope=Scope.READ, query=(_AFTER, *service_fields(is_read=True)))


class BatchViews(Views):
    """The views of batches."""

    @_operation(
        "POST /requestPredictions/<model>",
        "Send many images",
        Scope.SUBMIT,
        query=(*service_fields(), FRESH, NAME, WEBHOOK, *QUALITY_LIMITS, *REQUEST_OPTIONS),
        body={
            **MANY_IMAGES,
            "application/jsonl": {
                "type": "object",
                "properties": {
                    "client_id": {"type": "string"},
                    "url": {"type": "string", "format": "uri"},
                    "row": {"type": "object"},
                    "text": {"type": "string"},
                },
            },
            "text/csv": {"type": "string", "description": "Table rows or texts, below a line of column names."},
        },
        responses={202: "BatchSubmitted"},
        errors=(411,),
    )
    def request_predictions(self, model: str) -> Response:
        """Accept many images: 202 when all that are accepted are durable, with an id or a reason for each."""
        with self._context.intake.read_batch(flask.request, model) as received:
            return self._context.repetitions.once(received.digest, lambda: self._add(received))

    def _add(self, received: ReceivedBatch) -> flask.Response:
        batch, items = self._context.intake.add_batch(received)
        status_url = f"/batches/{batch.id}"
        count = sum(item.request is not None for item in items)
        return json_response(
            {
                "success": True,
                "batch_id": batch.id,
                "status_url": status_url,
                "results_url": f"{status_url}/results.jsonl",
                "model": batch.model,
                "accepted": count,
                "refused": len(items) - count,
                "items": [show_item(item) for item in items],
            },
            202,
            {"Location": status_url},
        )

    @_operation("GET /batches", "List batches, newest first", Scope.READ, returns="Batches", query=(CURSOR, LIMIT))
    def list_batches(self) -> flask.Response:
        """List batches, newest first."""
        page = PageQuery.from_request(flask.request, self._cursors("batches"))
        found = self._store.batches.list(key_id=page.key_id, before=page.before, limit=page.limit + 1)
        shown = [self._serialize(batch) for batch in found[: page.limit]]
        last = found[page.limit - 1].number if len(found) > page.limit else None
        return json_response({"success": True, "batches": shown, "next": page.next_cursor(last)})

    @_operation("GET /batches/<id>", "Read the progress of a batch", Scope.READ, returns=_BATCH, query=(WAIT,))
    def show_batch(self, id: str) -> flask.Response:
        """Show the progress of a batch, after holding the response until it has ended if the client asks for it."""
        batch = self._get_batch(id)
        fields = read_query(flask.request, "wait")
        give_up_at = time.monotonic() + parse_wait_seconds(fields.get("wait"), self._context.settings.max_hold_seconds)
        progress, is_allowed = self._store.batches.progress(id), caller_check()
        while progress.waiting and (seconds := give_up_at - time.monotonic()) > 0:
            last = self._store.batches.last_unfinished(batch.id, progress)
            if last is None:
                break
            last = self._context.long_poller.wait_until_final(
                last, seconds, client=current_key_id(), is_allowed=is_allowed
            )
            if not last.state.is_final:
                break  # the time is over, or no more reads are held
            progress = self._store.batches.progress(id)
        return json_response({"success": True, **self._serialize(self._get_batch(id), is_whole=True)})

    @_operation(
        "DELETE /batches/<id>",
        "Delete a batch that has ended, with its images and answers",
        Scope.SUBMIT,
        returns={"type": "object", "required": ["success", "deleted"]},
        errors=(409,),
    )
    def remove_batch(self, id: str) -> flask.Response:
        """Delete a batch, unless some of its requests have not ended."""
        self._get_batch(id)
        return json_response({"success": True, "deleted": self._store.batches.remove(id)})

    @_results_operation(
        "GET /batches/<id>/results.jsonl",
        "Results of a batch as JSON lines, in the order in which they ended",
        content_type="application/jsonl",
    )
    def results_jsonl(self, id: str) -> flask.Response:
        """Write the requests that have ended, one line each."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            for shown in self._results(batch, after, params):
                yield json.dumps(shown, separators=(",", ":"), ensure_ascii=False) + "\n"

        return _download(lines(), "application/jsonl")

    @_results_operation(
        "GET /batches/<id>/results.csv",
        "Results of a batch as CSV, in the order in which they ended",
        content_type="text/csv",
    )
    def results_csv(self, id: str) -> flask.Response:
        """Write the requests that have ended, one row each, with the most likely label or the number."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            yield _csv_line(_CSV_COLUMNS)
            for shown in self._results(batch, after, params):
                shown |= dict(zip(("label_id", "label", "probability"), _top_prediction(shown["preds"]), strict=True))
                shown["value"] = shown["preds"].get("value") if isinstance(shown["preds"], dict) else None
                yield _csv_line([to_cell(shown.get(name)) for name in _CSV_COLUMNS])

        return _download(lines(), "text/csv; charset=utf-8")

    @_operation(
        "GET /batches/<id>/contact-sheet.png",
        "A contact sheet of the first hundred images of a batch, or of those that answer it, with their labels",
        Scope.READ,
        content_type="image/png",
    )
    def contact_sheet(self, id: str) -> flask.Response:
        """Draw the first images of a batch, with their most likely labels."""
        self._get_batch(id)
        found = self._store.batches.items(id, limit=SHEET_ITEMS)
        shown = self._context.serialize_list(found)
        cells = [(_sheet_image(one), _sheet_lines(one, each)) for one, each in zip(found, shown, strict=True)]
        sheet = self._context.thumbnails.sheet(cells, client=current_key_id())
        return _download(iter((sheet,)), "image/png")

    @_operation("POST /batches/<id>/cancel", "Cancel the queued requests of a batch", Scope.SUBMIT, returns=_BATCH)
    def cancel_batch(self, id: str) -> flask.Response:
        """Cancel the requests that have not been dispatched."""
        self._get_batch(id)
        count = self._store.batches.cancel(id, now=self._now())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_batch(id), is_whole=True)})

    @_operation("POST /batches/<id>/retry", "Queue the failed requests of a batch again", Scope.SUBMIT, returns=_BATCH)
    def retry_batch(self, id: str) -> flask.Response:
        """Queue the failed requests again whose image is still there."""
        self._context.intake.check_retry(self._get_batch(id).model)
        count = self._store.batches.retry(id, now=self._now())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_batch(id), is_whole=True)})

    # Serialisation

    def _serialize(self, batch: BatchRecord, *, is_whole: bool = False) -> dict[str, Any]:
        """Build a batch's JSON. :param is_whole: with the refused items, and why it waits."""
        progress = self._store.batches.progress(batch.id)
        is_running = bool(progress.claimed or progress.ended)
        shown: dict[str, Any] = {
            "batch_id": batch.id,
            "status": "ended" if not progress.waiting else "running" if is_running else "queued",
            **fields(batch, "name model service labels created_at total"),
            "counts": {
                **fields(progress, "queued claimed done failed cancelled expired"),
                "refused": batch.refused,
                # Deleted since by retention, or by its owner.
                "deleted": max(0, batch.total - progress.waiting - progress.ended),
            },
            "progress": 1.0 if not batch.total else round(1 - progress.waiting / batch.total, 4),
            "cost": to_json(progress.cost),
            "cost_is_final": progress.is_cost_final,
            "results_url": f"/batches/{batch.id}/results.jsonl",
        }
        shown |= given_fields(batch, "deadline_at cancelled_at keep_seconds")
        if is_whole:
            last = self._store.batches.last_unfinished(batch.id, progress)
            wait = None if last is None else self._context.estimate_wait(last)
            shown["eta_seconds"] = 0.0 if not progress.waiting else None if wait is None else wait.eta_seconds
            if wait is not None:
                shown["waiting_for"] = wait.waiting_for
            shown["failures"] = dict(progress.failures)
            shown["refused"] = [fields(one, _REFUSED) for one in self._store.batches.refused_items(batch.id)]
        return shown

    def _parse_results_query(self, id: str) -> tuple[BatchRecord, int, dict[str, Any]]:
        batch = self._get_batch(id)
        fields = query_fields(flask.request)
        after = parse_number("after", fields.pop("after", "0"))
        return batch, after, parse_read_params(batch.service, fields)

    def _results(self, batch: BatchRecord, after: int, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while found := self._store.batches.results(batch.id, after=after, limit=RESULTS_PER_READ):
            after = found[-1][0]
            shown = self._context.serialize_list([request for _, request in found], params)
            yield from ({**each, "cursor": cursor} for each, (cursor, _) in zip(shown, found, strict=True))


def show_item(one: StagedItem) -> dict[str, Any]:
    """Build the JSON of an item that was accepted or refused."""
    if one.request is None:
        assert one.refused is not None
        return {**fields(one.refused, _REFUSED), "req_id": None, "status": "refused"}
    shown = {**fields(one.item, "client_id position"), "req_id": one.request.id, "status": one.request.status}
    return {**shown, "code": None, "reason": None}


def _top_prediction(preds: Any) -> tuple[Any, Any, Any]:
    """Return id, name and probability of the most likely label; three times None if there are no labels."""
    rows = preds.get("labels") if isinstance(preds, dict) else preds
    if isinstance(rows, list) and rows and isinstance(rows[0], list | tuple) and len(rows[0]) in (2, 3):
        return (None, *rows[0]) if len(rows[0]) == 2 else tuple(rows[0])
    return None, None, None


def _sheet_image(request: RequestRecord) -> str | None:
    """Return the hash of the image that answers a request, else of its own; None if neither is there."""
    if IMAGE_ANSWER in request.files:
        return request.files[IMAGE_ANSWER].sha256
    return request.image_sha256 if request.image_deleted_at is None and is_image(request) else None


def _sheet_lines(request: RequestRecord, shown: dict[str, Any]) -> list[str]:
    _, label, probability = _top_prediction(shown["preds"])
    if request.state is RequestState.DONE and label is not None:
        return [
            "unknown" if shown.get("unknown") else f"{label}",
            f"{float(probability):.2f} {request.client_id or ''}",
        ]
    value = shown["preds"].get("value") if isinstance(shown["preds"], dict) else None
    return [request.status if value is None else f"{value:.6g}", request.client_id or ""]


def _csv_line(cells: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def _download(pieces: Iterator[str] | Iterator[bytes], kind: str) -> flask.Response:
    return set_headers(flask.Response(pieces, content_type=kind))
