"""A chunk gets the right results, an item fails without affecting the others, and memory does not grow."""

import json
import logging
import resource
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from provider_image.backends import Device
from provider_image.chunk import ChunkItem, open_chunk, read_results, write_chunk
from provider_image.errors import BrokenImage, InferenceFailed, MalformedChunk, NotInstalled, UnknownModel
from provider_image.images.decoding import decode
from provider_image.images.resizing import encode_resized
from provider_image.models.artefact import find_artefact, installed_digest
from provider_image.models.processor import cpu_name
from provider_image.runtime import NetCache, net_bytes, peak_memory_bytes, run_chunk
from provider_image.service import Output
from provider_image.services import load_service
from provider_image.services.classification import Classification
from tests.provider_image.conftest import encode_image, make_chunk
from tests.timing import DEADLINE_SECONDS


@pytest.fixture(scope="module")
def nets(models_folder):
    """Nets that stay loaded over this module's tests."""
    return NetCache(models_folder, Device(threads=2))


def top(result) -> str:
    return result.output[0][1]


def test_photos_get_the_right_labels(tmp_path, photos, nets):
    chunk = make_chunk(tmp_path / "c.zip", [photos["chelsea"], photos["coffee"], photos["rocket"]])

    run_chunk(chunk, tmp_path / "r.zip", nets)

    results = read_results(tmp_path / "r.zip", "chunk-1", "efficientnet_lite0", [0, 1, 2])
    assert [top(item) for item in results.items] == ["tiger_cat", "espresso", "missile"]


def test_results_record_how_they_were_made(tmp_path, photos, models_folder):
    nets = NetCache(models_folder, Device(threads=1))
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]])

    first, second = (run_chunk(chunk, tmp_path / "r.zip", nets) for _ in range(2))

    assert first.digest == installed_digest(models_folder, "efficientnet_lite0")
    assert first.load_seconds > 0 == second.load_seconds
    assert first.precision == "f32"
    assert first.cpu == cpu_name()
    assert first.versions.keys() >= {"python", "openvino", "numpy", "pillow"}
    assert 50e6 < first.peak_memory_bytes <= peak_memory_bytes()
    assert 0 < second.items[0].seconds < 10


def test_broken_image_fails_alone(tmp_path, photos, nets):
    images = [photos["coffee"], photos["coffee"][:5000], b"", b"text", photos["chelsea"]]
    chunk = make_chunk(tmp_path / "c.zip", images)

    results = run_chunk(chunk, tmp_path / "r.zip", nets)

    codes = [item.error.code if item.error else top(item) for item in results.items]
    assert codes == ["espresso", "broken_image", "empty_image", "not_an_image", "tiger_cat"]
    assert all(item.error.permanent for item in results.items if item.error)


def test_resized_image_is_classified_and_one_of_the_wrong_size_fails_alone(tmp_path, photos, nets):
    images = [encode_resized(decode(photos["coffee"], side, side, 0.875)) for side in (224, 225)]
    chunk = make_chunk(tmp_path / "c.zip", [*images, photos["chelsea"]], is_resized=True)

    results = run_chunk(chunk, tmp_path / "r.zip", nets)

    assert [item.error.code if item.error else top(item) for item in results.items] == [
        "espresso",
        "bad_input",
        "bad_input",
    ]
    assert all(item.error.permanent for item in results.items if item.error)


class Buggy(Classification):
    """A service with a bug that some images trigger."""

    def prepare(self, artefact, inputs, params, *, is_resized=False):
        if inputs["image"] == b"bug":
            raise ZeroDivisionError("a bug")
        if inputs["image"] == b"net":
            raise InferenceFailed()
        return super().prepare(artefact, inputs, params)


def test_bug_fails_its_item_only_and_is_logged(tmp_path, photos, models_folder, caplog):
    nets = NetCache(models_folder, Device(threads=2), find_service=lambda name: Buggy())
    chunk = make_chunk(tmp_path / "c.zip", [b"bug", b"net", photos["coffee"]])

    with caplog.at_level(logging.ERROR):
        first, second, third = run_chunk(chunk, tmp_path / "r.zip", nets).items

    assert (first.error.code, first.error.permanent) == ("inference_failed", False)
    assert first.error.reason == "ZeroDivisionError: a bug"
    assert second.error.code == "inference_failed"
    assert top(third) == "espresso"
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError]


def test_item_with_bad_params_fails_alone(tmp_path, photos, nets):
    items = [
        ChunkItem(number=0, inputs={"image": photos["coffee"]}, params={"top": 99}),
        ChunkItem(number=1, inputs={"image": photos["coffee"]}, params={"top": 1}),
    ]
    write_chunk(tmp_path / "c.zip", "chunk-1", "classification", "efficientnet_lite0", None, items)

    first, second = run_chunk(tmp_path / "c.zip", tmp_path / "r.zip", nets).items

    assert first.error.code == "invalid_params"
    assert len(second.output) == 20


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "densenet121"}, NotInstalled),
        ({"model": "no_such_model"}, (NotInstalled, UnknownModel)),
        ({"service": "style"}, MalformedChunk),
        ({"digest": "0" * 64}, NotInstalled),
    ],
)
def test_chunk_that_cannot_be_processed_leaves_no_results(tmp_path, photos, nets, changes, error):
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]], **changes)

    with pytest.raises(error):
        run_chunk(chunk, tmp_path / "r.zip", nets)

    assert not (tmp_path / "r.zip").exists()


def test_right_digest_is_answered(tmp_path, photos, nets, models_folder):
    digest = installed_digest(models_folder, "efficientnet_lite0")
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]], digest=digest)

    assert run_chunk(chunk, tmp_path / "r.zip", nets).digest == digest


def test_item_with_other_inputs_than_those_of_the_service_fails_the_chunk(tmp_path, nets):
    items = [ChunkItem(number=0, inputs={"content": b"", "style": b""})]
    write_chunk(tmp_path / "c.zip", "id", "classification", "efficientnet_lite0", None, items)

    with pytest.raises(MalformedChunk, match=r"inputs `image` \(image\)"):
        run_chunk(tmp_path / "c.zip", tmp_path / "r.zip", nets)


def test_model_is_built_on_first_use(tmp_path, photos):
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]])

    results = run_chunk(chunk, tmp_path / "r.zip", NetCache(tmp_path / "models", Device(threads=1)))

    assert top(results.items[0]) == "espresso"


def test_damaged_weights_are_built_again(tmp_path, photos, models_folder):
    models = shutil.copytree(models_folder, tmp_path / "models")
    weights = models / "efficientnet_lite0" / "model.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    chunk = make_chunk(tmp_path / "c.zip", [photos["coffee"]])

    results = run_chunk(chunk, tmp_path / "r.zip", NetCache(models, Device(threads=1)))

    assert top(results.items[0]) == "espresso"


def test_threads_do_not_change_the_answers(tmp_path, photos, models_folder):
    chunk = make_chunk(tmp_path / "c.zip", [photos["chelsea"], photos["coffee"], photos["rocket"]] * 5)

    one, three = (
        run_chunk(chunk, tmp_path / "r.zip", NetCache(models_folder, Device(threads=threads))).items
        for threads in (1, 3)
    )

    assert [item.output for item in one] == [item.output for item in three]


class Counting(Classification):
    """Loads nothing, counts how often, and remembers how many inputs were in memory at once."""

    batch_items = 1

    def __init__(self):
        self.loads = 0

    def load(self, artefact, device):
        self.loads += 1
        return SimpleNamespace(artefact=artefact, batch_items=self.batch_items)

    def prepare(self, artefact, inputs, params, *, is_resized=False):
        return len(inputs["image"])

    def run(self, net, items, params):
        return [Output(data=item) for item in items]


def test_net_is_loaded_once(models_folder):
    service = Counting()
    nets = NetCache(models_folder, find_service=lambda name: service)

    first, second = (nets.get("classification", "efficientnet_lite0", None) for _ in range(2))

    assert service.loads == 1
    assert first.net is second.net


def test_nets_stay_loaded_within_a_number_of_bytes(tmp_path, models_folder):
    for number in range(4):
        folder = shutil.copytree(models_folder / "efficientnet_lite0", tmp_path / f"model{number}")
        facts = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(facts | {"name": f"model{number}"}))
    service = Counting()
    limit = 3 * net_bytes(find_artefact(tmp_path, "model0"))
    nets = NetCache(tmp_path, max_bytes=limit, find_service=lambda name: service)

    for number in range(4):
        nets.get("classification", f"model{number}", None)
    loads = service.loads
    nets.get("classification", "model1", None)
    assert service.loads == loads
    nets.get("classification", "model0", None)

    assert service.loads == loads + 1


def test_a_net_larger_than_the_limit_is_loaded_alone(models_folder):
    service = Counting()
    nets = NetCache(models_folder, max_bytes=1, find_service=lambda name: service)

    for _ in range(2):
        nets.get("classification", "efficientnet_lite0", None)

    assert service.loads == 1


def test_f16_weights_are_counted_as_the_f32_that_they_become(models_folder):
    artefact = find_artefact(models_folder, "efficientnet_lite0")

    halves = net_bytes(replace(artefact, precision="f16")) - net_bytes(replace(artefact, precision="f32"))

    assert halves == artefact.size_bytes


def test_memory_does_not_grow_with_the_chunk(tmp_path, models_folder):
    import tracemalloc

    megabytes = 4
    chunk = make_chunk(tmp_path / "c.zip", [bytes(megabytes << 20)] * 16)
    nets = NetCache(models_folder, Device(threads=1), find_service=lambda name: Counting())
    nets.get("classification", "efficientnet_lite0", None)

    tracemalloc.start()
    run_chunk(chunk, tmp_path / "r.zip", nets)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 4 * (megabytes << 20)


class Greedy(Counting):
    """Takes memory for an image, as a decoder with a fault may; what is not written to takes no real memory."""

    def prepare(self, artefact, inputs, params, *, is_resized=False):
        taken = [bytearray(1 << 28) for _ in range(int(inputs["image"]))]
        return len(taken)


def test_item_that_takes_memory_without_end_fails_alone(tmp_path, models_folder):
    device, allowed = Device(threads=2), 2 << 30
    nets = NetCache(models_folder, device, max_bytes=allowed, find_service=lambda name: Greedy())
    chunk = make_chunk(tmp_path / "c.zip", [b"1", b"256", b"2"])
    before = resource.getrlimit(resource.RLIMIT_DATA)

    first, greedy, last = run_chunk(chunk, tmp_path / "r.zip", nets).items

    assert (first.output, last.output) == (1, 2)
    assert (greedy.error.code, greedy.error.permanent) == ("inference_failed", False)
    assert "more memory" in greedy.error.reason
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_items_are_worked_on_side_by_side(tmp_path, models_folder):
    together = threading.Barrier(8, timeout=DEADLINE_SECONDS)

    class Together(Counting):
        def run(self, net, items, params):
            together.wait()
            return super().run(net, items, params)

    chunk = make_chunk(tmp_path / "c.zip", [b"x"] * 8)
    nets = NetCache(models_folder, Device(threads=8), find_service=lambda name: Together())

    run_chunk(chunk, tmp_path / "r.zip", nets)

    assert together.n_waiting == 0 and not together.broken


class Meeting(Counting):
    """Waits in each item until so many items are worked on."""

    def __init__(self, items):
        super().__init__()
        self.together = threading.Barrier(items, timeout=DEADLINE_SECONDS)

    def run(self, net, items, params):
        self.together.wait()
        return super().run(net, items, params)


def test_chunks_at_the_same_time_share_the_threads_and_the_net(tmp_path, models_folder):
    service = Meeting(4)
    nets = NetCache(models_folder, Device(threads=4), find_service=lambda name: service)
    chunks = [make_chunk(tmp_path / f"{name}.zip", [b"x"] * 2, chunk_id=name) for name in ("one", "two")]

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda chunk: run_chunk(chunk, chunk.with_suffix(".results"), nets), chunks))

    assert [results.chunk_id for results in done] == ["one", "two"]
    assert all(item.error is None for results in done for item in results.items)
    assert service.loads == 1


def test_chunk_of_another_model_waits_until_there_is_room_for_its_net(tmp_path, models_folder):
    for name in ("first", "second"):
        folder = shutil.copytree(models_folder / "efficientnet_lite0", tmp_path / name)
        facts = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(facts | {"name": name}))
    service, is_begun, order = Counting(), threading.Event(), []
    nets = NetCache(tmp_path, max_bytes=net_bytes(find_artefact(tmp_path, "first")), find_service=lambda name: service)

    def use_second():
        is_begun.set()
        with nets.use("classification", "second", None):
            order.append("second begins")

    with nets.use("classification", "first", None):
        thread = threading.Thread(target=use_second)
        thread.start()
        is_begun.wait(DEADLINE_SECONDS)
        time.sleep(0.05)
        order.append("first ends")
    thread.join(DEADLINE_SECONDS)

    assert order == ["first ends", "second begins"]
    assert service.loads == 2


class Mixing(Counting):
    """Runs up to eight items at once. The first two items are two batches, which wait until all items are prepared."""

    batch_items = 8

    def __init__(self, items):
        super().__init__()
        self.batches, self._items, self._prepared, self._changed = [], items, 0, threading.Condition()

    def _wait_for(self, condition):
        assert self._changed.wait_for(condition, DEADLINE_SECONDS)

    def prepare(self, artefact, inputs, params, *, is_resized=False):
        with self._changed:
            self._prepared += 1
            number = min(self._prepared - 1, 2)
            self._changed.notify_all()
            self._wait_for(lambda: len(self.batches) >= number)
        return super().prepare(artefact, inputs, params, is_resized=is_resized)

    def run(self, net, items, params):
        with self._changed:
            self.batches.append(items)
            is_second = len(self.batches) == 2
            self._changed.notify_all()
            self._wait_for(lambda: self._prepared == self._items)
            self._wait_for(lambda: len(self.batches) > 2 or not is_second)  # one thread takes what is left
        if 9 in items:
            raise InferenceFailed()
        return super().run(net, items, params)


def test_batches_are_filled_from_all_chunks_while_others_are_decoded(tmp_path, models_folder):
    service = Mixing(items=10)
    device = Device(threads=2, batch_items=8)
    nets = NetCache(models_folder, device, find_service=lambda name: service)
    sizes = {"one": [1, 2, 3, 4, 9], "two": [5, 6, 7, 8, 10]}
    chunks = [
        make_chunk(tmp_path / f"{name}.zip", [bytes(size) for size in each], chunk_id=name)
        for name, each in sizes.items()
    ]

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda chunk: run_chunk(chunk, chunk.with_suffix(".results"), nets), chunks))

    assert [[item.output for item in results.items] for results in done] == [[1, 2, 3, 4, None], [5, 6, 7, 8, 10]]
    assert done[0].items[4].error.code == "inference_failed"  # alone, after the batch with it
    assert [len(batch) for batch in service.batches[:2]] == [1, 1]
    assert max(map(len, service.batches)) <= 8
    mixed = [batch for batch in service.batches if set(batch) & set(sizes["one"]) and set(batch) & set(sizes["two"])]
    assert mixed


class Peak(Counting):
    """Remembers how many items were worked on at once."""

    def __init__(self):
        super().__init__()
        self._lock = threading.Lock()
        self._current = self.most = 0

    def run(self, net, items, params):
        with self._lock:
            self._current += 1
            self.most = max(self.most, self._current)
        time.sleep(0.02)
        with self._lock:
            self._current -= 1
        return super().run(net, items, params)


def test_items_that_together_need_too_much_memory_are_worked_on_one_after_another(tmp_path, models_folder, slow_chunk):
    # 16 images of 36 million pixels, each of which may take nearly all that one item may
    few, many = Peak(), Peak()
    for service, limit in ((few, 1), (many, 1 << 40)):
        nets = NetCache(models_folder, Device(threads=4), max_bytes=limit, find_service=lambda name, it=service: it)
        run_chunk(slow_chunk, tmp_path / "r.zip", nets)

    assert few.most == 1 < many.most


def test_small_items_do_not_wait_for_memory(tmp_path, models_folder, photos):
    service = Peak()
    nets = NetCache(models_folder, Device(threads=4), max_bytes=1, find_service=lambda name: service)

    run_chunk(make_chunk(tmp_path / "c.zip", [photos["coffee"]] * 16), tmp_path / "r.zip", nets)

    assert service.most > 1


class Batching(Counting):
    """Runs up to three items at once, and fails on every batch with a certain length of image in it."""

    batch_items = 3

    def __init__(self):
        super().__init__()
        self.batches = []

    def run(self, net, items, params):
        self.batches.append((list(items), list(params)))
        if 9 in items:
            raise InferenceFailed()
        return super().run(net, items, params)


def test_net_gets_batches_of_the_size_that_it_states_with_the_checked_params(tmp_path, models_folder):
    service = Batching()
    items = [
        ChunkItem(number=number, inputs={"image": bytes(number)}, params={"top": number + 1}) for number in range(7)
    ]
    write_chunk(tmp_path / "c.zip", "chunk-1", "classification", "efficientnet_lite0", None, items)
    nets = NetCache(models_folder, Device(threads=1), find_service=lambda name: service)

    results = run_chunk(tmp_path / "c.zip", tmp_path / "r.zip", nets)

    assert [batch for batch, _ in service.batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [params["top"] for _, of_batch in service.batches for params in of_batch] == [1, 2, 3, 4, 5, 6, 7]
    assert [(item.number, item.output) for item in results.items] == [(number, number) for number in range(7)]


def test_item_that_fails_its_batch_fails_alone(tmp_path, models_folder):
    chunk = make_chunk(tmp_path / "c.zip", [bytes(length) for length in (1, 9, 2)])
    nets = NetCache(models_folder, Device(threads=1), find_service=lambda name: Batching())

    first, second, third = run_chunk(chunk, tmp_path / "r.zip", nets).items

    assert (first.output, third.output) == (1, 2)
    assert second.error.code == "inference_failed"


def test_item_that_cannot_be_prepared_does_not_affect_its_batch(tmp_path, models_folder):
    class Picky(Batching):
        def prepare(self, artefact, inputs, params, *, is_resized=False):
            if not inputs["image"]:
                raise BrokenImage()
            return super().prepare(artefact, inputs, params)

    service = Picky()
    chunk = make_chunk(tmp_path / "c.zip", [b"a", b"", b"ab"])

    results = run_chunk(
        chunk, tmp_path / "r.zip", NetCache(models_folder, Device(threads=1), find_service=lambda name: service)
    )

    assert [batch for batch, _ in service.batches] == [[1, 2]]
    assert [item.error and item.error.code for item in results.items] == [None, "broken_image", None]


def test_reader_is_closed_after_a_chunk(tmp_path, photos, nets):
    chunk = make_chunk(tmp_path / "c.zip", [encode_image(Image.new("RGB", (8, 8)), "PNG")])

    run_chunk(chunk, tmp_path / "r.zip", nets)

    with open_chunk(chunk) as reader:
        assert reader.items
    assert load_service("classification") is load_service("classification")
