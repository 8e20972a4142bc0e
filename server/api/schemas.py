"""What the HTTP API's answers look like, as JSON Schema: one entry for each name that a view's operation may use.

Used by `openapi.py` only. The shapes themselves are made in `answers.py` and in the views; tests hold real answers
against these, closed, so that a field that is added there and not here is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provider_image.services import REGISTRY, load_service
from store.records import RequestState

Schema = dict[str, Any]
#: Shown of a request beside its states in the store: a cancelled one whose deadline was the reason.
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
    """Describe a number of things."""
    return {"type": "integer", "minimum": 0, "description": help, **more}


def boolean(help: str) -> Schema:
    """Describe a yes or no."""
    return {"type": "boolean", "description": help}


def nullable(schema: Schema) -> Schema:
    """Let a value be null too."""
    return {**schema, "type": [schema["type"], "null"]}


def object_schema(required: str, **properties: Schema) -> Schema:
    """Describe an object. :param required: the names that are always there, with spaces between."""
    return {"type": "object", "required": required.split(), "properties": properties}


def success(required: str, **properties: Schema) -> Schema:
    """Describe an answer that is no error."""
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
            name=string("The program."),
            routes={"type": "object", "additionalProperties": {"type": "string"}, "description": "What is where."},
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
            code=string("The same in one word, for programs; it stays when the sentence is improved."),
        ),
        "examples": [{"success": False, "reason": "There is no request with this id.", "code": "unknown_request"}],
    }


def _status(help: str) -> Schema:
    return {"type": "string", "enum": [*map(str, RequestState), _EXPIRED], "description": help}


def _submitted() -> Schema:
    return success(
        "req_id status status_url model cached",
        req_id=string("Reads the answer."),
        status=_status("`done` at once if an equal picture was answered before."),
        status_url=string("Where the answer will be, on this server."),
        model=string("The model's own name."),
        cached=boolean("Whether the answer is an earlier one."),
        batch_id=string("The batch it came in with."),
        client_id=string("The client's own id."),
    )


def _request(outputs: list[str]) -> Schema:
    return success(
        "req_id status preds model service name created_at attempts",
        req_id=string("Its id."),
        status=_status("Where it stands; done, failed, cancelled and expired are final."),
        preds={"anyOf": [{"type": "null"}, *map(ref, outputs)], "description": "The answer; null while there is none."},
        model=string("The model's own name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        name=nullable(string("The client's file name.")),
        created_at=timestamp("When it came in."),
        finished_at=timestamp("When it reached a final status."),
        attempts=integer("Failures of its own so far."),
        batch_id=string("The batch it came in with."),
        client_id=string("The client's own id, unique in its batch."),
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's own words about it.",
        },
        waiting_for=string("Why there is no answer yet, for people."),
        eta_seconds=nullable(number("Seconds until there likely is one; null when nobody knows.", minimum=0)),
        ahead=integer("Requests of the same model before it."),
        cached=boolean("Whether the answer is an earlier one."),
        provider=nullable(string("Who answered.")),
        seconds=nullable(number("Seconds the model spent on it.", minimum=0)),
        digest=nullable(string("Which artefact of the model answered.")),
        cost=nullable(string("Its share of what was paid, in GLM; null where nothing is paid.")),
        cost_is_final=boolean("Whether the bill was settled."),
        reason=string("Why it failed, or why the last attempt did, for people."),
        code=nullable(string("The same in one word, for programs.")),
    )


def _detail(outputs: list[str]) -> Schema:
    more = {
        "params": {"type": "object", "description": "What the client chose."},
        "image_sha256": string("Hash of the picture's bytes."),
        "image_bytes": integer("The picture's size."),
        "picture_url": nullable(string("Where the picture is; null once it was deleted.")),
        "timeline": {
            "type": "array",
            "items": {
                **object_schema("event at", event=string("What happened."), at=nullable(timestamp("When."))),
                "additionalProperties": True,
            },
            "description": "What happened to it, in order.",
        },
        "deadline_at": timestamp("If it is still queued then, it expires."),
        "keep_seconds": number("Seconds after its end that it is wanted.", minimum=0),
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
        client_id=string("The client's own id, else the file's name."),
        position=integer("Its place in what was sent, from 0."),
        code=nullable(string("Why it was not taken, for programs.")),
        reason=nullable(string("Why it was not taken, for people.")),
        **more,
    )


def _batch_submitted() -> Schema:
    status = {
        "type": "string",
        "enum": [*map(str, RequestState), _EXPIRED, "refused"],
        "description": "Where it stands.",
    }
    return success(
        "batch_id status_url results_url model accepted refused items",
        batch_id=string("Reads the batch."),
        status_url=string("Where its progress is."),
        results_url=string("Where its answers are, as they come."),
        model=string("The model's own name."),
        accepted=integer("Pictures that are safe."),
        refused=integer("Pictures that were not taken."),
        items=_list(_refusal(req_id=nullable(string("Reads the answer; null if it was refused.")), status=status)),
    )


def _batch() -> Schema:
    states = ("queued", "claimed", "done", "failed", "cancelled", "expired", "refused", "deleted")
    return success(
        "batch_id status name model service labels created_at total counts progress cost cost_is_final results_url",
        batch_id=string("Its id."),
        status={"type": "string", "enum": ["queued", "running", "ended"], "description": "How far it is."},
        name=nullable(string("What the client calls it.")),
        model=string("The model's own name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's own words about it.",
        },
        created_at=timestamp("When it came in."),
        deadline_at=timestamp("What is still queued then expires."),
        cancelled_at=timestamp("When it was cancelled."),
        keep_seconds=number("Seconds after its end that each request is wanted.", minimum=0),
        total=integer("Pictures that were taken."),
        counts=object_schema(" ".join(states), **{state: integer("How many.") for state in states}),
        progress=number("The share that has ended.", minimum=0, maximum=1),
        cost=nullable(string("What was paid for it, in GLM; null where nothing is.")),
        cost_is_final=boolean("Whether all bills were settled."),
        results_url=string("Where its answers are, as they come."),
        eta_seconds=nullable(number("Seconds until its end, likely; null when nobody knows.", minimum=0)),
        waiting_for=string("Why it has not ended, for people."),
        failures={
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "Of the failed: code, and how many.",
        },
        refused=_list(_refusal()),
        changed=integer("Requests that were cancelled or queued again."),
    )


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _without_success(schema: Schema) -> Schema:
    """The same inside of a list, where nothing says once more that it is no error."""
    properties = {name: value for name, value in schema["properties"].items() if name != "success"}
    return {**schema, "required": [name for name in schema["required"] if name != "success"], "properties": properties}


#: The mark of the next page of a list.
_NEXT = nullable(string("The `cursor` of the next page; null on the last."))


def _model() -> Schema:
    return object_schema(
        "name title service source height width installed builds_on_first_use digest size_bytes storage "
        "images_per_second install",
        name=string("The name in addresses; upper and lower case and other separators do as well."),
        title=string("The name for people."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it does."},
        source=string("Where its weights come from."),
        height=integer("Pixels."),
        width=integer("Pixels."),
        installed=boolean("Whether it answers here."),
        builds_on_first_use=boolean("Whether the first picture installs it."),
        digest=nullable(string("Which artefact is installed.")),
        size_bytes=nullable(integer("What it takes on the disk.")),
        storage=nullable(string("How its weights are kept.")),
        images_per_second=nullable(number("What a check measured on this machine.")),
        install=string("The command that installs it."),
    )
