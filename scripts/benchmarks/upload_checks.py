"""The checks of an upload before it is stored: reading the image's header and parsing the form."""

from __future__ import annotations

import io
import statistics

import click
from werkzeug.formparser import parse_form_data

from provider_image.images.decoding import MAX_PIXELS
from provider_image.images.headers import read_header
from scripts.benchmarks import photos
from scripts.benchmarks.measuring import rounds_option, timed
from server.intake import multipart

BOUNDARY = "----mlg-benchmark"


@click.command()
@rounds_option(15)
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
    for what, work in (
        ("the check of the header", lambda: read_header(jpeg, MAX_PIXELS)),
        ("parsing a form, mlg", lambda: multipart.split(form, BOUNDARY)),
        ("parsing a form, Werkzeug", werkzeug),
    ):
        hundreds = [timed(lambda work=work: [work() for _ in range(100)]) for _ in range(rounds)]  # type: ignore[misc]
        click.echo(f"{what}: {statistics.median(hundreds) * 1e4:.1f} microseconds")
