"""Takes the screenshot of the home page that README.md shows.

Called by `scripts/generate_docs --screenshot`. Starts a whole system on a free port with a temporary home, sends two
photos through the page, and takes the screenshot with chromium. Everything that it started has ended when it returns.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from pathlib import Path

WIDTH, HEIGHT = 1200, 900


def take(target: Path) -> None:
    """Take the screenshot and write it as a PNG with a palette of 128 colours."""
    from tests.system import System

    with tempfile.TemporaryDirectory() as folder:
        system = System(Path(folder, "home"), no_proxy="127.0.0.1")
        try:
            _photograph(system.base, Path(folder), target)
        finally:
            system.stop()


def _photograph(base: str, folder: Path, target: Path) -> None:
    import skimage.data
    from PIL import Image
    from playwright.sync_api import sync_playwright

    photos = []
    for name, shown_as in (("coffee", "coffee.jpg"), ("chelsea", "kitten.jpg")):
        photos.append(str(folder / shown_as))
        Image.fromarray(getattr(skimage.data, name)()).save(photos[-1], "JPEG", quality=90)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("scripts/generate_docs: --screenshot needs chromium (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(base_url=base, viewport={"width": WIDTH, "height": HEIGHT})
        page.goto("/")
        page.set_input_files("#files", photos)
        for label in ("tiger.cat", "espresso"):
            page.locator("#answers").get_by_text(re.compile(label)).first.wait_for()
        # The strip that moves while an answer is awaited ends with a transition.
        page.wait_for_timeout(800)
        page.evaluate("window.scrollTo(0, 0)")
        shot = page.screenshot(animations="disabled", full_page=True)
        browser.close()
    image = Image.open(io.BytesIO(shot)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(target, "PNG", optimize=True)
