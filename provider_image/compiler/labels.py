"""The labels of a classifier: those of ImageNet, and those of the file that comes with a custom model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from provider_image.errors import UnsuitableModel

#: Most classes of a model.
MAX_LABELS = 20_000
#: Most characters of an id or a name.
MAX_LABEL_LENGTH = 100
#: Largest labels file. Labels must fit into a model.json, where a non-ASCII letter takes six characters.
_MAX_BYTES = 512 * 1024


def imagenet_labels() -> tuple[tuple[str, str], ...]:
    """Return (wnid, name) of the 1000 classes of ImageNet in the order of a classifier's outputs."""
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return tuple((wnid, name) for _, wnid, name in rows)


def read_labels(path: Path) -> tuple[tuple[str, str], ...]:
    """Read a labels file: UTF-8, one line per output in the model's order, either `name` or `id<TAB>name`.

    :return: (id, name) of each; without an id, the name is the id as well.
    :raises UnsuitableModel: the file is invalid; names the line.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        lines = raw.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UnsuitableModel(f"The labels file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UnsuitableModel(f"The labels file {path} is not UTF-8. Save it as UTF-8 text.") from error
    if len(raw) > _MAX_BYTES:
        raise UnsuitableModel(f"The labels file {path} has more than {_MAX_BYTES} bytes. Shorten the names.")
    if lines[-1] == "":
        lines.pop()
    if not 1 <= len(lines) <= MAX_LABELS:
        raise UnsuitableModel(f"The labels file {path} has {len(lines)} lines; 1 to {MAX_LABELS} are allowed.")
    pairs = []
    for line in lines:
        id, tab, name = line.removesuffix("\r").partition("\t")
        pairs.append((id, name if tab else id))
    return check_labels(pairs, lambda number: f"Line {number} of {path}", "write a name, or an id, a tab and a name")


def check_labels(
    pairs: Iterable[tuple[str, str]], place: Callable[[int], str], form: str
) -> tuple[tuple[str, str], ...]:
    """Check labels.

    :param pairs: (id, name) of each.
    :param place: returns where a label is, by its number from 1.
    :param form: how it should be written there.
    :raises UnsuitableModel: one is invalid, or two have the same id; names its place.
    """
    labels: dict[str, str] = {}
    for number, (id, name) in enumerate(pairs, 1):
        for text in (id, name):
            if not 0 < len(text) <= MAX_LABEL_LENGTH or text != text.strip() or not text.isprintable():
                raise UnsuitableModel(
                    f"{place(number)} is not a label: {form}, each of 1 to {MAX_LABEL_LENGTH} characters, without "
                    "surrounding blanks and control characters."
                )
        if id in labels:
            raise UnsuitableModel(f"{place(number)} repeats the label {id!r}. Each class needs its own.")
        labels[id] = name
    return tuple(labels.items())
