"""The JSON Schemas of the HTTP API's responses: one entry for each name that a view's operation may use.

Used by `openapi.py` only. The JSON itself is built in `server/serializers.py` and in the views; tests check real
responses against these schemas, closed, so that a field that is added there and not here is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provider_image.services import REGISTRY, load_service
from store.states import RequestState

Schema = dict[str, Any]
#: A status beside the states in the store: cancelled because of the deadline.
_EXPIRED = "expired"


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


def object_schema(required: str, **properties: Schema) -> Schema:
    """Describe an object. :param required: the names of the required properties, separated by spaces."""
    return {"type": "object", "required": required.split(), "properties": properties}


def success(required: str, **properties: Schema) -> Schema:
    """Describe a response that is not an error."""
    return object_schema(f"success {required}", success={"const": True}, **properties)


def ref(name: str) -> Schema:
    """Refer to a schema of this file."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas() -> Mapping[str, Schema]:
    """Build all schemas, by name."""
    outputs = {f"{load_service(name).title}Output": _output(name) for name in REGISTRY}
    return {
        **outputs,
        "Error": _error(),
        "Submitted": _submitted(),
        "Request": _request(list(outputs)),
        "Detail": _detail(list(outputs)),
        "Requests": success("requests next", requests=_list(_without_success(_request(list(outputs)))), next=_NEXT),
        "Batch": _batch(),
        "Batches": success("batches next", batches=_list(_without_success(_batch())), next=_NEXT),
        "BatchSubmitted": _batch_submitted(),
        "Model": _model(),
        "Models": success("models", models={"type": "array", "items": ref("Model")}),
        "Index": success(
            "name routes try",
            name=string("The name of the program."),
            routes={
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "Summaries.",
            },
            **{"try": {"type": "array", "items": {"type": "string"}, "description": "Commands to copy."}},
        ),
        "Health": success("status", status={"const": "alive"}),
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
    example = [list(row) if isinstance(row, tuple) else row for row in service.example]
    return {**service.output_schema, "description": service.help, "examples": [example]}


def _error() -> Schema:
    return {
        **object_schema(
            "success reason code",
            success={"const": False},
            reason=string("What happened and what to do, for people."),
            code=string("The same in one word, for programs; it is stable, the reason is not."),
        ),
        "examples": [{"success": False, "reason": "There is no request with this id.", "code": "unknown_request"}],
    }


def _status(help: str) -> Schema:
    return {"type": "string", "enum": [*map(str, RequestState), _EXPIRED], "description": help}


def _submitted() -> Schema:
    return success(
        "req_id status status_url model cached",
        req_id=string("Reads the answer."),
        status=_status("`done` at once if an equal image was answered before."),
        status_url=string("Path of the answer."),
        model=string("The model's canonical name."),
        cached=boolean("Whether the answer is reused from an equal image."),
        batch_id=string("Its batch."),
        client_id=string("The client's id for it."),
    )


def _request(outputs: list[str]) -> Schema:
    return success(
        "req_id status preds model service name created_at attempts",
        req_id=string("Its id."),
        status=_status("Its state; done, failed, cancelled and expired are final."),
        files={
            "type": "object",
            "additionalProperties": object_schema(
                "url media_type bytes",
                url=string("Path of the file."),
                media_type=string("Its media type."),
                bytes=integer("Its size."),
            ),
            "description": "The files of the answer, by name, if it has any.",
        },
        preds={"anyOf": [{"type": "null"}, *map(ref, outputs)], "description": "The answer; null while there is none."},
        model=string("The model's canonical name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        name=nullable(string("The client's file name.")),
        created_at=timestamp("When it was created."),
        finished_at=timestamp("When it reached a final status."),
        attempts=integer("Failed attempts that were its own fault."),
        batch_id=string("Its batch."),
        client_id=string("The client's id for it, unique in its batch."),
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's labels.",
        },
        waiting_for=string("Why there is no answer yet, for people."),
        eta_seconds=nullable(number("Estimated seconds until the answer; null when unknown.", minimum=0)),
        ahead=integer("Requests of the same model before it."),
        cached=boolean("Whether the answer is reused from an equal image."),
        provider=nullable(string("The provider that computed it.")),
        seconds=nullable(number("Seconds the model spent on it.", minimum=0)),
        digest=nullable(string("Digest of the artefact that computed it.")),
        cost=nullable(string("Its share of the cost, in GLM; null where nothing is paid.")),
        cost_is_final=boolean("Whether the invoice was settled."),
        reason=string("Why it failed, or why the last attempt did, for people."),
        code=nullable(string("The same in one word, for programs.")),
    )


def _detail(outputs: list[str]) -> Schema:
    more = {
        "params": {"type": "object", "description": "What the client chose."},
        "image_sha256": string("Hash of the image's bytes."),
        "image_bytes": integer("The image's size."),
        "picture_url": nullable(string("Path of the image; null after it was deleted.")),
        "timeline": {
            "type": "array",
            "items": {
                **object_schema("event at", event=string("What happened."), at=nullable(timestamp("When."))),
                "additionalProperties": True,
            },
            "description": "What happened to it, in order.",
        },
        "deadline_at": timestamp("If it is still queued then, it expires."),
        "keep_seconds": number("Seconds that it is kept after its end.", minimum=0),
    }
    whole_request = _request(outputs)
    return {
        **whole_request,
        "required": [*whole_request["required"], "params", "image_sha256", "image_bytes", "picture_url", "timeline"],
        "properties": {**whole_request["properties"], **more},
    }


def _refusal(**more: Schema) -> Schema:
    return object_schema(
        " ".join(["client_id position code reason", *more]),
        client_id=string("The client's id, else the file's name."),
        position=integer("Its position in the batch, from 0."),
        code=nullable(string("Why it was refused, for programs.")),
        reason=nullable(string("Why it was refused, for people.")),
        **more,
    )


def _batch_submitted() -> Schema:
    status = {
        "type": "string",
        "enum": [*map(str, RequestState), _EXPIRED, "refused"],
        "description": "Its state.",
    }
    return success(
        "batch_id status_url results_url model accepted refused items",
        batch_id=string("Reads the batch."),
        status_url=string("Path of its progress."),
        results_url=string("Path of its results."),
        model=string("The model's canonical name."),
        accepted=integer("Images that were accepted."),
        refused=integer("Images that were refused."),
        items=_list(_refusal(req_id=nullable(string("Reads the answer; null if it was refused.")), status=status)),
    )


def _batch() -> Schema:
    states = ("queued", "claimed", "done", "failed", "cancelled", "expired", "refused", "deleted")
    return success(
        "batch_id status name model service labels created_at total counts progress cost cost_is_final results_url",
        batch_id=string("Its id."),
        status={"type": "string", "enum": ["queued", "running", "ended"], "description": "Its state."},
        name=nullable(string("The client's name for it.")),
        model=string("The model's canonical name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's labels.",
        },
        created_at=timestamp("When it was created."),
        deadline_at=timestamp("Requests that are still queued then expire."),
        cancelled_at=timestamp("When it was cancelled."),
        keep_seconds=number("Seconds that each request is kept after its end.", minimum=0),
        total=integer("Images that were accepted."),
        counts=object_schema(" ".join(states), **{state: integer("How many.") for state in states}),
        progress=number("The share of requests that have ended.", minimum=0, maximum=1),
        cost=nullable(string("Its cost, in GLM; null where nothing is paid.")),
        cost_is_final=boolean("Whether all invoices were settled."),
        results_url=string("Path of its results."),
        eta_seconds=nullable(number("Estimated seconds until its end; null when unknown.", minimum=0)),
        waiting_for=string("Why it has not ended, for people."),
        failures={
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "Code of the failed requests, and how many have it.",
        },
        refused=_list(_refusal()),
        changed=integer("Requests that were cancelled or queued again."),
    )


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _without_success(schema: Schema) -> Schema:
    """Return the schema without `success`, for entries of a list."""
    properties = {name: value for name, value in schema["properties"].items() if name != "success"}
    return {**schema, "required": [name for name in schema["required"] if name != "success"], "properties": properties}


#: The cursor of the next page of a list.
_NEXT = nullable(string("The `cursor` of the next page; null on the last."))


def _model() -> Schema:
    return object_schema(
        "name title service source height width installed builds_on_first_use digest size_bytes storage "
        "images_per_second install",
        name=string("The name in paths; case and separators do not matter."),
        title=string("The name for people."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it does."},
        source=string("The source of its weights."),
        height=integer("Pixels of the input."),
        width=integer("Pixels of the input."),
        installed=boolean("Whether it is installed."),
        builds_on_first_use=boolean("Whether the first request installs it."),
        digest=nullable(string("Digest of the installed artefact.")),
        size_bytes=nullable(integer("Its size on disk.")),
        storage=nullable(string("How its weights are stored.")),
        images_per_second=nullable(number("Measured by a check on this machine.")),
        install=string("The command that installs it."),
    )
