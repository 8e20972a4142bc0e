"""Searches in collections, and what is alike in them: the most similar images, near-duplicates, groups.

Called by the views. Each server process keeps the caches open that were used last, because mapping them anew takes
longer than a search. Only so many searches compute at once, and only so many threads wait for that, so that uploads
always find free ones; comparing all images of a collection is done for one caller at a time. A cache that is far behind
its collection is updated by a thread of its own; until then searches are refused.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from provider_image.errors import MlgError
from server.auth.limits import FairSlots
from server.errors import IndexBehind, SearchBusy
from store.collections.collections import CollectionRecord, Collections, MemberRecord, UnknownCollection
from store.collections.likeness import Group, group_by_likeness, near_duplicates
from store.collections.vector_cache import VectorCache

log = logging.getLogger(__name__)

#: Caches that a process keeps open.
_OPEN_CACHES = 16
#: Searches that compute at once, each with two threads.
_RUNNING = 2
#: Changes that a search applies itself, and how long it waits for another update.
_MAX_BEHIND, _UPDATE_SECONDS = 20_000, 5.0
#: How long near-duplicates may take.
COMPARISON_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search has found."""

    #: The members, the most similar first, and their similarities.
    matches: Sequence[tuple[MemberRecord, float]]
    #: Measured share of the true ten nearest that are found; None while every search is exact.
    recall: float | None


class Similarity:
    """The searches of one server process.

    :param max_waiting: threads that search or wait, shared fairly by the clients.
    """

    def __init__(self, collections: Collections, *, max_waiting: int) -> None:
        self._collections = collections
        self._slots = FairSlots(max_waiting)
        self._running = threading.BoundedSemaphore(_RUNNING)
        self._filtering = threading.Lock()
        self._comparisons = FairSlots(2)
        self._comparing = threading.Lock()
        self._lock = threading.Lock()
        self._caches: OrderedDict[str, VectorCache] = OrderedDict()
        #: Ids of the collections whose caches a thread updates.
        self._updating: set[str] = set()

    def search(
        self,
        collection: CollectionRecord,
        vector: bytes,
        k: int,
        *,
        threshold: float = -1.0,
        labels: Sequence[tuple[str | None, str]] = (),
        without: int | None = None,
        client: str | None = None,
    ) -> SearchResult:
        """Find the most similar members.

        :param vector: f32 of unit length, as many values as the collection's vectors have.
        :param labels: only members with all of these, as `Collections.numbers_with_labels` takes them.
        :param without: number of a member that is left out.
        :param client: as for `FairSlots`.
        :raises SearchBusy: :raises IndexBehind: :raises StoreError:
        """
        if collection.dimensions is None:
            return SearchResult(matches=(), recall=None)
        with self._slot(self._slots, client):
            cache = self._up_to_date(collection)
            # A label may be that of every member; searches without labels do not wait for that.
            with self._filtering if labels else contextlib.nullcontext():
                numbers = self._collections.numbers_with_labels(collection, labels)
            with self._running:
                found = cache.search(vector, k + (without is not None), threshold=threshold, numbers=numbers)
            found = [match for match in found if match.number != without][:k]
            members = self._collections.get_members([match.number for match in found])
            shown = [(members[match.number], match.score) for match in found if match.number in members]
            return SearchResult(matches=shown, recall=cache.recall())

    def recall(self, collection: CollectionRecord) -> float | None:
        """Return the measured recall of searches; None while they are exact."""
        return None if collection.dimensions is None else self._collections.cache(collection).recall()

    def near_duplicates(
        self, collection: CollectionRecord, threshold: float, *, client: str | None = None
    ) -> list[Group]:
        """Find near-duplicates, see `likeness.py`.

        :raises ComparisonTooLong: :raises SearchBusy: :raises StoreError:
        """
        if collection.dimensions is None:
            return []
        with self._slot(self._comparisons, client):
            cache = self._up_to_date(collection)
            with self._comparing:
                return near_duplicates(*cache.rows(), threshold, limit_seconds=COMPARISON_SECONDS)

    def groups(self, collection: CollectionRecord, count: int | None, *, client: str | None = None) -> list[Group]:
        """Divide the members into groups by likeness, see `likeness.py`. :raises SearchBusy: :raises StoreError:"""
        if collection.dimensions is None:
            return []
        with self._slot(self._comparisons, client):
            cache = self._up_to_date(collection)
            with self._comparing:
                return group_by_likeness(*cache.rows(), count=count)

    @staticmethod
    @contextlib.contextmanager
    def _slot(slots: FairSlots, client: str | None) -> Iterator[None]:
        with slots.holding(client) as is_held:
            if not is_held:
                raise SearchBusy()
            yield

    def _cache(self, collection: CollectionRecord) -> VectorCache:
        with self._lock:
            cache = self._caches.pop(collection.id, None) or self._collections.cache(collection)
            self._caches[collection.id] = cache
            while len(self._caches) > _OPEN_CACHES:
                self._caches.popitem(last=False)
            return cache

    def _up_to_date(self, collection: CollectionRecord) -> VectorCache:
        """Return the cache with everything that is committed. :raises IndexBehind: a thread is about to update it."""
        cache = self._cache(collection)
        behind = self._collections.sequence(collection) - cache.sequence()
        if behind and not 0 < behind <= _MAX_BEHIND:
            self._update_in_background(collection, cache)
            raise IndexBehind()
        if behind:
            try:
                self._collections.update_cache(collection, cache, makes_bits=False, wait_seconds=_UPDATE_SECONDS)
            except TimeoutError as error:
                raise IndexBehind() from error
        if cache.lacks_bits():
            self._update_in_background(collection, cache)
        return cache

    def _update_in_background(self, collection: CollectionRecord, cache: VectorCache) -> None:
        with self._lock:
            if collection.id in self._updating:
                return
            self._updating.add(collection.id)

        def update() -> None:
            try:
                self._collections.update_cache(collection, cache)
            except UnknownCollection:
                log.info("a collection was removed while it was made ready to be searched")
            except (MlgError, OSError):
                log.exception("cannot make a collection ready to be searched; the next search tries again")
            finally:
                with self._lock:
                    self._updating.discard(collection.id)

        threading.Thread(target=update, name="collection", daemon=True).start()
