"""Compares recorded calls with the published API descriptions that `scripts/extract_api_schema` extracted.

Stricter than the descriptions: fields and parameters that they do not name are violations too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from jsonschema import Draft202012Validator, FormatChecker, ValidationError

from devnet.api.application import ApiCall

PUBLISHED_API: dict[str, Any] = json.loads(Path(__file__).with_name("published_api.json").read_text(encoding="utf-8"))
EXECUTE = "POST /activity-api/v1/activity/{activityId}/exec"
RESULTS = "GET /activity-api/v1/activity/{activityId}/exec/{batchId}"
#: RFC 3339: a date without a zone is none.
_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A difference between a call and its published description."""

    #: "METHOD /path" with the names of the parameters in the path.
    call: str
    #: Where in the call: request, query, path, status or answer, and the field, as in answer[].stderr.
    location: str
    #: A keyword of JSON Schema, or `unknown` for something that is not published.
    rule: str
    message: str

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what identifies the same violation in different calls."""
        return (self.call, self.location, self.rule)


def published_name(method: str, path: str) -> str | None:
    """Return the published name of a call; None if it is not published."""
    matching = [name for name in PUBLISHED_API["calls"] if _pattern(name).fullmatch(f"{method} {path}")]
    # /payments/status is not the payment with the id "status".
    return min(matching, key=lambda name: name.count("{"), default=None)


def find_violations(call: ApiCall) -> list[Violation]:
    """Return the violations in a call. The response of an aborted call is not checked."""
    name = published_name(call.method, call.path)
    if name is None:
        here = f"{call.method} {call.path}"
        return [Violation(call=here, location="path", rule="unknown", message="There is no such call.")]
    return [
        Violation(call=name, location=location, rule=rule, message=message)
        for location, rule, message in (*_query(name, call), *_request(name, call), *_answer(name, call))
    ]


_Violations = Iterator[tuple[str, str, str]]


def _query(name: str, call: ApiCall) -> _Violations:
    schema = PUBLISHED_API["calls"][name].get("query", {"properties": {}})
    parameters: dict[str, Any] = dict(parse_qsl(call.query, keep_blank_values=True, strict_parsing=bool(call.query)))
    parameters.pop("authToken", None)
    for key, value in parameters.items():
        parameters[key] = _parse_parameter(value, schema["properties"].get(key, {}).get("type"))
    yield from _check(parameters, {"type": "object", **schema}, "query")


def _request(name: str, call: ApiCall) -> _Violations:
    spec = PUBLISHED_API["calls"][name]
    if "body" not in spec:
        # The client sends an empty object if there is no body.
        if call.request not in ("", "{}"):
            yield "request", "unknown", f"No body is published, but there is one: {call.request}"
        return
    if not call.request:
        if not spec.get("body_is_optional"):
            yield "request", "required", "There is no body."
        return
    body = json.loads(call.request)
    yield from _check(body, spec["body"], "request", is_request=True)
    if name == EXECUTE and isinstance(body, dict) and isinstance(body.get("text"), str):
        script = {"type": "array", "items": {"$ref": "#/schemas/ExeScriptCommand"}}
        yield from _check(json.loads(body["text"]), script, "request.text", is_request=True)


def _answer(name: str, call: ApiCall) -> _Violations:
    spec, status = PUBLISHED_API["calls"][name], str(call.status)
    if call.status is None:
        return
    if call.status >= 400 and {status, "default"} & set(spec["errors"]):
        yield from _check(json.loads(call.answer), {"$ref": "#/schemas/ErrorMessage"}, "error")
    elif status not in spec["answers"]:
        yield f"status {status}", "unknown", f"It is answered with {', '.join([*spec['answers'], *spec['errors']])}."
    elif spec["answers"][status] is None:
        # HTTP itself ensures it for 204; an empty response with 200 is null.
        if call.answer not in ("", "null"):
            yield "answer", "unknown", f"No body is published, but there is one: {call.answer}"
    else:
        yield from _check(json.loads(call.answer), spec["answers"][status], "answer")


# Schemas


def _check(value: Any, schema: dict[str, Any], location: str, *, is_request: bool = False) -> _Violations:
    full_schema = {**_strict(schema, is_request), "schemas": _REQUEST_SCHEMAS if is_request else _RESPONSE_SCHEMAS}
    validator = Draft202012Validator(full_schema, format_checker=_FORMATS)
    for error in _relevant_errors(validator.iter_errors(value)):
        where = "".join("[]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        rule = "unknown" if error.validator == "additionalProperties" else str(error.validator)
        if rule == "unknown":
            for key in sorted(set(error.instance) - set(error.schema["properties"])):
                yield f"{location}{where}.{key}", rule, "It is not published."
        elif rule == "required":
            for key in sorted(set(error.schema["required"]) - set(error.instance)):
                yield f"{location}{where}.{key}", rule, "It is missing."
        else:
            yield f"{location}{where}", rule, error.message


def _relevant_errors(errors: Any) -> Iterator[ValidationError]:
    """Yield errors; for a value with variants those of the most similar variant."""
    for error in errors:
        if error.validator != "oneOf" or not error.context:
            yield error
            continue
        variants: dict[Any, list[ValidationError]] = {}
        for each in error.context:
            variants.setdefault(each.relative_schema_path[0], []).append(each)
        scores = {number: _mismatch_score(several) for number, several in variants.items()}
        best = min(scores, key=lambda number: scores[number])
        if scores[best][0]:
            yield error
        else:
            yield from _relevant_errors(variants[best])


def _mismatch_score(errors: list[ValidationError]) -> tuple[int, int, int]:
    """Count errors, most significant first: another type or event type; errors at the top level; all errors."""
    at_top = [error for error in errors if not error.relative_path]
    is_other = [
        error for error in errors if error.validator == "const" or (error in at_top and error.validator == "type")
    ]
    return len(is_other), len(at_top), len(errors)


def _strict(schema: Any, is_request: bool) -> Any:
    """Forbid fields that are not named.

    :param is_request: fields that only the daemon sets are neither checked nor required.
    """
    if isinstance(schema, list):
        return [_strict(each, is_request) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "properties" not in schema:
        return {key: _strict(each, is_request) for key, each in schema.items()}
    fields = {key: _strict(each, is_request) for key, each in schema["properties"].items()}
    required = list(schema.get("required", []))
    if is_request:
        fields = {key: {} if each.get("readOnly") else each for key, each in fields.items()}
        required = [key for key in required if fields.get(key) != {}]
    # Some fields are published as required without a description.
    fields = {**{key: {} for key in required}, **fields}
    return {"additionalProperties": False, **schema, "properties": fields, "required": required}


def _parse_parameter(text: str, kind: str | None) -> Any:
    """Convert a query parameter to its published type; leave it as it is if that fails."""
    if kind == "array":
        return text.split(",")
    try:
        return {"integer": int, "number": float}.get(str(kind), str)(text)
    except ValueError:
        return text


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(name)))


_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("date-time", ValueError)
def _is_date(value: object) -> bool:
    return not isinstance(value, str) or (_DATE.fullmatch(value) is not None and bool(datetime.fromisoformat(value)))


@_FORMATS.checks("decimal", InvalidOperation)
def _is_decimal(value: object) -> bool:
    return not isinstance(value, str) or Decimal(value).is_finite()


_REQUEST_SCHEMAS = {name: _strict(schema, True) for name, schema in PUBLISHED_API["schemas"].items()}
_RESPONSE_SCHEMAS = {name: _strict(schema, False) for name, schema in PUBLISHED_API["schemas"].items()}
