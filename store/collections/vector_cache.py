"""Vectors of a collection in memory-mapped files: a cache for exact and nearly exact search, rebuilt from the database.

The rows of the database are the truth; a cache follows them by their sequence numbers, so that it can be deleted at any
time. Up to EXACT_ROWS a search compares the query with every vector (f32, inner product). Above, that would be limited
by the memory's bandwidth, so a first stage compares one bit per value (the sign after the collection's mean is
subtracted) and the best of it are compared exactly. How many of the true ten nearest that finds is measured with the
collection's own vectors whenever the bits are made; it decides how many are compared, and is stored.

    numbers.i64    the number of each row's vector, -1 where it was deleted
    vectors.f32    rows x dimensions
    mean-N.f32     what is subtracted before the signs are taken; N rows were there when it was computed
    bits-N.u64     rows x ceil(dimensions / 64)
    state.json     how many rows are valid; replaced when they are on disk, so a killed process leaves the state before

A rebuilt cache is a new folder. One process writes at a time (a file lock); any number reads.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

log = logging.getLogger(__name__)

#: Collections with more rows are searched in two stages.
EXACT_ROWS = 100_000
#: Candidates of the first stage that are compared exactly: the first number with which enough of the true nearest are
#: found, else the last.
RESCORED = (1000, 3000, 10_000)
_ENOUGH = 0.999
#: At least so many for each one that is asked for.
_CANDIDATES_OF_EACH = 10
#: Rows that one step of an update takes, and one of a search: its intermediate results stay in the processor's cache.
_BLOCK_ROWS, _SEARCH_ROWS = 16_384, 4096
#: Queries that the recall of the first stage is measured with, and how many of their nearest are looked for.
_RECALL_QUERIES, _RECALL_AT = 50, 10
#: Bits are made again, with a new mean, when this many times as many rows are there.
_GROWTH = 2
#: Pause between two attempts to get the lock of an update.
_LOCK_POLL_SECONDS = 0.02
_STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class VectorChange:
    """A vector that was added, or deleted."""

    #: Grows with every change of a collection.
    sequence: int
    #: Of what the vector belongs to; never used again in its collection.
    number: int
    #: f32 values, little-endian, of unit length; None: it was deleted.
    vector: bytes | None


@dataclass(frozen=True, kw_only=True)
class Match:
    """A vector that is similar to a query."""

    number: int
    #: Inner product with the query, -1 to 1.
    score: float


@dataclass(frozen=True, kw_only=True)
class _State:
    """What is valid in the files of a folder."""

    dimensions: int
    #: Name of the folder with the files.
    folder: str
    #: The last change that is in them.
    sequence: int = 0
    rows: int = 0
    deleted: int = 0
    #: Rows whose bits were there when the mean was computed; 0 without bits.
    rows_of_mean: int = 0
    #: Share of the true nearest that the first stage finds; None if it was not measured.
    recall: float | None = None
    #: Candidates of the first stage.
    rescored: int = 0


class VectorCache:
    """The files of one collection. Thread-safe for reading; `update` may be called from any process.

    :param folder: of this collection alone; created by the first update.
    :param threads: threads of a search.
    :param exact_rows: with more rows, a search has two stages.
    :param rescored: see RESCORED.
    """

    def __init__(
        self,
        folder: Path,
        dimensions: int,
        *,
        threads: int = 2,
        exact_rows: int = EXACT_ROWS,
        rescored: Sequence[int] = RESCORED,
    ) -> None:
        self._folder = folder
        self._dimensions = dimensions
        self._threads = threads
        self._exact_rows = exact_rows
        self._rescored = rescored
        #: The files that were mapped last, and what is valid in them: to map many pages again takes longer than to
        #: search them.
        self._mapped: tuple[_State, _Files] | None = None

    def sequence(self) -> int:
        """Return the last sequence number that is in the cache."""
        state = self._read_whole_state()
        return 0 if state is None else state.sequence

    def lacks_bits(self) -> bool:
        """Tell whether `update` would make the bits of all vectors, which takes long."""
        state = self._read_state()
        return state is not None and self._needs_bits(state)

    def _needs_bits(self, state: _State) -> bool:
        return state.rows > self._exact_rows and state.rows >= _GROWTH * state.rows_of_mean

    def recall(self) -> float | None:
        """Return the measured recall at ten of the first stage; None while every search is exact."""
        state = self._read_state()
        return None if state is None or state.rows <= self._exact_rows else state.recall

    def update(
        self,
        changes_after: Callable[[int], Iterable[VectorChange]],
        *,
        latest: Callable[[], int] | None = None,
        makes_bits: bool = True,
        wait_seconds: float | None = None,
    ) -> int:
        """Apply the changes that are not in the cache yet.

        :param changes_after: returns the changes with higher sequence numbers than this, in their order; all those of
            a deleted number may be left out for a cache at 0.
        :param latest: returns the last sequence number that there is. A cache that is ahead of it is made anew: the
            database is an older one, from a backup.
        :param makes_bits: False leaves the bits of a cache that `lacks_bits` to another update; searches are exact
            until then.
        :param wait_seconds: how long to wait for an update that another thread or process makes; None has no limit.
        :raises TimeoutError: it lasts longer.
        :return: the last sequence number that is in the cache.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("w") as lock:
            _lock(lock, wait_seconds)
            state = self._read_whole_state()
            is_ahead = state is not None and latest is not None and state.sequence > latest()
            if state is None or is_ahead or state.deleted > max(1000, state.rows // 2):
                state = self._begin()
            self._drop_unfinished(state)
            state = self._apply(state, changes_after)
            if makes_bits and self._needs_bits(state):
                state = self._make_bits(state)
            return state.sequence

    def search(
        self, query: bytes, k: int, *, threshold: float = -1.0, numbers: Iterable[int] | None = None
    ) -> list[Match]:
        """Return the most similar vectors, the most similar first.

        :param query: f32 values of unit length.
        :param threshold: least score.
        :param numbers: only these are considered.
        """
        import numpy as np

        files = self._open()
        if files is None:
            return []
        usable = files.numbers >= 0
        if numbers is not None:
            usable &= np.isin(files.numbers, np.fromiter(numbers, np.int64))
        rows = np.flatnonzero(usable)
        values = np.frombuffer(query, "<f4")
        with ThreadPoolExecutor(self._threads) as pool:
            if files.bits is not None and len(rows) > self._exact_rows:
                count = max(files.rescored, _CANDIDATES_OF_EACH * k)
                rows = _nearest_by_bits(files, values, usable, count, pool)
            scores = _scores(files, values, rows, pool)
        best = _largest(scores, k)
        found = zip(files.numbers[rows[best]].tolist(), scores[best].tolist(), strict=True)
        return [Match(number=number, score=score) for number, score in found if score >= threshold]

    def rows(self) -> tuple[Array, Array]:
        """Return all vectors: their numbers, i64, and the vectors themselves, f32, shape (rows, dimensions).

        Those of a deleted number are zeros, and the number is -1.
        """
        import numpy as np

        files = self._open()
        if files is None:
            return np.empty(0, "<i8"), np.empty((0, self._dimensions), "<f4")
        return files.numbers, files.vectors

    def _open(self) -> _Files | None:
        """Map the valid rows; None if there are none."""
        while True:
            state, mapped = self._read_state(), self._mapped
            if state is None or not state.rows:
                return None
            if mapped is not None and mapped[0] == state:
                return mapped[1]
            try:
                files = _Files(self._folder / state.folder, state)
                self._mapped = state, files
                return files
            except FileNotFoundError:
                if self._read_state() == state:
                    raise
                # An update replaced them meanwhile.

    # Updating, under the lock

    def _read_state(self) -> _State | None:
        try:
            state = _State(**json.loads((self._folder / _STATE).read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            log.warning("the vectors in %s are read again: %s", self._folder, error)
            return None
        return state if state.dimensions == self._dimensions else None

    def _read_whole_state(self) -> _State | None:
        """Read the state; None also if a file is missing or shorter than it says."""
        state = self._read_state()
        if state is None:
            return None
        widths = self._row_bytes(state).items()
        try:
            if not state.rows or all(
                (self._folder / state.folder / name).stat().st_size >= state.rows * width for name, width in widths
            ):
                return state
        except FileNotFoundError:
            pass
        log.warning("files of the vectors in %s are damaged, they are read again", self._folder)
        return None

    def _row_bytes(self, state: _State) -> dict[str, int]:
        """Return name of a file with rows -> bytes of one; the numbers, which tell what the others have, come last."""
        bits = {f"bits-{state.rows_of_mean}.u64": _bit_bytes(self._dimensions)} if state.rows_of_mean else {}
        return {"vectors.f32": 4 * self._dimensions, **bits, "numbers.i64": 8}

    def _drop_unfinished(self, state: _State) -> None:
        """Delete what a killed update left: the state does not know it, so later deletions would miss it."""
        widths = self._row_bytes(state)
        for path in (self._folder / state.folder).iterdir():
            if path.name in widths:
                if path.stat().st_size > state.rows * widths[path.name]:
                    os.truncate(path, state.rows * widths[path.name])
            elif path.name != f"mean-{state.rows_of_mean}.f32":
                path.unlink()

    def _write_state(self, state: _State) -> _State:
        draft = self._folder / f"{_STATE}.tmp"
        with draft.open("w") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._folder / _STATE)
        return state

    def _begin(self) -> _State:
        """Start with an empty folder; a search that has the earlier files open goes on with them."""
        for old in self._folder.glob("rows-*"):
            shutil.rmtree(old)
        state = _State(dimensions=self._dimensions, folder=f"rows-{secrets.token_hex(8)}")
        (self._folder / state.folder).mkdir()
        return self._write_state(state)

    def _apply(self, state: _State, changes_after: Callable[[int], Iterable[VectorChange]]) -> _State:
        changes = iter(changes_after(state.sequence))
        while block := list(itertools.islice(changes, _BLOCK_ROWS)):
            added = {each.number: each.vector for each in block if each.vector is not None}
            deleted = [each.number for each in block if each.vector is None]
            for number in deleted:
                added.pop(number, None)
            folder, rows = self._folder / state.folder, state.rows
            _write(folder / "numbers.i64", {rows * 8: struct.pack(f"<{len(added)}q", *added)})
            _write(folder / "vectors.f32", {rows * 4 * self._dimensions: b"".join(added.values())})
            state = replace(state, rows=rows + len(added), sequence=block[-1].sequence)
            if state.rows_of_mean:
                self._write_bits(state, slice(rows, state.rows))
            if deleted:
                state = replace(state, deleted=state.deleted + self._delete(state, deleted))
            self._write_state(state)
        return state

    def _delete(self, state: _State, numbers: list[int]) -> int:
        """Overwrite rows: what was deleted is not kept in a file. :return: how many."""
        import numpy as np

        files = _Files(self._folder / state.folder, state)
        rows = np.flatnonzero(np.isin(files.numbers, numbers)).tolist()
        for name, width in self._row_bytes(state).items():
            # -1 is all ones.
            data = (b"\xff" if name == "numbers.i64" else b"\0") * width
            _write(self._folder / state.folder / name, {row * width: data for row in rows})
        return len(rows)

    def _make_bits(self, state: _State) -> _State:
        """Compute the mean and the bits of all rows, and measure what the first stage finds."""
        import numpy as np

        folder, files = self._folder / state.folder, _Files(self._folder / state.folder, state)
        sums = [files.vectors[block].sum(axis=0, dtype=np.float64) for block in _blocks(state.rows, _BLOCK_ROWS)]
        mean = (np.sum(sums, axis=0) / max(1, state.rows - state.deleted)).astype("<f4")
        old, state = state.rows_of_mean, replace(state, rows_of_mean=state.rows)
        _write(folder / f"mean-{state.rows_of_mean}.f32", {0: mean.tobytes()})
        for block in _blocks(state.rows, _BLOCK_ROWS):
            self._write_bits(state, block)
        for rescored in self._rescored:
            recall = self._measure_recall(state, rescored)
            if recall is None or recall >= _ENOUGH:
                break
        state = self._write_state(replace(state, recall=recall, rescored=rescored))
        for name in (f"mean-{old}.f32", f"bits-{old}.u64"):
            (folder / name).unlink(missing_ok=True)
        return state

    def _write_bits(self, state: _State, rows: slice) -> None:
        folder = self._folder / state.folder
        vectors = _map(folder / "vectors.f32", "<f4", (state.rows, self._dimensions))[rows]
        mean = _map(folder / f"mean-{state.rows_of_mean}.f32", "<f4", (self._dimensions,))
        data = _to_bits(vectors - mean).tobytes()
        _write(folder / f"bits-{state.rows_of_mean}.u64", {rows.start * _bit_bytes(self._dimensions): data})

    def _measure_recall(self, state: _State, rescored: int) -> float | None:
        """Compare both stages with the exact search, for vectors of the collection itself."""
        import numpy as np

        files = _Files(self._folder / state.folder, state)
        usable = files.numbers >= 0
        rows = np.flatnonzero(usable)
        if len(rows) <= _RECALL_AT:
            return None
        chosen = np.sort(np.random.default_rng(state.rows).choice(rows, min(len(rows), _RECALL_QUERIES), replace=False))
        queries = files.vectors[chosen]
        # All queries at once: the vectors are read once.
        scores = np.concatenate([files.vectors[block] @ queries.T for block in _blocks(state.rows, _BLOCK_ROWS)])
        found = 0
        with ThreadPoolExecutor(self._threads) as pool:
            for number, (row, query) in enumerate(zip(chosen, queries, strict=True)):
                near = _nearest_by_bits(files, query, usable, rescored, pool)
                exact = rows[_largest(scores[rows, number], _RECALL_AT + 1)]
                exact = exact[exact != row][:_RECALL_AT]  # that it finds itself says nothing
                # The second stage compares exactly, so what the first one finds is what is found.
                found += len(np.intersect1d(near, exact))
        return found / (len(queries) * _RECALL_AT)


class _Files:
    """The valid rows of a folder, memory-mapped. :raises FileNotFoundError: they were replaced."""

    def __init__(self, folder: Path, state: _State) -> None:
        rows, dimensions, of_mean = state.rows, state.dimensions, state.rows_of_mean
        self.numbers = _map(folder / "numbers.i64", "<i8", (rows,))
        self.vectors = _map(folder / "vectors.f32", "<f4", (rows, dimensions))
        self.rescored = state.rescored
        #: None where every search is exact.
        self.mean = _map(folder / f"mean-{of_mean}.f32", "<f4", (dimensions,)) if of_mean else None
        words = _bit_bytes(dimensions) // 8
        self.bits = _map(folder / f"bits-{of_mean}.u64", "<u8", (rows, words)) if of_mean else None


def _lock(file: IO[str], wait_seconds: float | None) -> None:
    give_up_at = None if wait_seconds is None else time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if give_up_at is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            assert give_up_at is not None
            if time.monotonic() > give_up_at:
                raise TimeoutError("Another process is working on the vectors.") from error
            time.sleep(_LOCK_POLL_SECONDS)


def _map(path: Path, kind: str, shape: tuple[int, ...]) -> Array:
    import numpy as np

    return np.memmap(path, kind, "r", shape=shape) if shape[0] else np.empty(shape, kind)


def _scores(files: _Files, query: Array, rows: Array, pool: ThreadPoolExecutor) -> Array:
    """Return the inner products of a query with some rows, in ascending order."""
    import numpy as np

    if not len(rows):
        return np.empty(0, np.float32)
    # Not the matrix product: its library starts threads of its own, which take three times the processor time.
    if len(rows) * 4 >= len(files.vectors):
        # Reading all in one go is faster than copying many rows.
        blocks = _blocks(len(files.vectors), _SEARCH_ROWS)
        return np.concatenate(list(pool.map(lambda block: np.vecdot(files.vectors[block], query), blocks)))[rows]
    blocks = _blocks(len(rows), _SEARCH_ROWS)
    return np.concatenate(list(pool.map(lambda block: np.vecdot(files.vectors[rows[block]], query), blocks)))


def _nearest_by_bits(files: _Files, query: Array, usable: Array, count: int, pool: ThreadPoolExecutor) -> Array:
    """Return the usable rows whose bits differ least from the query's, in ascending order."""
    import numpy as np

    bits, mean = files.bits, files.mean
    assert bits is not None and mean is not None
    wanted = _to_bits((query - mean)[None])[0]
    parts = pool.map(
        lambda block: np.einsum("ij->i", np.bitwise_count(bits[block] ^ wanted), dtype=np.uint16),
        _blocks(len(bits), _SEARCH_ROWS),
    )
    differing = np.concatenate(list(parts))
    differing[~usable] = np.iinfo(np.uint16).max
    count = min(count, int(usable.sum()))
    farthest = np.partition(differing, count - 1)[count - 1]
    nearer = np.flatnonzero(differing < farthest)
    as_far = np.flatnonzero(differing == farthest)[: count - len(nearer)]
    return np.sort(np.concatenate([nearer, as_far]))


def _largest(scores: Array, count: int) -> Array:
    """Return the positions of the largest scores, the largest first; of equal ones the first."""
    import numpy as np

    if count < len(scores):
        kept = np.sort(np.argpartition(-scores, count - 1)[:count])
        return kept[np.argsort(-scores[kept], kind="stable")]
    return np.argsort(-scores, kind="stable")


def _to_bits(values: Array) -> Array:
    """Return one bit for each value, 1 where it is more than 0, in u64 words. :param values: shape (rows, values)."""
    import numpy as np

    packed = np.packbits(values > 0, axis=1)
    padded = np.zeros((len(values), _bit_bytes(values.shape[1])), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return padded.view("<u8")


def _bit_bytes(dimensions: int) -> int:
    return (dimensions + 63) // 64 * 8


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _write(path: Path, parts: Mapping[int, bytes]) -> None:
    """Write at positions of a file, durably."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o640)
    try:
        for offset, data in parts.items():
            view = memoryview(data)
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        os.fdatasync(handle)
    finally:
        os.close(handle)
