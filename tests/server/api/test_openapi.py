"""The API description: complete, valid, and matched by real responses and by requests generated from it."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from jsonschema import Draft202012Validator

from provider_image.models.catalogue import CATALOGUE
from provider_image.services import REGISTRY, load_service
from server.api.openapi import build_document, list_calls
from server.api.schemas import schemas
from server.app import create_app
from server.endpoint import PAGES, get_operation
from server.settings import ServerSettings
from store.store import Store

MODEL = "efficientnet_lite0"
URL = f"/requestPrediction/{MODEL}"


@pytest.fixture
def document(client: flask.testing.FlaskClient) -> dict[str, Any]:
    return build_document(client.application)


def closed(schema: Any) -> Any:
    """The same schema, in which objects that name their properties have no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {name: closed(value) for name, value in schema.items()}
    if "properties" in schema and "openapi" not in schema["properties"]:
        inside.setdefault("additionalProperties", False)
    return inside


def check(answer: Any, name: str) -> None:
    """Hold an answer against a schema of the document. :raises ValidationError:"""
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": closed(dict(schemas()))}}
    Draft202012Validator(root).validate(answer)


def references(inside: Any) -> Iterator[str]:
    if isinstance(inside, dict):
        if isinstance(inside.get("$ref"), str):
            yield inside["$ref"]
        for value in inside.values():
            yield from references(value)
    elif isinstance(inside, list):
        for value in inside:
            yield from references(value)


def test_every_view_has_an_operation(client: flask.testing.FlaskClient) -> None:
    app = client.application

    silent = [
        rule.rule for rule in app.url_map.iter_rules() if get_operation(app.view_functions[rule.endpoint]) is None
    ]

    assert silent == []


def test_every_path_for_programs_is_described(client: flask.testing.FlaskClient, document: dict[str, Any]) -> None:
    app = client.application
    expected = {
        re.sub(r"<(?:path:)?(\w+)>", r"{\1}", rule.rule)
        for rule in app.url_map.iter_rules()
        if getattr(get_operation(app.view_functions[rule.endpoint]), "tag", None) != PAGES
    }

    assert document["paths"].keys() == expected
    ids = [described["operationId"] for item in document["paths"].values() for described in item.values()]
    assert len(ids) == len(set(ids))


def test_the_document_is_valid_and_its_references_resolve(document: dict[str, Any]) -> None:
    from openapi_spec_validator import validate

    validate(document)

    for reference in set(references(document)):
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference
    for name, schema in schemas().items():
        Draft202012Validator.check_schema(schema)
        for example in schema.get("examples", []):
            check(example, name)


def test_the_document_is_served_as_it_is_built(client: flask.testing.FlaskClient, document: dict[str, Any]) -> None:
    response = client.get("/openapi.json")

    assert (response.status_code, response.mimetype) == (200, "application/json")
    assert response.json == json.loads(json.dumps(document))
    assert client.get("/openapi.json").data == response.data


def test_parameters_come_from_the_services_and_models_from_the_catalogue(document: dict[str, Any]) -> None:
    described = document["paths"]["/requestPrediction/{model}"]["post"]
    fields = {one["name"]: one for one in described["parameters"]}

    classifiers = {name for name, row in CATALOGUE.items() if row.base is None}
    assert set(fields["model"]["schema"]["examples"]) == {*classifiers, "efficientnet_lite0_embedding"}
    for name in REGISTRY:
        for param in load_service(name).params:
            schema = fields[param.name]["schema"]
            assert (schema.get("minimum"), schema.get("maximum")) == (param.minimum, param.maximum)
            assert schema["default"] == param.default
    assert {"200", "400", "404", "500", "503"} <= document["paths"]["/readPrediction/{id}"]["get"]["responses"].keys()


def test_examples_run_as_they_are(document: dict[str, Any]) -> None:
    for path, item in document["paths"].items():
        for method, described in item.items():
            curl, python = (sample["source"] for sample in described["x-codeSamples"])

            words = shlex.split(curl)
            assert words[0] == "curl"
            used_method = (
                words[words.index("-X") + 1] if "-X" in words else "POST" if {"-F", "-d"} & set(words) else "GET"
            )
            assert used_method == method.upper()
            assert re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), words[-1].removeprefix("http://127.0.0.1:5000"))
            ast.parse(python)


# Real answers


def form(data: bytes) -> dict[str, Any]:
    return {"image": (io.BytesIO(data), "kitten.jpg")}


def test_responses_about_a_request_match_the_schemas_for_every_status(
    client: flask.testing.FlaskClient,
    photos: dict[str, bytes],
    answer: Callable[..., list[str]],
    store: Store,
) -> None:
    from datetime import UTC, datetime, timedelta

    submitted = client.post(URL, data=form(photos["rocket"])).json
    address = submitted["status_url"]
    seen = {}

    def look() -> None:
        shown = client.get(address).json
        seen[shown["status"]] = shown

    look()
    client.delete(f"/requests/{submitted['req_id']}")
    look()
    client.post(f"/requests/{submitted['req_id']}/retry")
    now = datetime.now(UTC)
    store.requests.claim(
        models=[MODEL], limit=1, now=now, lease_ends_at=now + timedelta(seconds=-1), oldest_before=None
    )
    look()
    store.requests.release_expired(now)
    answer(fail_with="The image is damaged.")
    look()
    client.post(f"/requests/{submitted['req_id']}/retry")
    answer()
    look()

    check(submitted, "Submitted")
    assert seen.keys() == {"queued", "claimed", "done", "failed", "cancelled"}
    for shown in seen.values():
        check(shown, "Request")


def test_responses_about_the_server_match_the_schemas(client: flask.testing.FlaskClient) -> None:
    for address, name in (("/", "Index"), ("/models", "Models"), ("/healthz", "Health"), ("/readyz", "Readiness")):
        check(client.get(address).json, name)


def test_responses_about_batches_and_lists_match_the_schemas(
    client: flask.testing.FlaskClient, photos: dict[str, bytes], answer: Callable[..., list[str]]
) -> None:
    files = [(io.BytesIO(photos["rocket"]), "a.jpg"), (io.BytesIO(b"Dear kitten"), "letter.jpg")]
    sent = client.post(f"/requestPredictions/{MODEL}?label=shelf:7&deadline=60&name=box", data={"image": files}).json
    waiting = client.get(sent["status_url"]).json
    cancelled = client.post(f"{sent['status_url']}/cancel").json
    retried = client.post(f"{sent['status_url']}/retry").json
    id = sent["items"][0]["req_id"]
    client.post(f"/requests/{id}/retry")
    answer()

    check(sent, "BatchSubmitted")
    for shown in (waiting, cancelled, retried, client.get(sent["status_url"]).json):
        check(shown, "Batch")
    check(client.get("/batches").json, "Batches")
    check(client.get("/requests").json, "Requests")
    check(client.get(f"/requests/{id}").json, "Detail")
    for line in client.get(sent["results_url"]).text.splitlines():
        check(
            {"success": True, **{key: value for key, value in json.loads(line).items() if key != "cursor"}}, "Request"
        )


@pytest.mark.parametrize("address", ["/nowhere", "/readPrediction/unknown", "/readPrediction/unknown?wait=x"])
def test_errors_match_the_schema(client: flask.testing.FlaskClient, address: str) -> None:
    check(client.get(address).json, "Error")


# Requests that are made from the document

#: Streams that end when everything has, and what would go out to other hosts.
NOT_CALLED = re.compile(r"events|webhook", re.IGNORECASE)


@pytest.mark.timeout(300)
def test_requests_generated_from_the_document_get_the_documented_responses(
    settings: ServerSettings, store: Store, document: dict[str, Any], photos: dict[str, bytes]
) -> None:
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    client = create_app(replace(settings, max_hold_seconds=0.01), store).test_client()
    known = client.post(URL, data=form(photos["rocket"])).json["req_id"]
    described = json.loads(json.dumps(document))
    for path in [path for path in described["paths"] if NOT_CALLED.search(path)]:
        del described["paths"][path]
    for item in described["paths"].values():
        for call in item.values():
            for one in call["parameters"]:
                if one["in"] == "path":
                    choices = [MODEL] if one["name"] == "model" else [known, "unknown"]
                    one["schema"] = {"type": "string", "enum": choices}
    described["servers"] = [{"url": "http://127.0.0.1:5000"}]
    schema = schemathesis.openapi.from_dict(described)
    schema.app = client.application
    checks = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
    calls_made = 0
    for found in schema.get_all_operations():
        one = found.ok()

        def call(case: Any) -> None:
            nonlocal calls_made
            calls_made += 1
            response = case.call()
            case.validate_response(response, checks=checks)

        bounded = bounds(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        bounded(given(case=one.as_strategy())(call))()
    assert calls_made > 20


def test_the_page_shows_every_call(client: flask.testing.FlaskClient) -> None:
    response = client.get("/ui/api")

    html = response.text
    assert (response.status_code, response.mimetype) == (200, "text/html")
    for call in list_calls(client.application):
        assert f'data-method="{call.method}" data-path="{call.operation.template}"' in html
    assert "<script>" not in html and "style=" not in html and " onclick" not in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'for="([^"]+)"', html)) <= set(ids)
    assert "script-src 'self'" in response.headers["Content-Security-Policy"]
    for address in re.findall(r'(?:src|href)="(/static/[^"]+)"', html):
        assert client.get(address).status_code == 200, address


def test_the_script_of_the_page_sends_the_forms_fields() -> None:
    script = (Path(__file__).parents[3] / "server/pages/static/api.js").read_text()

    for word in ("path", "query", "json"):
        assert f'"{word}"' in script
    assert "innerHTML" not in script and "eval(" not in script
