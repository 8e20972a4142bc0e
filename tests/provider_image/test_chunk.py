"""Chunk and results files: what is written is read; what a hostile side writes is refused."""

import io
import json
import struct
import zipfile

import pytest

from provider_image import archive
from provider_image.chunk import (
    ChunkItem,
    ItemResult,
    Results,
    open_chunk,
    read_results,
    write_chunk,
    write_results,
)
from provider_image.errors import BrokenImage, MalformedChunk, MalformedResults

DIGEST = "0" * 64


@pytest.fixture
def chunk(tmp_path):
    """A valid chunk of two items."""
    (tmp_path / "image").write_bytes(b"from a file")
    items = [
        ChunkItem(number=0, inputs={"image": b"from memory"}, params={"top": 3}),
        ChunkItem(number=1, inputs={"image": tmp_path / "image"}),
    ]
    size = write_chunk(tmp_path / "chunk.zip", "id-1", "classification", "vgg16", DIGEST, items)
    assert size == (tmp_path / "chunk.zip").stat().st_size
    return tmp_path / "chunk.zip"


def results(**changes) -> Results:
    """Valid results for two items."""
    facts = {
        "chunk_id": "id-1",
        "model": "vgg16",
        "digest": DIGEST,
        "versions": {"python": "3"},
        "precision": "f32",
        "cpu": "some",
        "load_seconds": 0.5,
        "peak_memory_bytes": 1000,
        "items": (
            ItemResult(number=0, output=[["n1", "cat", 0.5]], files={"out.png": b"pixels"}, seconds=0.25),
            ItemResult(number=1, error=BrokenImage("It is.")),
        ),
    }
    return Results(**facts | changes)


def check_chunk(path):
    """Open a chunk and close it again."""
    with open_chunk(path):
        return


def rewritten(path, change=lambda document: None, files=lambda files: None, main="chunk.json", **options):
    """Write a zip again by hand after changes to its document and its files."""
    with zipfile.ZipFile(path) as found:
        contents = {name: found.read(name) for name in found.namelist()}
    document = json.loads(contents.pop(main))
    replaced = change(document)
    raw = replaced if isinstance(replaced, bytes) else json.dumps(replaced or document).encode()
    files(contents)
    with zipfile.ZipFile(path, "w", **options) as target:
        for name, data in contents.items():
            target.writestr(name, data)
        target.writestr(main, raw)
    return path


def test_chunk_that_was_written_is_read(chunk):
    with open_chunk(chunk) as reader:
        first, second = reader.items

        assert (reader.chunk_id, reader.service, reader.model) == ("id-1", "classification", "vgg16")
        assert (reader.digest, reader.is_resized) == (DIGEST, False)
        assert (first.params, second.params) == ({"top": 3}, {})
        assert reader.read_inputs(first) == {"image": b"from memory"}
        assert reader.read_inputs(second) == {"image": b"from a file"}


def test_chunk_records_that_its_inputs_are_resized(tmp_path):
    items = [ChunkItem(number=0, inputs={"image": b"pixels"})]
    write_chunk(tmp_path / "c.zip", "id", "classification", "vgg16", None, items, is_resized=True)

    with open_chunk(tmp_path / "c.zip") as reader:
        assert reader.is_resized


def test_images_lie_in_the_chunk_as_they_are(chunk):
    with zipfile.ZipFile(chunk) as found:
        assert sorted(found.namelist()) == ["0-image", "1-image", "chunk.json"]
        assert {info.compress_type for info in found.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time[0] for info in found.infolist()} == {1980}
    assert b"from a file" in chunk.read_bytes()


def test_results_that_were_written_are_read(tmp_path):
    write_results(tmp_path / "results.zip", results())

    # As text, because errors are not compared by value.
    assert repr(read_results(tmp_path / "results.zip", "id-1", "vgg16", [1, 0], DIGEST)) == repr(results())


def test_nothing_but_the_file_is_left(tmp_path):
    write_results(tmp_path / "results.zip", results())

    assert [path.name for path in tmp_path.iterdir()] == ["results.zip"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_results(tmp_path / "results.zip", results())
    before = (tmp_path / "results.zip").read_bytes()

    with pytest.raises(MalformedResults):
        write_results(tmp_path / "results.zip", results(items=(ItemResult(number=0, output=float("nan")),)))

    assert [path.name for path in tmp_path.iterdir()] == ["results.zip"]
    assert (tmp_path / "results.zip").read_bytes() == before


def test_long_reason_is_cut_when_written(tmp_path):
    error = BrokenImage("x" * 5000)
    write_results(tmp_path / "r.zip", results(items=(ItemResult(number=0, error=error),)))

    assert len(read_results(tmp_path / "r.zip", "id-1", "vgg16", [0]).items[0].error.reason) == 1000


@pytest.mark.parametrize(
    ("items", "facts"),
    [
        ([], {}),
        ([ChunkItem(number=i, inputs={"image": b""}) for i in range(17)], {}),
        ([ChunkItem(number=1, inputs={"image": b""})], {}),
        ([ChunkItem(number=0, inputs={})], {}),
        ([ChunkItem(number=0, inputs={"../image": b""})], {}),
        ([ChunkItem(number=0, inputs={"image": b""}, params={"x": float("inf")})], {}),
        ([ChunkItem(number=0, inputs={"image": b""}, params={"x": object()})], {}),
        ([ChunkItem(number=0, inputs={"image": b""}, params={"x": "y" * 2_000_000})], {}),
        ([ChunkItem(number=0, inputs={"image": b""})], {"chunk_id": "../x"}),
        ([ChunkItem(number=0, inputs={"image": b""})], {"model": "VGG 16"}),
        ([ChunkItem(number=0, inputs={"image": b""})], {"digest": "none"}),
    ],
)
def test_chunk_that_no_reader_would_take_is_not_written(tmp_path, items, facts):
    facts = {"chunk_id": "id", "service": "classification", "model": "vgg16", "digest": None} | facts

    with pytest.raises(MalformedChunk):
        write_chunk(tmp_path / "chunk.zip", items=items, **facts)

    assert list(tmp_path.iterdir()) == []


def test_chunk_of_too_many_bytes_is_not_written(tmp_path):
    megabytes = bytes(22 * 1024 * 1024)
    items = [ChunkItem(number=i, inputs={"image": megabytes}) for i in range(3)]

    with pytest.raises(MalformedChunk, match="67108864"):
        write_chunk(tmp_path / "chunk.zip", "id", "classification", "vgg16", None, items)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.update(more=1),
        lambda d: d.pop("digest") and None,
        lambda d: d.pop("is_shrunk") and None,
        lambda d: d.update(is_shrunk=1),
        lambda d: d.update(chunk_id="../../x"),
        lambda d: d.update(chunk_id=7),
        lambda d: d.update(model="../x"),
        lambda d: d.update(items=[]),
        lambda d: d.update(items={}),
        lambda d: d["items"].reverse(),
        lambda d: d["items"][0].update(number=True),
        lambda d: d["items"][0].update(inputs={"../image": 11}),
        lambda d: d["items"][0].update(inputs={"image": 10}),
        lambda d: d["items"][0].update(inputs={"image": -1}),
        lambda d: d["items"][0].update(inputs={"image": 1e3}),
        lambda d: d["items"][0].update(params=[]),
        lambda d: d["items"][0].update(params={"x": deep(30)}),
        lambda d: b"[]",
        lambda d: b"",
        lambda d: b"\xff\xfe",
        lambda d: b"[" * 100_000,
        lambda d: json.dumps(d).replace('"top": 3', '"top": NaN').encode(),
        lambda d: json.dumps(d).replace('"top": 3', '"top": 1e999').encode(),
        lambda d: json.dumps(d).replace('"top": 3', '"top": ' + "9" * 10_000).encode(),
        lambda d: json.dumps(d).replace('"top": 3', '"top": 3, "top": 4').encode(),
        lambda d: json.dumps(d).encode() + b" " * 1024 * 1024,
    ],
)
def test_chunk_with_a_bad_document_is_refused(chunk, change):
    rewritten(chunk, change)

    with pytest.raises(MalformedChunk):
        check_chunk(chunk)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "0-image/../x", "2-image", "0-IMAGE", "chunk.json.bak"])
def test_chunk_with_a_file_too_many_is_refused(chunk, name):
    rewritten(chunk, files=lambda files: files.update({name: b""}))

    with pytest.raises(MalformedChunk):
        check_chunk(chunk)


def test_chunk_with_a_file_too_few_is_refused(chunk):
    rewritten(chunk, files=lambda files: files.pop("1-image"))

    with pytest.raises(MalformedChunk):
        check_chunk(chunk)


def test_compressed_chunk_is_refused_because_it_could_swell(chunk):
    rewritten(chunk, compression=zipfile.ZIP_DEFLATED)

    with pytest.raises(MalformedChunk, match="compressed"):
        check_chunk(chunk)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_file_that_occurs_twice_is_refused(chunk):
    with zipfile.ZipFile(chunk, "a") as found:
        found.writestr("0-image", b"from memory")

    with pytest.raises(MalformedChunk, match="twice"):
        check_chunk(chunk)


def test_list_of_a_million_files_is_refused_before_it_is_read(tmp_path):
    entry = b"PK\1\2" + bytes(24) + b"\1\0" + bytes(16) + b"x"
    entries = entry * 200_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(entries), 0, 0)
    (tmp_path / "chunk.zip").write_bytes(entries + end)

    with pytest.raises(MalformedChunk, match="more files"):
        check_chunk(tmp_path / "chunk.zip")


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 10, b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18])
def test_file_that_is_no_zip_is_refused(tmp_path, data):
    (tmp_path / "chunk.zip").write_bytes(data)

    with pytest.raises(MalformedChunk):
        check_chunk(tmp_path / "chunk.zip")


def test_missing_chunk_is_refused(tmp_path):
    with pytest.raises(MalformedChunk, match="cannot be opened"):
        check_chunk(tmp_path / "chunk.zip")


def test_chunk_larger_than_any_may_be_is_refused_unread(tmp_path):
    with (tmp_path / "chunk.zip").open("wb") as file:
        file.truncate(100 * 1024 * 1024)

    with pytest.raises(MalformedChunk, match="more than a chunk may have"):
        check_chunk(tmp_path / "chunk.zip")


def test_every_cut_and_every_flipped_byte_is_refused_or_harmless(chunk):
    intact = chunk.read_bytes()

    damaged = [intact[:length] for length in range(len(intact))]
    for position in range(len(intact)):
        damaged.append(intact[:position] + bytes([intact[position] ^ 0xFF]) + intact[position + 1 :])
    for data in damaged:
        chunk.write_bytes(data)
        try:
            with open_chunk(chunk) as reader:
                contents = [reader.read_inputs(item)["image"] for item in reader.items]
        except MalformedChunk:
            continue

        assert contents == [b"from memory", b"from a file"]


def test_more_bytes_than_announced_are_refused(chunk):
    data = bytearray(chunk.read_bytes())
    # Both headers of 0-image announce one byte less; its CRC would still tell, were it read whole.
    for signature, offset in ((b"PK\3\4", 18), (b"PK\1\2", 20)):
        position = data.index(signature) + offset
        struct.pack_into("<LL", data, position, 10, 10)
    chunk.write_bytes(data)

    with pytest.raises(MalformedChunk):
        check_chunk(chunk)


def test_threads_may_share_a_reader(chunk):
    from concurrent.futures import ThreadPoolExecutor

    with open_chunk(chunk) as reader, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reader.read_inputs(reader.items[i % 2])["image"], range(200)))

    assert found == [b"from memory", b"from a file"] * 100


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version="1"),
        lambda d: d.update(chunk_id="id-2"),
        lambda d: d.update(model="vgg19"),
        lambda d: d.update(digest="1" * 64),
        lambda d: d.update(digest=None),
        lambda d: d.update(versions={"x": 1}),
        lambda d: d.update(versions={str(i): "" for i in range(100)}),
        lambda d: d.update(cpu="x" * 1000),
        lambda d: d.update(load_seconds=-1),
        lambda d: d.update(load_seconds=True),
        lambda d: d.update(peak_memory_bytes=1.5),
        lambda d: d["items"].pop(),
        lambda d: d["items"].append(d["items"][0]),
        lambda d: d["items"][1].update(number=0),
        lambda d: d["items"][1].update(number=5),
        lambda d: d["items"][1].update(ok=1),
        lambda d: d["items"][1].update(ok=True),
        lambda d: d["items"][1].update(seconds="1"),
        lambda d: d["items"][1].update(output=[]),
        lambda d: d["items"][1]["error"].update(code="Bad Code\n"),
        lambda d: d["items"][1]["error"].update(reason="x" * 1001),
        lambda d: d["items"][1]["error"].update(permanent=None),
        lambda d: d["items"][1]["error"].update(more=1),
        lambda d: d["items"][0].update(error=None),
        lambda d: d["items"][0].update(output=deep(40)),
        lambda d: d["items"][0].update(files={"out.png": 7}),
        lambda d: d["items"][0].update(files={"/out.png": 6}),
        lambda d: json.dumps(d).replace("0.5", "-Infinity").encode(),
    ],
)
def test_results_with_a_bad_document_are_refused(tmp_path, change):
    path = tmp_path / "results.zip"
    write_results(path, results())
    rewritten(path, change, main="results.json")

    with pytest.raises(MalformedResults):
        read_results(path, "id-1", "vgg16", [0, 1], DIGEST)


@pytest.mark.parametrize("numbers", [[], [0], [0, 1, 2], [0, 2], [0, 0, 1]])
def test_results_must_have_exactly_the_items_of_the_chunk(tmp_path, numbers):
    write_results(tmp_path / "r.zip", results())

    with pytest.raises(MalformedResults):
        read_results(tmp_path / "r.zip", "id-1", "vgg16", numbers)


@pytest.mark.parametrize("max_bytes", [{}, {"mask.png": 6}, {"out.png": 5}])
def test_files_that_nobody_asked_for_are_refused_before_they_are_read(tmp_path, monkeypatch, max_bytes):
    write_results(tmp_path / "r.zip", results())
    monkeypatch.setattr(archive.Archive, "read", lambda *_: pytest.fail("it was read"))

    with pytest.raises(MalformedResults, match=r"out\.png of 6 bytes, which nobody asked for"):
        read_results(tmp_path / "r.zip", "id-1", "vgg16", [0, 1], DIGEST, max_bytes=max_bytes)


def test_files_that_were_asked_for_are_read(tmp_path):
    write_results(tmp_path / "r.zip", results())

    found = read_results(tmp_path / "r.zip", "id-1", "vgg16", [0, 1], DIGEST, max_bytes={"out.png": 6})

    assert len(found.items[0].files["out.png"]) == 6


def test_document_just_within_its_limit_is_read(chunk):
    with zipfile.ZipFile(chunk) as found:
        length = len(found.read("chunk.json"))
    rewritten(chunk, lambda d: json.dumps(d, separators=(",", ":")).encode().ljust(archive.MAX_JSON_BYTES))

    check_chunk(chunk)

    assert length < archive.MAX_JSON_BYTES
    assert io.BytesIO(chunk.read_bytes()).read(2) == b"PK"
