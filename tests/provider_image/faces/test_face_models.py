"""The models of faces that need no weights, on a photo with a face: found, cut out, measured, made a vector."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageEnhance, ImageFilter

from provider_image.backends import Device
from provider_image.compiler import ensure_installed
from provider_image.errors import BrokenArtefact, MalformedResults
from provider_image.service import Output, check_params
from provider_image.services import load_service
from tests.provider_image.conftest import encode_image

#: The face in scikit-image's photo of an astronaut: its middle, its eyes, and about its width, in pixels. Seen by eye.
MIDDLE, LEFT_EYE, RIGHT_EYE, WIDTH = (225, 125), (206, 111), (244, 106), 105

Answer = Callable[..., Output]


@pytest.fixture(scope="module")
def astronaut() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Answer an image with a model as a worker does."""
    models, loaded = tmp_path_factory.mktemp("models"), {}

    def answer_image(model: str, image: Image.Image | bytes, **params: Any) -> Output:
        if model not in loaded:
            artefact = ensure_installed(models, model)
            service = load_service(artefact.service)
            loaded[model] = artefact, service, service.load(artefact, Device(threads=1))
        artefact, service, net = loaded[model]
        data = image if isinstance(image, bytes) else encode_image(image, format="PNG")
        checked = check_params(service.params, params)
        (output,) = service.run(net, [service.prepare(artefact, {"image": data}, checked)], [checked])
        service.check_output(artefact, checked, output)
        return output

    return answer_image


def face_at(output: Output, point: tuple[float, float]) -> dict[str, Any]:
    """The face whose box has a point."""
    return next(face for face in output.data["faces"] if is_inside(face["box"], point))


def is_inside(box: dict[str, float], point: tuple[float, float]) -> bool:
    return (
        box["left"] <= point[0] <= box["left"] + box["width"] and box["top"] <= point[1] <= box["top"] + box["height"]
    )


def test_the_detector_finds_a_face_and_its_eyes(answer: Answer, astronaut: Image.Image) -> None:
    output = answer("face_detector", astronaut)

    face = face_at(output, MIDDLE)
    assert (output.data["width"], output.data["height"]) == (512, 512)
    assert 0.7 * WIDTH < face["box"]["width"] < 1.6 * WIDTH
    for eye, point in zip(face["eyes"], (LEFT_EYE, RIGHT_EYE), strict=True):
        assert math.dist((eye["x"], eye["y"]), point) < 12
    assert -20 < face["angle"] < 5


def test_a_face_in_a_large_photo_has_the_coordinates_of_that_photo(answer: Answer, astronaut: Image.Image) -> None:
    photo = Image.new("RGB", (2400, 1600), (90, 110, 90))
    photo.paste(astronaut.resize((1024, 1024)), (1300, 400))

    output = answer("face_detector", photo)

    face = face_at(output, (1300 + 2 * MIDDLE[0], 400 + 2 * MIDDLE[1]))
    assert 1.4 * WIDTH < face["box"]["width"] < 3.2 * WIDTH


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photo_that_the_camera_has_turned_is_searched_upright(
    orientation: int, answer: Answer, astronaut: Image.Image
) -> None:
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    astronaut.transpose(turn).save(file, "JPEG", quality=95, exif=exif)

    assert face_at(answer("face_detector", file.getvalue()), MIDDLE)["eyes"]


def test_a_photo_without_a_face_has_none_of_a_high_score(answer: Answer) -> None:
    noise = np.random.default_rng(1).integers(0, 255, (200, 300, 3)).astype(np.uint8)

    assert answer("face_detector", Image.fromarray(noise)).data["faces"] == []


def test_a_turned_face_is_cut_out_with_level_eyes(answer: Answer, astronaut: Image.Image) -> None:
    turned = astronaut.rotate(-10, Image.Resampling.BICUBIC, center=MIDDLE)
    face = face_at(answer("face_detector", turned), MIDDLE)

    box = {"upper" if name == "top" else name: value for name, value in face["box"].items()}
    cut = answer("face_crop", turned, **box, angle=face["angle"], margin=0.25)
    upright = face_at(answer("face_detector", cut.files["image"]), (cut.data["width"] / 2, cut.data["height"] / 2))

    assert face["angle"] > 5
    assert abs(upright["angle"]) < 6
    assert cut.data["width"] == pytest.approx(1.5 * face["box"]["width"], abs=1)


def test_a_crop_with_default_parameters_is_the_whole_image(answer: Answer, astronaut: Image.Image) -> None:
    output = answer("crop", astronaut)

    assert output.data == {"width": 512, "height": 512, "format": "png"}
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(output.files["image"]))), np.asarray(astronaut))


def test_a_crop_of_another_size_than_it_says_is_refused(answer: Answer, astronaut: Image.Image) -> None:
    service, output = load_service("crop"), answer("crop", astronaut, side=64)

    with pytest.raises(MalformedResults, match="64 x 64"):
        service.check_output(
            None, check_params(service.params, {}), Output(data={**output.data, "width": 63}, files=output.files)
        )
    with pytest.raises(MalformedResults, match="from 1 to 32"):
        service.check_output(None, check_params(service.params, {"side": 32}), output)


@pytest.fixture(scope="module")
def face(astronaut: Image.Image) -> Image.Image:
    return astronaut.crop((165, 60, 285, 190))


def test_a_face_in_good_light_has_no_problems(answer: Answer, face: Image.Image) -> None:
    assert answer("face_quality", face).data["problems"] == []


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        ("small", lambda face: face.resize((40, 44))),
        ("blurred", lambda face: face.filter(ImageFilter.GaussianBlur(4))),
        ("dark", lambda face: ImageEnhance.Brightness(face).enhance(0.25)),
        ("bright", lambda face: Image.blend(face, Image.new("RGB", face.size, "white"), 0.8)),
        ("flat", lambda face: ImageEnhance.Contrast(face).enhance(0.2)),
        ("uneven light", lambda face: Image.composite(face, Image.new("RGB", face.size), half(face.size))),
    ],
)
def test_each_problem_is_named(
    problem: str, change: Callable[[Image.Image], Image.Image], answer: Answer, face: Image.Image
) -> None:
    assert problem in answer("face_quality", change(face)).data["problems"]


def test_a_face_that_is_its_own_mirror_image_is_symmetric(answer: Answer, face: Image.Image) -> None:
    mirrored = face.copy()
    mirrored.paste(face.crop((0, 0, 60, 130)).transpose(Image.Transpose.FLIP_LEFT_RIGHT), (60, 0))

    assert answer("face_quality", mirrored).data["symmetry"] > 0.99 > answer("face_quality", face).data["symmetry"]


def half(size: tuple[int, int]) -> Image.Image:
    """A mask of the left half."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_the_vector_of_a_face_is_nearer_to_the_same_picture_than_to_another(
    answer: Answer, face: Image.Image, photos: dict[str, bytes]
) -> None:
    def vector(image: Image.Image | bytes) -> np.ndarray:
        return np.frombuffer(answer("face_pictures", image).files["vector"], "<f4")

    one, smaller, cat = vector(face), vector(face.resize((90, 98))), vector(photos["chelsea"])

    assert one @ smaller > 0.8 > one @ cat


# Forged answers


def forge(change: Callable[[dict[str, Any]], object]) -> None:
    data = {
        "width": 100,
        "height": 50,
        "faces": [
            {
                "box": {"left": 10.0, "top": 10.0, "width": 20.0, "height": 20.0},
                "eyes": [{"x": 15.0, "y": 15.0}],
                "angle": 0.0,
                "score": 0.9,
            },
            {"box": {"left": 50.0, "top": 0, "width": 50.0, "height": 50.0}, "eyes": [], "angle": 0.0, "score": 0.5},
        ],
    }
    load_service("face_detection").check_output(None, {}, Output(data=data))
    change(data)
    load_service("face_detection").check_output(None, {}, Output(data=data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(width=True),
        lambda data: data.update(width=0),
        lambda data: data.update(width=60),  # less than a box needs
        lambda data: data.update(faces=data["faces"] * 101),
        lambda data: data["faces"].reverse(),
        lambda data: data["faces"][0].update(name="Ada"),
        lambda data: data["faces"][0].update(score=1.1),
        lambda data: data["faces"][0].update(score=float("nan")),
        lambda data: data["faces"][0].update(angle=181),
        lambda data: data["faces"][0]["box"].update(left=-1),
        lambda data: data["faces"][0]["box"].update(width=float("inf")),
        lambda data: data["faces"][0]["box"].update(width="20"),
        lambda data: data["faces"][0]["box"].pop("top"),
        lambda data: data["faces"][0].update(eyes=[{"x": 1, "y": 1}] * 3),
        lambda data: data["faces"][0].update(eyes=[{"x": 1, "y": 51}]),
        lambda data: data["faces"][0].update(eyes=[[1, 1]]),
        lambda data: data["faces"].append(None),
    ],
)
def test_forged_faces_are_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(MalformedResults):
        forge(change)


def test_a_detector_without_the_size_that_it_takes_is_a_broken_artefact(tmp_path: Path) -> None:
    artefact = replace(ensure_installed(tmp_path, "face_detector"), backend="openvino")

    with pytest.raises(BrokenArtefact, match="size"):
        load_service("face_detection").load(artefact, Device(threads=1))
