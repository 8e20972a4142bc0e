"""Many pictures at once: taking them, how far they are, their answers as they come, cancelling, trying again.

Registered by `api.py`. Each picture is checked like a single one. Those that cannot be used are refused one by one and
the others taken; only a body that cannot be read is refused as a whole, and then nothing of it is kept.
Longer than other modules, because a batch's JSON and every way to read it stand in one place.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import flask

from provider_image import errors
from provider_image.models.registry import find_row
from provider_image.services import load_service
from server.api.parameters import FRESH, WAIT, service_fields
from server.api.responses import json_response
from server.api.views.predictions import check_fields, parse_wait_seconds
from server.api.views.requests import CURSOR, LIMIT, PageQuery, read_cursor, to_cursor
from server.auth.guard import check_owner, check_quota, current_key_id
from server.context import Context, parse_read_params
from server.endpoint import Field, operation
from server.errors import FetchingDisabled
from server.intake.batch_intake import BatchIntake, ItemOutcome
from server.intake.batch_parser import MAX_ITEMS, detect_format, parse_items, spool
from server.intake.request_options import REQUEST_OPTIONS, read_request_options
from server.intake.uploads import clean_name, query_fields
from server.webhooks import WEBHOOK, check_webhook
from store import new_id
from store.batches import BatchProgress, BatchRecord, RefusedItem, UnknownBatch
from store.cost_split import to_amount
from store.errors import UnknownRequest
from store.keys import Scope
from store.records import NewRequest, RequestRecord, RequestState, to_text

#: Results that are read from the store at once.
RESULTS_PER_READ = 200
_CSV_COLUMNS = (
    "client_id", "req_id", "name", "status", "label_id", "label", "probability", "code", "reason", "cached",
    "provider", "seconds", "cost", "finished_at", "cursor",
)  # fmt: skip
_BATCH = "Batch"
_NAME = Field(name="name", help="What you call the batch; only shown.")
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
        self._intake = BatchIntake(context)

    @operation(
        summary="Send many pictures",
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
        """Take many pictures: 202 when all that were accepted are durable, with an id or a reason for each."""
        context = self._context
        row = find_row(context.settings.models, model)
        service = load_service(row.service)
        fields, options = read_request_options(flask.request, context.clock())
        name = clean_name(fields.pop("name", None))
        webhook = check_webhook(
            fields.pop("webhook", None), is_private_allowed=context.settings.allows_private_webhooks
        )
        is_fresh, params = check_fields(service, fields)
        kind, boundary = detect_format(flask.request)
        if kind == "lines" and not context.settings.fetches_urls:
            raise FetchingDisabled()
        digest = context.get_artefact_digest(row)
        context.check_backlog()
        check_quota()
        home, max_bytes = context.settings.home, context.settings.max_batch_bytes
        with (
            spool(flask.request, folder=home, max_bytes=max_bytes, active_reads=context.active_reads) as file,
            self._intake.fetch_slot() if kind == "lines" else context.work_slots,
        ):
            items = parse_items(
                file,
                kind,
                boundary,
                folder=home,
                max_image_bytes=context.settings.max_image_bytes,
                max_bytes=max_bytes,
            )
            outcomes = self._intake.stage_items(items)
        read_time = {param.name for param in service.params if param.is_read_time}
        # Asked only now: a slow upload must not be dated back, see the store's listing.
        now = context.clock()
        batch = BatchRecord(
            id=new_id(),
            service=row.service,
            model=row.name,
            params={key: value for key, value in params.items() if key not in read_time},
            name=name,
            labels=options.labels,
            key_id=current_key_id(),
            created_at=now,
            deadline_at=options.deadline_at,
            keep_seconds=options.keep_seconds,
            webhook=webhook,
        )
        new = NewRequest(
            id="",
            service=batch.service,
            model=batch.model,
            params=batch.params,
            digest=digest,
            is_fresh=is_fresh,
            batch_id=batch.id,
            labels=batch.labels,
            key_id=batch.key_id,
            keep_seconds=batch.keep_seconds,
            deadline_at=batch.deadline_at,
            created_at=now,
        )
        staged = [
            (replace(new, id=new_id(), client_id=one.item.client_id, name=one.item.name), one.staged)
            for one in outcomes
            if one.staged is not None
        ]
        try:
            context.check_backlog(len(staged))
        except errors.MlgError:
            self._intake.discard(outcomes)
            raise
        refused_items = [one.refused_item for one in outcomes if one.refused_item is not None]
        added = iter(context.store.add_batch(batch, staged, refused_items))
        shown = [_show_outcome(one, next(added) if one.staged is not None else None) for one in outcomes]
        status_url = f"/batches/{batch.id}"
        return json_response(
            {
                "success": True,
                "batch_id": batch.id,
                "status_url": status_url,
                "results_url": f"{status_url}/results.jsonl",
                "model": batch.model,
                "accepted": len(staged),
                "refused": len(refused_items),
                "items": shown,
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
        found = self._context.store.list_batches(key_id=page.key_id, before=page.before, limit=page.limit + 1)
        shown = [self._serialize(batch) for batch in found[: page.limit]]
        following = to_cursor(found[page.limit - 1].number) if len(found) > page.limit else None
        return json_response({"success": True, "batches": shown, "next": following})

    @operation(summary="How far a batch is", scope=Scope.READ, tag="batches", query=(WAIT,), responses={200: _BATCH})
    def show_batch(self, id: str) -> flask.Response:
        """Show how far a batch is, after holding the answer until it has ended if the client asks for it."""
        batch = self._get_owned(id)
        fields = query_fields(flask.request)
        give_up_at = time.monotonic() + parse_wait_seconds(
            fields.pop("wait", None), self._context.settings.max_hold_seconds
        )
        if fields:
            raise errors.InvalidParams(f"There is no parameter {next(iter(fields))[:64]!r}. Parameters: wait.")
        progress = self._context.store.batch_progress(id)
        while progress.waiting and (seconds := give_up_at - time.monotonic()) > 0:
            last = self._last_waiting(batch, progress)
            if last is None or not self._context.long_poller.wait_until_final(last, seconds).state.is_final:
                break  # the time is over, or nobody may be held any more
            progress = self._context.store.batch_progress(id)
        return json_response({"success": True, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Answers of a batch as JSON lines, in the order in which they came",
        scope=Scope.READ,
        tag="batches",
        query=(_AFTER, *service_fields(is_read=True)),
        responses={200: {"type": "string"}},
        content_type="application/jsonl",
    )
    def results_jsonl(self, id: str) -> flask.Response:
        """Write what has ended so far, a line each."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            for number, request in self._results(batch, after):
                shown = {**self._context.serialize(request, params), "cursor": number}
                yield json.dumps(shown, separators=(",", ":"), ensure_ascii=False) + "\n"

        return _download(lines(), "application/jsonl")

    @operation(
        summary="Answers of a batch as CSV, in the order in which they came",
        scope=Scope.READ,
        tag="batches",
        query=(_AFTER, *service_fields(is_read=True)),
        responses={200: {"type": "string"}},
        content_type="text/csv",
    )
    def results_csv(self, id: str) -> flask.Response:
        """Write what has ended so far, a row each, with the likeliest label."""
        batch, after, params = self._parse_results_query(id)

        def lines() -> Iterator[str]:
            yield _csv_line(_CSV_COLUMNS)
            for number, request in self._results(batch, after):
                shown = {**self._context.serialize(request, params), "cursor": number}
                shown |= dict(zip(("label_id", "label", "probability"), _top_prediction(shown["preds"]), strict=True))
                yield _csv_line(["" if (cell := shown.get(name)) is None else cell for name in _CSV_COLUMNS])

        return _download(lines(), "text/csv; charset=utf-8")

    @operation(
        summary="A sheet of the first hundred pictures of a batch with what is on them",
        scope=Scope.READ,
        tag="batches",
        responses={200: _BINARY},
        content_type="image/png",
    )
    def contact_sheet(self, id: str) -> flask.Response:
        """Draw the first pictures of a batch, with their likeliest labels."""
        from server.api.thumbnails import SHEET_ITEMS, SheetItem, contact_sheet

        self._get_owned(id)
        found = self._context.store.batch_items(id, limit=SHEET_ITEMS)
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

    @operation(summary="Cancel what waits of a batch", scope=Scope.SUBMIT, tag="batches", responses={200: _BATCH})
    def cancel_batch(self, id: str) -> flask.Response:
        """Cancel what has not been dispatched."""
        self._get_owned(id)
        count = self._context.store.cancel_batch(id, now=self._context.clock())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Queue the failed requests of a batch again", scope=Scope.SUBMIT, tag="batches", responses={200: _BATCH}
    )
    def retry_batch(self, id: str) -> flask.Response:
        """Queue what failed again, if its picture is still there."""
        self._get_owned(id)
        count = self._context.store.retry_batch(id, now=self._context.clock())
        return json_response({"success": True, "changed": count, **self._serialize(self._get_owned(id), is_whole=True)})

    @operation(
        summary="Delete a batch that has ended, with its pictures and answers",
        scope=Scope.SUBMIT,
        tag="batches",
        responses={200: {"type": "object", "required": ["success", "deleted"]}, 409: "Error"},
    )
    def remove_batch(self, id: str) -> flask.Response:
        """Delete a batch when nothing of it is under way."""
        self._get_owned(id)
        return json_response({"success": True, "deleted": self._context.store.remove_batch(id)})

    # Showing

    def _get_owned(self, id: str) -> BatchRecord:
        batch = self._context.store.get_batch(id)
        try:
            check_owner(batch)
        except UnknownRequest as error:
            raise UnknownBatch() from error
        return batch

    def _last_waiting(self, batch: BatchRecord, progress: BatchProgress) -> RequestRecord | None:
        if progress.last_number is None:
            return None
        found = self._context.store.batch_items(batch.id, after=progress.last_number - 1, limit=1)
        return found[0] if found else None

    def _serialize(self, batch: BatchRecord, *, is_whole: bool = False) -> dict[str, Any]:
        """Build a batch's JSON. :param is_whole: with the refusals, and why it waits."""
        progress = self._context.store.batch_progress(batch.id)
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
                # What retention, or its owner, has deleted since.
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
            last = self._last_waiting(batch, progress)
            wait = None if last is None else self._context.estimate_wait(last)
            shown["eta_seconds"] = 0.0 if not progress.waiting else None if wait is None else wait.eta_seconds
            if wait is not None:
                shown["waiting_for"] = wait.waiting_for
            shown["failures"] = dict(progress.failures)
            shown["refused"] = [_show_refused_item(one) for one in self._context.store.refused_items(batch.id)]
        return shown

    def _parse_results_query(self, id: str) -> tuple[BatchRecord, int, dict[str, Any]]:
        batch = self._get_owned(id)
        fields = query_fields(flask.request)
        after = read_cursor("after", fields.pop("after", "0"))
        return batch, after, parse_read_params(batch.service, fields)

    def _results(self, batch: BatchRecord, after: int) -> Iterator[tuple[int, RequestRecord]]:
        while found := self._context.store.batch_results(batch.id, after=after, limit=RESULTS_PER_READ):
            yield from found
            after = found[-1][0]

    def _read_image(self, request: RequestRecord) -> bytes | None:
        if request.image_deleted_at is not None:
            return None
        try:
            return self._context.store.images.read(request.image_sha256)
        except FileNotFoundError:
            return None


def _show_outcome(outcomes: ItemOutcome, request: RequestRecord | None) -> dict[str, Any]:
    if request is None:
        assert outcomes.refused_item is not None
        return {**_show_refused_item(outcomes.refused_item), "req_id": None, "status": "refused"}
    return {
        "client_id": outcomes.item.client_id,
        "position": outcomes.item.position,
        "req_id": request.id,
        "status": request.status,
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
    """Return the first row of a classification; nothing for what is no list of rows of three."""
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
    response = flask.Response(pieces, content_type=kind)
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
