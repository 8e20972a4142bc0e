"""Resizing: the same results from smaller chunks, and decoders that may die without affecting other items."""

from __future__ import annotations

import asyncio
import functools
import io
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from batcher.errors import ResizingUnavailable
from batcher.executors.local import LocalExecutor
from batcher.packing import pack, resized_bytes
from batcher.planner import plan
from batcher.resizing import Resizer, is_resizing
from batcher.scheduler import Batcher
from batcher.settings import BatcherSettings
from batcher.workspace import Workspace
from provider_image.chunk import ChunkItem, open_chunk, write_chunk
from provider_image.errors import BadInput, ChunkTimeout, ConfigError, InferenceFailed, NotAnImage, WorkerDied
from provider_image.images.headers import MAX_PIXELS, read_header
from provider_image.images.resizing import resize as resize_image
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE, ModelFacts
from provider_image.services import load_service
from store.requests import MAX_ATTEMPTS
from store.states import RequestState
from tests.batcher.conftest import MODEL, TableExecutor
from tests.contexts import make_context
from tests.decode_gate import DECODE_GATE
from tests.process_tree import children, command_line, is_alive
from tests.timing import slowness, wait_until

ROOT = Path(__file__).parents[2]
INPUT = CATALOGUE["efficientnet_lite0"]
#: Loaded by every decoder. An image that ends in POISON ends its process, as a bug in a decoder may. One that ends in
#: HOLD:PATH creates PATH.begun with the process's id when it begins, and waits until PATH exists. One that ends in LOCK
#: hangs and holds the GIL. One that ends in SOCKET takes control of its process and opens a socket. One that ends in
#: HALF sends the beginning of a message and hangs, and no alarm ends it.
PLUGIN = (
    DECODE_GATE
    + """
import ctypes

def decode(data, *arguments, plain=imaging.decode, **options):
    if bytes(data).endswith(b"POISON"):
        os._exit(139)
    if bytes(data).endswith(b"SOCKET"):
        __import__("socket").socket()
    if bytes(data).endswith(b"LOCK"):
        print("locked", file=__import__("sys").stderr, flush=True)
        ctypes.PyDLL(None).sleep(1000)
    if bytes(data).endswith(b"HALF"):
        __import__("signal").setitimer(0, 0)
        os.write(0, (100).to_bytes(4, "big") + b'{"code":')
        while True:
            __import__("time").sleep(1000)
    return plain(data, *arguments, **options)

imaging.decode = decode
"""
)


def encode_image(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def small_image(number: int = 0) -> bytes:
    return encode_image(Image.new("RGB", (40, 30), (number * 15, 255 - number * 15, 90)), "PNG")


def photo(width: int, height: int) -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.coffee()).resize((width, height), Image.Resampling.BICUBIC)


def with_orientation(image: Image.Image, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encode_image(image, "JPEG", quality=90, exif=exif)


@functools.cache
def many_images() -> dict[str, bytes]:
    """Make images of every format, mode and orientation, below, at and above the model's input, of odd proportions."""
    plain = photo(300, 200)
    grey = plain.convert("L")
    faded = plain.convert("RGBA")
    faded.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 200)
    found = {
        f"{form} {width}x{height}": encode_image(photo(width, height), form)
        for form, (width, height) in itertools.product(
            ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
            ((1, 1), (17, 90), (223, 225), (224, 224), (256, 256), (500, 375)),
        )
    }
    found |= {
        f"JPEG {width}x{height}": encode_image(photo(width, height), "JPEG")
        for width, height in ((1600, 1200), (4000, 3000))
    }
    found |= {f"orientation {value}": with_orientation(photo(2000, 1100), value) for value in range(1, 9)}
    found |= {f"grey {form}": encode_image(grey, form) for form in ("JPEG", "PNG", "TIFF", "BMP")}
    found |= {f"palette {form}": encode_image(plain.quantize(64), form) for form in ("PNG", "GIF", "TIFF", "BMP")}
    found |= {f"transparent {form}": encode_image(faded, form) for form in ("PNG", "TIFF", "WEBP")}
    found |= {
        "CMYK JPEG": encode_image(plain.convert("CMYK"), "JPEG"),
        "CMYK TIFF": encode_image(plain.convert("CMYK"), "TIFF"),
    }
    found |= {"16 bits PNG": encode_image(sixteen, "PNG"), "16 bits TIFF": encode_image(sixteen, "TIFF")}
    found |= {"bits": encode_image(plain.convert("1"), "PNG"), "float": encode_image(grey.convert("F"), "TIFF")}
    return found


GOOD = encode_image(photo(500, 375), "JPEG")
DEFLATED = encode_image(photo(200, 150), "TIFF", compression="tiff_adobe_deflate")
#: Images that cannot be decoded, each for another reason.
BAD = {
    "text": b"not an image at all",
    "a header": GOOD[:300],
    "cut short": GOOD[:9000],
    "a damaged TIFF": DEFLATED[:200] + b"\xff" * 2000 + DEFLATED[2200:],
    "a damaged PNG": small_image()[:50] + b"\0\0\0\0" + small_image()[54:],
    "too many pixels": encode_image(Image.new("1", (7000, 6000)), "PNG"),
    "another format": b"\0\0\0\x18ftypheic" + bytes(100),
}


@pytest.fixture
def plugin(tmp_path: Path) -> dict[str, str]:
    folder = tmp_path / "plugin"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PLUGIN)
    return {"PYTHONPATH": str(folder)}


@pytest.fixture
def resizer(plugin: dict[str, str], models_folder: Path) -> Iterator[Callable[..., Resizer]]:
    """Make resizers that are closed at the end."""
    made = []

    def make(workers: int = 2, **options: Any) -> Resizer:
        made.append(Resizer(workers, models_folder, **{"environment": plugin, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def resize(resizer: Resizer, folder: Path, *images: bytes, model: ModelFacts = INPUT) -> list[Any]:
    paths = []
    for number, data in enumerate(images):
        paths.append(folder / f"image-{number}")
        paths[-1].write_bytes(data)
    return list(resizer.resize(model, [{"image": path} for path in paths]))


# Equal results


@pytest.mark.parametrize("crop", [None, 0.875])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (299, 331)])
def test_the_model_gets_the_same_pixels_as_without_resizing(
    tmp_path: Path, height: int, width: int, crop: float | None
) -> None:
    service = load_service("classification")
    model: Any = SimpleNamespace(height=height, width=width, crop=crop)
    for name, data in many_images().items():
        resized = resize_image(data, height, width, crop)

        ours = service.prepare(model, {"image": resized}, {}, is_resized=True)
        plain = service.prepare(model, {"image": data}, {})
        assert (ours.shape, ours.dtype) == (plain.shape, plain.dtype), name
        assert np.array_equal(ours, plain), name


def process_all(harness: Any, choice: str) -> dict[str, Any]:
    """Process all images, good and bad, with a real cycle and real workers."""
    requests = {name: harness.add(data, is_fresh=True) for name, data in (many_images() | BAD).items()}

    async def main() -> None:
        harness.change_settings(shrink=choice, resizers=2)
        harness.executor = LocalExecutor(make_context(harness.settings.work / "local", harness.models, MLG_WORKERS="2"))
        is_resized = is_resizing(harness.settings, harness.executor)
        harness.resizer = Resizer(2, harness.models) if is_resized else None
        await harness.executor.start()
        cycle = harness.cycle()
        cycle.flush()
        await cycle.run(asyncio.Event())
        await harness.executor.close()
        if harness.resizer is not None:
            harness.resizer.close()

    asyncio.run(asyncio.wait_for(main(), 300))
    found = {name: harness.reload(request)[0] for name, request in requests.items()}
    return {name: (each.state, each.output, each.code, each.reason, each.attempts) for name, each in found.items()}


def test_results_and_errors_are_the_same_with_and_without_resizing(harness: Any) -> None:
    plain = process_all(harness, "off")
    resized = process_all(harness, "on")

    assert resized == plain
    assert {plain[name][0] for name in many_images()} == {RequestState.DONE}
    assert {plain[name][0] for name in BAD} == {RequestState.FAILED}
    assert len({plain[name][2:4] for name in BAD}) >= 6


def test_a_model_that_is_built_on_first_use_gets_the_same_pixels(harness: Any, tmp_path: Path, resizer: Any) -> None:
    harness.add(GOOD)
    now = harness.clock.now
    claims = harness.store.requests.claim(models={MODEL}, limit=16, now=now, lease_ends_at=now, oldest_before=None)
    options = {"folder": tmp_path, "image_path": harness.store.images.path, "resizer": resizer()}
    found = []
    for models in (harness.models, tmp_path / "nothing-installed"):
        packed = pack(plan(claims)[0], models=models, **options)
        with open_chunk(packed.chunk) as reader:
            found.append((reader.digest, reader.read_inputs(reader.items[0])))

    assert found[0][1] == found[1][1]
    assert [found[0][0], found[1][0]] == [find_artefact(harness.models, MODEL).digest, None]


def test_an_image_that_takes_control_of_its_process_opens_no_socket(tmp_path: Path, resizer: Any) -> None:
    (found,) = resize(resizer(), tmp_path, small_image() + b"SOCKET")

    assert isinstance(found, InferenceFailed) and "PermissionError" in found.reason


# Inputs that a stranger refused


def test_the_inputs_of_a_chunk_are_tried_as_a_worker_does(tmp_path: Path, resizer: Any) -> None:
    inputs = [small_image(), BAD["text"], small_image() + b"POISON"]
    chunk = tmp_path / "chunk.zip"
    items = [ChunkItem(number=number, inputs={"image": data}) for number, data in enumerate(inputs)]
    write_chunk(chunk, "c", "classification", MODEL, None, items)

    found = [resizer().try_item(chunk, number) for number in range(3)]

    assert found[0] is None
    assert isinstance(found[1], NotAnImage)
    assert isinstance(found[2], WorkerDied)


def test_an_input_is_tried_while_all_processes_are_busy_with_resizing(tmp_path: Path, resizer: Any) -> None:
    shared, gate, held, chunk = resizer(workers=1), tmp_path / "gate", tmp_path / "held.png", tmp_path / "chunk.zip"
    held.write_bytes(small_image() + b"HOLD:" + str(gate).encode())
    write_chunk(chunk, "c", "classification", MODEL, None, [ChunkItem(number=0, inputs={"image": small_image()})])
    with ThreadPoolExecutor(2) as threads:
        resizing = threads.submit(shared.resize, INPUT, [{"image": held}])
        wait_until(Path(f"{gate}.begun").exists)
        trying = threads.submit(shared.try_item, chunk, 0)
        try:
            assert trying.result(60 * slowness()) is None
        finally:
            gate.touch()
        assert isinstance(resizing.result()[0], dict)


# What is sent


class ChunkKeepingExecutor(TableExecutor):
    """Keeps the bytes of the chunk files."""

    def __init__(self, models: Path) -> None:
        super().__init__(models)
        self.chunks: list[bytes] = []

    async def run(self, job: Any) -> Any:
        self.chunks.append(job.chunk.read_bytes())
        return await super().run(job)


def test_a_chunk_is_small_and_contains_nothing_of_the_original_but_pixels(harness: Any, resizer: Any) -> None:
    exif = Image.Exif()
    exif[0x010F] = "SECRETCAMERA"
    exif[0x8298] = "SECRETOWNER"
    data = encode_image(
        photo(3000, 2000), "JPEG", quality=90, exif=exif, comment=b"SECRETCOMMENT", icc_profile=b"SECRETPROFILE"
    )
    assert data.count(b"SECRET") == 4
    harness.executor = ChunkKeepingExecutor(harness.models)
    harness.resizer = resizer()
    request = harness.add(data)

    harness.run()

    (chunk,) = harness.executor.chunks
    ((sent,),) = harness.executor.images
    assert harness.reload(request)[0].state is RequestState.DONE
    assert len(chunk) < 110_000 < 500_000 < len(data)
    assert b"SECRET" not in chunk
    assert not any(data[start : start + 64] in chunk for start in range(0, len(data), 1009))
    assert sent.startswith(b"RIFF") and b"EXIF" not in sent and b"ICCP" not in sent
    assert [record.bytes_sent for record in harness.store.chunks.list()] == [len(chunk)]


def test_images_share_a_chunk_if_they_fit_into_it_resized(harness: Any, resizer: Any) -> None:
    # What follows the end of a PNG is ignored. Resized to 224 x 224, six of them are at most 1.2 MB.
    harness.change_settings(chunk_bytes=3_000_000)
    for is_resized in (True, False):
        harness.resizer = resizer() if is_resized else None
        for number in range(6):
            harness.add(small_image(number).ljust(1_000_000, b"\0"), is_fresh=True)
        harness.run()

    assert [len(images) for images in harness.executor.images] == [6, 3, 3]


def test_size_of_a_resized_input_is_not_underestimated(harness: Any) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8))
    harness.add(encode_image(noise, "PNG"))
    now = harness.clock.now
    (claim,) = harness.store.requests.claim(models={MODEL}, limit=1, now=now, lease_ends_at=now, oldest_before=None)
    size = resized_bytes(harness.models)

    assert len(resize_image(encode_image(noise, "PNG"), 224, 224, None)) < size(claim) < 300_000
    assert size(replace(claim, model="unknown")) == size(replace(claim, service="unknown")) == claim.image_bytes


def test_an_invalid_image_is_not_sent_and_fails_before_the_others_are_answered(harness: Any, resizer: Any) -> None:
    harness.resizer = resizer()
    bad = harness.add(BAD["a damaged PNG"])
    good = harness.add(small_image())
    seen: list[RequestState] = []

    async def before_answer() -> None:
        seen.append(harness.reload(bad)[0].state)

    harness.executor.before_answer = before_answer
    report = harness.run()

    assert seen == [RequestState.FAILED]
    assert (report.claimed, report.done, report.failed) == (2, 1, 1)
    assert [len(images) for images in harness.executor.images] == [1]
    assert harness.reload(good)[0].state is RequestState.DONE


def test_a_chunk_of_invalid_images_is_not_sent(harness: Any, resizer: Any) -> None:
    harness.resizer = resizer()
    requests = [harness.add(data) for data in BAD.values()]

    report = harness.run()

    assert (report.failed, report.chunks, harness.executor.jobs) == (len(BAD), 0, [])
    assert {request.state for request in harness.reload(*requests)} == {RequestState.FAILED}


def test_a_missing_image_file_does_not_affect_the_other_images(harness: Any, resizer: Any, tmp_path: Path) -> None:
    results = resizer().resize(INPUT, [{"image": tmp_path / "gone"}, {"image": _written(tmp_path)}])

    assert isinstance(results[0], FileNotFoundError)
    assert results[1].keys() == {"image"}


def test_a_file_that_cannot_be_read_raises_its_os_error(resizer: Any, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        resizer().resize(INPUT, [{"image": tmp_path}])


def _written(folder: Path) -> Path:
    (folder / "image").write_bytes(small_image())
    return folder / "image"


# The setting MLG_SHRINK


@pytest.mark.parametrize(
    ("choice", "is_remote", "are_transfers_quick", "format"),
    [
        ("auto", False, True, None),
        ("auto", True, False, "WEBP"),
        ("auto", True, True, "BMP"),
        ("on", False, True, "WEBP"),
        ("off", True, False, None),
        ("uncompressed", True, False, "BMP"),
    ],
)
def test_auto_resizes_if_chunks_leave_this_machine_and_compresses_unless_that_is_quick(
    harness: Any, choice: str, is_remote: bool, are_transfers_quick: bool, format: str | None
) -> None:
    harness.executor.are_transfers_quick = are_transfers_quick
    harness.clock = lambda: datetime.now(UTC)
    harness.executor.is_remote = is_remote
    harness.change_settings(shrink=choice)
    workspace = Workspace(harness.settings.work, "batcher-id")
    workspace.create()
    harness.add(GOOD)

    async def main() -> None:
        batcher = Batcher(
            store=harness.store,
            executor=harness.executor,
            settings=harness.settings,
            home_settings=harness.home_settings,
            workspace=workspace,
            batcher_id="batcher-id",
        )
        await batcher.run_once(asyncio.Event())

    asyncio.run(asyncio.wait_for(main(), 300))
    workspace.remove()

    assert harness.executor.resized_flags == [format is not None]
    assert (harness.executor.images == [[GOOD]]) is (format is None)
    assert format in (None, read_header(harness.executor.images[0][0], MAX_PIXELS).format)
    assert not [pid for pid in children(os.getpid()) if "provider_image.decoders" in command_line(pid)]


def test_the_local_executor_is_not_remote() -> None:
    assert LocalExecutor.is_remote is False


def test_an_unknown_value_of_the_setting_is_rejected_with_the_known_ones() -> None:
    assert BatcherSettings.from_env({"MLG_SHRINK": "ON"}).shrink == "on"
    with pytest.raises(ConfigError, match=r"MLG_SHRINK.*auto, on, off"):
        BatcherSettings.from_env({"MLG_SHRINK": "perhaps"})


# Processes


def test_processes_are_started_with_the_first_image_and_kept(resizer: Any, tmp_path: Path) -> None:
    made = resizer(workers=1)
    assert made.pids() == []

    resize(made, tmp_path, small_image(1), small_image(2))
    (first,) = made.pids()
    resize(made, tmp_path, small_image(3))

    assert made.pids() == [first]


def test_an_invalid_image_does_not_end_its_process(resizer: Any, tmp_path: Path) -> None:
    made = resizer(workers=1)
    results = resize(made, tmp_path, small_image(), *BAD.values())
    (pid,) = made.pids()

    assert all(isinstance(result, BadInput) for result in results[1:])
    resize(made, tmp_path, small_image())
    assert made.pids() == [pid]


def test_a_process_killed_while_idle_blames_no_image(resizer: Any, tmp_path: Path) -> None:
    made = resizer(workers=1)
    resize(made, tmp_path, small_image())
    (pid,) = made.pids()
    os.kill(pid, signal.SIGKILL)

    (result,) = resize(made, tmp_path, small_image())

    assert result.keys() == {"image"}
    assert made.pids() != [pid]


def test_an_image_that_kills_its_process_fails_alone(harness: Any, resizer: Any) -> None:
    harness.resizer = resizer()
    requests = [harness.add(small_image(number) + (b"POISON" if number == 7 else b"")) for number in range(16)]
    poison = requests.pop(7)

    for _ in range(MAX_ATTEMPTS):
        harness.run()
        assert {request.state for request in harness.reload(*requests)} == {RequestState.DONE}
        harness.clock.advance(20)

    (failed,) = harness.reload(poison)
    assert (failed.state, failed.attempts, failed.code) == (RequestState.FAILED, MAX_ATTEMPTS, "worker_died")
    assert "status 139 at this one" in failed.reason
    assert [len(images) for images in harness.executor.images] == [15]


def test_an_image_whose_process_is_killed_is_tried_again(harness: Any, resizer: Any, tmp_path: Path) -> None:
    harness.resizer = resizer()
    gate = tmp_path / "gate"
    requests = [harness.add(small_image(number)) for number in range(8)]
    requests.append(harness.add(small_image(8) + b"HOLD:" + os.fsencode(gate)))
    killer = threading.Thread(target=lambda: os.kill(_begun(gate), signal.SIGKILL))
    killer.start()

    harness.run()
    killer.join()
    assert [request.state for request in harness.reload(*requests)] == [RequestState.DONE] * 8 + [RequestState.QUEUED]
    gate.touch()
    harness.clock.advance(20)
    harness.run()

    assert {request.state for request in harness.reload(*requests)} == {RequestState.DONE}


def _begun(gate: Path) -> int:
    wait_until(gate.with_suffix(".begun").exists)
    return int(gate.with_suffix(".begun").read_text())


@pytest.mark.parametrize("tail", [b"HOLD:", b"LOCK"])
def test_an_image_that_hangs_times_out_and_the_others_are_resized(resizer: Any, tmp_path: Path, tail: bytes) -> None:
    made = resizer(workers=1, limit_seconds=1)
    end = tail + (os.fsencode(tmp_path / "gate") if tail == b"HOLD:" else b"")

    results = resize(made, tmp_path, small_image(1), small_image(2) + end, small_image(3))

    assert isinstance(results[1], ChunkTimeout) and "1 s" in results[1].reason
    assert [results[0].keys(), results[2].keys()] == [{"image"}, {"image"}]


def test_a_process_that_sends_half_a_message_and_hangs_is_killed(resizer: Any, tmp_path: Path) -> None:
    made = resizer(workers=1, limit_seconds=0.5)

    results = resize(made, tmp_path, small_image(1), small_image(2) + b"HALF", small_image(3))

    assert isinstance(results[1], WorkerDied) and "SIGKILL" in results[1].reason
    assert [results[0].keys(), results[2].keys()] == [{"image"}, {"image"}]


def test_if_no_process_can_be_started_no_image_is_blamed_and_nothing_is_sent(
    harness: Any, resizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "plugin" / "sitecustomize.py").write_text("import os; os._exit(3)")
    harness.resizer = resizer()
    request = harness.add(small_image())

    harness.run()

    (seen,) = harness.reload(request)
    assert (seen.state, seen.attempts, seen.isolation, seen.code) == (
        RequestState.QUEUED,
        0,
        0,
        "shrinking_unavailable",
    )
    assert "status 3" in seen.reason
    assert harness.executor.jobs == []


def test_stopping_kills_a_decoder_that_hangs_and_releases_the_image(harness: Any, resizer: Any, tmp_path: Path) -> None:
    harness.resizer = resizer()
    harness.change_settings(drain_seconds=0.05)
    gate = tmp_path / "gate"
    request = harness.add(small_image() + b"HOLD:" + os.fsencode(gate))

    async def main() -> int:
        stop = asyncio.Event()
        cycle = harness.cycle()
        cycle.flush()
        run = asyncio.create_task(cycle.run(stop))
        await harness.until(gate.with_suffix(".begun").exists)
        stop.set()
        await run
        return _begun(gate)

    pid = asyncio.run(asyncio.wait_for(main(), 300))

    (seen,) = harness.reload(request)
    assert (seen.state, seen.attempts, seen.isolation) == (RequestState.QUEUED, 0, 0)
    assert not is_alive(pid)


def test_a_closed_resizer_raises_and_has_no_processes(resizer: Any, tmp_path: Path) -> None:
    made = resizer()
    resize(made, tmp_path, small_image())
    pids = made.pids()

    made.close()
    made.close()

    assert pids and not any(map(is_alive, pids)) and made.pids() == []
    with pytest.raises(ResizingUnavailable):
        resize(made, tmp_path, small_image())


@pytest.mark.parametrize("tail", ["", "HOLD:{gate}", "LOCK"])
def test_killing_the_batcher_leaves_no_process(tmp_path: Path, plugin: dict[str, str], tail: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(small_image() + tail.format(gate=tmp_path / "gate").encode())
    (tmp_path / "valid").write_bytes(small_image())
    code = f"""
import pathlib, threading, time
from batcher.resizing import Resizer
from provider_image.models.catalogue import CATALOGUE, ModelFacts
from provider_image.images.resizing import resize as resize_image

resizer = Resizer(2, pathlib.Path("models"), environment={plugin!r}, limit_seconds=1000 if {tail!r} != "LOCK" else 2)
model = CATALOGUE["efficientnet_lite0"]
resizer.resize(model, [{{"image": pathlib.Path({str(tmp_path / "valid")!r})}}])
print("resized", flush=True)
resizer.resize(model, [{{"image": pathlib.Path({str(path)!r})}}])
print("resized", flush=True)
time.sleep(1000)
"""
    batcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert batcher.stdout is not None and batcher.stderr is not None
    assert batcher.stdout.readline() == "resized\n"
    if tail == "LOCK":
        assert batcher.stderr.readline() == "locked\n"
    elif tail:
        _begun(tmp_path / "gate")
    else:
        assert batcher.stdout.readline() == "resized\n"
    pids = children(batcher.pid)

    batcher.kill()
    batcher.wait()
    batcher.stdout.close()
    batcher.stderr.close()

    assert pids
    wait_until(lambda: not any(map(is_alive, pids)))


def test_the_signal_that_killed_a_decoder_is_in_the_error(resizer: Any, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    killer = threading.Thread(target=lambda: os.kill(_begun(gate), signal.SIGSEGV))
    killer.start()

    (result,) = resize(resizer(), tmp_path, small_image() + b"HOLD:" + os.fsencode(gate))
    killer.join()

    assert isinstance(result, WorkerDied)
    assert "was killed by SIGSEGV at this one" in result.reason
