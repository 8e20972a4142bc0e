"""The labels of a classifier's outputs: ImageNet's, and those of a file that comes with a user's own model."""

from __future__ import annotations

from pathlib import Path


def imagenet_labels() -> tuple[tuple[str, str], ...]:
    """Return (wnid, name) of the thousand classes of ImageNet in the order of a classifier's outputs."""
    lines = (Path(__file__).parent / "imagenet_classes.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return tuple((wnid, name) for _, wnid, name in rows)
