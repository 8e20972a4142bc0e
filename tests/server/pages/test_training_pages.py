"""The pages of trainings: the two steps of the form, progress, figures, versions; with and without JavaScript."""

from __future__ import annotations

import io
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import flask.testing
import pytest

from store import new_id
from store.store import Store
from store.trainings.records import TrainingKind, TrainingRecord
from tests.conftest import RunningServer
from tests.server.api.test_batch_views import make_image
from tests.server.api.test_trainings import two_classes
from tests.server.pages.browser import browser_session
from trainer.figures import classification_figures, regression_figures

BROWSER = {"Accept": "text/html,application/xhtml+xml"}


def add_finished(store: Store, name: str, kind: TrainingKind, figures: dict[str, Any], *, image: bytes = b"") -> str:
    """Add a training that has ended, as the trainer ends it."""
    now = datetime.now(UTC)
    training = TrainingRecord(id=new_id(), name=name, kind=kind, target="score", examples=40, created_at=now)
    store.trainings.add(training)
    claimed = store.trainings.claim(training.id, now=now)
    assert claimed is not None
    files = {"answers.csv": "text/csv", **({"confusion.png": "image/png"} if image else {})}
    store.trainings.files.write(training.id, "answers.csv", b"name,true\n")
    store.trainings.files.write(training.id, "confusion.png", image)
    left_out = [{"name": "a/<b>.png", "reason": "It is broken."}]
    more = {"examples": 40, "left_out_count": len(left_out), "left_out": left_out}
    assert store.trainings.finish(claimed, digest="d" * 64, figures={**figures, **more}, files=files, now=now)
    return training.id


def class_figures() -> dict[str, Any]:
    import numpy as np

    names, true = [f"{n}.png" for n in range(4)], ["cats", "cats", "<b>dogs</b>", "<b>dogs</b>"]
    shares = np.array([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    return classification_figures(["<b>dogs</b>", "cats"], true, shares, names, basis="4 of 40 examples.").as_json()


def number_figures() -> dict[str, Any]:
    return regression_figures([1.0, 2.0, 4.0], [1.5, 2.0, 3.0], ["row 1", "row 2", "row 3"], basis="3 rows.").as_json()


def test_the_form_works_without_javascript(client: flask.testing.FlaskClient) -> None:
    first = client.get("/ui/train", headers=BROWSER)
    second = client.get("/ui/train?name=My+pets&backbone=efficientnet_lite0", headers=BROWSER)
    archive = {"archive": (io.BytesIO(two_classes()), "pets.zip")}
    sent = client.post("/ui/train/new/my_pets?backbone=efficientnet_lite0", data=archive, headers=BROWSER)
    shown = client.get(sent.headers["Location"], headers=BROWSER)

    assert 'name="backbone"' in first.text
    assert 'action="/ui/train/new/my_pets?backbone=efficientnet_lite0"' in second.text
    assert sent.status_code == 303
    assert "0 of 10 images." in shown.text and "no batcher is running" in shown.text
    assert "my_pets" in client.get("/ui/train", headers=BROWSER).text


def test_the_form_says_what_is_wrong(client: flask.testing.FlaskClient) -> None:
    taken = client.get("/ui/train?name=densenet121", headers=BROWSER)
    archive = {"archive": (io.BytesIO(two_classes(count=2)), "pets.zip")}
    few = client.post("/ui/train/new/pets", data=archive, headers=BROWSER)

    assert taken.status_code == 400 and "is a model of the catalogue" in taken.text
    assert few.status_code == 409 and "Each class needs at least 5 images" in few.text


TABLE = b"colour,kind\n" + b"".join(b"c%d,%s\n" % (n, (b"a", b"b")[n % 2]) for n in range(20))


def test_a_form_keeps_what_was_entered_after_an_error(client: flask.testing.FlaskClient) -> None:
    texts = "from=texts&text=my+review&target=%22mood%22&segmenter=jieba"
    wrong = client.get(f"/ui/train?name=My+!&{texts}", headers=BROWSER)
    refused = client.post(
        f"/ui/train/new/reviews?{texts}", data={"other": (io.BytesIO(b"a"), "a.csv")}, headers=BROWSER
    )

    for page, name in ((wrong, "My !"), (refused, "reviews")):
        assert page.status_code in (400, 409)
        form = page.text.partition('name="from" value="texts"')[2].partition("</form>")[0]
        assert f'name="name" value="{name}"' in form
        assert 'name="text" value="my review"' in form and 'name="target" value="&#34;mood&#34;"' in form
        assert "<option selected>jieba</option>" in form
        assert page.text.count("my review") == 1


@pytest.mark.parametrize(
    ("query", "kind", "options"),
    [
        ("from=table&target=kind", TrainingKind.TABLE, {}),
        ("from=texts&text=colour&target=kind", TrainingKind.TEXT, {"text": "colour"}),
    ],
)
def test_a_table_and_texts_are_sent_by_a_form(
    client: flask.testing.FlaskClient, store: Store, query: str, kind: TrainingKind, options: dict[str, str]
) -> None:
    form = client.get(f"/ui/train?name=My+fruit&{query}", headers=BROWSER)
    url = form.text.partition('method="post" action="')[2].partition('"')[0].replace("&amp;", "&")
    sent = client.post(url, data={"archive": (io.BytesIO(TABLE), "fruit.csv")}, headers=BROWSER)
    (training,) = store.trainings.list()

    assert url.startswith("/ui/train/new/my_fruit?from=") and 'accept=".csv,text/csv"' in form.text
    assert sent.status_code == 303 and sent.headers["Location"] == f"/ui/train/{training.id}"
    assert (training.kind, training.target, training.examples, training.options) == (kind, "kind", 20, options)
    assert store.trainings.files.read(training.id, "input.csv") == TABLE


def test_a_table_without_the_column_is_refused_with_the_reason(client: flask.testing.FlaskClient, store: Store) -> None:
    wrong = client.post(
        "/ui/train/new/fruit?from=table&target=shape", data={"archive": (io.BytesIO(TABLE), "a.csv")}, headers=BROWSER
    )
    other = {"other": (io.BytesIO(TABLE), "a.csv")}
    empty = client.post("/ui/train/new/fruit?from=table&target=kind", data=other, headers=BROWSER)

    assert wrong.status_code == 409 and "shape" in wrong.text
    assert empty.status_code == 409 and "no field `archive`" in empty.text
    assert store.trainings.list() == []


def test_the_form_of_a_collection_needs_no_file(client: flask.testing.FlaskClient) -> None:
    form = client.get("/ui/train?name=places&from=collection&collection=holiday&label=place", headers=BROWSER)
    sent = client.post("/ui/train/new/places?from=collection&collection=holiday&label=place", headers=BROWSER)

    assert 'action="/ui/train/new/places?from=collection&amp;collection=holiday&amp;label=place"' in form.text
    assert 'type="file"' not in form.text
    assert sent.status_code == 409 and "There is no collection with this name" in sent.text


def test_a_training_can_be_cancelled_on_its_page(client: flask.testing.FlaskClient, store: Store) -> None:
    archive = {"archive": (io.BytesIO(two_classes()), "pets.zip")}
    page = client.post("/ui/train/new/pets", data=archive, headers=BROWSER).headers["Location"]

    cancelled = client.post(f"{page}/cancel", headers=BROWSER)
    again = client.post(f"{page}/cancel", headers=BROWSER)

    assert (cancelled.status_code, again.status_code) == (303, 409)
    assert "has ended already" in again.text
    assert "cancelled" in client.get(page, headers=BROWSER).text


def test_the_page_of_a_training_shows_its_figures_and_escapes_names(
    client: flask.testing.FlaskClient, store: Store
) -> None:
    classes = add_finished(store, "pets", TrainingKind.IMAGES, class_figures(), image=make_image(1))
    numbers = add_finished(store, "beauty", TrainingKind.TABLE, number_figures())

    page, other = (client.get(f"/ui/train/{id}", headers=BROWSER).text for id in (classes, numbers))
    use = client.post(f"/ui/train/{classes}/use", headers=BROWSER)

    assert "75.0 %" in page and "&lt;b&gt;dogs&lt;/b&gt;" in page and "<b>dogs" not in page
    assert f"/trainings/{classes}/files/confusion.png" in page
    assert "a/&lt;b&gt;.png" in page
    assert "Mean absolute error" in other and "row 3" in other
    assert use.status_code == 409 and "no such version" in use.text


@pytest.mark.parametrize("look", ["light", "phone"])
def test_the_pages_are_accessible_and_fit_the_screen(
    browser: Any, start_server: Callable[..., RunningServer], store: Store, look: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    classes = add_finished(store, "pets", TrainingKind.IMAGES, class_figures(), image=make_image(1))
    numbers = add_finished(store, "a_name_that_is_rather_long_for_a_phone", TrainingKind.TABLE, number_figures())
    size: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}}
    if look == "phone":
        size = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with browser_session(browser, start_server().base, bypass_csp=True, **size) as session:
        page = session.page
        for name, address in (
            ("trainings", "/ui/train"),
            ("training-form", "/ui/train?name=my_pets"),
            ("training-table", "/ui/train?name=my_pets&from=table&target=kind"),
            ("training", f"/ui/train/{classes}"),
            ("training-numbers", f"/ui/train/{numbers}"),
        ):
            page.goto(address)
            page.wait_for_load_state("load")
            session.save_screenshot(f"{name}-{look}")
            page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")

            found = Axe().run(page).response["violations"]
            bad = [
                (violation["id"], [node["html"] for node in violation["nodes"]])
                for violation in found
                if violation["impact"] in ("serious", "critical")
            ]
            assert not bad, (address, bad)
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, f"{address} is {overflow} px wider than the screen"


def test_a_zip_is_chosen_and_its_training_is_shown(
    browser: Any, start_server: Callable[..., RunningServer], store: Store
) -> None:
    with browser_session(browser, start_server().base) as session:
        page = session.page
        page.goto("/ui/train")
        page.fill("#name", "My pets")
        page.click("text=Choose images")

        page.set_input_files(
            "#archive", {"name": "few.zip", "mimeType": "application/zip", "buffer": two_classes(count=2)}
        )
        page.wait_for_selector("#sending >> text=Each class needs at least 5 images")
        page.set_input_files("#archive", {"name": "pets.zip", "mimeType": "application/zip", "buffer": two_classes()})
        page.wait_for_url("**/ui/train/*")

        page.wait_for_selector("text=0 of 10 images.")
        (training,) = store.trainings.list()
        assert training.name == "my_pets"
        store.trainings.cancel(training.id, now=datetime.now(UTC))
        page.wait_for_selector(".state.cancelled")
