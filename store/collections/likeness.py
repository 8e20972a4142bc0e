"""What is alike among all vectors of a collection: near-duplicates, and groups by likeness.

Called by the server with the rows of a cache. All of it works on blocks of rows, in bounded memory.

Near-duplicates are exact: two images belong together if their similarity reaches the threshold, or if a chain of such
pairs connects them. Not every pair has to be compared in all values. With an orthonormal basis, a vector is a part in
it and a rest; by the Cauchy-Schwarz inequality two rests add at most the product of their lengths, so the parts and
these lengths give an upper bound, and only pairs whose bound reaches the threshold are compared. The basis is that of
the largest components of a sample, which makes most rests short.

Groups are those of spherical k-means: each vector belongs to the most similar of k centres, and each centre has the
direction of the sum of its vectors. The centres are chosen among a seeded sample, far from one another, and fitted to
it; so the same vectors give the same groups.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import MlgError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Rows that are compared with as many others at once.
_BLOCK_ROWS = 2048
#: Components of the basis, and vectors that it is made of. Fewer rows are compared in all values.
_COMPONENTS, _BASIS_ROWS = 96, 4096
#: Added to an upper bound, for rounding in f32.
_ROUNDING = 1e-4
#: Candidates of a block, as a share of its pairs, above which all its pairs are compared.
_DENSE = 0.02
#: Vectors that centres are fitted to, the most groups, and how often centres move at most.
_SAMPLE_ROWS, MAX_GROUPS, _ITERATIONS = 10_000, 200, 30
#: Groups without a number of groups: the square root of half the vectors, but no more than these.
_DEFAULT_GROUPS = 50


class ComparisonTooLong(MlgError):
    """Comparing all images of the collection takes too long here. Raise the threshold, or use smaller collections."""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class Group:
    """Vectors that are alike."""

    #: The numbers of the vectors. Of near-duplicates in ascending order, else the most similar to the centre first.
    numbers: tuple[int, ...]
    #: Their similarities to the first one, or to the centre.
    scores: tuple[float, ...]


def near_duplicates(numbers: Array, vectors: Array, threshold: float, *, limit_seconds: float) -> list[Group]:
    """Find the groups of vectors that are connected by similarities of at least a threshold, the largest first.

    :param numbers: i64; vectors with a negative one are left out.
    :param vectors: f32 of unit length, shape (rows, dimensions).
    :raises ComparisonTooLong: after this time.
    """
    import numpy as np

    give_up_at = time.monotonic() + limit_seconds
    rows = np.flatnonzero(np.asarray(numbers) >= 0)
    bounds = _bounds(vectors, rows)
    #: Position in `rows` -> the lowest position that it is connected with.
    connected = np.arange(len(rows))
    for first, second in _block_pairs(len(rows)):
        if time.monotonic() > give_up_at:
            raise ComparisonTooLong()
        for one, others in _similar(vectors, rows, bounds, first, second, threshold):
            found = np.unique(connected[np.append(others, one)])
            if len(found) > 1:
                connected[np.isin(connected, found[1:])] = found[0]
    groups = []
    order = np.argsort(connected, kind="stable")
    starts = np.flatnonzero(np.diff(connected[order], prepend=-1))
    for members in np.split(order, starts[1:]):
        if len(members) > 1:
            found = rows[members[np.argsort(numbers[rows[members]])]]
            first = vectors[found[0]]
            scores = np.concatenate([vectors[found[block]] @ first for block in _blocks(len(found))])
            groups.append(_group(numbers[found], scores))
    return sorted(groups, key=lambda group: (-len(group.numbers), group.numbers))


def group_by_likeness(numbers: Array, vectors: Array, *, count: int | None = None, seed: int = 0) -> list[Group]:
    """Divide vectors into groups, the largest first; there may be fewer than asked for.

    :param numbers: i64; vectors with a negative one are left out.
    :param vectors: f32 of unit length, shape (rows, dimensions).
    :param count: how many groups; None chooses by the number of vectors.
    """
    import numpy as np

    rows = np.flatnonzero(np.asarray(numbers) >= 0)
    if not len(rows):
        return []
    if count is None:
        count = min(_DEFAULT_GROUPS, max(1, round((len(rows) / 2) ** 0.5)))
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(len(rows), min(len(rows), _SAMPLE_ROWS), replace=False))
    centres = _fit_centres(vectors[rows[chosen]], min(count, len(rows)), generator)
    nearest = np.empty(len(rows), np.intp)
    scores = np.empty(len(rows), np.float32)
    for block in _blocks(len(rows)):
        likeness = vectors[rows[block]] @ centres.T
        nearest[block] = likeness.argmax(axis=1)
        scores[block] = likeness.max(axis=1)
    groups = []
    for centre in range(len(centres)):
        members = np.flatnonzero(nearest == centre)
        if len(members):
            members = members[np.argsort(-scores[members], kind="stable")]
            groups.append(_group(numbers[rows[members]], scores[members]))
    return sorted(groups, key=lambda group: (-len(group.numbers), group.numbers))


def _group(numbers: Array, scores: Array) -> Group:
    return Group(numbers=tuple(numbers.tolist()), scores=tuple(round(score, 6) for score in scores.tolist()))


def _bounds(vectors: Array, rows: Array) -> Array | None:
    """Return what the upper bound of a pair is the inner product of, one row for each; None for few vectors."""
    import numpy as np

    if len(rows) <= _BASIS_ROWS or vectors.shape[1] <= 2 * _COMPONENTS:
        return None
    sample = vectors[rows[np.linspace(0, len(rows) - 1, _BASIS_ROWS).astype(np.intp)]].astype(np.float64)
    _, components = np.linalg.eigh(sample.T @ sample)
    basis = components[:, -_COMPONENTS:].astype(np.float32)
    bounds = np.empty((len(rows), _COMPONENTS + 1), np.float32)
    for block in _blocks(len(rows)):
        part = vectors[rows[block]] @ basis
        bounds[block, :-1] = part
        bounds[block, -1] = np.sqrt(np.maximum(0, 1 - np.einsum("ij,ij->i", part, part)))
    return bounds


def _similar(
    vectors: Array, rows: Array, bounds: Array | None, first: slice, second: slice, threshold: float
) -> Iterator[tuple[int, Array]]:
    """Iterate over the positions of one block with those of another, not earlier ones, that are similar to them."""
    import numpy as np

    if bounds is not None:
        ones, others = _at_least(bounds[first], bounds[second], threshold - _ROUNDING, is_same=first == second)
        if len(ones) <= _DENSE * _BLOCK_ROWS**2:
            if not len(ones):
                return
            products = np.concatenate(
                [
                    np.einsum(
                        "ij,ij->i",
                        vectors[rows[first][ones[part]]],
                        vectors[rows[second][others[part]]],
                    )
                    for part in _blocks(len(ones))
                ]
            )
            is_similar = products >= threshold
            yield from _by_row(ones[is_similar], others[is_similar], first.start, second.start)
            return
    ones, others = _at_least(vectors[rows[first]], vectors[rows[second]], threshold, is_same=first == second)
    yield from _by_row(ones, others, first.start, second.start)


def _at_least(one: Array, other: Array, threshold: float, *, is_same: bool) -> tuple[Array, Array]:
    """Return the pairs of rows whose inner product reaches a threshold, in the order of the first.

    :param is_same: both are the same rows; each pair is returned once then.
    """
    import numpy as np

    reached = one @ other.T >= threshold
    return np.nonzero(np.triu(reached, 1) if is_same else reached)  # type: ignore[return-value]


def _by_row(ones: Array, others: Array, first: int, second: int) -> Iterator[tuple[int, Array]]:
    """Group pairs by their first position. :param ones: ascending."""
    import numpy as np

    if len(ones):
        starts = np.flatnonzero(np.diff(ones, prepend=-1))
        for start, part in zip(starts, np.split(others, starts[1:]), strict=True):
            yield first + int(ones[start]), second + part


def _fit_centres(sample: Array, count: int, generator: np.random.Generator) -> Array:
    """Fit centres of unit length to vectors by spherical k-means. :return: f32, shape (at most count, dimensions)."""
    import numpy as np

    # Each further centre with a probability by its squared distance from those there are (k-means++).
    centres = np.empty((count, sample.shape[1]), np.float32)
    distances = np.full(len(sample), np.inf)
    for position in range(count):
        total = distances.sum()
        weights = None if position == 0 or total <= 0 else distances / total
        centres[position] = sample[generator.choice(len(sample), p=weights)]
        # Of unit vectors the squared distance is 2 - 2 times the inner product; equal ones differ by rounding.
        distances = np.minimum(distances, np.maximum(0, 2 - 2 * (sample @ centres[position]) - 1e-6))
    nearest = None
    for _ in range(_ITERATIONS):
        before, nearest = nearest, (sample @ centres.T).argmax(axis=1)
        if before is not None and bool((before == nearest).all()):
            break
        order = np.argsort(nearest, kind="stable")
        present, starts = np.unique(nearest[order], return_index=True)
        sums = np.add.reduceat(sample[order], starts, axis=0)
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = sums / np.maximum(lengths, np.finfo(np.float32).tiny)
        # A centre that lost all its vectors is dropped.
        nearest = np.searchsorted(present, nearest)
    return centres.astype(np.float32)


def _block_pairs(rows: int) -> Iterator[tuple[slice, slice]]:
    blocks = _blocks(rows)
    for position, first in enumerate(blocks):
        for second in blocks[position:]:
            yield first, second


def _blocks(rows: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK_ROWS, rows)) for first in range(0, rows, _BLOCK_ROWS)]
