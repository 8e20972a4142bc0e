"""The compiled part that resizes images, built from its source, against Pillow."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from provider_image.images.resampling import Resampler, choose_resampler
from tests.programs import find_program

ROOT = Path(__file__).parents[3]
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def build(folder: Path, compiler: str, root: Path = ROOT) -> list[str]:
    """Build the compiled part as an installation does. :return: its file, or nothing if that failed."""
    arguments = ["build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "temporary")]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=root,
        env={**os.environ, "CC": compiler},
        capture_output=True,
        timeout=300,
        check=True,
    )
    return [str(path) for path in folder.rglob("_resampling*.so")]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Resampler:
    (path,) = build(tmp_path_factory.mktemp("build"), find_program("gcc", "cc", package="gcc"))
    found = choose_resampler(path)
    if "AVX2" in found.reason:
        pytest.skip("this processor has no AVX2")
    assert str(found) == "avx2"
    return found


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def assert_equal(
    compiled: Resampler,
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float] | None = None,
    filter: Image.Resampling = BICUBIC,
) -> None:
    box = box or (0, 0, *image.size)
    resized = compiled.resize_compiled(image, size, filter, box)

    assert resized is not None, (image.size, size, box)
    assert (resized.mode, resized.size) == ("RGB", size)
    assert resized.tobytes() == image.resize(size, filter, box).tobytes(), (image.size, size, box, filter)


def test_all_photos_give_the_pixels_of_pillow(compiled: Resampler) -> None:
    import skimage

    checked = 0
    for path in sorted((Path(skimage.__file__).parent / "data").glob("*.*")):
        if path.suffix not in (".png", ".jpg", ".jpeg"):
            continue
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        width, height = photo.size
        side = int(0.875 * min(width, height))
        left, top = (width - side) // 2, (height - side) // 2
        for size, box in (
            ((224, 224), (left, top, left + side, top + side)),
            ((224, 224), None),
            ((100, 299), (0.5, 0.25, width - 0.5, height - 0.75)),
        ):
            if min(photo.size) >= 20:
                assert_equal(compiled, photo, size, box)
                checked += 1
    assert checked >= 30


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 480), (480, 640), (301, 1003), (1003, 301), (224, 900), (97, 89), (40, 640)],
)
def test_noise_gives_the_pixels_of_pillow(compiled: Resampler, width: int, height: int) -> None:
    image = noise(width, height)

    for size in ((224, 224), (31, 7), (width, 5), (61, height)):
        for filter, box in (
            (BICUBIC, None),
            (BICUBIC, (width * 0.21, height * 0.1, width * 0.83, height * 0.9)),
            (BILINEAR, None),
        ):
            assert_equal(compiled, image, size, box, filter)


def test_random_sizes_and_boxes_give_the_pixels_of_pillow(compiled: Resampler) -> None:
    chosen = random.Random(5)
    accelerated = 0
    for number in range(150):
        width, height = (chosen.randint(1, chosen.choice((12, 90, 500))) for _ in "wh")
        size = chosen.randint(1, 120), chosen.randint(1, 120)
        left, top = chosen.uniform(0, width - 1), chosen.uniform(0, height - 1)
        box = chosen.choice(
            [
                (0, 0, width, height),
                (left, top, chosen.uniform(left + 0.1, width), chosen.uniform(top + 0.1, height)),
                (int(left), int(top), width, height),
            ]
        )
        filter = chosen.choice((BICUBIC, BILINEAR))
        image = noise(width, height, number)
        accelerated += compiled.resize_compiled(image, size, filter, box) is not None

        assert compiled.resize(image, size, filter, box).tobytes() == image.resize(size, filter, box).tobytes()
    assert accelerated > 75


def test_extreme_values_are_limited_as_by_pillow(compiled: Resampler) -> None:
    stripes = Image.new("RGB", (400, 300))
    for x in range(0, 400, 8):
        stripes.paste((255, 255, 255), (x, 0, x + 4, 300))
    for y in range(0, 300, 6):
        stripes.paste((255, 0, 255), (0, y, 400, y + 1))

    for size in ((397, 298), (150, 150), (1000, 900)):
        assert_equal(compiled, stripes, size)


def test_threads_do_not_disturb_each_other(compiled: Resampler) -> None:
    images = [noise(300 + 10 * number, 420 - 10 * number, number) for number in range(8)]
    expected = [image.resize((90, 80), BICUBIC).tobytes() for image in images]

    def work(number: int) -> bool:
        image = images[number % 8]
        return compiled.resize(image, (90, 80), BICUBIC, (0, 0, *image.size)).tobytes() == expected[number % 8]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(160)))


def test_an_image_of_more_than_16_megabytes_is_in_one_piece(compiled: Resampler) -> None:
    assert_equal(compiled, Image.radial_gradient("L").resize((2600, 1900)).convert("RGB"), (224, 224))


def test_the_rest_is_left_to_pillow(compiled: Resampler) -> None:
    image = noise(50, 40)
    for other, size, filter in (
        (image.convert("L"), (20, 20), BICUBIC),
        (image.convert("RGBA"), (20, 20), BICUBIC),
        (image, (20, 20), Image.Resampling.LANCZOS),
        (image, (3, 3), BICUBIC),
        (image, (50, 40), BICUBIC),
        (noise(3, 2), (20, 20), BICUBIC),
    ):
        box = (0, 0, *other.size)

        assert compiled.resize_compiled(other, size, filter, box) is None
        assert compiled.resize(other, size, filter, box).tobytes() == other.resize(size, filter, box).tobytes()


def test_a_box_outside_of_the_image_is_refused_as_by_pillow(compiled: Resampler) -> None:
    for box in ((0, 0, 51, 40), (-1, 0, 50, 40), (30, 0, 20, 40)):
        with pytest.raises(ValueError, match=r"[Bb]ox"):
            compiled.resize(noise(50, 40), (20, 20), BICUBIC, box)


def test_pillow_resizes_where_the_compiled_part_gives_other_pixels(
    compiled: Resampler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Path("provider_image/images/_resampling.c")
    source = (ROOT / place).read_text()
    assert source.count("1.5 * x - 2.5") == 1
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(source.replace("1.5 * x - 2.5", "1.25 * x - 2.25"))
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    (path,) = build(tmp_path / "build", find_program("gcc", "cc", package="gcc"), tmp_path)

    found = choose_resampler(path)

    assert str(found) == "pillow: the compiled part gives other pixels than this Pillow" and found.library is None
    assert "gives other pixels" in caplog.text
    image = noise(80, 70)
    assert found.resize(image, (20, 20), BICUBIC, (0, 0, 80, 70)) == image.resize((20, 20), BICUBIC)


def test_pillow_resizes_where_there_is_no_compiled_part_or_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "damaged.so").write_bytes(b"\x7fELF and no more")

    for path, reason in ((None, "was not built"), (str(tmp_path / "damaged.so"), "cannot be loaded")):
        found = choose_resampler(path)

        assert found.name == "pillow" and reason in found.reason
        image = noise(80, 70)
        assert found.resize(image, (20, 20), BICUBIC, (0, 0, 80, 70)) == image.resize((20, 20), BICUBIC)


def test_an_installation_without_a_compiler_goes_on_without_the_compiled_part(tmp_path: Path) -> None:
    assert build(tmp_path, "no-such-compiler") == []
