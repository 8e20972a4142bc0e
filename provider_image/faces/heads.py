"""What the outputs of detection networks mean: their heads, as rows of faces.

A builder joins the outputs of a network to one array with a row for each place where it looks for a face; this module
turns that into faces. The networks are not part of mlg; the forms are those of two families that are often used:

- `yunet`: YuNet as OpenCV's model zoo has it since 2023. For strides of 8, 16 and 32 pixels, a row for each cell: two
  scores whose product counts, the box relative to the cell, five points (right eye, left eye, nose, corners of the
  mouth, named as the person would).
- `ssd`: a row for each prior box: probabilities of background and face, then left, top, right and bottom as shares of
  the image's sides, as UltraFace and other SSD exports with decoded boxes have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from provider_image.faces.rows import COLUMNS, keep_best

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Kind -> numbers in a row of its output.
HEADS = {"yunet": 16, "ssd": 6}
#: Pixels of a cell, in the order of the rows.
STRIDES = (8, 16, 32)
#: Boxes with a lower score are no faces to any of these networks.
MIN_SCORE = 0.3
#: Most boxes that are compared with each other.
_MAX_CANDIDATES = 2000
#: A box is at most e to this power as large as its cell; larger numbers are from a net that does not fit.
_MAX_EXPONENT = 10.0


def read_head(kind: str, output: Array, height: int, width: int) -> Array:
    """Return the faces that an output describes, best first, without duplicates.

    :param kind: one of HEADS.
    :param output: shape (rows, HEADS[kind]).
    :param height, width: of the network's input in pixels.
    :return: shape (n, rows.COLUMNS), in pixels of that input.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # numbers that are not finite are left out below
        faces = (_yunet if kind == "yunet" else _ssd)(np.asarray(output, np.float64), height, width)
    faces = faces[faces[:, -1] >= MIN_SCORE]  # also leaves out nan
    faces = faces[np.isfinite(faces[:, :4]).all(axis=1)]
    return keep_best(faces[np.argsort(-faces[:, -1], kind="stable")[:_MAX_CANDIDATES]])


def cells(height: int, width: int) -> Array:
    """Return column, row and stride of each cell of a YuNet, shape (rows, 3), in the order of its output."""
    import numpy as np

    grids = []
    for stride in STRIDES:
        rows, columns = np.mgrid[0 : height // stride, 0 : width // stride]
        grids.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], axis=1))
    return np.concatenate(grids).astype(np.float64)


def _yunet(output: Array, height: int, width: int) -> Array:
    import numpy as np

    places = cells(height, width)
    corner, stride = places[:, :2], places[:, 2:]
    faces = np.empty((len(output), COLUMNS))
    size = np.exp(np.minimum(output[:, 4:6], _MAX_EXPONENT)) * stride
    faces[:, 0:2] = (corner + output[:, 2:4]) * stride - size / 2
    faces[:, 2:4] = size
    faces[:, 4:6] = (corner + output[:, 6:8]) * stride  # the person's right eye, on the left of an upright face
    faces[:, 6:8] = (corner + output[:, 8:10]) * stride
    faces[:, 8] = np.sqrt(np.clip(output[:, 0], 0, 1) * np.clip(output[:, 1], 0, 1))
    return faces


def _ssd(output: Array, height: int, width: int) -> Array:
    import numpy as np

    faces = np.full((len(output), COLUMNS), np.nan)
    sides = np.array([width, height], np.float64)
    faces[:, 0:2] = output[:, 2:4] * sides
    faces[:, 2:4] = np.maximum(0, output[:, 4:6] - output[:, 2:4]) * sides
    faces[:, 8] = output[:, 1]
    return faces
