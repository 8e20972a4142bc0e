"""Searches in collections: their time, what the first stage finds, the memory, and what adding an image costs.

Three parts: synthetic vectors in clusters, not negative and with many zeros like those of images; crops of the photos
in scikit-image's and scikit-learn's wheels through the embedding model; and the store with and without a collection.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scripts.benchmarks.support import stored_requests
from scripts.benchmarks.support.measuring import medians, milliseconds, print_table, rounds_option, timed, work_folder
from store import new_id
from store.collections.collections import CollectionRecord
from store.collections.likeness import group_by_likeness, near_duplicates
from store.collections.vector_cache import RESCORED, VectorCache, VectorChange
from store.files import NewFile
from store.requests import Answer, NewRequest
from store.store import Store

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MODEL, DIMENSIONS = "efficientnet_lite0_embedding", 1280
#: Searches of one measurement, and how many nearest are looked for.
SEARCHES, NEAREST = 200, 10
_CLUSTERS, _PART = 1000, 10_000


@click.command()
@click.option("--vectors", default="100000,1000000", show_default=True, help="Sizes of synthetic collections.")
@click.option("--crops", default=10_000, show_default=True, help="Crops of photos; 0 leaves that part out.")
@click.option("--images", default=1000, show_default=True, help="Images that are added; 0 leaves that part out.")
@rounds_option(5)
def main(vectors: str, crops: int, images: int, rounds: int) -> None:
    """Measure searches in collections, their recall, and what adding an image costs."""
    with work_folder() as folder:
        rows = [_search_synthetic(folder / count, int(count)) for count in vectors.split(",") if count]
        times = ("p50 ms", "p95 ms", "processor ms")
        head = ("vectors", *times, "recall@10", "its own measurement", "MB beside the f32", "built in s")
        print_table(f"Synthetic vectors of {DIMENSIONS} values, {SEARCHES} searches", head, rows)
        if crops:
            _search_crops(folder, crops)
        if images:
            _add(folder, images, rounds)


def _synthetic(count: int, seed: int = 0) -> Iterator[Array]:
    """Make unit vectors in parts: clusters, no negative values, about half of them zero."""
    import numpy as np

    centres = np.random.default_rng(1).normal(size=(_CLUSTERS, DIMENSIONS)).astype(np.float32)
    generator = np.random.default_rng(seed)
    for first in range(0, count, _PART):
        size = min(_PART, count - first)
        chosen = generator.integers(_CLUSTERS, size=size)
        values = np.maximum(0, centres[chosen] + generator.standard_normal((size, DIMENSIONS), np.float32))
        yield values / np.linalg.norm(values, axis=1, keepdims=True)


def _changes(parts: Iterator[Array], after: int) -> Iterator[VectorChange]:
    number = 0
    for part in parts:
        for vector in part:
            number += 1
            if number > after:
                yield VectorChange(sequence=number, number=number, vector=vector.astype("<f4").tobytes())


def _search_synthetic(folder: Path, count: int) -> list[object]:
    """Build a cache and search it. :return: a row of the table."""
    import numpy as np

    cache = VectorCache(folder, DIMENSIONS)
    seconds = timed(lambda: cache.update(lambda after: _changes(_synthetic(count), after)))
    queries = next(_synthetic(SEARCHES, seed=2))
    cache.search(queries[0].tobytes(), NEAREST)  # maps the files
    times, began = [], time.process_time()
    for query in queries:
        times += milliseconds(functools.partial(cache.search, query.tobytes(), NEAREST), 1)
    processor = 1000 * (time.process_time() - began) / len(queries)
    resident = _resident_mb()
    numbers, vectors = cache.rows()
    recall = _recall(cache, queries[:50], np.asarray(numbers), vectors)
    own = cache.recall()
    p50, p95 = np.percentile(times, [50, 95])
    return [
        f"{count:,}",
        f"{p50:.1f}",
        f"{p95:.1f}",
        f"{processor:.1f}",
        f"{recall:.4f}",
        "all are compared" if own is None else f"{own:.4f}",
        f"{resident:.0f}",
        f"{seconds:.0f}",
    ]


def _recall(cache: VectorCache, queries: Array, numbers: Array, vectors: Array, own: Array | None = None) -> float:
    """Return the share of the true nearest that searches find. :param own: number of each query, left out."""
    import numpy as np

    found = 0
    scores = np.concatenate([vectors[first : first + _PART] @ queries.T for first in range(0, len(vectors), _PART)])
    for position, query in enumerate(queries):
        left_out = -1 if own is None else int(own[position])
        exact = numbers[np.argsort(-scores[:, position], kind="stable")[: NEAREST + 1]]
        exact = exact[exact != left_out][:NEAREST]
        matches = [match.number for match in cache.search(query.tobytes(), NEAREST + 1)]
        found += len(set(exact.tolist()) & set([number for number in matches if number != left_out][:NEAREST]))
    return found / (NEAREST * len(queries))


def _resident_mb() -> float:
    """Return the resident memory of this process without the mapped f32 vectors."""
    total = 0
    is_counted = True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_counted = not line.endswith("vectors.f32")
        elif line.startswith("Rss:") and is_counted:
            total += int(line.split()[1])
    return total / 1024


def _photos() -> list[Any]:
    """Open the colour photos in the wheels of scikit-image and scikit-learn."""
    from PIL import Image

    found = []
    for package, folder in (("skimage", "data"), ("sklearn", "datasets/images")):
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            for path in sorted((Path(spec.origin).parent / folder).glob("*")):
                if path.suffix in (".png", ".jpg", ".jpeg"):
                    image = Image.open(path)
                    if image.mode == "RGB" and min(image.size) >= 224:
                        found.append(image.convert("RGB"))
    return found


def _search_crops(folder: Path, count: int) -> None:
    """Compute the vectors of crops, and compare searches in two stages with exact ones."""
    import numpy as np

    from provider_image.backends import Device, load_net
    from provider_image.compiler import ensure_installed
    from provider_image.images.resizing import load_image
    from provider_image.models.artefact import find_artefact

    ensure_installed(folder / "models", MODEL)
    artefact = find_artefact(folder / "models", MODEL)
    net = load_net(artefact, Device())
    photos, generator = _photos(), np.random.default_rng(3)
    vectors = np.empty((count, DIMENSIONS), "<f4")
    seconds = 0.0
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(generator.integers(112, min(photo.size) + 1))
        left, top = (int(generator.integers(0, edge - side + 1)) for edge in photo.size)
        crop = photo.crop((left, top, left + side, top + side)).resize((256, 256))
        item = load_image(_to_png(crop), artefact, is_resized=False)
        started = time.perf_counter()
        vectors[number] = next(iter(net.infer([item])))
        seconds += time.perf_counter() - started
    click.echo(f"{count} crops of {len(photos)} photos, {1000 * seconds / count:.1f} ms of inference each")
    numbers = np.arange(1, count + 1)
    chosen = generator.choice(count, min(count, SEARCHES), replace=False)
    rows = []
    for rescored in (50, 200, RESCORED[0]):
        cache = VectorCache(folder / f"crops-{rescored}", DIMENSIONS, exact_rows=1, rescored=[rescored])
        cache.update(lambda after: _changes(iter([vectors]), after))
        recall = _recall(cache, vectors[chosen], numbers, vectors, own=numbers[chosen])
        rows.append([rescored, f"{recall:.4f}", f"{cache.recall():.4f}"])
    print_table("Two stages on crops of photos", ("compared exactly", "recall@10", "its own measurement"), rows)
    duplicates = timed(lambda: near_duplicates(numbers, vectors, 0.95, limit_seconds=600))
    groups = timed(lambda: group_by_likeness(numbers, vectors))
    click.echo(f"near-duplicates above 0.95 in {duplicates:.2f} s, groups in {groups:.2f} s")


def _to_png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _add(folder: Path, count: int, rounds: int) -> None:
    """Record answers with and without a collection; both get the same vectors."""
    vectors = next(_synthetic(count))
    with stored_requests.opened(folder / "home") as store:
        rows = []
        for turn in range(rounds):
            rows.append([_record(store, vectors, turn, is_member) for is_member in (False, True)])
        without, within = medians(rows)
    click.echo(
        f"recording an answer with its vector: {without:.3f} ms of processor time, as a member of a collection "
        f"{within:.3f} ms: {within - without:.3f} ms more"
    )


def _record(store: Store, vectors: Array, turn: int, is_member: bool) -> float:
    """Add requests and record their answers. :return: milliseconds of processor time for each."""
    now, digest = datetime.now(UTC), "d" * 64
    number = None
    if is_member:
        name = f"measured-{turn}"
        number = store.collections.add(CollectionRecord(id=new_id(), name=name, model=MODEL, created_at=now)).number
    started = time.process_time()
    for position in range(len(vectors)):
        new = NewRequest(
            id=new_id(), service="embedding", model=MODEL, digest=digest, collection=number, created_at=now
        )
        store.requests.add(new, store.images.stage(f"{turn} {is_member} {position}".encode()))
        if position % 16 == 15 or position == len(vectors) - 1:
            claims = store.requests.claim(
                models=[MODEL], limit=16, now=now, lease_ends_at=now + timedelta(seconds=60), oldest_before=None
            )
            make = functools.partial(Answer, digest=digest, chunk_id="c", provider="p", seconds=0.01)
            first = position + 1 - len(claims)
            store.requests.finish(
                [
                    make(
                        claim=claim,
                        output={"dimensions": DIMENSIONS},
                        files={
                            "vector": NewFile(
                                data=vectors[first + place].astype("<f4").tobytes(),
                                media_type="application/octet-stream",
                            )
                        },
                    )
                    for place, claim in enumerate(claims)
                ],
                now=now,
            )
    return 1000 * (time.process_time() - started) / len(vectors)
