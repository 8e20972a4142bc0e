"""Faces: what the detector of the installation finds, and how long a photo of ten faces takes.

Recall is measured on `lfw_subset` of scikit-image's wheel, 100 faces and 100 other parts of photos of 25 x 25 pixels,
and on the face of its astronaut, scaled and turned. The photo of ten faces is made of the astronaut's at several sizes.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
from PIL import Image

from provider_image.backends import Device
from provider_image.compiler import ensure_installed
from provider_image.cores import available_cores
from provider_image.service import check_params
from provider_image.services import load_service
from scripts.benchmarks.support.measuring import medians, print_table, rate, work_folder
from scripts.benchmarks.support.photos import UNIQUE_BYTES, make_unique
from scripts.benchmarks.support.processes import mlg, serving
from tests.process_tree import cpu_seconds, descendants

#: Photos of which the first and the last quarter are compared: with fewer, a chunk of 16 is too large a part.
MIN_FOR_QUARTERS = 400
#: The face of the astronaut in its photo of 512 x 512 pixels: left, top, right and bottom. Seen by eye.
FACE = (168, 60, 282, 190)
#: What is cut out of that photo with the face in its middle.
HEAD = (125, 20, 325, 220)
#: Left, top and side of each head in the photo of ten faces, which has 1600 x 1200 pixels.
TEN = (
    *((20 + 320 * number, 30, 300) for number in range(5)),
    *((20 + 250 * number, 400, 220) for number in range(3)),
    *((800 + 380 * number, 420, 340) for number in range(2)),
)
PIPELINE, DETECTOR = "faces", "face_detector"


def skimage_data() -> Path:
    """Return the folder of scikit-image's photos."""
    spec = find_spec("skimage")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


def astronaut() -> Image.Image:
    """Return the photo."""
    return Image.open(skimage_data() / "astronaut.png").convert("RGB")


def ten_faces() -> bytes:
    """Make a JPEG with ten faces of different sizes on a street's photo, with a comment as `photos.encode` writes."""
    whole = Image.open(skimage_data() / "coffee.png").convert("RGB").resize((1600, 1200))
    head = astronaut().crop(HEAD)
    for number, (left, top, side) in enumerate(TEN):
        small = head.resize((side, side), Image.Resampling.LANCZOS)
        whole.paste(small if number % 2 else small.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (left, top))
    data = _jpeg(whole)
    return data[:2] + b"\xff\xfe" + (UNIQUE_BYTES + 2).to_bytes(2) + b"@" * UNIQUE_BYTES + data[2:]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


class Finder:
    """A detector, run as a worker does."""

    def __init__(self, models: Path, model: str) -> None:
        self.artefact = ensure_installed(models, model)
        self.service = load_service(self.artefact.service)
        self.net = self.service.load(self.artefact, Device(threads=1))

    def find(self, image: bytes) -> list[dict[str, Any]]:
        """Return the faces of an image."""
        params = check_params(self.service.params, {})
        item = self.service.prepare(self.artefact, {"image": image}, params)
        faces: list[dict[str, Any]] = self.service.run(self.net, [item], [params])[0].data["faces"]
        return faces


def measure_lfw(finder: Finder) -> list[list[object]]:
    """Count the images of `lfw_subset` with a face, at several scores and enlarged before they are sent."""
    images = np.load(skimage_data() / "lfw_subset.npy")
    rows = []
    for side in (25, 50, 100):
        scores = []
        for pixels in images:
            image = Image.fromarray((255 * pixels).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
            found = finder.find(_png(image))
            scores.append(max((face["score"] for face in found), default=0.0))
        faces, others = np.array(scores[:100]), np.array(scores[100:])
        for lowest in (0.0, 0.5, 0.8):
            rows.append([side, lowest, f"{(faces > lowest).sum()} of 100", f"{(others > lowest).sum()} of 100"])
    return rows


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def measure_turned(finder: Finder) -> list[list[object]]:
    """Try the face of the astronaut at sizes and angles; found means that its middle is in a box of its size."""
    photo, centre = astronaut(), ((FACE[0] + FACE[2]) / 2, (FACE[1] + FACE[3]) / 2)
    rows: list[list[object]] = []
    for side in (20, 30, 40, 60, 120, 480):
        scale = side / (FACE[2] - FACE[0])
        row: list[object] = [side]
        for angle in (0, 10, 20, 30, 45, 90):
            turned = photo.rotate(-angle, Image.Resampling.BICUBIC, center=centre)
            small = turned.resize((round(512 * scale), round(512 * scale)), Image.Resampling.LANCZOS)
            # On a larger canvas, so that the detector does not enlarge it.
            canvas = Image.new("RGB", (max(1024, small.width), max(1024, small.height)), (90, 110, 90))
            canvas.paste(small, (0, 0))
            found = [face for face in finder.find(_jpeg(canvas)) if _hits(face, centre, scale, side)]
            row.append(f"{found[0]['score']:.2f}, {found[0]['angle']:.0f}°" if found else "–")
        rows.append(row)
    return rows


def _hits(face: dict[str, Any], centre: tuple[float, float], scale: float, side: float) -> bool:
    box = face["box"]
    is_inside = all(
        box[edge] <= scale * place <= box[edge] + box[size]
        for place, edge, size in zip(centre, ("left", "top"), ("width", "height"), strict=True)
    )
    return is_inside and 0.5 * side <= box["width"] <= 2.5 * side


def measure_ten(base: str, photo: bytes, number: int) -> list[float]:
    """Send the photo and wait. :return: seconds to its last answer, and the number of faces."""
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=120)
    started = time.perf_counter()
    connection.request(
        "POST", f"/requestPrediction/{PIPELINE}", make_unique(photo, number), {"Content-Type": "image/jpeg"}
    )
    answer = json.load(connection.getresponse())
    if not answer["success"]:
        raise RuntimeError(answer)
    while answer.get("status") not in ("done", "failed", "cancelled"):
        connection.request("GET", f"/readPrediction/{answer['req_id']}?wait=30")
        answer = json.load(connection.getresponse())
    seconds = time.perf_counter() - started
    return [seconds, float(len(answer["steps"]["detect"]["preds"]["faces"]))]


def detect_for(models: Path, photo: bytes, seconds: float) -> tuple[float, float]:
    """Run the detector alone, in this process and one thread. :return: photos per second; processor seconds of each."""
    finder = Finder(models, DETECTOR)
    finder.find(photo)
    used, started = time.process_time(), time.perf_counter()
    found = rate(lambda: bool(finder.find(photo)), seconds)
    return found, (time.process_time() - used) / (found * (time.perf_counter() - started))


def detect_on_all_cores(models: Path, photo: bytes, seconds: float = 10.0) -> tuple[float, float]:
    """Run the detector alone in a process for each core. :return: as `detect_for`."""
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(detect_for, models, photo, seconds) for _ in range(available_cores())]
        rates, used = zip(*(each.result() for each in running), strict=True)
    return sum(rates), statistics.mean(used)


def measure_many(base: str, photo: bytes, count: int, first: int) -> dict[str, float]:
    """Send many photos to the detector.

    :return: photos per second until the last has its answer, and those of the first and of the last quarter that was
        answered; processor seconds of a photo, in all processes of the server.
    """
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=120)
    used, started, ids = _used_by_children(), time.perf_counter(), []
    begun_at = datetime.now(UTC)
    for number in range(count):
        connection.request(
            "POST",
            f"/requestPrediction/{DETECTOR}",
            make_unique(photo, first + number),
            {"Content-Type": "image/jpeg"},
        )
        ids.append(json.load(connection.getresponse())["req_id"])
    ended = []
    for id in reversed(ids):
        answer: dict[str, Any] = {}
        while answer.get("status") not in ("done", "failed"):
            connection.request("GET", f"/readPrediction/{id}?wait=30")
            answer = json.load(connection.getresponse())
        if answer["status"] != "done":
            raise RuntimeError(answer)
        ended.append(datetime.fromisoformat(answer["finished_at"]))
    seconds, quarter = time.perf_counter() - started, max(1, count // 4)
    ended = [begun_at, *sorted(ended)]
    return {
        "rate": count / seconds,
        "first": quarter / (ended[quarter] - ended[0]).total_seconds(),
        "last": quarter / max(1e-3, (ended[-1] - ended[-1 - quarter]).total_seconds()),
        "used": (_used_by_children() - used) / count,
    }


def _used_by_children() -> float:
    return sum(cpu_seconds(pid) for pid in descendants(os.getpid()))


@click.command()
@click.option("--photos", default=1000, show_default=True, help="Photos of the measurement of throughput.")
@click.option("--rounds", default=7, show_default=True, help="Photos of ten faces; the median is reported.")
def main(photos: int, rounds: int) -> None:
    """Measure the recall of the detector, the time of a photo of ten faces, and the throughput.

    Takes a minute, and a second for each two photos or so: 10 minutes for 1,000. Example: scripts/bench faces --photos
    100
    """
    with work_folder() as folder:
        home = folder / "home"
        models = home / "models"
        finder = Finder(models, DETECTOR)
        print_table(
            "lfw_subset, by side in pixels and lowest score",
            ("pixels", "score over", "faces", "others"),
            measure_lfw(finder),
        )
        head = ("face, pixels", *(f"turned {angle}°" for angle in (0, 10, 20, 30, 45, 90)))
        print_table("The face of the astronaut: score and angle found", head, measure_turned(finder))
        photo = ten_faces()
        before = detect_on_all_cores(models, photo)
        command = mlg("up", "--home", str(home))
        with serving(folder, *command, MLG_FACES="on", MLG_MAX_WAIT_SECONDS="0", MLG_POLL_SECONDS="0.05") as base:
            measure_ten(base, photo, 0)
            seconds = [measure_ten(base, photo, 1 + number) for number in range(rounds)]
            many = measure_many(base, photo, photos, 1000)
        # Before and after, because the machine may have become faster or slower meanwhile.
        own_rate, own_used = (
            statistics.mean(each) for each in zip(before, detect_on_all_cores(models, photo), strict=True)
        )
        middle, what = medians(seconds), "of these the first quarter, and the last"
        print_table(
            "A photo of 1600 x 1200 pixels with ten faces",
            ("what", "figure"),
            [
                ("faces found", f"{middle[1]:.0f}"),
                ("upload to last answer of the pipeline, median", f"{middle[0]:.2f} s"),
                ("the same, longest", f"{max(each[0] for each in seconds):.2f} s"),
                ("the detector alone, a process for each core", f"{own_rate:.2f} photos/s"),
                (f"{photos} photos through the server", f"{many['rate']:.2f} photos/s, {many['rate'] / own_rate:.0%}"),
                *(
                    [(what, f"{many['first']:.2f} and {many['last']:.2f} photos/s")]
                    if photos >= MIN_FOR_QUARTERS
                    else []
                ),
                ("processor time of a photo, detector alone", f"{own_used:.3f} s"),
                ("the same through the server", f"{many['used']:.3f} s, {many['used'] / own_used:.0%}"),
            ],
        )
