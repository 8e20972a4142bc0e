"""Faces as rows of numbers: what detectors return, in the pixels of the image that they were given.

A row is left, top, width and height of the box, x and y of the eye that is on the left of an upright face, then of the
other one, and the score from 0 to 1. An eye that was not found is nan. Used by detectors and by the service
`face_detection`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Numbers in a row.
COLUMNS = 9
BOX, EYES, SCORE = slice(0, 4), slice(4, 8), 8
#: Most faces of an image; a photo of a crowd has some hundred.
MAX_FACES = 200
#: Two boxes that share more of their common area than this are of the same face.
MAX_OVERLAP = 0.3
#: Digits after the point of coordinates, of angles and of scores.
_PIXEL_DIGITS, _ANGLE_DIGITS, _SCORE_DIGITS = 1, 1, 4


def keep_best(faces: Array, max_overlap: float = MAX_OVERLAP, max_faces: int = MAX_FACES) -> Array:
    """Sort faces by their scores, best first, and drop each that overlaps a better one (non-maximum suppression).

    :param faces: shape (n, COLUMNS).
    :param max_overlap: of two boxes, the share of the area of both together that is in both.
    """
    import numpy as np

    faces = faces[np.argsort(-faces[:, SCORE], kind="stable")]
    kept: list[Array] = []
    while len(faces) and len(kept) < max_faces:
        best, others = faces[0], faces[1:]
        kept.append(best)
        faces = others[overlaps(best, others) <= max_overlap]
    return np.array(kept, np.float64).reshape(-1, COLUMNS)


def overlaps(face: Array, others: Array) -> Array:
    """Return the share of the area of a face's box and of each other one together that is in both, shape (n,)."""
    import numpy as np

    start = np.maximum(face[0:2], others[:, 0:2])
    end = np.minimum(face[0:2] + face[2:4], others[:, 0:2] + others[:, 2:4])
    common = np.prod(np.maximum(0.0, end - start), axis=1)
    together = face[2] * face[3] + others[:, 2] * others[:, 3] - common
    return np.asarray(common / np.maximum(together, 1e-9))


def eye_angle(face: Array) -> float:
    """Return by how many degrees a face is turned clockwise, from -180 to 180; 0 if its eyes are not known."""
    left_x, left_y, right_x, right_y = face[EYES].tolist()
    if not all(map(math.isfinite, (left_x, left_y, right_x, right_y))):
        return 0.0
    return math.degrees(math.atan2(right_y - left_y, right_x - left_x))


def to_json(faces: Array, found_in: tuple[int, int], width: int, height: int) -> dict[str, Any]:
    """Describe faces in the pixels of the original.

    :param faces: shape (n, COLUMNS), in the pixels of a smaller or larger copy.
    :param found_in: (width, height) of that copy.
    :param width, height: of the original, upright. What is outside of it is left out.
    """
    import numpy as np

    across, down = width / found_in[0], height / found_in[1]
    found = []
    for face in faces * np.array([across, down] * 4 + [1.0]):
        left, top = max(0.0, face[0]), max(0.0, face[1])
        right, bottom = min(width, face[0] + face[2]), min(height, face[1] + face[3])
        if right - left < 1 or bottom - top < 1:
            continue
        pairs = (face[4:6], face[6:8])
        eyes = [(float(x), float(y)) for x, y in pairs if 0 <= x <= width and 0 <= y <= height]
        corner = (round(left, _PIXEL_DIGITS), round(top, _PIXEL_DIGITS))
        found.append(
            {
                "box": {
                    "left": corner[0],
                    "top": corner[1],
                    "width": round(min(right, width) - corner[0], _PIXEL_DIGITS),
                    "height": round(min(bottom, height) - corner[1], _PIXEL_DIGITS),
                },
                "eyes": [{"x": round(x, _PIXEL_DIGITS), "y": round(y, _PIXEL_DIGITS)} for x, y in eyes],
                "angle": round(eye_angle(face), _ANGLE_DIGITS) + 0.0,  # no -0.0
                "score": round(float(min(1.0, max(0.0, face[SCORE]))), _SCORE_DIGITS),
            }
        )
    return {"width": width, "height": height, "faces": found}
