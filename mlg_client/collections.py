"""The calls about collections: create, add images, search, near-duplicates, groups, remove.

Inherited by both clients, like the other calls in `calls.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from mlg_client.calls import Calls
from mlg_client.errors import StillWaiting
from mlg_client.methods import ClientMethod, ClientStream
from mlg_client.records import Batch, Request
from mlg_client.uploads import Image, find_images, load

#: Requests that one call adds to a collection, and images on one page of a list.
_MAX_IDS, _PAGE_SIZE = 1000, 200


class CollectionCalls(Calls):
    """The calls of both clients about collections; those about requests are inherited."""

    @ClientMethod
    async def create_collection(self, name: str, model: str | None = None) -> Mapping[str, Any]:
        """Create an empty collection.

        :param model: whose vectors it has; None leaves it to the server.
        :raises Refused: with the code collection_exists if there is one with this name.
        """
        body = {"name": name, **({} if model is None else {"model": model})}
        return await self._post("/collections", json=body)

    @ClientStream
    async def collections(self) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the collections, newest first."""
        async for collection in self._entries("/collections", "collections"):
            yield collection

    @ClientMethod
    async def collection(self, name: str) -> Mapping[str, Any]:
        """Read how many images a collection has. :raises Refused: with the code unknown_collection."""
        return await self._send("GET", _path(name))

    @ClientMethod
    async def delete_collection(self, name: str) -> None:
        """Delete a collection with its vectors; its requests stay. :raises Refused: the collection is unknown."""
        await self._send("DELETE", _path(name))

    @ClientStream
    async def collection_images(self, name: str) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the images of a collection, the last added first. :raises Refused: the collection is unknown."""
        async for image in self._entries(_path(name, "images"), "images"):
            yield image

    @ClientMethod
    async def add_to_collection(
        self,
        name: str,
        images: Iterable[Image] | str | os.PathLike[str],
        *,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Send images, or all of a folder, that become members of a collection; see `submit_many`.

        :param labels: any names and values; a search can select by them.
        :raises Refused: the collection is unknown, or takes no more images.
        """
        if isinstance(images, str | os.PathLike):
            images = find_images(images)
        query = [("label", f"{label}:{value}") for label, value in (labels or {}).items()]
        path = _path(name, "images")
        return await self._submit_all(map(load, images), "", query, idempotency_key, batch_path=path)

    @ClientMethod
    async def add_requests_to_collection(
        self, name: str, requests: Iterable[Request | str], *, labels: Mapping[str, str] | None = None
    ) -> list[Mapping[str, Any]]:
        """Add the images of requests that the server has.

        :return: for each request what the server said: `req_id` is None if it was refused.
        """
        ids = [request if isinstance(request, str) else request.id for request in requests]
        query = [("label", f"{label}:{value}") for label, value in (labels or {}).items()]
        items: list[Mapping[str, Any]] = []
        for start in range(0, len(ids), _MAX_IDS):
            body = {"req_ids": ids[start : start + _MAX_IDS]}
            answer = await self._post(_path(name, "images"), query=query, json=body)
            items += answer["items"]
        return items

    @ClientMethod
    async def remove_from_collection(self, name: str, request: Request | str) -> None:
        """Remove an image from a collection; its request stays. :raises Refused: with the code unknown_member."""
        id = request if isinstance(request, str) else request.id
        await self._send("DELETE", _path(name, "images", id))

    @ClientMethod
    async def search_collection(
        self,
        name: str,
        image: Image | None = None,
        *,
        request: Request | str | None = None,
        vector: Sequence[float] | None = None,
        k: int = 10,
        threshold: float | None = None,
        labels: Iterable[str] = (),
        timeout: float | None = None,
    ) -> list[Mapping[str, Any]]:
        """Find the images of a collection that are most similar to an image, to that of a request, or to a vector.

        :param k: how many at most.
        :param threshold: least similarity, -1 to 1.
        :param labels: only images with all of these, as "name:value", or "value" under any name.
        :return: the most similar first, with `score`, `req_id`, `name` and `labels`.
        :raises StillWaiting: the vector of the image is not there after the timeout.
        """
        if sum(given is not None for given in (image, request, vector)) != 1:
            raise ValueError("search_collection takes an image, a request or a vector.")
        query = [("k", str(k)), *(("label", label) for label in labels)]
        query += [] if threshold is None else [("threshold", str(threshold))]
        body: dict[str, Any] = {"json": {"vector": list(vector)}} if vector is not None else {}
        if image is not None:
            body = {"files": [load(image).form_field]}
        elif request is not None:
            body = {"json": {"req_id": request if isinstance(request, str) else request.id}}
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            began_at = time.monotonic()
            hold = self._hold_until(give_up_at)
            answer = await self._post(_path(name, "search"), query=[*query, ("wait", f"{hold:.3f}")], **body)
            if "matches" in answer:
                return list(answer["matches"])
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise StillWaiting("The vector of the image is not there yet.", code="still_waiting")
            body = {"json": {"req_id": answer["req_id"]}}
            await self._poll_delay(began_at)

    @ClientMethod
    async def collection_duplicates(
        self, name: str, *, threshold: float = 0.95, limit: int = 200, images: int = 12
    ) -> Mapping[str, Any]:
        """Find near-duplicates: groups of images that similarities of at least a threshold connect.

        :param limit: how many groups at most, the largest first.
        :param images: how many images of each are listed.
        """
        query = {"threshold": threshold, "limit": limit, "images": images}
        return await self._send("GET", _path(name, "duplicates"), params=query, timeout=self._timeout_seconds + 60)

    @ClientMethod
    async def collection_groups(
        self, name: str, *, count: int | None = None, limit: int = 200, images: int = 12
    ) -> Mapping[str, Any]:
        """Divide the images of a collection into groups by likeness. :param count: None leaves it to the server."""
        query = {"limit": limit, "images": images, **({} if count is None else {"count": count})}
        return await self._send("GET", _path(name, "groups"), params=query, timeout=self._timeout_seconds + 60)

    async def _entries(self, path: str, entries: str) -> AsyncGenerator[Mapping[str, Any], None]:
        """Yield the entries of all pages of a list."""
        query: dict[str, Any] = {"limit": _PAGE_SIZE}
        while True:
            page = await self._send("GET", path, params=query)
            for entry in page[entries]:
                yield entry
            if page["next"] is None:
                return
            query["cursor"] = page["next"]


def _path(name: str, *more: str) -> str:
    return "/".join(["/collections", *(quote(part, safe="") for part in (name, *more))])
