"""Views of trainings: send examples, read progress and figures, cancel, delete, and go back to an earlier version.

Who has trained a model owns its trainings. The model itself is like any other: every key may send requests to it.
"""

from __future__ import annotations

import csv
import functools
import io
from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.compiler.versions import UnknownVersion
from server.api.query import CURSOR, LIMIT, PageQuery, read_query
from server.api.responses import json_response, set_headers
from server.api.views.batches import BINARY
from server.auth.guard import is_owner
from server.context import Views
from server.csv_cells import to_cell
from server.endpoint import operation
from server.intake.staging import StagedItem
from server.intake.trainings import OPTIONS, ReceivedTraining, TrainingOptions
from server.record_json import fields
from store.clients.keys import Scope
from store.errors import UnknownFile
from store.trainings.records import TrainingRecord

#: Refused examples that the response names; the figures name more.
MAX_REFUSED = 100
_operation = functools.partial(operation, tag="trainings")


class TrainingViews(Views):
    """The views of trainings."""

    @_operation(
        "POST /train/<name>",
        "Train a model on your own examples",
        Scope.TRAIN,
        query=OPTIONS,
        body={
            "application/zip": BINARY,
            "text/csv": {"type": "string", "description": "A table, with `target`; texts, with `text` too."},
            "multipart/form-data": {"type": "object", "required": ["archive"], "properties": {"archive": BINARY}},
        },
        responses={202: "TrainingSubmitted"},
    )
    def train(self, name: str) -> Response:
        """Accept a zip with a folder of images for each class, or a CSV with a table or texts.

        The answer is 202 when the training and all accepted examples are durable.
        """
        options = TrainingOptions.parse(name, read_query(flask.request, *(field.name for field in OPTIONS)))
        with self._context.training_intake.read(flask.request, options) as received:
            return self._context.repetitions.once(received.digest, lambda: self._add(received))

    def _add(self, received: ReceivedTraining) -> flask.Response:
        training, items = self._context.training_intake.add(received)
        status_url = f"/trainings/{training.id}"
        refused = [item for item in items if item.request is None]
        return json_response(
            {
                "success": True,
                "training_id": training.id,
                "status_url": status_url,
                "name": training.name,
                "batch_id": training.batch_id,
                "accepted": training.examples,
                "refused": len(refused),
                "items": [_show_refused(item) for item in refused[:MAX_REFUSED]],
            },
            202,
            {"Location": status_url},
        )

    @_operation(
        "GET /trainings", "List trainings, newest first", Scope.READ, returns="Trainings", query=(CURSOR, LIMIT)
    )
    def list_trainings(self) -> flask.Response:
        """List trainings, newest first."""
        page = PageQuery.from_request(flask.request, self._cursors("trainings"))
        found = self._store.trainings.list(key_id=page.key_id, before=page.before, limit=page.limit + 1)
        last = found[page.limit - 1].number if len(found) > page.limit else None
        shown = [self._context.serialize_training(training) for training in found[: page.limit]]
        return json_response({"success": True, "trainings": shown, "next": page.next_cursor(last)})

    @_operation(
        "GET /trainings/<id>", "Read the progress and the figures of a training", Scope.READ, returns="Training"
    )
    def show_training(self, id: str) -> flask.Response:
        """Show a training."""
        read_query(flask.request)
        return self._response(self._get_training(id))

    @_operation("GET /trainings/<id>/files/<name>", "A file of a training's result", Scope.READ, content_type="*/*")
    def show_training_file(self, id: str, name: str) -> flask.Response:
        """Return the confusion matrix as an image, or answers as CSV."""
        read_query(flask.request)
        training = self._get_training(id)
        if name not in training.files:
            names = ", ".join(training.files) or "none"
            raise UnknownFile(f"The training has no file {name[:64]!r}. Its files: {names}.")
        data, kind = self._store.trainings.files.read(id, name), training.files[name]
        response = flask.Response(_safe_cells(data) if kind == "text/csv" else data, content_type=kind)
        if kind == "text/csv":
            response.headers.set("Content-Disposition", "attachment", filename=name)
        return set_headers(response)

    @_operation(
        "POST /trainings/<id>/cancel",
        "Cancel a training that has not ended",
        Scope.TRAIN,
        returns="Training",
    )
    def cancel_training(self, id: str) -> flask.Response:
        """Cancel a training, and the requests for its features that have not been dispatched."""
        return self._response(self._context.training_intake.cancel(self._get_training(id)))

    @_operation(
        "DELETE /trainings/<id>",
        "Delete a training that has ended, with its version of the model",
        Scope.TRAIN,
        returns={"type": "object", "required": ["success", "training_id"]},
        errors=(409,),
    )
    def remove_training(self, id: str) -> flask.Response:
        """Delete a training. Deleting the last one of a name deletes the model."""
        self._context.training_intake.remove(self._get_training(id))
        return json_response({"success": True, "training_id": id, "status": "deleted"})

    @_operation(
        "GET /models/<name>/versions",
        "List the versions of a model that was trained, newest first",
        Scope.READ,
        returns="Versions",
        tag="models",
    )
    def list_versions(self, name: str) -> flask.Response:
        """List the finished trainings of a name, those of the caller's key only."""
        read_query(flask.request)
        found = [one for one in self._store.trainings.versions(name[:64]) if is_owner(one)]
        shown = [self._context.serialize_training(training) for training in found]
        return json_response({"success": True, "versions": shown})

    @_operation(
        "POST /models/<name>/versions/<version>/use",
        "Go back to a version of a model that was trained",
        Scope.TRAIN,
        returns="Training",
        tag="models",
    )
    def use_version(self, name: str, version: str) -> flask.Response:
        """Install a version. The one that is installed now is kept."""
        for training in self._store.trainings.versions(name[:64]):
            if str(training.version) == version and is_owner(training):
                self._context.training_intake.use(training)
                return self._response(training)
        raise UnknownVersion()

    def _response(self, training: TrainingRecord) -> flask.Response:
        return json_response({"success": True, **self._context.serialize_training(training, is_whole=True)})


def _show_refused(one: StagedItem) -> dict[str, Any]:
    assert one.refused is not None
    return fields(one.refused, "client_id position code reason")


def _safe_cells(data: bytes) -> bytes:
    """Return a CSV whose cells no spreadsheet takes for formulas: names of files and classes are a client's."""
    text = io.StringIO(newline="")
    rows = csv.reader(io.StringIO(data.decode(), newline=""))
    csv.writer(text, lineterminator="\n").writerows([to_cell(cell) for cell in row] for row in rows)
    return text.getvalue().encode()
