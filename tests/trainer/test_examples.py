"""Reading examples: folders, zips and CSV files, also hostile ones."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from trainer.errors import UnusableExamples
from trainer.examples import Example, ExampleLimits, ExampleSet, check_examples, read_examples


def image(colour: str = "teal", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(file, kind)
    return file.getvalue()


TWO_CLASSES = {f"{name}/{number}.png": image() for name in ("cat", "dog") for number in range(5)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def pack(path: Path, files: dict[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def read(source: Path, work: Path, **options: object) -> ExampleSet:
    return read_examples(source, work, **options)  # type: ignore[arg-type]


def reasons(found: ExampleSet) -> dict[str, str]:
    return {each.name: each.reason for each in found.skipped}


# Folders


def test_a_folder_per_class_is_read_with_names_and_classes(tmp_path: Path, work: Path) -> None:
    files = {**TWO_CLASSES, "dog/puppies/6.jpg": image("red", "JPEG")}

    found = read(write(tmp_path / "photos", files), work)

    assert [each.name for each in found.examples] == sorted(files)
    assert found.count_classes() == {"cat": 5, "dog": 6}
    assert found.skipped == ()
    assert all(each.data == tmp_path / "photos" / each.name for each in found.examples)


def test_what_is_no_usable_image_is_skipped_with_its_reason(tmp_path: Path, work: Path) -> None:
    files = {
        **TWO_CLASSES,
        "cat/notes.txt": b"no image",
        "cat/broken.png": image()[:40],
        "cat/large.png": image() + bytes(5000),
        "loose.png": image(),
        ".DS_Store": b"x",
        "dog/.hidden.png": image(),
    }

    found = read(write(tmp_path / "photos", files), work, limits=ExampleLimits(max_image_bytes=5000))

    assert set(reasons(found)) == {"cat/notes.txt", "cat/broken.png", "cat/large.png", "loose.png"}
    assert "not an image" in reasons(found)["cat/notes.txt"]
    assert "0.005 MB" in reasons(found)["cat/large.png"]
    assert "not in the folder of a class" in reasons(found)["loose.png"]
    assert len(found.examples) == 10


def test_links_are_not_followed(tmp_path: Path, work: Path) -> None:
    folder = write(tmp_path / "photos", TWO_CLASSES)
    write(tmp_path / "elsewhere", {"secret.png": image()})
    (folder / "cat" / "link.png").symlink_to(tmp_path / "elsewhere" / "secret.png")
    (folder / "linked_class").symlink_to(tmp_path / "elsewhere")

    found = read(folder, work)

    assert found.count_classes() == {"cat": 5, "dog": 5}


def test_the_error_names_the_classes_that_need_more_images(tmp_path: Path, work: Path) -> None:
    files = {**TWO_CLASSES, "bird/1.png": image(), "bird/2.png": b"broken"}

    with pytest.raises(UnusableExamples, match=r"at least 5 images.*'bird' has 1\. 1 files or rows") as caught:
        read(write(tmp_path / "photos", files), work)

    assert "cat" not in caught.value.reason


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no class with an image"),
        ({"loose.png": image()}, "no class with an image"),
        ({name: data for name, data in TWO_CLASSES.items() if name.startswith("cat")}, "only one class, 'cat'"),
    ],
)
def test_one_class_is_not_enough(tmp_path: Path, work: Path, files: dict[str, bytes], message: str) -> None:
    (tmp_path / "photos").mkdir()

    with pytest.raises(UnusableExamples, match=message):
        read(write(tmp_path / "photos", files), work)


def test_too_many_images_files_classes_and_bytes_are_refused(tmp_path: Path, work: Path) -> None:
    folder = write(tmp_path / "photos", TWO_CLASSES)

    for limits, message in (
        (ExampleLimits(max_examples=9), "more than 9 images"),
        (ExampleLimits(max_files=9), "more than 9 files"),
        (ExampleLimits(max_classes=1), "at most 1 are allowed"),
        (ExampleLimits(max_total_bytes=100), "The images have more than"),
    ):
        with pytest.raises(UnusableExamples, match=message):
            read(folder, work, limits=limits)


def test_a_source_that_is_nothing_known_is_refused(tmp_path: Path, work: Path) -> None:
    write(tmp_path, {"photos.tar": b"x"})

    with pytest.raises(UnusableExamples, match="neither a folder nor a zip"):
        read(tmp_path / "photos.tar", work)
    with pytest.raises(UnusableExamples, match="There is no"):
        read(tmp_path / "missing", work)


# Zip files


@pytest.mark.parametrize("around", ["", "photos/", "a/photos/"])
def test_a_zip_is_read_like_the_folder_that_was_packed(tmp_path: Path, work: Path, around: str) -> None:
    files = {f"{around}{name}": data for name, data in TWO_CLASSES.items()}
    source = pack(tmp_path / "photos.zip", {**files, "__MACOSX/photos/._1.png": b"x"})

    found = read(source, work)

    assert [each.name for each in found.examples] == sorted(TWO_CLASSES)
    assert found.count_classes() == {"cat": 5, "dog": 5}
    assert all(isinstance(each.data, Path) and each.data.parent == work for each in found.examples)
    assert found.examples[0].data.read_bytes() == TWO_CLASSES["cat/0.png"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["../cat/x.png", "cat/../../x.png", "/cat/x.png", "cat\\x.png", "cat/a\x1bb.png"])
def test_a_name_that_leads_elsewhere_is_skipped(tmp_path: Path, work: Path, name: str) -> None:
    found = read(pack(tmp_path / "photos.zip", {**TWO_CLASSES, name: image()}), work)

    assert len(found.examples) == 10
    assert [each.reason for each in found.skipped] == ["Its name leads out of the zip or has control characters."]
    assert found.skipped[0].name.isprintable()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "photos.zip", *work.iterdir()}


def test_links_encrypted_files_and_repeated_names_in_a_zip_are_skipped(tmp_path: Path, work: Path) -> None:
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name, data in TWO_CLASSES.items():
            archive.writestr(name, data)
        archive.writestr(link, b"/etc/passwd")
        archive.writestr("cat/0.png", image("red"))
        archive.writestr("cat/unusual.png", image(), zipfile.ZIP_BZIP2)
        archive.writestr("cat/secret.png", image())
    raw = bytearray((tmp_path / "photos.zip").read_bytes())
    directory = raw.rfind(b"PK\x01\x02")  # of the last file
    raw[directory + 8] |= 1
    (tmp_path / "photos.zip").write_bytes(raw)

    found = read(tmp_path / "photos.zip", work)

    assert {name: reason.split(".")[0] for name, reason in reasons(found).items()} == {
        "cat/link.png": "It is a link or no ordinary file",
        "cat/0.png": "The zip has another file of this name",
        "cat/unusual.png": "It is compressed by an unusual method",
        "cat/secret.png": "It is encrypted",
    }
    assert len(found.examples) == 10


def test_names_with_needless_parts_are_the_same_names(tmp_path: Path, work: Path) -> None:
    files = {f"./{name}".replace("/0", "//0"): data for name, data in TWO_CLASSES.items()}

    found = read(pack(tmp_path / "photos.zip", {**files, "cat/./1.png": image()}), work)

    assert [each.name for each in found.examples] == sorted(TWO_CLASSES)
    assert list(reasons(found)) == ["cat/1.png"]


def test_a_zip_whose_end_says_too_little_is_refused(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", TWO_CLASSES)
    raw = source.read_bytes()
    fewer = raw[:-22] + raw[-22:-14] + struct.pack("<HH", 1, 1) + raw[-10:]
    pointed = raw[:-22] + b"PK\x06\x07" + bytes(16) + raw[-22:]

    for data in (fewer, pointed):
        source.write_bytes(data)
        with pytest.raises(UnusableExamples, match=r"more than (9|60000) files"):
            read(source, work, limits=ExampleLimits(max_files=9 if data is fewer else 60_000))


def test_a_zip_that_does_not_fit_on_the_disk_is_refused(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", TWO_CLASSES)

    with pytest.raises(UnusableExamples, match="cannot be unpacked"):
        read(source, work / "missing")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", {**TWO_CLASSES, "cat/bomb.png": bytes(50_000)})

    found = read(source, work, limits=ExampleLimits(max_image_bytes=10_000))
    with pytest.raises(UnusableExamples, match="The images have more than"):
        read(source, work, limits=ExampleLimits(max_total_bytes=20_000))

    assert list(reasons(found)) == ["cat/bomb.png"]


def test_a_file_that_is_larger_than_the_zip_declares_is_skipped(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", {**TWO_CLASSES, "cat/liar.png": bytes(50_000)})
    raw = bytearray(source.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<L", raw, raw.rfind(signature) + offset, 100)
    source.write_bytes(raw)

    found = read(source, work)

    assert "damaged" in reasons(found)["cat/liar.png"]
    assert len(found.examples) == 10


def test_a_damaged_entry_is_skipped_and_a_damaged_zip_refused(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", {"cat/bad.png": image("red"), **TWO_CLASSES}, zipfile.ZIP_STORED)
    raw = bytearray(source.read_bytes())
    raw[60] ^= 0xFF
    source.write_bytes(raw)

    found = read(source, work)
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04" + bytes(40) + raw[-22:])

    assert "damaged" in reasons(found)["cat/bad.png"]
    with pytest.raises(UnusableExamples, match="is not a valid zip"):
        read(tmp_path / "cut.zip", work)


def test_the_directory_of_a_zip_is_limited_before_it_is_read(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", TWO_CLASSES)

    for limits in (ExampleLimits(max_files=9), ExampleLimits(max_directory_bytes=100)):
        with pytest.raises(UnusableExamples, match="files, or names that are too long"):
            read(source, work, limits=limits)
    with pytest.raises(UnusableExamples, match="GB"):
        read(source, work, limits=ExampleLimits(max_zip_bytes=100))


def test_a_long_comment_does_not_hide_that_the_directory_is_elsewhere(tmp_path: Path, work: Path) -> None:
    source = pack(tmp_path / "photos.zip", TWO_CLASSES)
    raw = source.read_bytes()
    start = raw.rfind(b"PK\x05\x06")
    directory_bytes, directory_at = struct.unpack_from("<LL", raw, start + 12)
    end = struct.pack("<4sQHHLLQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 10, 10, directory_bytes, directory_at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, start, 1)
    # Zeros and the largest numbers: what counts is in the larger record.
    last = struct.pack("<4sHHHHLLH", b"PK\x05\x06", 0, 0, 0xFFFF, 0, 0, 0, 65_535) + bytes(65_535)
    source.write_bytes(raw[:start] + end + locator + last)
    assert len(zipfile.ZipFile(source).infolist()) == 10

    with pytest.raises(UnusableExamples, match="names that are too long"):
        read(source, work, limits=ExampleLimits(max_files=70_000, max_directory_bytes=100))


# CSV files


def table(folder: Path, *lines: str) -> Path:
    write(folder, {"table.csv": "\n".join(lines).encode()})
    return folder / "table.csv"


def test_a_csv_file_gives_numbers(tmp_path: Path, work: Path) -> None:
    write(tmp_path, {f"{number}.png": image() for number in range(10)})
    source = table(tmp_path, "Image;score", *(f"{number}.png;{number / 2}" for number in range(10)))

    found = read(source, work, target="score")

    assert [each.target for each in found.examples] == [number / 2 for number in range(10)]
    assert {each.label for each in found.examples} == {None}
    assert found.examples[3].name == "3.png"


def test_a_csv_file_gives_classes(tmp_path: Path, work: Path) -> None:
    write(tmp_path, TWO_CLASSES)
    source = table(tmp_path, "path,label", *(f"{name},{name[:3].upper()}" for name in TWO_CLASSES))

    found = read(source, work)

    assert found.count_classes() == {"CAT": 5, "DOG": 5}
    assert {each.target for each in found.examples} == {None}


def test_a_table_in_a_zip_or_folder_names_its_images(tmp_path: Path, work: Path) -> None:
    lines = "\n".join(["image,score", *(f"{name},{number}" for number, name in enumerate(TWO_CLASSES))])
    files = {"ratings.csv": lines.encode(), **TWO_CLASSES}

    packed = read(
        pack(tmp_path / "photos.zip", {f"x/{name}": data for name, data in files.items()}), work, target="score"
    )
    listed = read(write(tmp_path / "photos", files), work, target="score")

    assert [each.target for each in packed.examples] == [each.target for each in listed.examples] == list(range(10))
    with pytest.raises(UnusableExamples, match="there are 0"):
        read(write(tmp_path / "others", TWO_CLASSES), work, target="score")


def test_rows_that_cannot_be_used_are_skipped_with_their_reason(tmp_path: Path, work: Path) -> None:
    folder = write(tmp_path / "inside", {f"{number}.png": image() for number in range(10)})
    write(tmp_path, {"outside.png": image()})
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    good = [f"{number}.png,{number}" for number in range(10)]
    bad = {
        "../outside.png": "no such file",
        str(tmp_path / "outside.png"): "no such file",
        "link.png": "no such file",
        "missing.png": "no such file",
        "https://example.com/1.png": "not fetched",
    }

    source = table(folder, "image,score", *good, *(f"{name},1" for name in bad), "1.png,high", "2.png,nan", "3.png,inf")
    found = read(source, work, target="score")

    assert len(found.examples) == 10
    assert [each.reason for each in found.skipped[-3:]] == [
        f"{text!r} is not a number." for text in ("high", "nan", "inf")
    ]
    assert all(reason in reasons(found)[name] for name, reason in bad.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"image,score\n1.png\n", "Line 2 of table.csv has 1 values, the header has 2"),
        (b"image,points\n1.png,1\n", "needs one column 'score'. It has: image, points"),
        (b"picture,score\n1.png,1\n", "needs one column 'image' or"),
        (b"image,score,Score\n1.png,1,2\n", "needs one column 'score'"),
        (b'image,score\n"1.png,1\n', "cannot be read"),
        (b"image,score\n" + b"x" * 200_000 + b",1\n", "cannot be read"),
        (b"image,score\n", "at least 10 are needed"),
    ],
)
def test_a_csv_file_that_cannot_be_used_is_refused(tmp_path: Path, work: Path, text: bytes, message: str) -> None:
    write(tmp_path, {"table.csv": text})

    with pytest.raises(UnusableExamples, match=message):
        read(tmp_path / "table.csv", work, target="score")


def test_limits_of_a_csv_file(tmp_path: Path, work: Path) -> None:
    write(tmp_path, TWO_CLASSES)
    source = table(tmp_path, "path,label", *(f"{name},{name[:3]}" for name in TWO_CLASSES))

    for limits in (ExampleLimits(max_table_bytes=20), ExampleLimits(max_examples=9), ExampleLimits(max_total_bytes=99)):
        with pytest.raises(UnusableExamples, match="more than"):
            read(source, work, limits=limits)
    with pytest.raises(UnusableExamples, match="more than 20 images"):
        read(table(tmp_path, "path,label", *["x,y"] * 21), work, limits=ExampleLimits(max_examples=20))


def test_composed_and_decomposed_letters_are_one_class(tmp_path: Path, work: Path) -> None:
    # macOS writes ü as two characters.
    names = ["Hu\u0308hner", "H\u00fchner"]
    files = {f"{name}/{number}.png": image() for name in names for number in range(3)}

    found = read(write(tmp_path / "photos", {**files, **TWO_CLASSES}), work)

    assert found.count_classes() == {"H\u00fchner": 6, "cat": 5, "dog": 5}


def test_numbers_need_no_classes() -> None:
    examples = tuple(Example(name=str(number), target=float(number), data=b"") for number in range(10))

    check_examples(ExampleSet(examples=examples), has_numbers=True)
    with pytest.raises(UnusableExamples, match="There are 9 images with a number"):
        check_examples(ExampleSet(examples=examples[:9]), has_numbers=True)
    check_examples(ExampleSet(examples=examples[:9]), ExampleLimits(min_with_number=9), has_numbers=True)
