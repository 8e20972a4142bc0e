"""The gallery in a browser: a photo becomes an image, before and after are compared, with mouse and keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blend import MODEL
from tests.extensions import FOLDER, install_extension_models
from tests.server.pages.browser import DESKTOP, PHONE, browser_session, find_chromium
from tests.system import System, variant


@pytest.fixture(scope="module")
def running_system(tmp_path_factory: pytest.TempPathFactory, registered_extensions: Path) -> Iterator[System]:
    """A running server and batcher with a model that answers with an image."""
    find_chromium()
    home = tmp_path_factory.mktemp("up") / "home"
    install_extension_models(home / "models")
    system = System(home, MLG_WORKERS="1", PYTHONPATH=str(FOLDER))
    yield system
    system.stop()


#: The part that is done, once a preview is shown beside it.
SHARE_WITH_PREVIEW = """() => {
    const card = document.querySelector(".image-card");
    return card?.querySelector(".preview")?.src.includes("/preview?number=") && card.querySelector("progress")?.value;
}"""


def upload_file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/jpeg", "buffer": data}


def choose(page: Any, photos: list[dict[str, Any]], style: bytes) -> None:
    page.set_input_files("#file-image", photos)
    page.set_input_files("#file-style", [upload_file("style.jpg", style)])


def violations(page: Any) -> list[Any]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def overflow(page: Any) -> int:
    pixels: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return pixels


def test_a_photo_becomes_an_image_before_the_readers_eyes_and_is_compared_and_saved(
    browser: Any, running_system: System, photos: dict[str, bytes], tmp_path: Path
) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto(f"/ui/gallery?model={MODEL}")
        choose(page, [upload_file("cat.jpg", variant(photos["chelsea"], 1))], photos["rocket"])
        page.get_by_text("Options").click()
        page.get_by_label("Steps").fill("12")
        page.get_by_label("Pause").fill("0.3")
        session.save_screenshot("gallery-chosen")

        page.get_by_role("button", name="Make images").click()
        share = page.wait_for_function(SHARE_WITH_PREVIEW).json_value()
        session.save_screenshot("gallery-becoming")
        page.wait_for_selector(".image-card .state.done")

        assert 0 < share <= 1
        frame = page.locator(".image-card .frame")
        page.wait_for_function("() => document.querySelector('.image-card .after').naturalWidth > 0")
        slider = page.get_by_label("How much of the photo is shown: cat.jpg")
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        assert frame.evaluate("frame => frame.style.getPropertyValue('--cut')") == "47%"
        assert slider.get_attribute("aria-valuetext") == "47 % photo"
        box = frame.bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
        cut = float(frame.evaluate("frame => frame.style.getPropertyValue('--cut')").rstrip("%"))
        assert 75 <= cut <= 85
        session.save_screenshot("gallery-compared")
        with page.expect_download() as download:
            page.get_by_role("link", name="Save the image").click()
        download.value.save_as(tmp_path / "saved")
        assert download.value.suggested_filename == f"cat-{MODEL}.png"
        assert (tmp_path / "saved").read_bytes().startswith(b"\x89PNG")
        page.locator(".image-card a.name").click()
        page.wait_for_url("**/ui/requests/*")
        assert page.locator(".compare .frame").count() == 1
        session.save_screenshot("gallery-request")


def test_many_photos_share_a_style_and_one_that_cannot_be_used_says_why(
    browser: Any, running_system: System, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, running_system.base, **DESKTOP) as session:
        page = session.page
        page.goto(f"/ui/gallery?model={MODEL}")
        page.get_by_role("button", name="Make images").click()
        page.get_by_text("Choose an image first.").wait_for()
        assert page.evaluate("document.activeElement.id") == "file-image"
        files = [upload_file(f"{name}.jpg", variant(data, 2)) for name, data in photos.items()]

        choose(page, [*files, upload_file("notes.jpg", b"These are my notes.")], photos["coffee"])
        page.get_by_role("button", name="Make images").click()

        page.wait_for_selector(".image-card:nth-child(4)")
        page.wait_for_function("() => document.querySelectorAll('.image-card .compare').length === 3")
        assert "not an image" in page.locator(".image-card.failed .reason").inner_text()
        styles = "SELECT inputs FROM requests ORDER BY number DESC LIMIT 3"
        assert len({row[0] for row in running_system.query(styles)}) == 1
        session.save_screenshot("gallery-many")


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_the_gallery_is_accessible_and_fits_the_screen(
    browser: Any, running_system: System, photos: dict[str, bytes], look: str
) -> None:
    options: dict[str, Any] = {**(PHONE if look == "phone" else DESKTOP)}
    # The content security policy of the pages forbids axe-core, so it is bypassed here.
    with browser_session(
        browser, running_system.base, color_scheme="dark" if look == "dark" else "light", bypass_csp=True, **options
    ) as session:
        page = session.page
        page.goto(f"/ui/gallery?model={MODEL}")
        choose(page, [upload_file("cup.jpg", variant(photos["coffee"], 3))], photos["chelsea"])
        page.get_by_role("button", name="Make images").click()
        page.wait_for_selector(".image-card .state.done")
        page.wait_for_function("() => document.querySelector('.image-card .after').naturalWidth > 0")
        page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        session.save_screenshot(f"gallery-{look}")

        assert violations(page) == []
        assert overflow(page) <= 0
        page.locator(".image-card a.name").click()
        page.wait_for_url("**/ui/requests/*")
        page.wait_for_load_state("load")
        session.save_screenshot(f"gallery-request-{look}")
        assert violations(page) == []
        assert overflow(page) <= 0


def test_without_scripts_a_photo_is_sent_and_both_images_are_shown(
    browser: Any, running_system: System, photos: dict[str, bytes]
) -> None:
    with browser_session(browser, running_system.base, java_script_enabled=False, **DESKTOP) as session:
        page = session.page
        page.goto(f"/ui/gallery?model={MODEL}")
        choose(page, [upload_file("plain.jpg", variant(photos["rocket"], 4))], photos["coffee"])
        page.get_by_role("button", name="Make images").click()
        page.wait_for_url("**/ui/requests/*")
        running_system.read(page.url.rpartition("/")[2])

        page.reload()

        assert page.locator(".compare img").count() == 2
        assert page.locator(".compare input").is_hidden()
        session.save_screenshot("gallery-without-scripts")
