"""The checks of an upload before it is stored: reading the image's header and parsing the form."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable

import click
from rich.console import Console
from werkzeug.formparser import parse_form_data

from provider_image.images.decoding import MAX_PIXELS
from provider_image.images.headers import read_header
from scripts.benchmarks import photos
from server.intake import multipart

BOUNDARY = "----mlg-benchmark"


def microseconds(work: Callable[[], object], rounds: int) -> float:
    """Run work in batches of a hundred. :return: the median of a call's mean."""
    means = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(100):
            work()
        means.append((time.perf_counter() - started) * 1e4)
    return statistics.median(means)


@click.command()
@click.option("--rounds", default=15, show_default=True, help="Batches of a hundred calls; the median is reported.")
def main(rounds: int) -> None:
    """Measure the checks of an upload. Example: scripts/bench upload_checks"""
    jpeg = photos.photo_jpegs()[2]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    form = head.encode() + jpeg + f"\r\n--{BOUNDARY}--\r\n".encode()

    def werkzeug() -> bytes:
        _, _, files = parse_form_data(
            {
                "REQUEST_METHOD": "POST",
                "CONTENT_TYPE": f"multipart/form-data; boundary={BOUNDARY}",
                "CONTENT_LENGTH": str(len(form)),
                "wsgi.input": io.BytesIO(form),
            }
        )
        return files["image"].read()

    assert werkzeug() == multipart.split(form, BOUNDARY)[0].data == jpeg
    console = Console()
    for what, work in (
        ("the check of the header", lambda: read_header(jpeg, MAX_PIXELS)),
        ("parsing a form, mlg", lambda: multipart.split(form, BOUNDARY)),
        ("parsing a form, Werkzeug", werkzeug),
    ):
        console.print(f"{what}: {microseconds(work, rounds):.1f} microseconds")
