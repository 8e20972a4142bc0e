"""What `mlg train` sends: a zip of a folder or of the images that a CSV file names, or a CSV file with a table."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from mlg_client import SUFFIXES
from provider_image.errors import ConfigError
from trainer.examples import IMAGE_COLUMNS, ExampleLimits, read_csv, read_examples


def read_archive(source: Path, *, target: str | None, label: str | None) -> bytes:
    """Return a folder, a zip, or a CSV file with its images, as a zip; a CSV file without images as it is.

    :raises ConfigError: there is no such file or folder, or no image in it.
    :raises UnusableExamples: the table cannot be used.
    """
    if not source.exists():
        raise ConfigError(f"There is no file or folder {source}.")
    if source.is_file() and (source.suffix.lower() != ".csv" or not names_images(source)):
        return source.read_bytes()
    with tempfile.SpooledTemporaryFile(max_size=2**26) as file, tempfile.TemporaryDirectory() as work:
        # Images are compressed already.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, path in _files(source, Path(work), target=target, label=label).items():
                archive.write(path, name)
        file.seek(0)
        return file.read()


def names_images(table: Path) -> bool:
    """Tell whether the first row of a CSV file names an image beside it. :raises UnusableExamples:"""
    rows = read_csv(table, ExampleLimits())
    header, first = next(rows), next(rows, None)
    columns = {name.lower(): place for place, name in enumerate(header)}
    places = [columns[name] for name in IMAGE_COLUMNS if name in columns]
    return first is not None and bool(places) and (table.parent / first[places[0]].strip()).is_file()


def _files(source: Path, work: Path, *, target: str | None, label: str | None) -> dict[str, Path]:
    """Return path in the zip -> file, in the order of the names."""
    if source.is_file():
        named = read_examples(source, work, target=target, label=label).examples
        images = {example.name: example.data for example in named if isinstance(example.data, Path)}
        return {source.name: source, **images}
    suffixes = {*SUFFIXES, ".csv"}
    found = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix.lower() in suffixes)
    if not any(path.suffix.lower() in SUFFIXES for path in found):
        raise ConfigError(f"{source} has no images. Put a folder for each class into it.")
    return {path.relative_to(source).as_posix(): path for path in found}
