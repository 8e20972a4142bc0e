"""The outputs of detection networks become faces where the networks meant them."""

import math

import numpy as np
import pytest

from provider_image.faces.heads import HEADS, STRIDES, cells, read_head
from provider_image.faces.rows import eye_angle

HEIGHT, WIDTH = 96, 160


def yunet(*faces):
    """An output of a YuNet for faces: (stride, column, row, box, eyes, score), the last three in pixels."""
    places = cells(HEIGHT, WIDTH)
    output = np.zeros((len(places), HEADS["yunet"]))
    for stride, column, row, (left, top, width, height), eyes, score in faces:
        (place,) = np.flatnonzero((places == (column, row, stride)).all(axis=1))
        centre = ((left + width / 2) / stride - column, (top + height / 2) / stride - row)
        points = [point / stride - (column, row)[number % 2] for number, point in enumerate(eyes)]
        size = (math.log(width / stride), math.log(height / stride))
        output[place] = [score, score, *centre, *size, *points, *[0] * 6]
    return output


def test_a_yunet_has_a_cell_for_each_place_of_each_stride():
    found = cells(HEIGHT, WIDTH)

    assert len(found) == sum(HEIGHT // stride * (WIDTH // stride) for stride in STRIDES)
    assert found[1].tolist() == [1, 0, 8]  # along the row first
    assert found[20].tolist() == [0, 1, 8]
    assert found[-1].tolist() == [4, 2, 32]


def test_yunet_gives_box_eyes_and_score():
    output = yunet((16, 3, 2, (30, 20, 40, 50), (42, 38, 58, 46), 0.81))

    (face,) = read_head("yunet", output, HEIGHT, WIDTH)

    assert face == pytest.approx([30, 20, 40, 50, 42, 38, 58, 46, 0.81])
    assert eye_angle(face) == pytest.approx(math.degrees(math.atan2(8, 16)))


def test_yunet_multiplies_its_two_scores():
    output = yunet((8, 1, 1, (4, 4, 16, 16), (8, 8, 16, 8), 1))
    output[output[:, 0] > 0, 1] = 0.25

    assert read_head("yunet", output, HEIGHT, WIDTH)[0, 8] == pytest.approx(0.5)


def test_neighbouring_cells_that_find_the_same_face_give_one():
    box, eyes = (30, 20, 40, 50), (42, 38, 58, 38)

    found = read_head("yunet", yunet((16, 3, 2, box, eyes, 0.7), (8, 6, 5, box, eyes, 0.9)), HEIGHT, WIDTH)

    assert found[:, 8] == pytest.approx([0.9])


def test_ssd_gives_boxes_without_eyes():
    output = np.array([[0.1, 0.9, 0.25, 0.5, 0.5, 1.0], [0.9, 0.1, 0, 0, 1, 1], [0.4, 0.6, 0.26, 0.5, 0.5, 0.99]])

    (face,) = read_head("ssd", output, HEIGHT, WIDTH)

    assert face[:4] == pytest.approx([0.25 * WIDTH, 0.5 * HEIGHT, 0.25 * WIDTH, 0.5 * HEIGHT])
    assert face[8] == pytest.approx(0.9)
    assert np.isnan(face[4:8]).all()


@pytest.mark.parametrize("kind", HEADS)
def test_numbers_that_are_not_finite_are_no_faces(kind):
    for value in (np.nan, np.inf, -np.inf):
        found = read_head(kind, np.full((len(cells(HEIGHT, WIDTH)), HEADS[kind]), value), HEIGHT, WIDTH)

        assert len(found) == 0


@pytest.mark.parametrize("kind", HEADS)
def test_an_image_without_faces_gives_none(kind):
    assert read_head(kind, np.zeros((len(cells(HEIGHT, WIDTH)), HEADS[kind])), HEIGHT, WIDTH).shape == (0, 9)
