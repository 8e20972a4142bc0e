"""Faces as rows: overlaps, angles, and the way back to the original's pixels."""

import math

import numpy as np
import pytest

from provider_image.faces.rows import eye_angle, keep_best, overlaps, to_json

NO_EYES = [math.nan] * 4


def faces(*boxes, eyes=NO_EYES):
    """Rows of (left, top, width, height, score)."""
    return np.array([[*box[:4], *eyes, box[4]] for box in boxes], np.float64)


def test_overlap_is_the_share_of_both_areas_together():
    (first, *others) = faces((0, 0, 10, 10, 1), (0, 0, 10, 10, 1), (5, 0, 10, 10, 1), (10, 0, 5, 5, 1), (2, 2, 5, 5, 1))

    assert overlaps(first, np.array(others)) == pytest.approx([1, 50 / 150, 0, 25 / 100])


def test_of_boxes_that_overlap_the_best_is_kept_and_others_stay():
    found = keep_best(faces((0, 0, 10, 10, 0.5), (1, 0, 10, 10, 0.9), (40, 0, 10, 10, 0.7), (1, 1, 10, 10, 0.6)))

    assert found[:, [0, 8]].tolist() == [[1, 0.9], [40, 0.7]]


def test_faces_in_a_row_that_touch_are_all_kept():
    assert len(keep_best(faces(*((10 * number, 0, 10, 10, 0.5) for number in range(20))))) == 20


def test_number_of_faces_is_limited():
    assert len(keep_best(faces(*((20 * number, 0, 10, 10, 0.5) for number in range(9))), max_faces=4)) == 4
    assert keep_best(np.empty((0, 9))).shape == (0, 9)


@pytest.mark.parametrize("degrees", [0, 10, -35, 90, 179, -120])
def test_angle_is_that_of_the_line_through_the_eyes(degrees):
    across, down = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    assert eye_angle(faces((0, 0, 9, 9, 1), eyes=[5, 5, 5 + 3 * across, 5 + 3 * down])[0]) == pytest.approx(degrees)


def test_angle_without_both_eyes_is_0():
    assert eye_angle(faces((0, 0, 9, 9, 1), eyes=[5, 5, math.nan, math.nan])[0]) == 0


def test_faces_are_described_in_pixels_of_the_original_and_cut_at_its_edge():
    found = to_json(faces((-5, 10, 20, 30, 0.8), eyes=[2, 20, math.nan, math.nan]), (100, 50), 400, 200)

    assert found == {
        "width": 400,
        "height": 200,
        "faces": [
            {
                "box": {"left": 0, "top": 40, "width": 60, "height": 120},
                "eyes": [{"x": 8, "y": 80}],
                "angle": 0,
                "score": 0.8,
            }
        ],
    }


def test_a_face_outside_of_the_image_is_left_out():
    assert to_json(faces((101, 0, 20, 20, 1), (-30, 0, 30, 20, 1)), (100, 50), 100, 50)["faces"] == []


def test_boxes_never_reach_beyond_the_image_whatever_rounding_does():
    random = np.random.default_rng(1)
    boxes = [(*random.uniform(-30, 640, 2), *random.uniform(1, 300, 2), 0.5) for _ in range(500)]

    for face in to_json(faces(*boxes), (640, 480), 1999, 1333)["faces"]:
        box = face["box"]
        assert box["left"] >= 0 and box["top"] >= 0
        assert box["left"] + box["width"] <= 1999.01 and box["top"] + box["height"] <= 1333.01
