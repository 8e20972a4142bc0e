"""The JSON Schemas of the HTTP API's responses: one entry for each name that a view's operation may use.

Used by `openapi.py`, and by views whose responses have no name. The JSON itself is built in `server/serializers.py` and
in the views; tests check real responses against these schemas, closed, so that a field that is added there and not here
is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from provider_image.services import REGISTRY, load_service
from store.clients.usage import USAGE_BY, ClientKind
from store.pipelines.definition import PIPELINE
from store.states import EXPIRED, RequestState
from store.trainings.records import TrainingKind, TrainingState

Schema = dict[str, Any]


def string(help: str, **more: Any) -> Schema:
    """Describe a string."""
    return {"type": "string", "description": help, **more}


def timestamp(help: str) -> Schema:
    """Describe a time."""
    return string(help, format="date-time", examples=["2026-11-21T10:15:00.000Z"])


def number(help: str, **more: Any) -> Schema:
    """Describe a number."""
    return {"type": "number", "description": help, **more}


def integer(help: str, **more: Any) -> Schema:
    """Describe a count."""
    return {"type": "integer", "minimum": 0, "description": help, **more}


def boolean(help: str) -> Schema:
    """Describe a boolean."""
    return {"type": "boolean", "description": help}


def nullable(schema: Schema) -> Schema:
    """Allow null too."""
    return {**schema, "type": [schema["type"], "null"]}


def object_schema(required: str | None = None, /, **properties: Schema) -> Schema:
    """Describe an object. :param required: the required properties, with spaces between; None for all."""
    names = list(properties) if required is None else required.split()
    return {"type": "object", "required": names, "properties": properties}


def success(required: str | None = None, /, **properties: Schema) -> Schema:
    """Describe a response that is not an error."""
    names = None if required is None else f"success {required}"
    return object_schema(names, success={"const": True}, **properties)


def ref(name: str) -> Schema:
    """Refer to a schema of this file."""
    return {"$ref": f"#/components/schemas/{name}"}


def list_of(items: Schema, help: str | None = None) -> Schema:
    """Describe a list."""
    return {"type": "array", "items": items, **({} if help is None else {"description": help})}


def map_of(type: str, help: str) -> Schema:
    """Describe an object with any names."""
    return {"type": "object", "additionalProperties": {"type": type}, "description": help}


def enum(values: Iterable[str], help: str) -> Schema:
    """Describe a string of a few."""
    return {"type": "string", "enum": list(values), "description": help}


STATUSES = (*map(str, RequestState), EXPIRED)
_MODEL = string("The model's canonical name.")
_LABELS = map_of("string", "The client's labels.")
_CACHED = boolean("Whether the answer is reused from an equal image.")
#: The cursor of the next page of a list.
_NEXT = nullable(string("The `cursor` of the next page; null on the last."))
_COUNTS = ("queued", "claimed", "done", "failed", "cancelled", "expired", "refused", "deleted")
_REFUSED = {
    "client_id": string("The client's id, else the file's name."),
    "position": integer("Its position in the batch, from 0."),
    "code": nullable(string("Why it was refused, for programs.")),
    "reason": nullable(string("Why it was refused, for people.")),
}

_ERROR = {
    **object_schema(
        success={"const": False},
        reason=string("What happened and what to do, for people."),
        code=string("The same in one word, for programs; it is stable, the reason is not."),
    ),
    "examples": [{"success": False, "reason": "There is no request with this id.", "code": "unknown_request"}],
}
_SUBMITTED = success(
    "req_id status status_url model cached",
    req_id=string("Reads the answer."),
    status=enum(STATUSES, "`done` at once if an equal image was answered before."),
    status_url=string("Path of the answer."),
    model=_MODEL,
    cached=_CACHED,
    batch_id=string("Its batch."),
    client_id=string("The client's id for it."),
)
_REQUEST = success(
    "req_id status preds model service name created_at attempts",
    req_id=string("Its id."),
    status=enum(STATUSES, "Its state; done, failed, cancelled and expired are final."),
    files={
        "type": "object",
        "additionalProperties": object_schema(
            url=string("Path of the file."),
            media_type=string("Its media type."),
            bytes=integer("Its size."),
        ),
        "description": "The files of the answer, by name, if it has any.",
    },
    image_url=string("Path of the image that is the answer, if it is one."),
    preds={"anyOf": [{"type": "null"}], "description": "The answer; null while there is none."},
    progress=number("The part that is done, if its worker reports that.", minimum=0, maximum=1),
    preview_url=nullable(string("Path of what the image that will answer it looks like now; null if there is none.")),
    steps={
        "type": "object",
        "additionalProperties": {"type": ["object", "array"]},
        "description": "Of a pipeline: the answer of each step as far as it is, or a list with one for each item.",
    },
    parent=string("Of a step of a pipeline: id of the request to the pipeline."),
    step=string("Its name."),
    position=integer("The place of its item in the list that it runs for; 0 without a list."),
    model=_MODEL,
    service=enum((*REGISTRY, PIPELINE), "What kind of work it is."),
    name=nullable(string("The client's file name.")),
    created_at=timestamp("When it was created."),
    finished_at=timestamp("When it reached a final status."),
    attempts=integer("Failed attempts that were its own fault."),
    batch_id=string("Its batch."),
    client_id=string("The client's id for it, unique in its batch."),
    labels=_LABELS,
    replaces=string("Id of the request that it does again with another model."),
    replaced_by={
        **object_schema(
            req_id=string("Its id."),
            model=_MODEL,
            status_url=string("Path of its answer."),
        ),
        "description": "The latest request that has answered this one again.",
    },
    waiting_for=string("Why there is no answer yet, for people."),
    eta_seconds=nullable(number("Estimated seconds until the answer; null when unknown.", minimum=0)),
    ahead=integer("Requests of the same model before it."),
    unknown=boolean("Whether the most likely label is less sure than the model's threshold; absent without one."),
    unknown_below=number("The model's threshold, a probability.", minimum=0, maximum=1),
    cached=_CACHED,
    provider=nullable(string("The provider that computed it.")),
    seconds=nullable(number("Seconds the model spent on it.", minimum=0)),
    digest=nullable(string("Digest of the artefact that computed it.")),
    cost=nullable(string("Its share of the cost, in GLM; null where nothing is paid.")),
    cost_is_final=boolean("Whether the invoice was settled."),
    reason=string("Why it failed, or why the last attempt did, for people."),
    code=nullable(string("The same in one word, for programs.")),
)
#: What the details of a request have beside the request.
_DETAIL = object_schema(
    "params image_sha256 image_bytes picture_url inputs timeline",
    params={"type": "object", "description": "What the client chose."},
    image_sha256=string("Hash of the image's bytes."),
    image_bytes=integer("The image's size."),
    picture_url=nullable(string("Path of the image; null after it was deleted.")),
    inputs={
        "type": "object",
        "additionalProperties": object_schema(
            url=nullable(string("Path of the input; null after it was deleted.")),
            media_type=string("Its media type."),
            bytes=integer("Its size."),
        ),
        "description": "What it has beside its first input, by name.",
    },
    timeline=list_of(
        {
            **object_schema(event=string("What happened."), at=nullable(timestamp("When."))),
            "additionalProperties": True,
        },
        "What happened to it, in order.",
    ),
    deadline_at=timestamp("If it is still queued then, it expires."),
    keep_seconds=number("Seconds that it is kept after its end.", minimum=0),
)
_BATCH = success(
    "batch_id status name model service labels created_at total counts progress cost cost_is_final results_url",
    batch_id=string("Its id."),
    status=enum(("queued", "running", "ended"), "Its state."),
    name=nullable(string("The client's name for it.")),
    model=_MODEL,
    service=enum((*REGISTRY, PIPELINE), "What kind of work it is."),
    labels=_LABELS,
    created_at=timestamp("When it was created."),
    deadline_at=timestamp("Requests that are still queued then expire."),
    cancelled_at=timestamp("When it was cancelled."),
    keep_seconds=number("Seconds that each request is kept after its end.", minimum=0),
    total=integer("Images that were accepted."),
    counts=object_schema(**{state: integer("How many.") for state in _COUNTS}),
    progress=number("The share of requests that have ended.", minimum=0, maximum=1),
    cost=nullable(string("Its cost, in GLM; null where nothing is paid.")),
    cost_is_final=boolean("Whether all invoices were settled."),
    results_url=string("Path of its results."),
    eta_seconds=nullable(number("Estimated seconds until its end; null when unknown.", minimum=0)),
    waiting_for=string("Why it has not ended, for people."),
    failures=map_of("integer", "Code of the failed requests, and how many have it."),
    refused=list_of(object_schema(**_REFUSED)),
    changed=integer("Requests that were cancelled or queued again."),
)
_BATCH_SUBMITTED = success(
    batch_id=string("Reads the batch."),
    status_url=string("Path of its progress."),
    results_url=string("Path of its results."),
    model=_MODEL,
    accepted=integer("Images that were accepted."),
    refused=integer("Images that were refused."),
    items=list_of(
        object_schema(
            **_REFUSED,
            req_id=nullable(string("Reads the answer; null if it was refused.")),
            status=enum((*STATUSES, "refused"), "Its state."),
        )
    ),
)
_COLLECTION = success(
    id=string("Its id."),
    name=string("Its name, unique for its API key."),
    model=_MODEL,
    dimensions=nullable(integer("Values of a vector; null before the first.")),
    digest=nullable(string("Digest of the artefact that made its vectors; null before the first.")),
    created_at=timestamp("When it was created."),
    counts=object_schema(
        ready=integer("Images with a vector, which a search finds."),
        pending=integer("Images whose vector is being computed."),
        failed=integer("Images without one; the list of images tells why."),
    ),
    recall=nullable(
        number(
            "The share of the ten most similar images that a search finds, measured with its own images; null while "
            "every image is compared.",
            minimum=0,
            maximum=1,
        )
    ),
)
_COLLECTION_ADDED = success(
    collection=string("The collection's name."),
    status_url=string("Path of the collection."),
    batch_id=nullable(string("The batch of the new requests; null if none was necessary.")),
    model=_MODEL,
    accepted=integer("Images that were accepted."),
    refused=integer("Images that were refused."),
    items=_BATCH_SUBMITTED["properties"]["items"],
)
_MEMBER = object_schema(
    "req_id name status labels created_at picture_url",
    req_id=string("The request that computes its vector."),
    name=nullable(string("The client's file name.")),
    status=enum(("ready", "pending", "failed"), "Whether it has a vector."),
    labels=map_of("string", "Given by the client, and the most likely label of each classifier under its name."),
    created_at=timestamp("When the request was created."),
    picture_url=string("Path of the image."),
    reason=string("Why it has no vector."),
)
_SCORE = number("The similarity: the cosine of the angle between two vectors.", minimum=-1.01, maximum=1.01)
_SCORED_MEMBER = {
    **_MEMBER,
    "required": [*_MEMBER["required"], "score"],
    "properties": {**_MEMBER["properties"], "score": _SCORE},
}
_TRAINING = success(
    "training_id name kind state backbone target seed examples created_at is_used figures files",
    training_id=string("Its id."),
    name=string("The name of the model that it makes."),
    kind=enum(TrainingKind, "What it learns from."),
    state=enum(TrainingState, "Its state; done, failed and cancelled are final."),
    backbone=nullable(string("The model whose features are used.")),
    target=nullable(string("The column of the table with what is learned.")),
    options=map_of("string", "Further options of its kind."),
    seed=integer("Decides which examples are held out."),
    examples=integer("Examples that were accepted."),
    created_at=timestamp("When it was created."),
    started_at=timestamp("When fitting began."),
    ended_at=timestamp("When it ended."),
    batch_id=string("The batch of the requests for features."),
    features=object_schema(
        **{state: integer("Requests for features.") for state in _COUNTS if state not in ("refused", "deleted")}
    ),
    step=string("What is done now."),
    waiting_for=string("Why nothing is done now."),
    version=integer("Counts the finished trainings of this name."),
    digest=string("Digest of the model that was made."),
    is_used=boolean("Whether that is the model which is installed under the name."),
    figures={
        "type": "object",
        "additionalProperties": True,
        "description": "How good the model is, on examples that it has not seen; empty before. Lists show a few.",
    },
    files={
        "type": "object",
        "additionalProperties": object_schema(url=string("Path of the file."), media_type=string("Its media type.")),
        "description": "Files of the result: every answer, the worst mistakes, the confusion matrix.",
    },
    reason=string("Why it failed, for people."),
    code=string("The same in one word, for programs."),
)
_TRAINING_SUBMITTED = success(
    training_id=string("Reads the training."),
    status_url=string("Path of its progress."),
    name=string("The name of the model."),
    batch_id=nullable(string("The batch of the requests for features; null for a table.")),
    accepted=integer("Examples that were accepted."),
    refused=integer("Examples that were refused."),
    items=list_of(object_schema(**_REFUSED), "The first hundred that were refused."),
)
_REDO = success(
    "model with found existing without_inputs unsuitable next",
    model=_MODEL,
    **{"with": _MODEL},
    found=integer("Requests that this call does again, or would."),
    existing=integer("Those done again before, or answered by the present version of the model."),
    without_inputs=integer("Those whose image was deleted."),
    unsuitable=integer("Those with inputs of another kind than the model takes."),
    next=nullable(string("The `cursor` of the next call, for older requests; null at the end.")),
    added=integer("New requests."),
    batches=list_of(
        object_schema(
            batch_id=string("Reads the batch."),
            status_url=string("Path of its progress."),
            results_url=string("Path of its results."),
            accepted=integer("Its requests."),
        ),
        "The batches of the new requests: one, for an operator one for each key whose requests are done again.",
    ),
    reason=string("Why not all were added, for people."),
    code=string("The same in one word, for programs."),
    eta_seconds=nullable(number("Of a dry run: estimated seconds until the end; null when unknown.", minimum=0)),
    cost=nullable(string("Of a dry run by an operator: estimated cost in GLM; null when unknown.")),
)
_USED = {
    "accepted": integer("Requests that were accepted; those that have no outcome yet still wait."),
    "refused": integer("Images that batches refused."),
    "done": integer("Requests that were answered."),
    "cached": integer("Requests that were answered with an earlier answer."),
    "failed": integer("Requests that failed."),
    "cancelled": integer("Requests that were cancelled."),
    "expired": integer("Requests whose deadline passed."),
    "bytes": integer("Size of all inputs."),
    "seconds": number("Time that models spent on those that are done.", minimum=0),
    "cost": string("In GLM; a string because a JSON number would lose digits."),
    "cost_is_final": boolean("False while a part of the cost is an estimate."),
}
_USAGE = success(
    since=string("First day, UTC.", format="date"),
    until=string("Last day.", format="date"),
    by=list_of(enum(USAGE_BY, "What the rows are grouped by.")),
    usage=list_of(
        object_schema(
            " ".join(_USED),
            day=string("UTC.", format="date"),
            key=string("Id of the API key; empty for requests without one."),
            key_name=nullable(string("The key's name.")),
            model=string("The model's canonical name; empty for what was sent before usage was counted by model."),
            client=enum(ClientKind, "The kind of program, by its User-Agent."),
            **_USED,
        ),
        "The latest day and the most requests first.",
    ),
    total=object_schema(**_USED),
    quotas=list_of(
        object_schema(
            key=string("Id of the API key."),
            key_name=string("Its name."),
            images_per_day=nullable(integer("Images that it may send in a day, UTC; null if that is not limited.")),
            requests_per_minute=nullable(integer("Requests that it may send in a minute; null likewise.")),
            images_today=integer("Images that it has sent today."),
            images_left=nullable(integer("Images that it may still send today.")),
        ),
        "The limits of the keys that have some.",
    ),
)
_CATALOGUE_MODEL = object_schema(
    name=string("The name in paths; case and separators do not matter."),
    title=string("The name for people."),
    service=enum(REGISTRY, "What kind of work it does."),
    source=string("The source of its weights."),
    height=integer("Pixels of the input."),
    width=integer("Pixels of the input."),
    base=nullable(string("The classifier that it is without its last layer, if it is an embedding.")),
    dimensions=nullable(integer("Number of values of the vector that it returns.")),
    input=string("Kind of what it takes: image, row, text or file."),
    inputs={
        "type": "object",
        "additionalProperties": object_schema(
            kind=string("Its kind."),
            is_optional=boolean("Whether a request may leave it out."),
            help=string("What it is."),
        ),
        "description": "All that it takes, by name; the first is `input`.",
    },
    answers_with_image=boolean("Whether its answer is an image, see `image_url` of a request."),
    takes_faces=boolean("Whether it is for images of people's faces, which are treated as biometric data."),
    columns=list_of({"type": "string"}, "The columns of the table row that it takes; empty if it takes none."),
    installed=boolean("Whether it is installed."),
    builds_on_first_use=boolean("Whether the first request installs it."),
    digest=nullable(string("Digest of the installed artefact.")),
    size_bytes=nullable(integer("Its size on disk.")),
    storage=nullable(string("How its weights are stored.")),
    images_per_second=nullable(number("Measured by a check on this machine.")),
    reduced=nullable(
        object_schema(
            base=string("The model that it is a copy of."),
            precision=string("The precision in which it computes: bf16 or int8."),
            layers=integer("Layers with weights."),
            layers_in_f32=integer("Those of them that compute in f32."),
            calibration_images=integer("Images with which it was calibrated."),
            images=integer("Other images, with which it was judged."),
            same_first_label=integer("On how many of these its first label was that of the model."),
            agreement_low=number("Lower end of the 95 % interval of that share, by Wilson."),
            agreement_high=number("Upper end."),
            largest_difference=number("Largest difference of a probability on any of these images."),
            median_difference=number("Median over the images of the largest difference on each."),
            bound=number("The largest difference that was allowed."),
            processor=string("The processor on which it was judged."),
            speedup=number("How many times as fast as the model it was there, in processor time."),
            figures=string("All of this for people."),
            is_quickest=boolean("Whether workers on this machine take it for the model with MLG_PRECISION=fastest."),
        )
    ),
    install=string("The command that installs it."),
)


def schemas() -> Mapping[str, Schema]:
    """Build all schemas, by name."""
    outputs = {f"{name.title().replace('_', '')}Output": _output(name) for name in REGISTRY}
    outputs["PipelineOutput"] = {
        **map_of("integer", "Of a pipeline: how many requests of its steps have which status."),
        "examples": [{"done": 6, "skipped": 1}],
    }
    preds = {**_REQUEST["properties"]["preds"], "anyOf": [{"type": "null"}, *map(ref, outputs)]}
    request = {**_REQUEST, "properties": {**_REQUEST["properties"], "preds": preds}}
    return {
        **outputs,
        "Error": _ERROR,
        "Submitted": _SUBMITTED,
        "Request": request,
        "Detail": {
            **request,
            "required": [*request["required"], *_DETAIL["required"]],
            "properties": {**request["properties"], **_DETAIL["properties"]},
        },
        "Requests": success(requests=list_of(_without_success(request)), next=_NEXT),
        "Batch": _BATCH,
        "Batches": success(batches=list_of(_without_success(_BATCH)), next=_NEXT),
        "BatchSubmitted": _BATCH_SUBMITTED,
        "Collection": _COLLECTION,
        "Collections": success(collections=list_of(_without_success(_COLLECTION)), next=_NEXT),
        "CollectionAdded": _COLLECTION_ADDED,
        "Members": success(images=list_of(_MEMBER), next=_NEXT),
        "Matches": success(
            collection=string("The collection's name."),
            req_id=nullable(string("The request whose image was searched for; null for a vector.")),
            matches=list_of(_SCORED_MEMBER, "The most similar first."),
            recall=_COLLECTION["properties"]["recall"],
        ),
        "Groups": success(
            collection=string("The collection's name."),
            total=integer("How many groups there are."),
            groups=list_of(
                object_schema(
                    size=integer("How many images the group has."),
                    label=nullable(string("The most frequent label of the listed images.")),
                    images=list_of(_SCORED_MEMBER),
                ),
                "The largest first.",
            ),
        ),
        "Training": _TRAINING,
        "Trainings": success(trainings=list_of(_without_success(_TRAINING)), next=_NEXT),
        "TrainingSubmitted": _TRAINING_SUBMITTED,
        "Versions": success(versions=list_of(_without_success(_TRAINING))),
        "Redo": _REDO,
        "Usage": _USAGE,
        "Model": _CATALOGUE_MODEL,
        "Models": success(models=list_of(ref("Model"))),
        "Pipelines": success(
            pipelines=list_of(
                object_schema(
                    name=string("The name in paths."),
                    title=string("The name for people."),
                    inputs=map_of("string", "What a request takes: name -> image, row, text or file."),
                    steps=list_of(
                        object_schema(
                            name=string("Its name in answers."),
                            model=_MODEL,
                            service=string("The service that runs it."),
                            for_each=nullable(string("The list for whose items it runs; null if it runs once.")),
                            when=list_of({"type": "string"}, "The conditions; without them it always runs."),
                            collection=nullable(string("The collection that its image becomes a member of.")),
                        )
                    ),
                )
            )
        ),
        "Index": success(
            name=string("The name of the program."),
            routes=map_of("string", "Summaries."),
            **{"try": list_of({"type": "string"}, "Commands to copy.")},
        ),
        "Health": success(status={"const": "alive"}),
        "Readiness": success(
            "status store batchers",
            status={"const": "ready"},
            store={"const": "writable"},
            batchers=integer("Batchers that are alive."),
            warning=string("What an operator should do."),
        ),
        "Document": object_schema("openapi info paths", openapi=string("The version of OpenAPI.")),
    }


def _output(service_name: str) -> Schema:
    service = load_service(service_name)
    example = json.loads(json.dumps(service.example))  # its tuples as lists
    return {**service.output_schema, "description": service.help, "examples": [example]}


def _without_success(schema: Schema) -> Schema:
    """Return the schema without `success`, for entries of a list."""
    properties = {name: value for name, value in schema["properties"].items() if name != "success"}
    return {**schema, "required": [name for name in schema["required"] if name != "success"], "properties": properties}
