"""The files that `mlg submit` sends: which there are, what the model takes, and their content. Used by `submit.py`."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from provider_image.errors import ConfigError
from provider_image.models.catalogue import normalise_name

if TYPE_CHECKING:
    from mlg_client import Client

#: Input of models that take no image -> suffixes of its files; each line of a .jsonl file is one.
PLAIN_SUFFIXES = {"text": frozenset({".txt"}), "row": frozenset({".json", ".jsonl"})}


def find_files(paths: Iterable[Path], suffixes: Collection[str] | None = None) -> list[Path]:
    """List the given files and those in the given folders, in a stable order and without duplicates.

    :param suffixes: of the files that are taken from folders; None takes those of images.
    :raises ConfigError: a path does not exist, or there is no file at all.
    """
    from mlg_client import SUFFIXES

    chosen = SUFFIXES if suffixes is None else suffixes
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            found.update(dict.fromkeys(sorted(_inside(path, chosen))))
        elif path.exists():
            found[path] = None
        else:
            raise ConfigError(f"There is no file or folder {path}.")
    if not found:
        what = "image files" if suffixes is None else "files"
        raise ConfigError(f"No {what} found. Suffixes that are sent from folders: {' '.join(sorted(chosen))}")
    return list(found)


def _inside(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    inside = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return (file for file in inside if file.suffix.lower() in suffixes)


def find_input(paths: Iterable[Path], client: Client, model: str) -> str:
    """Return the name of what the model or the pipeline takes. The server is asked only if no image is given.

    :raises ClientError: the server is unreachable.
    """
    from mlg_client import SUFFIXES

    plain = frozenset[str]().union(*PLAIN_SUFFIXES.values())
    if not all(
        any(_inside(path, plain)) and not any(_inside(path, SUFFIXES))
        if path.is_dir()
        else path.suffix.lower() in plain
        for path in paths
    ):
        return "image"
    kinds = {normalise_name(one.name): one.raw.get("input") for one in client.models()}
    if normalise_name(model) not in kinds:
        kinds = {normalise_name(one["name"]): next(iter(one["inputs"].values())) for one in client.pipelines()}
    kind = kinds.get(normalise_name(model))
    return kind if kind in PLAIN_SUFFIXES else "image"


def split_files(files: Iterable[Path]) -> Iterator[Path]:
    """Iterate over files, in place of a .jsonl file over its lines that are not empty: rows.jsonl:1, rows.jsonl:2.

    :raises ConfigError: such a file cannot be read, or has no line.
    """
    for file in files:
        if file.suffix.lower() != ".jsonl":
            yield file
            continue
        try:
            numbers = list(_read_lines(file, file.stat().st_mtime_ns))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
        if not numbers:
            raise ConfigError(f"{file} is empty.")
        yield from (file.with_name(f"{file.name}:{number}") for number in numbers)


def read_file(file: Path) -> bytes:
    """Read a file, or a line that `split_files` names. :raises OSError: also if there is no such line any more."""
    name, colon, number = file.name.rpartition(":")
    if not (colon and number.isascii() and number.isdigit() and name.lower().endswith(".jsonl")) or file.exists():
        return file.read_bytes()
    source = file.with_name(name)
    line = _read_lines(source, source.stat().st_mtime_ns).get(int(number))
    if line is None:
        raise FileNotFoundError(errno.ENOENT, "The file has no such line any more", str(file))
    return line


@functools.lru_cache(maxsize=2)
def _read_lines(file: Path, changed_at: int) -> Mapping[int, bytes]:
    """Return the lines of a file that are not empty, by number from 1. :param changed_at: of the version to read."""
    lines = enumerate(file.read_bytes().splitlines(), start=1)
    return {number: line for number, line in lines if line.strip()}
