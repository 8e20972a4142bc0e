"""Forms are parsed as by Werkzeug and RFC 2046."""

from __future__ import annotations

import io

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from provider_image.errors import MalformedRequest
from server.intake.multipart import Part, split

#: Bytes that look like a delimiter as often as possible.
PIECES = st.lists(st.sampled_from([b"\r\n", b"--", b"b", b"--b", b"\r\n--bX", b"\n", b"\r", b" ", b"\xff", b"x"]))


@given(data=PIECES.map(b"".join), other=PIECES.map(b"".join))
@settings(deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_any_bytes_in_a_field_are_preserved(data: bytes, other: bytes) -> None:
    body = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"; filename="f"\r\n\r\n%s\r\n' % (name, content)
        for name, content in ((b"image", data), (b"other", other))
    )
    body += b"--b--\r\n"
    # A field that holds a delimiter of its own is cut there by everyone; a client chooses another boundary then.
    framed = [b"\r\n" + content + b"\r\n" for content in (data, other)]
    assume(not any(sign in content for content in framed for sign in (b"\r\n--b\r\n", b"\r\n--b ", b"\r\n--b--")))

    parts = split(body, "b")

    assert [(part.name, part.data) for part in parts] == [("image", data), ("other", other)]


@given(junk=st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_are_refused_or_parsed_but_never_crash(junk: bytes) -> None:
    for body in (junk, b"--b\r\n" + junk + b"\r\n--b--", b"--b" + junk):
        try:
            assert all(isinstance(part, Part) for part in split(body, "b"))
        except MalformedRequest as error:
            assert error.reason


@given(*2 * [st.text('ab"\\%;=* \t:/äü\x7f\u2028', max_size=8)])
@settings(deadline=None)
def test_names_are_read_as_by_werkzeug(name: str, filename: str) -> None:
    disposition = f'form-data; name="{name}"; filename="{filename}"'
    kind, expected = parse_options_header(disposition)
    assume("name" in expected)

    (part,) = split(f"--b\r\nContent-Disposition: {disposition}\r\n\r\nx\r\n--b--".encode(), "b")

    assert (kind, part) == ("form-data", Part(name=expected["name"], filename=expected.get("filename"), data=b"x"))


def test_preamble_padding_and_epilogue_are_skipped() -> None:
    body = b'This is a form.\r\n--b \t\r\ncontent-disposition: FORM-DATA; NAME="image"\r\n\r\ndata\r\n--b--\r\nBye.'

    assert split(body, "b") == [Part(name="image", filename=None, data=b"data")]


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        (b'form-data; name="image"; filename="a \\"b\\".jpg"', 'a "b".jpg'),
        (b"form-data; name=image; filename=a.jpg", "a.jpg"),
        ('form-data; name="image"; filename="ä.jpg"'.encode(), "ä.jpg"),
        (b"form-data; name=\"image\"; filename*=UTF-8''%C3%A4.jpg", "ä.jpg"),
        (b'form-data; name="image"; filename=""', ""),
    ],
)
def test_file_names_are_read_in_every_spelling(disposition: bytes, filename: str) -> None:
    body = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\ndata\r\n--b--\r\n"

    (part,) = split(body, "b")

    assert (part.name, part.filename) == ("image", filename)


def test_it_agrees_with_werkzeug_on_curls_forms() -> None:
    boundary = "------------------------d74496d66958873e"
    body = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="top"\r\n\r\n3\r\n'
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
        f"Content-Type: image/jpeg\r\n\r\n"
    ).encode() + bytes(range(256)) * 50
    body += f"\r\n--{boundary}--\r\n".encode()

    parts = {part.name: part for part in split(body, boundary)}
    _, fields, files = FormDataParser().parse(
        io.BytesIO(body), "multipart/form-data", len(body), {"boundary": boundary}
    )

    assert parts["top"].data.decode() == fields["top"]
    assert parts["image"].data == files["image"].read()
    assert parts["image"].filename == files["image"].filename
    files["image"].close()
