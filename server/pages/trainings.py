"""The pages of trainings: the list with the form that begins one, and one training with its progress and figures.

The form has two steps, so that it works without JavaScript: the first chooses the name and what is learned from, the
second sends the file. The files of a result are those of the API, `server/api/views/trainings.py`.
"""

from __future__ import annotations

from typing import Any

import flask
from werkzeug.wrappers import Response

from provider_image.errors import MlgError
from provider_image.features.text import SEGMENTERS
from provider_image.models.catalogue import EMBEDDING_SUFFIX, normalise_name
from server.api.query import parse_cursor, read_query
from server.auth.guard import is_owner, visible_key_id
from server.context import Views
from server.endpoint import PAGES, operation
from server.intake.trainings import DEFAULT_BACKBONE, MAX_TABLE_BYTES, OPTIONS, TrainingOptions
from server.pages.render import page, url_with_query
from server.serializers import serialize_models
from store.clients.keys import Scope
from store.trainings.records import TrainingRecord

#: Trainings on a page of the list.
PER_PAGE = 20
#: Mistakes of which a page shows the images.
MAX_IMAGES = 24
#: The largest confusion matrix that is shown as a table too.
MAX_TABLE_CLASSES = 20
#: What can be learned from -> the parameters of its form.
SOURCES = {
    "images": ("backbone",),
    "table": ("target",),
    "texts": ("text", "target", "segmenter"),
    "collection": ("collection", "label", "target"),
}
#: Those whose file is a CSV.
TABLES = ("table", "texts")
#: What only some trainings have.
_NOTHING = dict.fromkeys(("batch_id", "digest", "ended_at", "features", "reason", "step", "version", "waiting_for"))


class TrainingPageViews(Views):
    """The pages of trainings, their forms and buttons."""

    @operation("GET /ui/train", "The list of trainings, and the form that begins one", Scope.READ, tag=PAGES)
    def trainings_page(self) -> flask.Response:
        """List trainings, newest first, beside the form."""
        return self._list(flask.request.args.get("name", ""))

    @operation("POST /ui/train/new/<name>", "The form that sends the examples of a training", Scope.TRAIN, tag=PAGES)
    def train_form(self, name: str) -> Response:
        """Begin a training and redirect to its page."""
        try:
            given = read_query(flask.request, "from", *(field.name for field in OPTIONS))
            is_table = given.pop("from", "images") in TABLES
            options = TrainingOptions.parse(name, given)
            with self._context.training_intake.read(flask.request, options, is_table=is_table) as received:
                training, _ = self._context.training_intake.add(received)
        except MlgError as error:
            return self._list(name, notice=error.reason, code=409)
        return flask.redirect(f"/ui/train/{training.id}", 303)

    @operation("GET /ui/train/<id>", "The page of one training", Scope.READ, tag=PAGES)
    def training_page(self, id: str) -> flask.Response:
        """Show the progress, then the figures, and the versions of the model."""
        return self._show(self._get_training(id))

    @operation("POST /ui/train/<id>/cancel", "The button that cancels a training", Scope.TRAIN, tag=PAGES)
    def cancel_training_form(self, id: str) -> Response:
        """Cancel a training."""
        training = self._get_training(id)
        try:
            self._context.training_intake.cancel(training)
        except MlgError as error:
            return self._show(training, notice=error.reason, code=409)
        return flask.redirect(f"/ui/train/{id}", 303)

    @operation("POST /ui/train/<id>/use", "The button that goes back to a version of a model", Scope.TRAIN, tag=PAGES)
    def use_version_form(self, id: str) -> Response:
        """Install the model of a training again."""
        training = self._get_training(id)
        try:
            self._context.training_intake.use(training)
        except MlgError as error:
            return self._show(training, notice=error.reason, code=409)
        return flask.redirect(f"/ui/train/{id}", 303)

    def _list(self, entered_name: str, *, notice: str | None = None, code: int = 200) -> flask.Response:
        cursors, given = self._cursors("trainings"), flask.request.args
        before = parse_cursor(cursors, "before", given.get("before") or None)
        found = self._store.trainings.list(key_id=visible_key_id(), before=before, limit=PER_PAGE + 1)
        shown = [self._show_one(training) for training in found[:PER_PAGE]]
        name = normalise_text(entered_name)
        source = given.get("from", "images") if given.get("from") in SOURCES else "images"
        upload = None
        if name and notice is None:
            chosen = {field: given[field].strip() for field in SOURCES[source] if given.get(field)}
            if source == "images":
                chosen.setdefault("backbone", DEFAULT_BACKBONE)
            try:
                TrainingOptions.parse(name, chosen)
            except MlgError as error:
                notice, code = error.reason, 400
            else:
                upload = url_with_query(
                    f"/ui/train/new/{name}", chosen if source == "images" else {"from": source, **chosen}
                )
        return page(
            "trainings.html",
            status=code,
            notice=notice,
            trainings=shown,
            is_live=before is None and any(one["state"] in ("waiting_for_features", "fitting") for one in shown),
            is_later=before is not None,
            older=url_with_query("/ui/train", {"before": cursors.write(found[PER_PAGE - 1].number)})
            if len(found) > PER_PAGE
            else None,
            backbones=self._backbones(),
            chosen=given.get("backbone") or DEFAULT_BACKBONE,
            name=name,
            # So that nothing has to be entered again after an error.
            entered={field: given.get(field, "") for fields in SOURCES.values() for field in fields}
            | {"name": entered_name},
            upload=upload,
            source=source,
            is_table=source in TABLES,
            segmenters=SEGMENTERS,
            max_bytes=MAX_TABLE_BYTES if source in TABLES else self._context.settings.max_batch_bytes,
            base=flask.request.host_url.rstrip("/"),
        )

    def _show_one(self, training: TrainingRecord, *, is_whole: bool = False) -> dict[str, Any]:
        """Return a training's JSON, with None for what it does not have."""
        return {**_NOTHING, **self._context.serialize_training(training, is_whole=is_whole)}

    def _backbones(self) -> list[dict[str, Any]]:
        """List the models whose features can be used."""
        models = serialize_models(self._context.settings.models)
        return [
            {**model, "name": model["name"].removesuffix(EMBEDDING_SUFFIX)}
            for model in models
            if model["name"].endswith(EMBEDDING_SUFFIX) and (model["installed"] or model["builds_on_first_use"])
        ]

    def _show(self, training: TrainingRecord, *, notice: str | None = None, code: int = 200) -> flask.Response:
        shown = self._show_one(training, is_whole=True)
        figures = shown["figures"]
        versions = [one for one in self._store.trainings.versions(training.name) if is_owner(one)]
        classes = figures.get("classes", ())
        return page(
            "training.html",
            status=code,
            notice=notice,
            training=shown,
            is_live=not training.state.is_final,
            figures=figures,
            # Rows of a table have no request.
            mistakes=[{"req_id": None, **mistake} for mistake in figures.get("mistakes", ())[:MAX_IMAGES]],
            confusion=figures.get("confusion") if len(classes) <= MAX_TABLE_CLASSES else None,
            versions=[self._show_one(version) for version in versions],
            base=flask.request.host_url.rstrip("/"),
        )


def normalise_text(name: str) -> str:
    """Return a name as people write it as one of a model: `My pets` is `my_pets`."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")[:64] if normalise_name(name) else ""
