"""What the HTTP API's answers look like, as JSON Schema: one entry for each name that a view's operation may use.

Used by `openapi.py` only. The shapes themselves are made in `answers.py` and in the views; tests hold real answers
against these, closed, so that a field that is added there and not here is found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provider_image.services import REGISTRY, load_service
from store.records import State

Schema = dict[str, Any]
#: Shown of a request beside its states in the store: a cancelled one whose deadline was the reason.
_EXPIRED = "expired"


def text(help: str, **more: Any) -> Schema:
    """Describe a string."""
    return {"type": "string", "description": help, **more}


def moment(help: str) -> Schema:
    """Describe a time."""
    return text(help, format="date-time", examples=["2026-11-21T10:15:00.000Z"])


def number(help: str, **more: Any) -> Schema:
    """Describe a number."""
    return {"type": "number", "description": help, **more}


def whole(help: str, **more: Any) -> Schema:
    """Describe a number of things."""
    return {"type": "integer", "minimum": 0, "description": help, **more}


def yes(help: str) -> Schema:
    """Describe a yes or no."""
    return {"type": "boolean", "description": help}


def maybe(schema: Schema) -> Schema:
    """Let a value be null too."""
    return {**schema, "type": [schema["type"], "null"]}


def shape(required: str, **properties: Schema) -> Schema:
    """Describe an object. :param required: the names that are always there, with spaces between."""
    return {"type": "object", "required": required.split(), "properties": properties}


def success(required: str, **properties: Schema) -> Schema:
    """Describe an answer that is no error."""
    return shape(f"success {required}", success={"const": True}, **properties)


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
        "Requests": success("requests next", requests=_list(_bare(_request(list(outputs)))), next=_NEXT),
        "Batch": _batch(),
        "Batches": success("batches next", batches=_list(_bare(_batch())), next=_NEXT),
        "BatchSubmitted": _batch_submitted(),
        "Model": _model(),
        "Models": success("models", models={"type": "array", "items": ref("Model")}),
        "Index": success(
            "name routes try",
            name=text("The program."),
            routes={"type": "object", "additionalProperties": {"type": "string"}, "description": "What is where."},
            **{"try": {"type": "array", "items": {"type": "string"}, "description": "Commands to copy."}},
        ),
        "Health": success("status", status={"const": "alive"}),
        "Readiness": success(
            "status store batchers",
            status={"const": "ready"},
            store={"const": "writable"},
            batchers=whole("Batchers that are alive."),
            warning=text("What an operator should do."),
        ),
        "Document": shape("openapi info paths", openapi=text("The version of OpenAPI.")),
    }


def _output(service_name: str) -> Schema:
    service = load_service(service_name)
    example = [list(row) if isinstance(row, tuple) else row for row in service.example]
    return {**service.output_schema, "description": service.help, "examples": [example]}


def _error() -> Schema:
    return {
        **shape(
            "success reason code",
            success={"const": False},
            reason=text("What happened and what to do, for people."),
            code=text("The same in one word, for programs; it stays when the sentence is improved."),
        ),
        "examples": [{"success": False, "reason": "There is no request with this id.", "code": "unknown_request"}],
    }


def _status(help: str) -> Schema:
    return {"type": "string", "enum": [*map(str, State), _EXPIRED], "description": help}


def _submitted() -> Schema:
    return success(
        "req_id status status_url model cached",
        req_id=text("Reads the answer."),
        status=_status("`done` at once if an equal picture was answered before."),
        status_url=text("Where the answer will be, on this server."),
        model=text("The model's own name."),
        cached=yes("Whether the answer is an earlier one."),
        batch_id=text("The batch it came in with."),
        client_id=text("The client's own id."),
    )


def _request(outputs: list[str]) -> Schema:
    return success(
        "req_id status preds model service name created_at attempts",
        req_id=text("Its id."),
        status=_status("Where it stands; done, failed, cancelled and expired are final."),
        preds={"anyOf": [{"type": "null"}, *map(ref, outputs)], "description": "The answer; null while there is none."},
        model=text("The model's own name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        name=maybe(text("The client's file name.")),
        created_at=moment("When it came in."),
        finished_at=moment("When it reached a final status."),
        attempts=whole("Failures of its own so far."),
        batch_id=text("The batch it came in with."),
        client_id=text("The client's own id, unique in its batch."),
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's own words about it.",
        },
        waiting_for=text("Why there is no answer yet, for people."),
        eta_seconds=maybe(number("Seconds until there likely is one; null when nobody knows.", minimum=0)),
        ahead=whole("Requests of the same model before it."),
        cached=yes("Whether the answer is an earlier one."),
        provider=maybe(text("Who answered.")),
        seconds=maybe(number("Seconds the model spent on it.", minimum=0)),
        digest=maybe(text("Which artefact of the model answered.")),
        cost=maybe(text("Its share of what was paid, in GLM; null where nothing is paid.")),
        cost_is_final=yes("Whether the bill was settled."),
        reason=text("Why it failed, or why the last attempt did, for people."),
        code=maybe(text("The same in one word, for programs.")),
    )


def _detail(outputs: list[str]) -> Schema:
    more = {
        "params": {"type": "object", "description": "What the client chose."},
        "image_sha256": text("Hash of the picture's bytes."),
        "image_bytes": whole("The picture's size."),
        "picture_url": maybe(text("Where the picture is; null once it was deleted.")),
        "timeline": {
            "type": "array",
            "items": {
                **shape("event at", event=text("What happened."), at=maybe(moment("When."))),
                "additionalProperties": True,
            },
            "description": "What happened to it, in order.",
        },
        "deadline_at": moment("If it is still queued then, it expires."),
        "keep_seconds": number("Seconds after its end that it is wanted.", minimum=0),
    }
    whole_request = _request(outputs)
    return {
        **whole_request,
        "required": [*whole_request["required"], "params", "image_sha256", "image_bytes", "picture_url", "timeline"],
        "properties": {**whole_request["properties"], **more},
    }


def _refusal(**more: Schema) -> Schema:
    return shape(
        " ".join(["client_id position code reason", *more]),
        client_id=text("The client's own id, else the file's name."),
        position=whole("Its place in what was sent, from 0."),
        code=maybe(text("Why it was not taken, for programs.")),
        reason=maybe(text("Why it was not taken, for people.")),
        **more,
    )


def _batch_submitted() -> Schema:
    status = {"type": "string", "enum": [*map(str, State), _EXPIRED, "refused"], "description": "Where it stands."}
    return success(
        "batch_id status_url results_url model accepted refused items",
        batch_id=text("Reads the batch."),
        status_url=text("Where its progress is."),
        results_url=text("Where its answers are, as they come."),
        model=text("The model's own name."),
        accepted=whole("Pictures that are safe."),
        refused=whole("Pictures that were not taken."),
        items=_list(_refusal(req_id=maybe(text("Reads the answer; null if it was refused.")), status=status)),
    )


def _batch() -> Schema:
    states = ("queued", "claimed", "done", "failed", "cancelled", "expired", "refused", "deleted")
    return success(
        "batch_id status name model service labels created_at total counts progress cost cost_is_final results_url",
        batch_id=text("Its id."),
        status={"type": "string", "enum": ["queued", "running", "ended"], "description": "How far it is."},
        name=maybe(text("What the client calls it.")),
        model=text("The model's own name."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it is."},
        labels={
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The client's own words about it.",
        },
        created_at=moment("When it came in."),
        deadline_at=moment("What is still queued then expires."),
        cancelled_at=moment("When it was cancelled."),
        keep_seconds=number("Seconds after its end that each request is wanted.", minimum=0),
        total=whole("Pictures that were taken."),
        counts=shape(" ".join(states), **{state: whole("How many.") for state in states}),
        progress=number("The share that has ended.", minimum=0, maximum=1),
        cost=maybe(text("What was paid for it, in GLM; null where nothing is.")),
        cost_is_final=yes("Whether all bills were settled."),
        results_url=text("Where its answers are, as they come."),
        eta_seconds=maybe(number("Seconds until its end, likely; null when nobody knows.", minimum=0)),
        waiting_for=text("Why it has not ended, for people."),
        failures={
            "type": "object",
            "additionalProperties": {"type": "integer"},
            "description": "Of the failed: code, and how many.",
        },
        refused=_list(_refusal()),
        changed=whole("Requests that were cancelled or queued again."),
    )


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _bare(schema: Schema) -> Schema:
    """The same inside of a list, where nothing says once more that it is no error."""
    properties = {name: value for name, value in schema["properties"].items() if name != "success"}
    return {**schema, "required": [name for name in schema["required"] if name != "success"], "properties": properties}


#: The mark of the next page of a list.
_NEXT = maybe(text("The `cursor` of the next page; null on the last."))


def _model() -> Schema:
    return shape(
        "name title service source height width installed builds_on_first_use digest size_bytes storage "
        "images_per_second install",
        name=text("The name in addresses; upper and lower case and other separators do as well."),
        title=text("The name for people."),
        service={"type": "string", "enum": list(REGISTRY), "description": "What kind of work it does."},
        source=text("Where its weights come from."),
        height=whole("Pixels."),
        width=whole("Pixels."),
        installed=yes("Whether it answers here."),
        builds_on_first_use=yes("Whether the first picture installs it."),
        digest=maybe(text("Which artefact is installed.")),
        size_bytes=maybe(whole("What it takes on the disk.")),
        storage=maybe(text("How its weights are kept.")),
        images_per_second=maybe(number("What a check measured on this machine.")),
        install=text("The command that installs it."),
    )
