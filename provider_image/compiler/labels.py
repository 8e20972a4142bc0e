"""The labels of a classifier's outputs: ImageNet's, and those of a file that comes with a user's own model."""

from __future__ import annotations

from pathlib import Path

from provider_image.errors import UnsuitableModel

#: Classes that a model may have at most.
MAX_LABELS = 20_000
#: Characters of an id or a name at most.
MAX_LABEL_LENGTH = 100
#: They must fit into a model.json, where a letter beyond ASCII takes six characters.
_MAX_BYTES = 512 * 1024


def imagenet_labels() -> tuple[tuple[str, str], ...]:
    """Return (wnid, name) of the thousand classes of ImageNet in the order of a classifier's outputs."""
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return tuple((wnid, name) for _, wnid, name in rows)


def read_labels(path: Path) -> tuple[tuple[str, str], ...]:
    """Read a labels file: UTF-8, a line for each output in its order, either `name` or `id<TAB>name`.

    :return: (id, name) of each; a name alone is its own id.
    :raises UnsuitableModel: the file breaks a rule; names the line.
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
        raise UnsuitableModel(f"The labels file {path} has {len(lines)} lines; 1 to {MAX_LABELS} are taken.")
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        id, tab, name = line.removesuffix("\r").partition("\t")
        for text in (id, name) if tab else (id,):
            if not 0 < len(text) <= MAX_LABEL_LENGTH or text != text.strip() or not text.isprintable():
                raise UnsuitableModel(
                    f"Line {number} of {path} is not a label: write a name, or an id, a tab and a name, each of 1 to "
                    f"{MAX_LABEL_LENGTH} characters, without blanks around it or control characters."
                )
        if id in labels:
            raise UnsuitableModel(f"Line {number} of {path} repeats the label {id!r}. Each class needs its own.")
        labels[id] = name if tab else id
    return tuple(labels.items())
