"""The cache of vectors: it finds what an exact search finds, follows every change, and survives being killed."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.collections import vector_cache
from store.collections.vector_cache import Match, VectorCache, VectorChange

DIMENSIONS = 70


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype("<f4")


def features(count: int, seed: int = 0) -> np.ndarray:
    """Make vectors like those of images: not negative, many zeros, in clusters."""
    generator = np.random.default_rng(seed)
    centres = np.maximum(0, np.random.default_rng(1000).normal(size=(20, DIMENSIONS)))
    noise = generator.normal(scale=0.5, size=(count, DIMENSIONS))
    return unit(np.maximum(0, centres[generator.integers(20, size=count)] + noise) + 1e-6)


class Rows:
    """What a database has: the changes of a collection by their sequence numbers."""

    def __init__(self) -> None:
        self.vectors: dict[int, np.ndarray] = {}
        self.changes: list[VectorChange] = []

    def add(self, vectors: np.ndarray) -> list[int]:
        numbers = []
        for vector in vectors:
            sequence = len(self.changes) + 1
            numbers.append(sequence * 10)
            self.vectors[numbers[-1]] = vector
            self.changes.append(VectorChange(sequence=sequence, number=numbers[-1], vector=vector.tobytes()))
        return numbers

    def delete(self, *numbers: int) -> None:
        for number in numbers:
            del self.vectors[number]
            self.changes.append(VectorChange(sequence=len(self.changes) + 1, number=number, vector=None))

    def after(self, sequence: int) -> list[VectorChange]:
        return self.changes[sequence:]

    def nearest(self, query: np.ndarray, k: int) -> list[int]:
        scores = {number: float(vector @ query) for number, vector in self.vectors.items()}
        return sorted(scores, key=lambda number: -scores[number])[:k]


@pytest.fixture
def rows() -> Rows:
    return Rows()


def numbers_of(matches: list[Match]) -> list[int]:
    return [match.number for match in matches]


def test_a_search_finds_the_most_similar_first(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    rows.add(features(500))
    cache.update(rows.after)

    for query in features(20, seed=1):
        found = cache.search(query.tobytes(), 10)
        assert numbers_of(found) == rows.nearest(query, 10)
        assert [match.score for match in found] == pytest.approx(
            [float(rows.vectors[match.number] @ query) for match in found], abs=1e-6
        )


def test_an_empty_collection_has_no_matches(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)

    before = cache.search(features(1)[0].tobytes(), 3)
    cache.update(rows.after)

    assert before == cache.search(features(1)[0].tobytes(), 3) == []


def test_fewer_vectors_than_asked_for_are_all_found(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    added = rows.add(features(3))
    cache.update(rows.after)

    assert sorted(numbers_of(cache.search(features(1, seed=2)[0].tobytes(), 10))) == added


def test_a_threshold_and_a_set_of_numbers_limit_what_is_found(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    added = rows.add(features(400))
    cache.update(rows.after)
    query = rows.vectors[added[7]]

    some = added[5:25]
    among = cache.search(query.tobytes(), 5, numbers=some)
    near = cache.search(query.tobytes(), 400, threshold=0.9)

    assert numbers_of(among) == [number for number in rows.nearest(query, 400) if number in some][:5]
    assert {match.number for match in near} == {n for n, v in rows.vectors.items() if float(v @ query) >= 0.9}


def test_what_was_deleted_is_not_found_and_not_in_the_files(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    added = rows.add(features(50))
    cache.update(rows.after)
    secret = rows.vectors[added[20]].tobytes()

    rows.delete(added[20], added[49])
    cache.update(rows.after)
    rows.add(features(5, seed=3))
    cache.update(rows.after)

    assert numbers_of(cache.search(secret, 60)) == rows.nearest(np.frombuffer(secret, "<f4"), 60)
    assert all(secret not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_cache_made_at_once_equals_one_that_followed_every_change(tmp_path: Path, rows: Rows) -> None:
    followed = VectorCache(tmp_path / "followed", DIMENSIONS, exact_rows=100)
    generator = np.random.default_rng(5)
    for seed in range(12):
        rows.add(features(40, seed))
        if seed % 3 == 2:
            rows.delete(*generator.choice(list(rows.vectors), 15, replace=False).tolist())
        followed.update(rows.after)
    at_once = VectorCache(tmp_path / "at-once", DIMENSIONS, exact_rows=100)
    at_once.update(rows.after)

    for query in features(20, seed=99):
        expected = rows.nearest(query, 10)
        # So few vectors are all compared exactly, in both.
        assert numbers_of(followed.search(query.tobytes(), 10)) == expected
        assert numbers_of(at_once.search(query.tobytes(), 10)) == expected


def test_two_stages_find_what_the_exact_search_finds_and_the_recall_is_measured(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS, exact_rows=1000)
    rows.add(features(900))
    cache.update(rows.after)
    exact_only = cache.recall()
    rows.add(features(6000, seed=1))
    cache.update(rows.after)

    queries = features(30, seed=2)
    found = sum(
        len(set(rows.nearest(query, 10)) & set(numbers_of(cache.search(query.tobytes(), 10)))) for query in queries
    )

    assert exact_only is None
    recall = cache.recall()
    # Seventy bits tell little; with the 1280 of a real model nothing is missed here.
    assert recall is not None and 0.9 < recall <= 1
    assert found / 300 > 0.9


def test_more_are_compared_exactly_until_enough_is_found(tmp_path: Path, rows: Rows) -> None:
    rows.add(features(3000))
    few = VectorCache(tmp_path / "few", DIMENSIONS, exact_rows=1000, rescored=[10])
    chosen = VectorCache(tmp_path / "chosen", DIMENSIONS, exact_rows=1000, rescored=[10, 3000, 20])

    few.update(rows.after)
    chosen.update(rows.after)

    assert (few.recall() or 1) < 0.999
    assert chosen.recall() == 1
    query = features(1, seed=2)[0]
    assert numbers_of(chosen.search(query.tobytes(), 10)) == rows.nearest(query, 10)


def test_many_nearest_are_found_in_two_stages_too(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS, exact_rows=100, rescored=[20])
    rows.add(features(3000))
    cache.update(rows.after)

    query = features(1, seed=4)[0]
    found = numbers_of(cache.search(query.tobytes(), 20))

    assert len(set(found) & set(rows.nearest(query, 20))) >= 18


def test_vectors_added_after_the_bits_were_made_are_found(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS, exact_rows=1000)
    rows.add(features(2000))
    cache.update(rows.after)
    (late,) = rows.add(features(1, seed=8))
    cache.update(rows.after)
    found_late = cache.search(rows.vectors[late].tobytes(), 1)
    rows.delete(late)
    query = features(1, seed=8)[0]
    cache.update(rows.after)

    assert numbers_of(found_late) == [late]
    assert late not in numbers_of(cache.search(query.tobytes(), 10))


def test_a_damaged_state_is_read_again_from_the_rows(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    added = rows.add(features(30))
    cache.update(rows.after)
    (tmp_path / "cache" / "state.json").write_text("{")

    cache.update(rows.after)

    assert sorted(numbers_of(cache.search(rows.vectors[added[0]].tobytes(), 50))) == added


@pytest.mark.parametrize("name", ["vectors.f32", "numbers.i64"])
def test_files_that_are_cut_or_gone_are_read_again_from_the_rows(tmp_path: Path, rows: Rows, name: str) -> None:
    added = rows.add(features(30))
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink):
        cache = VectorCache(tmp_path / "cache", DIMENSIONS)
        cache.update(rows.after)
        (file,) = (tmp_path / "cache").glob(f"*/{name}")
        damage(file)

        damaged = VectorCache(tmp_path / "cache", DIMENSIONS)
        assert damaged.sequence() == 0
        damaged.update(rows.after)

        assert sorted(numbers_of(damaged.search(rows.vectors[added[0]].tobytes(), 50))) == added


def test_other_dimensions_start_anew(tmp_path: Path, rows: Rows) -> None:
    rows.add(features(5))
    VectorCache(tmp_path / "cache", DIMENSIONS).update(rows.after)

    assert VectorCache(tmp_path / "cache", DIMENSIONS + 1).search(bytes(4 * (DIMENSIONS + 1)), 3) == []


def test_bits_may_be_left_to_a_later_update(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS, exact_rows=100)
    rows.add(features(300))

    cache.update(rows.after, makes_bits=False)
    before = cache.lacks_bits(), cache.recall()
    exact = numbers_of(cache.search(features(1, seed=4)[0].tobytes(), 10))
    cache.update(rows.after)

    assert before == (True, None)
    assert exact == rows.nearest(features(1, seed=4)[0], 10)
    assert not cache.lacks_bits()
    assert cache.recall() is not None


def test_an_update_waits_only_so_long_for_another(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    rows.add(features(3))

    def while_locked(sequence: int) -> list[VectorChange]:
        with pytest.raises(TimeoutError):
            VectorCache(tmp_path / "cache", DIMENSIONS).update(rows.after, wait_seconds=0.05)
        return rows.after(sequence)

    cache.update(while_locked)

    assert cache.sequence() == 3


def test_most_rows_deleted_makes_the_files_small_again(tmp_path: Path, rows: Rows) -> None:
    cache = VectorCache(tmp_path / "cache", DIMENSIONS)
    added = rows.add(features(3000))
    cache.update(rows.after)
    rows.delete(*added[:2000])
    cache.update(rows.after)
    # The next update starts anew, and asks for all changes.
    cache.update(rows.after)

    state = json.loads((tmp_path / "cache" / "state.json").read_text())
    assert state["rows"] == 1000
    query = features(1, seed=4)[0]
    assert numbers_of(cache.search(query.tobytes(), 10)) == rows.nearest(query, 10)


KILLED = """
import os, signal, sys
from pathlib import Path
from store.collections import vector_cache
from tests.store.collections.test_vector_cache import DIMENSIONS, Rows, features

rows = Rows()
numbers = rows.add(features(300))
rows.delete(*numbers[100:130])
rows.add(features(300, seed=1))
write, write_state = vector_cache._write, vector_cache.VectorCache._write_state
vector_cache._BLOCK_ROWS = 128

def update(calls):
    def count(call):
        def counted(*arguments):
            nonlocal calls
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            calls -= 1
            return call(*arguments)
        return counted

    vector_cache._write, vector_cache.VectorCache._write_state = count(write), count(write_state)
    vector_cache.VectorCache(Path(sys.argv[1]), DIMENSIONS, exact_rows=150).update(rows.after)

for calls in range(50):
    child = os.fork()
    if not child:
        update(calls)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if not status:
        break
"""


def test_killed_before_every_write_the_next_update_is_complete(tmp_path: Path) -> None:
    rows = Rows()
    numbers = rows.add(features(300))
    rows.delete(*numbers[100:130])
    rows.add(features(300, seed=1))

    command = [sys.executable, "-c", KILLED, str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True, check=True)

    *killed, last = map(int, done.stdout.split())
    assert last == 0
    assert len(killed) > 5 and set(killed) == {-signal.SIGKILL}
    cache = VectorCache(tmp_path / "cache", DIMENSIONS, exact_rows=10_000)
    query = features(1, seed=6)[0]
    assert numbers_of(cache.search(query.tobytes(), 600)) == rows.nearest(query, 600)


@pytest.mark.parametrize(
    ("is_deleting", "failing"), [*((False, call) for call in range(2, 7)), *((True, call) for call in range(4, 8))]
)
def test_what_is_deleted_around_a_failed_update_is_not_in_the_files(
    tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch, is_deleting: bool, failing: int
) -> None:
    folder, (*_, last) = tmp_path / "cache", rows.add(features(30))
    secret = rows.vectors[last]
    if is_deleting:
        VectorCache(folder, DIMENSIONS, exact_rows=10).update(rows.after)
        rows.delete(last)
    calls = itertools.count(1)

    def failing_once(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if next(calls) == failing:
                raise OSError
            return call(*arguments)

        return counted

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(vector_cache, "_write", failing_once(vector_cache._write))
        patched.setattr(VectorCache, "_write_state", failing_once(VectorCache._write_state))
        VectorCache(folder, DIMENSIONS, exact_rows=10).update(rows.after)
    if not is_deleting:
        rows.delete(last)
    VectorCache(folder, DIMENSIONS, exact_rows=10).update(rows.after)

    assert all(secret.tobytes() not in path.read_bytes() for path in folder.rglob("*.f32"))
    (bits,), (mean,) = folder.rglob("bits-*"), folder.rglob("mean-*")
    of_secret = vector_cache._to_bits((secret - np.fromfile(mean, "<f4"))[None]).tobytes()
    assert of_secret not in bits.read_bytes()
