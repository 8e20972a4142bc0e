"""The pages as HTML: their content, their headers, and that they work without JavaScript."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser

import flask.testing
import pytest

from provider_image.compiler import can_build_now
from provider_image.models.catalogue import CATALOGUE
from provider_image.service import IMAGE_ANSWER
from provider_image.services import load_service
from server.pages import render
from server.settings import ServerSettings
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.states import RequestState
from store.store import Store

MODEL = "efficientnet_lite0"
BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
MALICIOUS_NAME = '"><script>alert(1)</script><img src=x onerror=alert(2)>.png'


def png(shade: int = 0) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade % 256, shade // 256, 90)).save(file, "PNG")
    return file.getvalue()


def post_image(client: flask.testing.FlaskClient, name: str = "cat.png", shade: int = 0) -> str:
    body = {"image": (io.BytesIO(png(shade)), name)}
    response = client.post(f"/requestPrediction/{MODEL}", data=body)
    assert response.status_code == 202, response.text
    id: str = response.get_json()["req_id"]
    return id


def get_page(client: flask.testing.FlaskClient, address: str, status: int = 200) -> str:
    response = client.get(address, headers=BROWSER)
    assert response.status_code == status, response.text
    assert response.mimetype == "text/html"
    return response.text


class TagCollector(HTMLParser):
    """All tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag == name]


def page_urls(client: flask.testing.FlaskClient) -> list[str]:
    id = post_image(client)
    return ["/", "/ui/requests", f"/ui/requests/{id}", "/ui/collections", "/ui/login", "/ui/nonsense"]


def test_a_browser_gets_a_page_where_programs_get_json(client: flask.testing.FlaskClient) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html;q=0.5", ""):
        response = client.get("/", headers={"Accept": accept})

        assert response.get_json()["name"] == "mlg", accept
        assert "Accept" in response.headers["Vary"]

    response = client.get("/", headers=BROWSER)

    assert response.mimetype == "text/html"
    assert "Accept" in response.headers["Vary"]


def test_every_page_has_strict_security_headers(client: flask.testing.FlaskClient) -> None:
    for address in page_urls(client):
        response = client.get(address, headers=BROWSER)

        policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "img-src": "'self' blob: data:",
            "connect-src": "'self'",
            "form-action": "'self'",
            "base-uri": "'none'",
            "frame-ancestors": "'none'",
        }, address
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Referrer-Policy"] == "same-origin"
        assert response.headers["Cache-Control"] == "no-store"


def test_no_page_has_inline_scripts_or_styles_or_uses_another_host(client: flask.testing.FlaskClient) -> None:
    for address in page_urls(client):
        tags = TagCollector(client.get(address, headers=BROWSER).text)

        assert not tags.all("style")
        for tag, attributes in tags.found:
            assert "style" not in attributes, (address, tag)
            assert not [name for name in attributes if name.startswith("on")], (address, tag)
            for name in ("src", "href", "action"):
                assert re.match(r"/(?!/)|#", attributes.get(name) or "/"), (address, tag, attributes)
        assert all(script.get("src") for script in tags.all("script"))


def test_static_files_have_urls_with_a_hash_and_are_cached_forever(client: flask.testing.FlaskClient) -> None:
    tags = TagCollector(get_page(client, "/"))
    files = [link["href"] for link in tags.all("link")] + [script["src"] for script in tags.all("script")]

    assert len(files) >= 4
    for file in files:
        response = client.get(file or "")
        assert response.status_code == 200
        assert "immutable" in response.headers["Cache-Control"]
        assert response.mimetype in ("text/css", "text/javascript", "image/svg+xml")
        assert client.get(re.sub(r"/static/\w+/", "/static/0123456789ab/", file or "")).status_code == 404
    assert client.get("/static/0123456789ab/../../render.py").status_code == 404
    assert client.get(f"/static/{render.static_url('mlg.css').split('/')[2]}/nothing.css").status_code == 404


def test_imports_between_scripts_resolve(client: flask.testing.FlaskClient) -> None:
    tags = TagCollector(get_page(client, "/"))
    for script in tags.all("script"):
        source = client.get(script["src"] or "").text
        for name in re.findall(r'from "\./([\w.]+)"', source):
            folder = (script["src"] or "").rpartition("/")[0]
            assert client.get(f"{folder}/{name}").status_code == 200


def test_home_with_its_files_is_under_100_kb(client: flask.testing.FlaskClient) -> None:
    page = get_page(client, "/")
    tags = TagCollector(page)
    files = {link["href"] for link in tags.all("link")} | {script["src"] for script in tags.all("script")}

    assert len(page.encode()) + sum(len(client.get(file or "").data) for file in files) < 100_000


def test_home_lists_installed_models_first_and_how_to_install_the_others(
    client: flask.testing.FlaskClient,
) -> None:
    page = get_page(client, "/")
    models = [tag for tag in TagCollector(page).all("input") if tag.get("name") == "model"]

    ready = [model["value"] for model in models if "disabled" not in model]
    assert [model["value"] for model in models[: len(ready)]] == ready
    # objects is a pipeline
    assert (ready[0], ready[-2:]) == (MODEL, ["objects", f"{MODEL}_embedding"])
    assert "quality" in ready and all(can_build_now(CATALOGUE[name or ""]) for name in ready if name != "objects")
    assert [model["value"] for model in models if "checked" in model] == [MODEL]
    assert "any size" in page
    # The gallery has those that answer with an image, and faces have a page of their own.
    shown = [row for row in CATALOGUE.values() if IMAGE_ANSWER not in load_service(row.service).outputs]
    assert len(models) == 2 + sum(row.base is None and not row.takes_faces for row in shown)
    assert "mlg models compile densenet121" in page and "<summary>1 embedding</summary>" in page
    assert page.count("mlg models compile densenet121_embedding") == 1
    assert "224 × 224" in page
    assert f"curl -F image=@kitten.jpg http://localhost/requestPrediction/{MODEL}" in page


def test_malicious_file_names_and_labels_are_escaped(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post_image(client, name=MALICIOUS_NAME)
    answer(output=[["n1", f"<script>{MALICIOUS_NAME}", 0.9], ["n2", "b", 0.1]])

    for address in ("/ui/requests", f"/ui/requests/{id}"):
        page = get_page(client, address)

        assert "<script>alert" not in page
        assert "<img src=x" not in page
        assert html.escape(MALICIOUS_NAME.rpartition("/")[2], quote=False).replace('"', "&#34;")[:20] in page


def test_a_malicious_search_is_escaped(client: flask.testing.FlaskClient) -> None:
    page = client.get("/ui/requests", query_string={"q": MALICIOUS_NAME, "model": MALICIOUS_NAME}, headers=BROWSER).text

    assert "<script>alert" not in page
    assert "&lt;script&gt;" in page


def test_requests_are_filtered_by_state_model_and_name(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    done = post_image(client, "tabby_50%.png", 1)
    answer()
    waiting = post_image(client, "rocket.png", 2)

    def shown(**fields: str) -> set[str]:
        page = client.get("/ui/requests", query_string=fields, headers=BROWSER).text
        return set(re.findall(r'href="/ui/requests/(\w{32})"', page))

    assert shown() == {done, waiting}
    assert shown(state="done") == {done}
    assert shown(state="queued") == {waiting}
    assert shown(model=MODEL) == {done, waiting}
    assert shown(model="vgg16") == set()
    assert shown(q="TABBY") == {done}
    assert shown(q="50%") == {done}
    assert shown(q="%") == {done}
    assert shown(q="rocket", state="done") == set()


def test_an_invalid_filter_is_explained_on_a_page(client: flask.testing.FlaskClient) -> None:
    assert "state must be one of" in get_page(client, "/ui/requests?state=lost", 400)
    assert "before takes a value from" in get_page(client, "/ui/requests?before=-1", 400)


def test_links_to_older_requests_show_each_request_once(client: flask.testing.FlaskClient) -> None:
    sent = {post_image(client, f"{number}.png", number) for number in range(30)}
    found: list[str] = []
    address: str | None = "/ui/requests?state=queued"

    while address:
        page = get_page(client, address)
        found += re.findall(r'href="/ui/requests/(\w{32})"', page)
        older = [tag for tag in TagCollector(page).all("a") if tag.get("rel") == "next"]
        address = older[0]["href"] if older else None

    assert len(found) == 30
    assert set(found) == sent


def test_a_request_shows_its_result_as_a_list_with_percentages(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post_image(client)
    answer()

    page = get_page(client, f"/ui/requests/{id}")

    assert page.count('<span class="percent">') == 5
    assert "label 0" in page
    assert "9.5 %" in page  # 20 / 210 of the stored output
    for text in ("Received", "Queued", "Dispatched", "Answered", "to local", "nothing"):
        assert text in page
    assert "&#34;preds&#34;" in page


def test_a_waiting_request_shows_the_reason_and_is_cancelled_by_a_plain_form(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    id = post_image(client)
    page = get_page(client, f"/ui/requests/{id}")
    forms = [form["action"] for form in TagCollector(page).all("form") if id in (form.get("action") or "")]

    response = client.post(forms[0] or "", headers=BROWSER)

    assert "no batcher is running" in page
    assert forms == [f"/ui/requests/{id}/cancel"]
    assert response.status_code == 303
    assert response.headers["Location"] == f"/ui/requests/{id}"
    assert store.requests.get(id).state is RequestState.CANCELLED
    page = get_page(client, f"/ui/requests/{id}")
    assert "Try again" in page
    assert client.post(f"/ui/requests/{id}/retry", headers=BROWSER).status_code == 303
    assert store.requests.get(id).state is RequestState.QUEUED


def test_cancelling_too_late_shows_the_error_on_the_page(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post_image(client)
    answer()

    response = client.post(f"/ui/requests/{id}/cancel", headers=BROWSER)

    assert response.status_code == 409
    assert 'role="alert"' in response.text
    assert "label 0" in response.text


def test_a_failed_request_shows_the_reason(client: flask.testing.FlaskClient, answer: Callable[..., list[str]]) -> None:
    id = post_image(client)
    answer(fail_with="The file is damaged: <b>half</b> is missing.")

    for address in ("/ui/requests", f"/ui/requests/{id}"):
        assert "The file is damaged: &lt;b&gt;half&lt;/b&gt; is missing." in get_page(client, address)


def test_an_error_under_ui_is_a_page_for_browsers_and_json_for_programs(client: flask.testing.FlaskClient) -> None:
    assert "<h1>Not found</h1>" in get_page(client, f"/ui/requests/{'0' * 32}", 404)
    assert "<h1>Not found</h1>" in get_page(client, "/ui/nothing", 404)
    assert client.get("/ui/nothing").get_json()["code"] == "not_found"
    assert client.get("/nothing", headers=BROWSER).get_json()["code"] == "not_found"


@pytest.mark.parametrize(
    "next", ["//evil.example", "https://evil.example", "/\\evil.example", "/ui//evil.example", "/a"]
)
def test_the_login_form_accepts_only_pages_of_this_server_as_next(client: flask.testing.FlaskClient, next: str) -> None:
    page = client.get("/ui/login", query_string={"next": next}, headers=BROWSER).text

    (field,) = [tag for tag in TagCollector(page).all("input") if tag.get("name") == "next"]
    assert field["value"] == "/"


def test_home_warns_when_no_batcher_is_running(settings: ServerSettings, client: flask.testing.FlaskClient) -> None:
    page = get_page(client, "/")

    assert "No model is installed" not in page
    assert "No batcher is running" in page


def post_batch(client: flask.testing.FlaskClient, *names: str) -> str:
    """Send a batch of images with these names and one text file. :return: its id."""
    files = [(io.BytesIO(png(300 + number)), name) for number, name in enumerate(names)]
    response = client.post(
        f"/requestPredictions/{MODEL}?name=holiday",
        data={"image": [*files, (io.BytesIO(b"not an image"), "notes.txt")]},
    )
    assert response.status_code == 202, response.text
    id: str = response.get_json()["batch_id"]
    return id


def test_a_batch_shows_its_progress_its_rejected_files_and_its_images(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post_batch(client, "a.png", MALICIOUS_NAME)
    waiting = get_page(client, f"/ui/batches/{id}")
    answer()
    page = get_page(client, f"/ui/batches/{id}")

    assert "0 of 2" in waiting
    assert "no batcher is running" in waiting
    assert f'action="/ui/batches/{id}/cancel"' in waiting
    assert "2 of 2" in page
    assert "notes.txt" in page
    assert "holiday" in page
    assert page.count("/picture?size=160") == 2
    assert "<img src=x" not in page
    for file in ("results.jsonl", "results.csv", "contact-sheet.png"):
        assert client.get(f"/batches/{id}/{file}").status_code == 200
        assert f'href="/batches/{id}/{file}"' in page
    assert "holiday" in get_page(client, "/ui/batches")


def test_a_batch_is_cancelled_and_retried_by_plain_forms(
    client: flask.testing.FlaskClient, store: Store, answer: Callable[..., list[str]]
) -> None:
    cancelled, failed = post_batch(client, "a.png"), ""

    assert client.post(f"/ui/batches/{cancelled}/cancel", headers=BROWSER).status_code == 303
    assert store.batches.progress(cancelled).cancelled == 1
    failed = post_batch(client, "b.png", "c.png")
    answer(fail_with="It is broken.")
    page = get_page(client, f"/ui/batches/{failed}?state=failed")
    assert page.count("/picture?size=160") == 2
    assert client.post(f"/ui/batches/{failed}/retry", headers=BROWSER).status_code == 303
    assert store.batches.progress(failed).queued == 2


def test_a_large_batch_is_shown_page_by_page_in_its_order(client: flask.testing.FlaskClient) -> None:
    names = [f"{number:02d}.png" for number in range(30)]
    id = post_batch(client, *names)
    found: list[str] = []
    address: str | None = f"/ui/batches/{id}"

    while address:
        page = get_page(client, address)
        found += re.findall(r'<span class="name">(\d\d\.png)</span>', page)
        following = [tag for tag in TagCollector(page).all("a") if tag.get("rel") == "next"]
        address = following[0]["href"] if following else None

    assert found == names


def test_a_deleted_image_is_not_requested(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]], store: Store
) -> None:
    id = post_image(client)
    answer()
    now = datetime.now(UTC) + timedelta(days=1)
    store.retention.purge(images_before=now, results_before=now - timedelta(days=9), now=now)

    for address in ("/ui/requests", f"/ui/requests/{id}"):
        assert f"/requests/{id}/picture" not in get_page(client, address)


def test_a_plain_form_sends_an_image(client: flask.testing.FlaskClient, store: Store) -> None:
    body = {"model": MODEL, "image": (io.BytesIO(png(7)), "plain.png")}

    response = client.post("/ui/send", data=body, headers=BROWSER)

    assert response.status_code == 303
    id = response.headers["Location"].rpartition("/")[2]
    assert store.requests.get(id).name == "plain.png"
    for model, data, status, reason in (
        ("densenet121", png(8), 503, "not installed"),
        ("no_such_model", png(8), 404, "no_such_model"),
        (MODEL, b"text", 400, "not"),
    ):
        response = client.post("/ui/send", data={"model": model, "image": (io.BytesIO(data), "x.png")}, headers=BROWSER)
        assert response.status_code == status
        assert response.mimetype == "text/html"
        assert reason in response.text


def test_a_finished_request_is_deleted_by_a_plain_form(
    client: flask.testing.FlaskClient, answer: Callable[..., list[str]]
) -> None:
    id = post_image(client)

    assert client.post(f"/ui/requests/{id}/delete", headers=BROWSER).status_code == 409
    answer()
    assert client.post(f"/ui/requests/{id}/delete", headers=BROWSER).status_code == 303
    assert "Not found" in get_page(client, f"/ui/requests/{id}", 404)


def test_a_key_sees_only_its_own_requests(client: flask.testing.FlaskClient, store: Store) -> None:
    keys = [make_api_key(store, name, Scope.SUBMIT, Scope.READ) for name in ("alice", "bob")]
    alice, bob = ({**BROWSER, "Authorization": f"Bearer {key}"} for key in keys)
    body = {"image": (io.BytesIO(png(9)), "secret.png")}
    id = client.post(f"/requestPrediction/{MODEL}", data=body, headers=alice).get_json()["req_id"]

    assert "secret.png" in client.get("/ui/requests", headers=alice).text
    assert "secret.png" not in client.get("/ui/requests", headers=bob).text
    assert client.get(f"/ui/requests/{id}", headers=alice).status_code == 200
    for action in ("", "/cancel", "/retry", "/delete"):
        method = client.post if action else client.get
        assert method(f"/ui/requests/{id}{action}", headers=bob).status_code == 404
    assert client.post("/ui/send", data={"model": MODEL}, headers=BROWSER).status_code == 303  # to the login page
    for address in ("/ui/requests", f"/ui/requests/{id}", "/ui/batches"):
        response = client.get(address, headers=BROWSER)
        assert response.status_code == 303
        assert response.headers["Location"].startswith("/ui/login?next=%2Fui%2F")
    assert "/ui/operator" not in client.get("/ui/requests", headers=alice).text
    assert "requires an API key" in get_page(client, "/")
    assert "requires an API key" not in client.get("/", headers=alice).text


def make_api_key(store: Store, name: str, *scopes: Scope) -> str:
    """Make an API key."""
    id, key = make_key()
    record = KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=frozenset(scopes), created_at=datetime.now(UTC))
    store.keys.add(record)
    return key
