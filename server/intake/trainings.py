"""The way in of a training: its options, its examples, and the requests for their features.

Used by the API and by the page. A zip becomes one batch of ordinary requests for features, and a row that says what
each is an example of. In this order: the options, the name and the limits of the key, the backbone, the backlog and the
quota, and only then the body. Examples that cannot be used are refused with a reason and the others accepted, as long
as there are enough.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from flask import Request

from provider_image.compiler.versions import UnknownVersion, remove_model, remove_version, use_version
from provider_image.errors import InvalidParams, MalformedRequest, MlgError, TooManyBytes
from provider_image.features.normal_form import normalise
from provider_image.features.text import SEGMENTERS
from provider_image.models.artefact import installed_digest, is_model_name
from provider_image.models.catalogue import EMBEDDING_SUFFIX, look_up
from provider_image.models.registry import find_custom_name, find_row
from server.auth.guard import current_key, current_key_id, owned
from server.auth.memory import hold_bytes
from server.endpoint import Field
from server.errors import TooManyUploads, UnsupportedMediaType
from server.intake.accept import Intake, ReceivedBatch
from server.intake.batch_parser import (
    MAX_CLIENT_ID_LENGTH,
    MAX_ITEMS,
    BatchItem,
    check_directory,
    form_parts,
)
from server.intake.staging import StagedItem
from server.intake.uploads import body_digest, clean_name
from server.settings import ServerSettings
from store import new_id
from store.batches import UnknownBatch
from store.images import as_store_error
from store.pipelines.folder import PipelineFolder
from store.store import Store
from store.trainings.records import (
    NameTaken,
    TrainingExample,
    TrainingKind,
    TrainingRecord,
    TrainingRights,
    VersionInUse,
)
from trainer.errors import UnusableExamples
from trainer.examples import (
    LABEL_COLUMNS,
    Example,
    ExampleLimits,
    ExampleSet,
    check_examples,
    parse_number,
    read_csv,
    read_examples,
)

DEFAULT_BACKBONE = "efficientnet_lite0"
MAX_SEED = 2**31 - 1
#: Images of a collection that are read at a time.
MEMBERS_PER_READ = 500
#: Examples that cannot be read of which a reason is kept.
_MAX_SKIPPED = 1000
_MAX_COLUMN_LENGTH = 100
BACKBONE = Field(
    name="backbone",
    help="The installed model whose features are used.",
    schema={"type": "string", "default": DEFAULT_BACKBONE},
)
SEED = Field(
    name="seed",
    help="Decides which examples are held out for the figures.",
    schema={"type": "integer", "minimum": 0, "maximum": MAX_SEED, "default": 0},
)
TARGET = Field(
    name="target",
    help="The column with what is learned: of a table or texts, or the number of each image in the CSV file of a zip.",
)
LABEL = Field(name="label", help="The column of the CSV file in the zip with the class of each image.")
TEXT = Field(name="text", help="The column of a CSV with the text, to learn from texts.")
SEGMENTER = Field(
    name="segmenter",
    help="What finds the words of texts in languages without blanks between them.",
    schema={"type": "string", "enum": list(SEGMENTERS)},
)
COLLECTION = Field(
    name="collection",
    help="Instead of a body: train on the images of this collection. Then label, or target, names the label to learn.",
)
OPTIONS = (BACKBONE, SEED, TARGET, LABEL, TEXT, SEGMENTER, COLLECTION)
#: Most bytes of a table, and how many times as much memory reading it takes.
MAX_TABLE_BYTES, _MEMORY_OF_TABLE = 32 * 1024 * 1024, 3


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a client says of a training beside its examples."""

    #: The name of the model.
    name: str
    backbone: str = DEFAULT_BACKBONE
    seed: int = 0
    #: The column with a number, or with a class; both None where folders are the classes.
    target: str | None = None
    label: str | None = None
    #: The column with texts, and what finds their words.
    text: str | None = None
    segmenter: str | None = None
    #: The collection whose images are learned from; None where the body has them.
    collection: str | None = None

    @classmethod
    def parse(cls, name: str, fields: Mapping[str, str]) -> TrainingOptions:
        """Check the name and the parameters of a training. :raises InvalidParams: :raises NameTaken:"""
        if not is_model_name(name) or name.endswith(EMBEDDING_SUFFIX):
            raise InvalidParams(
                "The name of a model has at most 64 letters a to z, digits and underscores, begins with a letter or a "
                f"digit, and does not end with {EMBEDDING_SUFFIX}."
            )
        if look_up(name) is not None:
            raise NameTaken(f"{name} is a model of the catalogue. Choose another name.")
        seed = fields.get("seed", "0")
        if not (seed.isascii() and seed.isdigit() and len(seed) <= 10 and int(seed) <= MAX_SEED):
            raise InvalidParams(f"seed takes a whole number from 0 to {MAX_SEED}.")
        columns = {one: fields[one] for one in ("target", "label", "text", "collection") if fields.get(one)}
        if "collection" in columns and ("text" in columns or fields.get("backbone")):
            raise InvalidParams("With collection, neither text nor backbone can be given: its vectors are used.")
        if columns.keys() >= {"target", "label"}:
            raise InvalidParams("Give either target, a column of numbers, or label, a column of classes.")
        segmenter = fields.get("segmenter") or None
        if segmenter is not None and (segmenter not in SEGMENTERS or "text" not in columns):
            raise InvalidParams(f"segmenter takes one of {', '.join(SEGMENTERS)}, with the parameter text.")
        for column, text in columns.items():
            if len(text) > _MAX_COLUMN_LENGTH or not text.isprintable():
                raise InvalidParams(f"{column} takes the name of a column, at most {_MAX_COLUMN_LENGTH} characters.")
        backbone = fields.get("backbone") or DEFAULT_BACKBONE
        return cls(name=name, backbone=backbone, seed=int(seed), segmenter=segmenter, **columns)


@dataclass(frozen=True, kw_only=True)
class ReceivedTraining:
    """A training that was read; its examples are not yet checked."""

    options: TrainingOptions
    #: Its zip, as the body of a batch; None for a table and a collection.
    batch: ReceivedBatch | None = None
    #: Its table; None for images.
    table: IO[bytes] | None = None
    #: Of the whole body; None for a request without an idempotency key.
    digest: str | None


class TrainingIntake:
    """Accepts trainings in one server process."""

    def __init__(self, settings: ServerSettings, store: Store, intake: Intake, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._store = store
        self._intake = intake
        self._clock = clock

    @contextlib.contextmanager
    def read(self, request: Request, options: TrainingOptions, *, is_table: bool = False) -> Iterator[ReceivedTraining]:
        """Read the body of a training: a zip, a form with the field `archive`, or a CSV. Its slot is kept meanwhile.

        :param is_table: the file in a form is a CSV.
        :raises MlgError: the training cannot be accepted.
        """
        self._check_name(options.name)
        self._store.trainings.check(self._record(options), self._rights())
        if options.collection is not None:
            if request.content_length:
                raise MalformedRequest("Send either a body or the parameter collection.")
            digest = body_digest(request)
            yield ReceivedTraining(options=options, digest=None if digest is None else digest.hexdigest())
            return
        if request.mimetype == "text/csv" or is_table:
            too_large = TooManyBytes(f"A table may have at most {MAX_TABLE_BYTES} bytes.")
            with self._intake.spool_body(request, max_bytes=MAX_TABLE_BYTES, too_large=too_large) as (file, whole):
                if request.mimetype == "text/csv":
                    yield ReceivedTraining(options=options, table=file, digest=whole)
                else:
                    boundary = request.mimetype_params.get("boundary", "")
                    with contextlib.closing(form_parts(file, boundary, self._settings.home, 0)) as parts:
                        yield ReceivedTraining(options=options, table=_only_part(parts), digest=whole)
            return
        if options.text is not None:
            raise UnsupportedMediaType("Send texts as a CSV (Content-Type: text/csv).")
        self._refuse_faces(f"{options.backbone}{EMBEDDING_SUFFIX}")
        given = {"name": f"Training of {options.name}"}
        with self._intake.read_batch(request, f"{options.backbone}{EMBEDDING_SUFFIX}", given) as batch:
            if batch.kind not in ("zip", "form"):
                raise UnsupportedMediaType(
                    "Send a zip with a folder for each class (Content-Type: application/zip), or a form with the field "
                    "`archive`; a table as a CSV (Content-Type: text/csv)."
                )
            yield ReceivedTraining(options=options, batch=batch, digest=batch.digest)

    def add(self, received: ReceivedTraining) -> tuple[TrainingRecord, Sequence[StagedItem]]:
        """Check the examples, and add the requests for their features and the training.

        :return: after all is durable: the training, and every example with its request or why it was refused.
        :raises MlgError: nothing is kept.
        """
        if received.options.collection is not None:
            return self._add_collection(received.options, received.options.collection), ()
        if received.batch is None:
            return self._add_table(received), ()
        options, folder = received.options, self._store.trainings.files.folder
        limits = ExampleLimits(
            max_examples=MAX_ITEMS,
            max_image_bytes=self._settings.max_image_bytes,
            max_total_bytes=self._settings.max_batch_bytes,
            max_zip_bytes=self._settings.max_batch_bytes,
            max_table_bytes=MAX_TABLE_BYTES,
        )
        try:
            folder.mkdir(exist_ok=True, mode=0o750)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
                work = Path(name)
                (work / "files").mkdir()
                archive = _archive(received.batch, work, self._settings.max_image_bytes)
                found = read_examples(
                    archive, work / "files", target=options.target, label=options.label, limits=limits
                )
                batch, items = self._intake.add_batch(
                    received.batch,
                    items=_to_items(found),
                    check=lambda outcomes: check_examples(_usable(found, outcomes), limits),
                )
        except OSError as error:
            raise as_store_error(error, folder) from error
        examples = [
            TrainingExample(
                position=position,
                request_id=item.request.id,
                name=example.name,
                label=example.label,
                target=example.target,
            )
            for position, (example, item) in enumerate(zip(found.examples, items, strict=False))
            if item.request is not None
        ]
        training = self._record(options, backbone=batch.model.removesuffix(EMBEDDING_SUFFIX), batch_id=batch.id)
        try:
            return self._store.trainings.add(training, examples, rights=self._rights()), items
        except MlgError:  # for example, another key was faster with the name
            self._store.batches.cancel(batch.id, now=self._clock())
            raise

    def _add_table(self, received: ReceivedTraining) -> TrainingRecord:
        """Check that a table can be read and has the columns, and add its training. :raises UnusableExamples:"""
        from trainer.tables import find_column

        options, file = received.options, received.table
        assert file is not None  # it has either a table or a batch
        if options.target is None:
            raise InvalidParams("target takes the name of the column with what is to be learned.")
        folder = self._store.trainings.files.folder
        hold_bytes(_MEMORY_OF_TABLE * file.seek(0, os.SEEK_END), TooManyUploads())
        file.seek(0)
        try:
            folder.mkdir(exist_ok=True, mode=0o750)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as name:
                path = Path(name, "table.csv")
                path.symlink_to(f"/proc/self/fd/{file.fileno()}")
                rows = read_csv(path, ExampleLimits())
                header = [normalise(column) for column in next(rows)]
                for column in (options.target, options.text):
                    if column is not None:
                        find_column(header, column)
                count = sum(1 for _ in rows)
        except OSError as error:
            raise as_store_error(error, folder) from error
        file.seek(0)
        kind = TrainingKind.TABLE if options.text is None else TrainingKind.TEXT
        more = {"text": options.text, "segmenter": options.segmenter}
        training = self._record(
            options,
            kind=kind,
            examples=count,
            options={name: value for name, value in more.items() if value is not None},
        )
        return self._store.trainings.add(training, table=file.read(), rights=self._rights())

    def _add_collection(self, options: TrainingOptions, name: str) -> TrainingRecord:
        """Add a training on the images of a collection that have a vector and the label.

        :raises UnknownCollection: :raises UnusableExamples: too few have it.
        """
        collections = self._store.collections
        collection = owned(lambda text: collections.find(text, key_id=current_key_id()), name)
        if not collection.model.endswith(EMBEDDING_SUFFIX):
            raise UnusableExamples(f"The vectors of the collection are of {collection.model}, which has no backbone.")
        self._refuse_faces(collection.model)
        given = options.target or options.label
        wanted = LABEL_COLUMNS if given is None else (given,)
        examples: list[TrainingExample] = []
        before: int | None = None
        while found := collections.members(collection, before=before, limit=MEMBERS_PER_READ):
            before = found[-1].number
            for member in found:
                label = next((member.labels[one] for one in wanted if one in member.labels), None)
                if label is None or member.status != "ready":
                    continue
                if len(examples) == MAX_ITEMS:
                    raise UnusableExamples(f"More than {MAX_ITEMS} images of the collection have the label.")
                examples.append(
                    TrainingExample(
                        position=len(examples),
                        request_id=member.id,
                        name=f"{member.name or member.id}, {member.id[-8:]}",
                        label=None if options.target else label,
                        target=parse_number(label) if options.target else None,
                    )
                )
        described = [Example(name=one.name, label=one.label, target=one.target, data=b"") for one in examples]
        check_examples(ExampleSet(examples=tuple(described)))
        training = self._record(
            options,
            backbone=collection.model.removesuffix(EMBEDDING_SUFFIX),
            options={"collection": collection.name},
        )
        return self._store.trainings.add(training, examples, rights=self._rights())

    def cancel(self, training: TrainingRecord) -> TrainingRecord:
        """Cancel a training, and the requests for its features that wait. :raises TrainingEnded:"""
        cancelled = self._store.trainings.cancel(training.id, now=self._clock())
        if training.batch_id is not None:
            with contextlib.suppress(UnknownBatch):  # it was deleted
                self._store.batches.cancel(training.batch_id, now=self._clock())
        return cancelled

    def remove(self, training: TrainingRecord) -> None:
        """Delete a training that has ended, with its version of the model; the last one takes the model away.

        :raises TrainingInProgress: :raises VersionInUse: it is installed, and there are others.
        """
        models, digest = self._settings.models, training.digest
        if digest is not None:
            others = [one for one in self._store.trainings.versions(training.name) if one.id != training.id]
            is_used = digest == installed_digest(models, training.name)
            if is_used and any(one.digest != digest for one in others):
                raise VersionInUse()
            if not others:
                remove_model(models, training.name)
            elif not any(one.digest == digest for one in others):
                remove_version(models, training.name, digest)
        self._store.trainings.remove(training.id)

    def use(self, training: TrainingRecord) -> None:
        """Install the model of a finished training again. :raises UnknownVersion: it is not kept any more."""
        if training.digest is None:
            raise UnknownVersion("The training has made no model.")
        use_version(self._settings.models, training.name, training.digest)

    def _record(self, given: TrainingOptions, **facts: Any) -> TrainingRecord:
        key = current_key()
        return TrainingRecord(
            id=new_id(),
            name=given.name,
            key_id=None if key is None else key.id,
            target=given.target or given.label,
            seed=given.seed,
            created_at=self._clock(),
            **{"kind": TrainingKind.IMAGES, **facts},
        )

    def _rights(self) -> TrainingRights:
        key = current_key()
        is_operator = key is None or key.is_operator
        return TrainingRights(
            is_operator=is_operator, max_models=None if is_operator else self._settings.max_trained_models
        )

    def _refuse_faces(self, embedding: str) -> None:
        """Refuse to learn from vectors of faces: a model may contain them, and is kept. :raises UnusableExamples:"""
        if find_row(self._settings.models, embedding).takes_faces:
            raise UnusableExamples(
                f"{embedding} takes faces. What was learned from them would be kept longer than they."
            )

    def _check_name(self, name: str) -> None:
        """Refuse the name of a model that was not trained, and that of a pipeline. :raises NameTaken:"""
        if PipelineFolder(self._settings.home, self._settings.models).has(name):
            raise NameTaken(f"There is a pipeline {name}, which would not be reached any more. Choose another name.")
        installed = find_custom_name(self._settings.models, name)
        if installed is not None and not (installed == name and self._store.trainings.is_trained(name)):
            raise NameTaken(f"There is a model {installed} that was not trained here. Choose another name.")


def _only_part(parts: Iterator[tuple[str, str | None, IO[bytes]]]) -> IO[bytes]:
    """Return the file of a form, which stays open while the parts do. :raises MalformedRequest: there is none."""
    for name, _, data in parts:
        if name == "archive":
            return data
    raise MalformedRequest("The form has no field `archive` with a file.")


def _archive(batch: ReceivedBatch, work: Path, max_image_bytes: int) -> Path:
    """Return the path of the zip in a body. :raises MalformedRequest: there is none, or it has too many entries."""
    path = work / "upload.zip"
    if batch.kind == "zip":
        check_directory(batch.file)
        path.symlink_to(f"/proc/self/fd/{batch.file.fileno()}")
        return path
    for name, _, data in form_parts(batch.file, batch.boundary, work, max_image_bytes):
        if name != "archive":
            raise MalformedRequest(f"The form has a field {name[:40]!r}. Only `archive` is expected, with a zip.")
        if path.exists():
            raise MalformedRequest("The form has two fields `archive`. Send one zip.")
        check_directory(data)
        with path.open("xb") as file:
            shutil.copyfileobj(data, file)
    if not path.exists():
        raise MalformedRequest("The form has no field `archive` with a zip.")
    return path


def _to_items(found: ExampleSet) -> Iterator[BatchItem]:
    """Iterate over the examples as items of a batch, then over what could not be read."""
    seen: set[str] = set()

    def client_id(name: str, position: int) -> str:
        short = name[-MAX_CLIENT_ID_LENGTH:]
        unique = f"{position}:{short}"[:MAX_CLIENT_ID_LENGTH] if short in seen else short
        seen.add(unique)
        return unique

    for position, example in enumerate(found.examples):
        data = example.data if isinstance(example.data, bytes) else example.data.read_bytes()
        id, name = client_id(example.name, position), clean_name(example.name)
        yield BatchItem(position=position, client_id=id, name=name, data=data)
    for position, skipped in enumerate(found.skipped[:_MAX_SKIPPED], len(found.examples)):
        yield BatchItem(
            position=position, client_id=client_id(skipped.name, position), error=UnusableExamples(skipped.reason)
        )


def _usable(found: ExampleSet, outcomes: Sequence[StagedItem]) -> ExampleSet:
    """Return the examples that the server accepts."""
    examples: list[Example] = [
        example for example, outcome in zip(found.examples, outcomes, strict=False) if outcome.staged is not None
    ]
    return ExampleSet(examples=tuple(examples), skipped=found.skipped)
