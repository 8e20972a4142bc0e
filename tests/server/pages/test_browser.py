"""The pages in a browser: every way to send images, live results, accessibility."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.pages.browser import DESKTOP, PHONE, browser_session, find_chromium
from tests.system import System, variant
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def running_system(tmp_path_factory: pytest.TempPathFactory, embedding_models_folder: Path) -> Iterator[System]:
    """A running server and batcher with the starter model and its embedding."""
    find_chromium()
    home = tmp_path_factory.mktemp("up") / "home"
    home.mkdir()
    (home / "models").symlink_to(embedding_models_folder)
    system = System(home, MLG_WORKERS="1")
    yield system
    system.stop()


@pytest.fixture(scope="module")
def idle_server(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[str]:
    """The URL of a server without a batcher: requests stay queued."""
    find_chromium()
    home = tmp_path_factory.mktemp("idle")
    (home / "models").symlink_to(models_folder)
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*(sys.executable, "-m", "mlg", "serve", "--home", str(home), "--port", "0", "--ready-fd", str(writer))],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        env={**os.environ, "MLG_SERVER_THREADS": "8"},
    )
    os.close(writer)
    with os.fdopen(reader) as ready:
        host, port = ready.readline().split()
    yield f"http://{host}:{port}"
    process.terminate()
    process.wait(DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def answered_requests(running_system: System, photos: dict[str, bytes]) -> dict[str, str]:
    """Photos with a result: name -> request id."""
    import httpx

    found = {}
    for name, data in photos.items():
        files = {"image": (f"{name}.jpg", data, "image/jpeg")}
        sent = httpx.post(f"{running_system.base}/requestPrediction/efficientnet_lite0", files=files, timeout=30).json()
        found[name] = sent["req_id"]
    for id in found.values():
        assert running_system.read(id)["status"] == "done"
    return found


@pytest.fixture(scope="module")
def finished_batch(running_system: System, photos: dict[str, bytes]) -> str:
    """The id of a finished batch of eight images and one rejected text file."""
    import httpx

    files = [
        ("image", (f"{name}-{number}.jpg", variant(data, 100 + number), "image/jpeg"))
        for number, (name, data) in enumerate([*photos.items()] * 3)
    ]
    files[-1] = ("image", ("notes.txt", b"These are my notes.", "image/jpeg"))
    sent = httpx.post(
        f"{running_system.base}/requestPredictions/efficientnet_lite0?name=Holidays", files=files, timeout=30
    ).json()
    for item in sent["items"]:
        if item["req_id"] is not None:
            assert running_system.read(item["req_id"])["status"] == "done"
    id: str = sent["batch_id"]
    return id


@pytest.fixture(scope="module")
def collection(running_system: System, photos: dict[str, bytes]) -> str:
    """The page of a collection of two versions of each photo, all with vectors."""
    import httpx

    files = [
        ("image", (f"{name}-{number}.jpg", data if number == 1 else variant(data, 300), "image/jpeg"))
        for name, data in photos.items()
        for number in (1, 2)
    ]
    httpx.post(f"{running_system.base}/collections", json={"name": "photos"}, timeout=30).raise_for_status()
    url = f"{running_system.base}/collections/photos/images?label=place:Rome"
    for item in httpx.post(url, files=files, timeout=30).json()["items"]:
        assert running_system.read(item["req_id"])["status"] == "done"
    return "/ui/collections/photos"


def upload_file(name: str, data: bytes, kind: str = "image/jpeg") -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": data}


def expect_count(page: Any, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=15_000)


#: Creates files in the page and dispatches the events of a drop or a paste.
DROP_OR_PASTE_SCRIPT = """([way, selector, files]) => {
    const transfer = new DataTransfer();
    for (const [name, data] of files) {
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
    }
    const target = document.querySelector(selector);
    const options = { bubbles: true, cancelable: true };
    if (way === "paste") {
        target.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
        return true;
    }
    for (const kind of ["dragenter", "dragover"]) {
        target.dispatchEvent(new DragEvent(kind, { ...options, dataTransfer: transfer }));
    }
    const isMarked = target.classList.contains("drag-over");
    target.dispatchEvent(new DragEvent("drop", { ...options, dataTransfer: transfer }));
    return isMarked && !target.classList.contains("drag-over");
}"""


def drop_or_paste(page: Any, way: str, selector: str, files: dict[str, bytes]) -> bool:
    """Drop or paste files; return whether the target was marked while they were over it."""
    encoded = [(name, base64.b64encode(data).decode()) for name, data in files.items()]
    marked: bool = page.evaluate(DROP_OR_PASTE_SCRIPT, [way, selector, encoded])
    return marked


def test_chosen_dropped_and_pasted_images_get_live_results(
    browser: Any, running_system: System, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto("/")

        page.set_input_files(
            "#files",
            [upload_file("chelsea.jpg", variant(photos["chelsea"], 1)), upload_file("coffee.jpg", photos["coffee"])],
        )
        page.wait_for_selector(".answer:nth-child(2) .state.done")
        session.save_screenshot("home")
        for way in ("drop", "paste"):
            assert drop_or_paste(page, way, "#drop", {f"{way}.jpg": variant(photos["rocket"], len(way))})
        page.wait_for_selector(".answer:nth-child(4) .state.done")
        expect_count(page, ".answer .state.done", 4)

        cards = {card.locator(".name").first.inner_text(): card for card in page.locator(".answer").all()}
        assert set(cards) == {"chelsea.jpg", "coffee.jpg", "drop.jpg", "paste.jpg"}
        for name, best in (("chelsea.jpg", "tiger cat"), ("coffee.jpg", "espresso"), ("drop.jpg", "missile")):
            bars = cards[name].locator(".bars li")
            assert bars.count() == 5
            assert best in bars.first.inner_text()
            assert "%" in bars.first.locator(".percent").inner_text()
        assert page.evaluate("[...document.querySelectorAll('.answer img')].every((image) => image.naturalWidth > 0)")
        assert "4 of 4" in page.locator("#count").inner_text()
        session.save_screenshot("home-answers")
        cards["chelsea.jpg"].locator("a.name").click()
        page.wait_for_url("**/ui/requests/*")
        assert "tiger cat" in page.locator(".bars li").first.inner_text()


def test_a_photo_that_is_too_large_is_resized_in_the_browser(browser: Any, running_system: System) -> None:
    import io
    import random

    from PIL import Image

    noise = Image.frombytes("RGB", (1500, 1200), random.Random(5).randbytes(1500 * 1200 * 3))
    file = io.BytesIO()
    noise.save(file, "JPEG", quality=98)
    assert len(file.getvalue()) > 2 * 2**20

    with browser_session(browser, running_system.base) as session:
        session.page.goto("/")
        session.page.set_input_files("#files", [upload_file("large.jpg", file.getvalue())])

        session.page.wait_for_selector(".answer .state.done", timeout=30_000)


def test_a_file_that_is_no_image_is_rejected_with_a_reason_and_can_be_sent_again(
    browser: Any, running_system: System
) -> None:
    with browser_session(browser, running_system.base) as session:
        session.page.goto("/")
        session.page.set_input_files("#files", [upload_file("notes.png", b"These are my notes.", "image/png")])

        session.page.wait_for_selector(".answer.failed")
        assert "not" in session.page.locator(".answer .reason").inner_text()
        assert session.page.get_by_role("button", name="Try again: notes.png").is_visible()
        session.save_screenshot("home-refused")


def test_results_arrive_without_event_streams_too(
    browser: Any, running_system: System, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, running_system.base) as session:
        session.page.add_init_script("delete window.EventSource")
        session.page.goto("/")
        files = [upload_file(f"{number}.jpg", variant(photos["coffee"], 50 + number)) for number in range(3)]

        session.page.set_input_files("#files", files)

        expect_count(session.page, ".answer .state.done", 3)


def test_a_waiting_image_shows_the_reason_and_is_cancelled(
    browser: Any, idle_server: str, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, idle_server, **DESKTOP) as session:
        page = session.page
        page.goto("/")
        page.set_input_files("#files", [upload_file("chelsea.jpg", photos["chelsea"])])
        page.wait_for_selector(".answer .state.queued")
        page.locator(".answer .reason", has_text="no batcher").wait_for()
        session.save_screenshot("home-waiting")

        page.get_by_role("button", name="Cancel: chelsea.jpg").click()

        page.wait_for_selector(".answer .state.cancelled")
        page.locator(".answer a.name").click()
        page.get_by_role("button", name="Try again").click()
        page.wait_for_selector("#request .state.queued")
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_selector("#request .state.cancelled")
        session.save_screenshot("request-cancelled")
        page.get_by_text("Delete", exact=True).click()
        page.get_by_role("button", name="Delete permanently").click()
        page.wait_for_url("**/ui/requests")
        assert page.get_by_text("chelsea.jpg").count() == 0


def test_requests_are_filtered(browser: Any, running_system: System, answered_requests: dict[str, str]) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto("/ui/requests")
        page.wait_for_load_state("networkidle")
        session.save_screenshot("requests")
        page.get_by_label("File name").fill("coff")
        page.get_by_label("State").select_option("done")
        page.keyboard.press("Tab")
        page.get_by_role("button", name="Filter").click()

        page.wait_for_url("**/ui/requests?q=coff&state=done*")
        names = {name.inner_text() for name in page.locator(".gallery .name").all()}
        assert names == {"coffee.jpg"}


def test_a_batch_shows_its_progress_live_and_is_cancelled(
    browser: Any, idle_server: str, photos: dict[str, bytes]
) -> None:
    import httpx

    files = [("image", (f"{number}.jpg", variant(photos["coffee"], 200 + number), "image/jpeg")) for number in range(3)]
    sent = httpx.post(f"{idle_server}/requestPredictions/efficientnet_lite0", files=files, timeout=30).json()
    with browser_session(browser, idle_server, **DESKTOP) as session:
        session.page.goto(f"/ui/batches/{sent['batch_id']}")
        assert session.page.locator("progress").get_attribute("value") == "0"
        session.save_screenshot("batch-waiting")

        httpx.delete(f"{idle_server}/requests/{sent['items'][0]['req_id']}").raise_for_status()

        session.page.get_by_text("1 of 3").wait_for()
        session.page.get_by_role("button", name="Cancel waiting requests").click()
        session.page.get_by_text("3 of 3").wait_for()
        session.page.wait_for_selector("progress[value='3']")


@pytest.mark.parametrize("is_scripted", [True, False], ids=["with scripts", "without scripts"])
def test_a_request_shows_result_and_json(
    browser: Any, running_system: System, answered_requests: dict[str, str], is_scripted: bool
) -> None:
    with browser_session(browser, running_system.base, java_script_enabled=is_scripted, **DESKTOP) as session:
        session.page.goto(f"/ui/requests/{answered_requests['chelsea']}")

        assert session.page.get_by_role("heading", level=1).inner_text() == "chelsea.jpg"
        assert "tiger cat" in session.page.locator(".bars li").first.inner_text()
        session.page.get_by_text("Show as JSON").click()
        assert '"preds"' in session.page.locator(".raw pre").inner_text()
        session.save_screenshot("request" if is_scripted else "request-without-scripts")


def test_without_scripts_an_image_is_sent_cancelled_and_found(
    browser: Any, idle_server: str, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, idle_server, java_script_enabled=False, **DESKTOP) as session:
        page = session.page
        page.goto("/")
        session.save_screenshot("home-without-scripts")
        page.set_input_files("#files", [upload_file("plain.jpg", photos["rocket"])])
        page.get_by_role("button", name="Classify").click()
        page.wait_for_url("**/ui/requests/*")
        assert "no batcher" in page.locator(".notice").first.inner_text()

        page.get_by_role("button", name="Cancel").click()

        assert page.locator("#request .state").first.inner_text() == "cancelled"
        page.goto("/ui/requests")
        page.get_by_label("File name").fill("plain")
        page.get_by_role("button", name="Filter").click()
        assert page.locator(".gallery li").count() == 1


def test_home_works_with_the_keyboard_only(browser: Any, running_system: System, photos: dict[str, bytes]) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        # From here on: interception that begins together with the key press can come too late for it.
        choosers: list[Any] = []
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.goto("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        page.wait_for_function("location.hash != ''")
        for _ in range(8):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "files":
                break
        assert page.evaluate("document.activeElement.id") == "files"
        session.save_screenshot("home-focus")
        page.wait_for_function("document.hasFocus()")

        # A browser opens a file chooser only within seconds of a key press, so on a busy machine it may need another.
        presses = 0
        while not choosers:
            presses += 1
            assert presses <= 10, "the Enter key opens no file chooser"
            page.keyboard.press("Enter")
            page.wait_for_timeout(1000 * presses)
        choosers[0].set_files([upload_file("keys.jpg", variant(photos["coffee"], 77))])

        page.wait_for_selector(".answer .state.done")
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('.answer a.name')"):
                break
        page.keyboard.press("Enter")
        page.wait_for_url("**/ui/requests/*")


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_every_page_is_accessible_and_fits_the_screen(
    browser: Any,
    running_system: System,
    answered_requests: dict[str, str],
    finished_batch: str,
    collection: str,
    look: str,
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {**(PHONE if look == "phone" else DESKTOP)}
    # The dark theme differs in colours only.
    rules = {"runOnly": ["color-contrast"]} if look == "dark" else {}
    # The content security policy of the pages forbids axe-core, so it is bypassed here.
    with browser_session(
        browser, running_system.base, color_scheme="dark" if look == "dark" else "light", bypass_csp=True, **options
    ) as session:
        page = session.page
        for name, address in (
            ("home", "/"),
            ("requests", "/ui/requests"),
            ("requests-none", "/ui/requests?q=nothing-like-it"),
            ("request", f"/ui/requests/{answered_requests['chelsea']}"),
            ("batches", "/ui/batches"),
            ("batch", f"/ui/batches/{finished_batch}"),
            ("collections", "/ui/collections"),
            ("collection", collection),
            ("collection-search-none", f"{collection}/search"),
            ("collection-search", f"{collection}/search?image={answered_requests['chelsea']}"),
            ("collection-duplicates", f"{collection}/duplicates"),
            ("collection-groups", f"{collection}/groups?count=3"),
            ("collection-group", f"{collection}/groups?count=3&group=1"),
            ("pipelines", "/ui/pipelines"),
            ("operator", "/ui/operator"),
            ("api", "/ui/api"),
            ("login", "/ui/login"),
            ("error", "/ui/nothing"),
        ):
            page.goto(address)
            page.wait_for_load_state("load")
            session.save_screenshot(f"{name}-{look}", is_full_page=name != "api")
            if name != "api":
                page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")

            found = Axe().run(page, options=rules).response["violations"]
            bad = [
                (violation["id"], [node["html"] for node in violation["nodes"]])
                for violation in found
                if violation["impact"] in ("serious", "critical")
            ]
            assert not bad, (address, bad)
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, f"{address} is {overflow} px wider than the screen"


def test_dropped_images_become_a_collection_that_finds_similar_ones(
    browser: Any, running_system: System, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto("/ui/collections")
        page.get_by_label("Name of a new collection").fill("dropped")
        page.get_by_role("button", name="Create").click()
        page.wait_for_url("**/ui/collections/dropped")
        page.get_by_text("No images yet").wait_for()
        files = {f"{name}.jpg": variant(data, 400) for name, data in photos.items()}

        assert drop_or_paste(page, "drop", "[data-add]", {**files, "notes.jpg": b"These are my notes."})
        page.get_by_text("4 of 4 sent. notes.jpg: ").wait_for()
        page.locator("#images").get_by_text("3 with a vector").wait_for()
        assert drop_or_paste(page, "drop", "[data-search]", {"query.jpg": variant(photos["chelsea"], 401)})

        page.wait_for_url("**/search?image=*")
        assert page.locator("#matches .name").all_inner_texts()[0] == "chelsea.jpg"
        assert float(page.locator("#matches .best").first.inner_text().split()[0]) > 0.9
        page.get_by_role("link", name="More like this: coffee.jpg").click()
        page.locator(".query-name", has_text="coffee.jpg").wait_for()
        assert "coffee.jpg" not in page.locator("#matches .name").all_inner_texts()
        page.get_by_role("button", name="Remove from the collection: rocket.jpg").click()
        expect_count(page, "#matches .gallery > li", 1)
        page.get_by_role("link", name="Images", exact=True).click()
        page.get_by_text("Delete the collection").click()
        page.get_by_role("button", name="Delete permanently").click()
        page.wait_for_url("**/ui/collections")


def test_more_like_this_finds_images_like_an_answer(
    browser: Any, running_system: System, photos: dict[str, bytes], collection: str
) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto("/")
        page.set_input_files("#files", [upload_file("cup.jpg", variant(photos["coffee"], 500))])

        page.get_by_role("link", name="More like this: cup.jpg").click()

        page.wait_for_selector("#matches .gallery")
        assert set(page.locator("#matches .name").all_inner_texts()[:2]) == {"coffee-1.jpg", "coffee-2.jpg"}
        page.go_back()
        page.wait_for_selector("#drop")


def test_home_loads_quickly(browser: Any, running_system: System) -> None:
    with browser_session(browser, running_system.base) as session:
        times = []
        for _ in range(3):
            session.page.goto("/")
            times.append(
                session.page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
            )
        resources = session.page.evaluate("performance.getEntriesByType('resource').map((resource) => resource.name)")

        # 100 to 210 ms were measured on two cores busy with other tests; the limit allows for busier ones.
        assert min(times) < 1000, times
        assert len(resources) < 8
