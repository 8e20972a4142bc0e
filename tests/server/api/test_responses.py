"""JSON responses of the HTTP API, as they reach the server that sends them."""

from __future__ import annotations

from server.api.responses import error_response, json_response


def test_a_json_response_has_all_its_headers() -> None:
    response = json_response({"name": "Käse"}, 202, {"Location": "/readPrediction/1"})

    pieces, status, headers = response.get_wsgi_response({"REQUEST_METHOD": "POST"})

    body = b"".join(pieces)
    assert (body.decode(), status) == ('{"name":"Käse"}\n', "202 ACCEPTED")
    assert dict(headers) == {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Location": "/readPrediction/1",
    }


def test_the_response_to_head_has_no_body() -> None:
    pieces, _, headers = error_response("gone", "gone", 410).get_wsgi_response({"REQUEST_METHOD": "HEAD"})

    assert not b"".join(pieces)
    assert int(dict(headers)["Content-Length"]) == len('{"success":false,"reason":"gone","code":"gone"}\n')
