"""Examples to learn from: images with their classes or numbers, read from a folder, a zip or a CSV file.

A folder has a folder for each class; its name is the class's name. A zip is the same, packed. A CSV file has a row for
each image: its path, below the folder of the file, and its class or its number. What is read may come from strangers:
names, sizes and counts are limited, and nothing outside the folder is read. Images that cannot be used are left out,
and listed with the reason.
"""

from __future__ import annotations

import csv
import io
import math
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from provider_image.errors import DAMAGED_FILE_ERRORS, BadInput
from provider_image.features.normal_form import normalise
from provider_image.images.headers import MAX_PIXELS, read_header
from provider_image.rows import find_delimiter
from trainer.errors import UnusableExamples

#: Most characters of a class's name, as in labels files.
MAX_CLASS_NAME = 100
#: Names of the column with the image's path, and of the column with its class.
IMAGE_COLUMNS = ("image", "path", "file", "filename", "name")
LABEL_COLUMNS = ("label", "class")
#: Files and folders that systems add on their own: they are no examples, and not worth a line.
_IGNORED_NAMES = {"__MACOSX", "Thumbs.db", "desktop.ini"}
#: The end of a zip: its signature, the size of the record, and the longest comment after it.
_ZIP_END, _ZIP_END_BYTES, _MAX_ZIP_COMMENT = b"PK\x05\x06", 22, 65_535
#: What stands before the end of a zip that has larger numbers than fit into it.
_ZIP64_LOCATOR, _ZIP64_LOCATOR_BYTES = b"PK\x06\x07", 20
#: What zipfile raises for damaged or manipulated files; NotImplementedError for methods that it does not know.
_ZIP_ERRORS = (zipfile.BadZipFile, *DAMAGED_FILE_ERRORS)


@dataclass(frozen=True, kw_only=True)
class Example:
    """One input, and what it should be answered with."""

    #: Its path in the folder or the zip, or the number of its row.
    name: str
    #: Its class; None for an example with a number.
    label: str | None = None
    #: Its number; None for an example with a class.
    target: float | None = None
    #: The input, or the file that has it.
    data: bytes | Path


@dataclass(frozen=True, kw_only=True)
class SkippedExample:
    """A file or a row that is not used."""

    #: Its path, or the number of its row.
    name: str
    #: Why, for people.
    reason: str


@dataclass(frozen=True, kw_only=True)
class ExampleSet:
    """What was read."""

    #: What can be learned from, in the order of the names or rows.
    examples: tuple[Example, ...]
    #: What is left out.
    skipped: tuple[SkippedExample, ...] = ()

    def count_classes(self) -> dict[str, int]:
        """Return class -> number of its examples, by name."""
        return dict(sorted(Counter(each.label for each in self.examples if each.label is not None).items()))


@dataclass(frozen=True, kw_only=True)
class ExampleLimits:
    """What is read at most, and the least that is enough."""

    #: Most images, and most files in a folder or zip, whatever they are.
    max_examples: int = 50_000
    max_files: int = 60_000
    #: Most classes.
    max_classes: int = 1000
    #: Most bytes of an image, and of all images after unpacking.
    max_image_bytes: int = 16_000_000
    max_total_bytes: int = 8_000_000_000
    #: Most bytes of a zip, of its directory, and of a CSV file.
    max_zip_bytes: int = 4_000_000_000
    max_directory_bytes: int = 16_000_000
    max_table_bytes: int = 16_000_000
    #: Fewest images of a class.
    min_of_class: int = 5
    #: Fewest images with a number.
    min_with_number: int = 10
    #: Of a CSV file of rows or texts: most rows, most values, and most different terms of a text, added up.
    max_rows: int = 200_000
    max_values: int = 5_000_000
    max_text_terms: int = 5_000_000


#: Finds a file by its path below the folder or in the zip; None if there is none.
_FindFile = Callable[[str], Path | None]


def read_examples(
    source: Path,
    work: Path,
    *,
    target: str | None = None,
    label: str | None = None,
    limits: ExampleLimits | None = None,
) -> ExampleSet:
    """Read examples and check that there are enough of each class.

    :param source: a folder, a zip or a CSV file.
    :param work: an empty folder, which gets the images of a zip; the examples refer to them.
    :param target: the column of a CSV file with a number; the examples get numbers instead of classes. With a folder or
        a zip, the only CSV file at its top is read.
    :param label: the column of a CSV file with the class; by default one of LABEL_COLUMNS.
    :raises UnusableExamples: it cannot be read, is too large, or a class has too few images; names them.
    """
    limits = limits or ExampleLimits()
    skipped: list[SkippedExample] = []
    if not source.exists():
        raise UnusableExamples(f"There is no {source}.")
    if source.suffix.lower() == ".csv":
        found = _read_table(source, _files_below(source.parent), target, label, limits)
    else:
        if source.is_dir():
            files = _list_folder(source, limits)
        elif zipfile.is_zipfile(source):
            files, skipped = _unpack(source, work, limits)
        else:
            raise UnusableExamples(f"{source.name} is neither a folder nor a zip nor a .csv file.")
        if target is not None or label is not None:
            found = _read_table(_only_table(files), files.get, target, label, limits)
        else:
            found = _read_classes(files, limits)
    found = ExampleSet(examples=found.examples, skipped=(*found.skipped, *skipped))
    check_examples(found, limits, has_numbers=target is not None)
    return found


def check_examples(found: ExampleSet, limits: ExampleLimits | None = None, *, has_numbers: bool | None = None) -> None:
    """Check that there are enough examples.

    :param has_numbers: whether they are to have numbers instead of classes; None takes what they have.
    :raises UnusableExamples: there are not; names the classes that need more.
    """
    limits = limits or ExampleLimits()
    left_out = f" {len(found.skipped)} files or rows could not be used." if found.skipped else ""
    if any(each.target is not None for each in found.examples) if has_numbers is None else has_numbers:
        if len(found.examples) < limits.min_with_number:
            raise UnusableExamples(
                f"There are {len(found.examples)} images with a number; at least {limits.min_with_number} are needed."
                + left_out
            )
        return
    counts = found.count_classes()
    if len(counts) < 2:
        what = f"only one class, {next(iter(counts))!r}" if counts else "no class with an image"
        raise UnusableExamples(f"There is {what}. Give at least two: a folder with images for each.{left_out}")
    if len(counts) > limits.max_classes:
        raise UnusableExamples(f"There are {len(counts)} classes; at most {limits.max_classes} are allowed.")
    short = [f"{name!r} has {count}" for name, count in counts.items() if count < limits.min_of_class]
    if short:
        more = f" and {len(short) - 10} more" if len(short) > 10 else ""
        raise UnusableExamples(
            f"Each class needs at least {limits.min_of_class} images. Too few: {', '.join(short[:10])}{more}.{left_out}"
        )


def _read_classes(files: Mapping[str, Path], limits: ExampleLimits) -> ExampleSet:
    """Take the first folder of each path as the class."""
    examples: list[Example] = []
    skipped: list[SkippedExample] = []
    total = 0
    for name, path in sorted(files.items()):
        folder, slash, _ = name.partition("/")
        label = normalise(folder).strip()
        try:
            if not slash:
                raise UnusableExamples("It is not in the folder of a class.")
            check_class_name(label)
            total += _check_image(path, limits)
        except BadInput as error:
            skipped.append(SkippedExample(name=name, reason=error.reason))
            continue
        _check_total(len(examples) + 1, total, limits)
        examples.append(Example(name=name, label=label, data=path))
    return ExampleSet(examples=tuple(examples), skipped=tuple(skipped))


def check_class_name(name: str) -> None:
    """Check the name of a class. :raises UnusableExamples:"""
    if not 0 < len(name) <= MAX_CLASS_NAME or not name.isprintable():
        raise UnusableExamples(
            f"{name[:MAX_CLASS_NAME]!r} is not the name of a class: it has 1 to {MAX_CLASS_NAME} characters and no "
            "control characters."
        )


def _check_image(path: Path, limits: ExampleLimits) -> int:
    """Check the header of an image. :return: its bytes. :raises BadInput: it cannot be used."""
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_image_bytes + 1)
    except OSError as error:
        raise UnusableExamples(f"It cannot be read: {error.strerror}.") from error
    if len(data) > limits.max_image_bytes:
        raise UnusableExamples(f"It has more than {limits.max_image_bytes / 1e6:g} MB.")
    read_header(data, MAX_PIXELS)
    return len(data)


def _check_total(count: int, total: int, limits: ExampleLimits) -> None:
    if count > limits.max_examples:
        raise UnusableExamples(f"There are more than {limits.max_examples} images.")
    if total > limits.max_total_bytes:
        raise UnusableExamples(f"The images have more than {limits.max_total_bytes / 1e9:g} GB. Scale them down.")


# Folders


def _list_folder(folder: Path, limits: ExampleLimits) -> dict[str, Path]:
    """Return path below the folder -> file. Links are not followed."""
    found: dict[str, Path] = {}
    waiting = [folder]
    while waiting:
        try:
            entries = sorted(waiting.pop().iterdir())
        except OSError as error:
            raise UnusableExamples(f"{error.filename} cannot be read: {error.strerror}.") from error
        for entry in entries:
            if _is_ignored(entry.name) or entry.is_symlink():
                continue
            if entry.is_dir():
                waiting.append(entry)
            elif entry.is_file():
                found[entry.relative_to(folder).as_posix()] = entry
        if len(found) > limits.max_files or len(waiting) > limits.max_files:
            raise UnusableExamples(f"{folder} has more than {limits.max_files} files.")
    return found


def _is_ignored(name: str) -> bool:
    return (name.startswith(".") and name != "..") or name in _IGNORED_NAMES


def _files_below(folder: Path) -> _FindFile:
    """Find files below a folder, links that lead out of it excluded."""
    root = folder.resolve()

    def find(name: str) -> Path | None:
        try:
            path = (root / name).resolve()
            return path if path.is_relative_to(root) and path.is_file() else None
        except (OSError, ValueError):  # too long, or a NUL in it
            return None

    return find


# Zip files


def _unpack(source: Path, work: Path, limits: ExampleLimits) -> tuple[dict[str, Path], list[SkippedExample]]:
    """Unpack a zip into files with names of our own. :return: path in the zip -> file, and what was left out."""
    files: dict[str, Path] = {}
    skipped: list[SkippedExample] = []
    total = 0
    try:
        _check_zip_end(source, limits)
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            if len(entries) > limits.max_files:  # more than the end of the zip says
                raise UnusableExamples(f"{source.name} has more than {limits.max_files} files.")
            for number, entry in enumerate(entries):
                if entry.is_dir() or any(map(_is_ignored, PurePosixPath(entry.filename).parts)):
                    continue
                reason, data = _refusal(entry, limits), b""
                name = str(PurePosixPath(entry.filename))
                if name in files:
                    reason = "The zip has another file of this name."
                if reason is None:
                    try:
                        data = _read_entry(archive, entry)
                    except _ZIP_ERRORS as error:
                        reason = f"It is damaged: {error}"
                if reason is not None:
                    skipped.append(SkippedExample(name=_printable(name), reason=reason))
                    continue
                total += len(data)
                _check_total(len(files) + 1, total, limits)
                files[name] = _write(work / f"{number:06d}", data)
    except _ZIP_ERRORS as error:
        raise UnusableExamples(f"{source.name} is not a valid zip: {error}") from error
    return _without_shared_folder(files), skipped


def _check_zip_end(source: Path, limits: ExampleLimits) -> None:
    """Limit the directory before zipfile makes an object of each entry in it."""
    size = source.stat().st_size
    if size > limits.max_zip_bytes:
        raise UnusableExamples(f"{source.name} has more than {limits.max_zip_bytes / 1e9:g} GB.")
    with source.open("rb") as file:
        file.seek(max(0, size - _ZIP_END_BYTES - _MAX_ZIP_COMMENT - _ZIP64_LOCATOR_BYTES))
        tail = file.read()
    start = tail.rfind(_ZIP_END)
    if start < 0 or start + _ZIP_END_BYTES > len(tail):
        raise zipfile.BadZipFile("its end is missing")
    entries, directory_bytes = struct.unpack_from("<HL", tail, start + 10)
    # Larger numbers would be elsewhere in the file, to which a second record just before this one points.
    has_larger = tail[max(0, start - _ZIP64_LOCATOR_BYTES) : start].startswith(_ZIP64_LOCATOR)
    if entries > limits.max_files or directory_bytes > limits.max_directory_bytes or has_larger:
        raise UnusableExamples(f"{source.name} has more than {limits.max_files} files, or names that are too long.")


def _refusal(entry: zipfile.ZipInfo, limits: ExampleLimits) -> str | None:
    """Tell why an entry is not unpacked, None if it is."""
    name, parts = entry.filename, PurePosixPath(entry.filename).parts
    if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        return "Its name leads out of the zip or has control characters."
    if entry.flag_bits & 0x1:
        return "It is encrypted."
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return "It is a link or no ordinary file."
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "It is compressed by an unusual method. Pack the folder with an ordinary zip program."
    is_table = name.lower().endswith(".csv")
    if entry.file_size > (limits.max_table_bytes if is_table else limits.max_image_bytes):
        return f"It has {entry.file_size / 1e6:.0f} MB; at most {limits.max_image_bytes / 1e6:g} MB are allowed."
    return None


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read an entry, no more than it declares."""
    with archive.open(entry) as packed:
        data = packed.read(entry.file_size + 1)
    if len(data) != entry.file_size:
        raise zipfile.BadZipFile("it has another size than the zip declares")
    return data


def _write(path: Path, data: bytes) -> Path:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UnusableExamples(f"The zip cannot be unpacked: {error.strerror}.") from error
    return path


def _without_shared_folder(files: Mapping[str, Path]) -> dict[str, Path]:
    """Leave out folders around everything: packing a folder usually puts it into the zip, not what is in it."""
    found = dict(files)
    while len({name.partition("/")[0] for name in found}) == 1 and all(
        name.count("/") >= (1 if name.lower().endswith(".csv") else 2) for name in found
    ):
        found = {name.partition("/")[2]: path for name, path in found.items()}
    return found


def _printable(name: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in name)[:200]


# CSV files


def _only_table(files: Mapping[str, Path]) -> Path:
    tables = [path for name, path in files.items() if "/" not in name and name.lower().endswith(".csv")]
    if len(tables) != 1:
        raise UnusableExamples(f"There must be one .csv file beside the images; there are {len(tables)}.")
    return tables[0]


def _read_table(
    table: Path, find: _FindFile, target: str | None, label: str | None, limits: ExampleLimits
) -> ExampleSet:
    """Read the rows of a CSV file. The name of an example is the path in its row."""
    examples: list[Example] = []
    skipped: list[SkippedExample] = []
    total = 0
    rows = read_csv(table, limits)
    columns = next(rows)
    image_at = _find_column(columns, None, IMAGE_COLUMNS)
    value_at = _find_column(columns, label if target is None else target, LABEL_COLUMNS)
    for number, row in enumerate(rows, 2):
        _check_total(len(examples) + len(skipped) + 1, total, limits)
        name = row[image_at].strip()
        text = row[value_at].strip()
        try:
            if "://" in name:
                raise UnusableExamples("Addresses are not fetched. Download the image and write its path.")
            path = find(name)
            if path is None:
                raise UnusableExamples("There is no such file in the folder of the table.")
            number_of_row = None if target is None else parse_number(text)
            if target is None:
                text = normalise(text)
                check_class_name(text)
            total += _check_image(path, limits)
        except BadInput as error:
            skipped.append(SkippedExample(name=_printable(name) or f"row {number}", reason=error.reason))
            continue
        examples.append(Example(name=name, label=None if target else text, target=number_of_row, data=path))
    return ExampleSet(examples=tuple(examples), skipped=tuple(skipped))


def read_csv(table: Path, limits: ExampleLimits) -> Iterator[list[str]]:
    """Yield the header of a CSV file, then its rows; each has as many values as the header. Empty lines are left out.

    Values are separated by commas, semicolons or tabs, whichever the header has most of.

    :raises UnusableExamples: it is too large, not UTF-8 or not CSV, or a row is too short or too long; names the line.
    """
    try:
        with table.open("rb") as file:
            raw = file.read(limits.max_table_bytes + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UnusableExamples(f"{table.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UnusableExamples(f"{table.name} is not UTF-8. Save it as UTF-8 text.") from error
    if len(raw) > limits.max_table_bytes:
        raise UnusableExamples(f"{table.name} has more than {limits.max_table_bytes / 1e6:g} MB.")
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=find_delimiter(header), strict=True)
    width = None
    try:
        for row in reader:
            if not row:
                continue
            if width is not None and len(row) != width:
                raise UnusableExamples(
                    f"Line {reader.line_num} of {table.name} has {len(row)} values, the header has {width}."
                )
            if width is None:
                width, row = len(row), [each.strip() for each in row]
            yield row
    except csv.Error as error:
        raise UnusableExamples(f"Line {reader.line_num} of {table.name} cannot be read: {error}.") from error
    if width is None:
        raise UnusableExamples(f"{table.name} is empty.")


def parse_number(text: str) -> float:
    """Parse a finite number. :raises UnusableExamples: it is none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UnusableExamples(f"{text[:40]!r} is not a number.")
    return number


def _find_column(columns: list[str], wanted: str | None, usual: tuple[str, ...]) -> int:
    names = [wanted] if wanted is not None else list(usual)
    lowered = [each.lower() for each in columns]
    for name in names:
        if lowered.count(name.lower()) == 1:
            return lowered.index(name.lower())
    raise UnusableExamples(
        f"The table needs one column {' or '.join(map(repr, names))}. It has: {', '.join(columns)[:300]}."
    )
