"""The calls of both clients, without a transport: requests, retries, and the parsing of responses.

`Client` and `AsyncClient` inherit them; `methods.py` explains how one implementation serves both.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import os
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from mlg_client.errors import FATAL, RETRYABLE, ClientError, Refused, StillWaiting, Unreachable, error_of, retry_after
from mlg_client.image_files import name_images, write_whole
from mlg_client.methods import ClientMethod, ClientStream
from mlg_client.records import FINAL, Batch, Model, Request
from mlg_client.sse import Event
from mlg_client.uploads import Image, ImageUpload, Inputs, find_images, form_fields, load, split

#: What the client calls itself; servers count requests by this word in it.
USER_AGENT = "mlg_client"
DEFAULT_URL = "http://127.0.0.1:5000"
#: How long one read asks the server to hold the response.
HOLD_SECONDS = 5.0
#: Interval between two reads if the server does not hold them.
POLL_SECONDS = 0.25
#: Maximum number of reads or uploads in flight.
IN_FLIGHT = 8
_FIRST_DELAY_SECONDS, _MAX_DELAY_SECONDS = 0.2, 10.0
#: A stream of events that is silent for so long is opened again; servers write something more often.
_MAX_SILENCE_SECONDS = 60.0
#: Maximum number of request ids in the address of an event stream; proxies accept addresses of 8 KB.
_MAX_EVENT_IDS = 150
#: Rate of a slow connection, for the timeouts of uploads.
_SLOW_BYTES_PER_SECOND = 100_000
#: Statuses of a server that does not have the address.
_MISSING_STATUSES = frozenset({404, 405, 501})

Item = TypeVar("Item")
T = TypeVar("T")


class Calls(abc.ABC):
    """The calls of both clients."""

    is_async: bool
    _http: httpx.Client | httpx.AsyncClient

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        *,
        retry_timeout_seconds: float,
        timeout_seconds: float,
        user_agent: str,
    ) -> None:
        self.url = (url or os.environ.get("MLG_URL") or DEFAULT_URL).rstrip("/")
        #: How long one read asks the server to hold the response; may be changed.
        self.hold_seconds = HOLD_SECONDS
        self._retry_timeout_seconds = retry_timeout_seconds
        self._timeout_seconds = timeout_seconds
        key = api_key if api_key is not None else os.environ.get("MLG_API_KEY")
        self._headers = {"User-Agent": user_agent, **({"Authorization": f"Bearer {key}"} if key else {})}
        #: False once the server has answered that it has no batches.
        self._has_batches = True

    # One image

    @ClientMethod
    async def submit(
        self,
        image: Image | Inputs,
        model: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
    ) -> Request:
        """Send one image, or the inputs of a model that takes something else.

        :param image: or name of each input -> an image, a file, a mapping with the values of a table row, or the bytes
            of a text: {"text": b"not bad"}.
        :param name: file name to show with the request. Defaults to that of the path or file.
        :param labels: any names and values to store with the request.
        :param params: parameters of the model's service, and `fresh`, `deadline`, `keep_seconds`.
        :param webhook: address that the server notifies when the request is done.
        :param idempotency_key: sending again with the same key creates no second request. Defaults to a random key.
        :raises Refused: the server does not accept the image or a parameter.
        :raises Unavailable: the server could not accept it within the retry timeout.
        :raises Unreachable: the server does not answer.
        """
        if isinstance(image, Mapping):
            query = _query(labels, params, webhook)
            return await self._submit_fields(form_fields(image), name, model, query, idempotency_key)
        upload = load(image, name=name)
        query = _query(labels, params, webhook)
        return await self._submit_fields([upload.form_field], upload.name, model, query, idempotency_key)

    @ClientMethod
    async def read(self, id: str, *, hold_seconds: float = 0.0, top: int | None = None) -> Request:
        """Read a request with its result.

        :param hold_seconds: how long the server may wait for the result before it responds.
        :param top: number of labels; None leaves it to the server.
        :raises Refused: with the code unknown_request if the server does not know the id.
        """
        return await self._read(id, hold_seconds, top)

    @ClientMethod
    async def file(self, request: Request | str, name: str) -> bytes:
        """Read a file of a result; see `Request.files`. :raises Refused: with the code unknown_file or picture_gone."""
        return await self._bytes(f"/requests/{_id(request)}/files/{quote(name, safe='')}")

    @ClientMethod
    async def image(self, request: Request | str) -> bytes:
        """Read the image that answers a request, a JPEG, PNG or WebP file.

        :raises Refused: with the code unknown_file or picture_gone.
        """
        return await self._bytes(f"/requests/{_id(request)}/image")

    @ClientMethod
    async def preview(self, request: Request | str) -> bytes | None:
        """Read what the image that will answer a request looks like now, a JPEG; None if there is nothing to see."""
        try:
            return await self._bytes(f"/requests/{_id(request)}/preview")
        except Refused as error:
            if error.code != "unknown_file":
                raise
            return None

    @ClientMethod
    async def save_images(self, requests: Iterable[Request], folder: str | os.PathLike[str]) -> list[Path | None]:
        """Write the images that answer requests into a folder, which is created; several at the same time.

        :return: the file of each, named after the image that was sent; None for a request without such an answer.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        requests = list(requests)
        files = name_images(requests, Path(folder))

        async def save(numbered: tuple[Request, Path | None]) -> Path | None:
            request, file = numbered
            if file is not None:
                write_whole(file, await self._bytes(f"/requests/{_id(request)}/image"))
            return file

        return await self._map(save, list(zip(requests, files, strict=True)))

    @ClientMethod
    async def wait(self, request: Request | str, timeout: float | None = None) -> Request:
        """Wait until a request is final and return it with its result. :raises StillWaiting: after the timeout."""
        return await self._wait(request if isinstance(request, str) else request.id, timeout)

    @ClientMethod
    async def cancel(self, request: Request | str) -> Request:
        """Cancel a request that has not been dispatched. :raises Refused: it cannot be cancelled any more."""
        answer = await self._send("DELETE", f"/requests/{_id(request)}")
        return Request.from_answer(answer)

    @ClientMethod
    async def retry(self, request: Request | str) -> Request:
        """Queue a failed or cancelled request again. :raises Refused: it is neither."""
        answer = await self._post(f"/requests/{_id(request)}/retry")
        return Request.from_answer(answer)

    # Many images

    @ClientMethod
    async def submit_many(
        self,
        images: Iterable[Image],
        model: str,
        *,
        names: Iterable[str] | None = None,
        input: str = "image",
        inputs: Inputs | None = None,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
    ) -> Batch:
        """Send many images, in batches if the server has them. Images that it refuses are listed in the result.

        :param names: a file name for each image. Defaults to those of the paths or files.
        :param input: the model's name of what is sent: "image", or "text" for texts and "row" for rows as JSON; each
            as a path or bytes.
        :param inputs: what the model takes beside an image, the same for all: {"style": "painting.jpg"}.
        :param idempotency_key: sending the same images with the same key creates no second requests. Defaults to a
            random key.
        :raises Refused: the server accepts no image with this model or these parameters.
        :raises Unavailable: the server could not accept them within the retry timeout.
        :raises Unreachable: the server does not answer.
        """
        uploads = (
            (load(image, input=input) for image in images)
            if names is None
            else (load(image, name=name, input=input) for image, name in zip(images, names, strict=True))
        )
        query, shared = _query(labels, params, webhook), form_fields(inputs or {})
        return await self._submit_all(uploads, model, query, idempotency_key, shared=shared)

    @ClientMethod
    async def submit_dir(
        self,
        folder: str | os.PathLike[str],
        model: str,
        *,
        inputs: Inputs | None = None,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
    ) -> Batch:
        """Send all images of a folder and its subfolders, in the order of their names; see `submit_many`.

        :raises FileNotFoundError: there is no image.
        """
        found = find_images(folder)
        uploads = (load(path, id=path.relative_to(folder).as_posix()) for path in found)
        query, shared = _query(labels, params, webhook), form_fields(inputs or {})
        return await self._submit_all(uploads, model, query, shared=shared)

    @ClientMethod
    async def read_many(self, ids: Iterable[str], *, top: int | None = None) -> list[Request | None]:
        """Read the current state of many requests, in the order of the ids; None for an unknown id."""

        async def read(id: str) -> Request | None:
            try:
                return await self._read(id, top=top)
            except Refused as error:
                if error.code != "unknown_request":
                    raise
                return None

        return await self._map(read, list(ids))

    @ClientMethod
    async def batch(self, id: str, *, hold_seconds: float = 0.0) -> Mapping[str, Any]:
        """Read the state of a batch on the server: counts, progress, cost.

        :param hold_seconds: how long the server may wait for the batch to end before it responds.
        :raises Refused: with the code unknown_batch if the server does not know the id.
        """
        params = {"wait": round(hold_seconds, 3)} if hold_seconds > 0 else {}
        timeout = self._timeout_seconds + hold_seconds
        return await self._send("GET", f"/batches/{_id(id)}", params=params, timeout=timeout)

    @ClientMethod
    async def cancel_batch(self, id: str) -> Mapping[str, Any]:
        """Cancel the requests of a batch that have not been dispatched. :raises Refused: the batch is unknown."""
        return await self._post(f"/batches/{_id(id)}/cancel")

    @ClientMethod
    async def retry_batch(self, id: str) -> Mapping[str, Any]:
        """Queue the failed requests of a batch again. :raises Refused: the batch is unknown."""
        return await self._post(f"/batches/{_id(id)}/retry")

    @ClientStream
    async def as_completed(
        self, requests: Iterable[Request], timeout: float | None = None, *, top: int | None = None
    ) -> AsyncGenerator[Request, None]:
        """Yield each request with its result as soon as it is final.

        Listens to the server's events, reconnecting as often as needed; without events it polls. A request that the
        server no longer knows is yielded as failed.

        :param top: number of labels; None leaves it to the server.
        :raises StillWaiting: after the timeout.
        """
        waiting: dict[str, Request] = {}
        for request in requests:
            if request.is_read:
                yield request
            else:
                waiting[request.id] = request
        give_up_at = None if timeout is None else time.monotonic() + timeout
        async with contextlib.aclosing(self._listen(waiting, give_up_at, top)) as listened:
            async for request in listened:
                yield request
        while waiting:
            began_at = time.monotonic()
            hold = self._hold_until(give_up_at)
            read = functools.partial(self._read_known, hold_seconds=hold, top=top)
            for request in await self._map(read, list(waiting.values())[:IN_FLIGHT]):
                # Requests that are not final move to the end.
                earlier = waiting.pop(request.id)
                if request.is_final:
                    yield request
                else:
                    waiting[request.id] = earlier
            _check_time(waiting, give_up_at)
            if waiting and len(waiting) <= IN_FLIGHT:
                await self._poll_delay(began_at)

    @ClientStream
    async def results(self, batch: Batch) -> AsyncGenerator[Request, None]:
        """Yield the requests of a batch in the order of the files, each once it and all before it are final."""
        for start in range(0, len(batch.requests), IN_FLIGHT):
            part = batch.requests[start : start + IN_FLIGHT]
            waiting = [request.id for request in part if not request.is_read]
            ended = dict(zip(waiting, await self._map(self._wait, waiting), strict=True))
            for request in part:
                yield ended.get(request.id, request)

    # Trainings

    @ClientMethod
    async def train(
        self,
        examples: Image | None,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Mapping[str, Any]:
        """Train a model on a zip with a folder of images for each class, or on a CSV with a table or texts.

        :param examples: None with the parameter `collection`.
        :param name: of the model.
        :param params: `backbone`, `seed`, `target`, `label`, `text`, `segmenter`, `collection`.
        :param idempotency_key: sending again with the same key begins no second training. Defaults to a random key.
        :raises Refused: the examples or the name cannot be used.
        """
        data, path = b"" if examples is None else load(examples).data, f"/train/{quote(name, safe='')}"
        kind = "application/zip" if data.startswith(b"PK") else "text/csv"
        return await self._send(
            "POST",
            path,
            headers={"Idempotency-Key": idempotency_key or uuid.uuid4().hex, "Content-Type": kind},
            timeout=self._timeout_seconds + len(data) / _SLOW_BYTES_PER_SECOND,
            params=_query(None, params, None),
            content=data,
        )

    @ClientMethod
    async def training(self, id: str) -> Mapping[str, Any]:
        """Read the progress and the figures of a training. :raises Refused: with the code unknown_training."""
        return await self._send("GET", f"/trainings/{_id(id)}")

    @ClientMethod
    async def training_file(self, id: str, name: str) -> bytes:
        """Read a file of a training's result, for example confusion.png. :raises Refused: there is none."""
        return await self._bytes(f"/trainings/{_id(id)}/files/{quote(name, safe='')}")

    @ClientMethod
    async def cancel_training(self, id: str) -> Mapping[str, Any]:
        """Cancel a training. :raises Refused: it has ended."""
        return await self._post(f"/trainings/{_id(id)}/cancel")

    @ClientMethod
    async def use_version(self, name: str, version: int) -> Mapping[str, Any]:
        """Go back to a version of a model that was trained. :raises Refused: with the code unknown_version."""
        return await self._post(f"/models/{quote(name, safe='')}/versions/{version}/use")

    # Server and models

    @ClientMethod
    async def health(self) -> Mapping[str, Any]:
        """Ask whether the server is alive. :raises Unreachable: it does not answer."""
        return await self._send("GET", "/healthz")

    @ClientMethod
    async def models(self) -> list[Model]:
        """List the server's models."""
        answer = await self._send("GET", "/models")
        return [Model.from_answer(model) for model in answer["models"]]

    @ClientMethod
    async def pipelines(self) -> list[Mapping[str, Any]]:
        """List the server's pipelines: each has a name, the kind of each input, the first one first, and its steps."""
        return list((await self._send("GET", "/pipelines"))["pipelines"])

    # Usage

    @ClientMethod
    async def usage(
        self, *, since: str | None = None, until: str | None = None, by: str = "day", key: str | None = None
    ) -> Mapping[str, Any]:
        """Read how much the API key has used, and what is left of its quotas.

        :param since: first day, UTC, for example "2026-11-20". Defaults to 29 days before the last.
        :param until: last day. Defaults to today.
        :param by: some of day, key, model, client, with commas between.
        :param key: id or name of a key, for operators.
        """
        given = {"since": since, "until": until, "by": by, "key": key}
        params = {name: value for name, value in given.items() if value is not None}
        return await self._send("GET", "/usage", params=params)

    # Private steps of the calls above

    async def _read(self, id: str, hold_seconds: float = 0.0, top: int | None = None) -> Request:
        params: dict[str, Any] = {} if top is None else {"top": top}
        if hold_seconds > 0:
            params["wait"] = round(hold_seconds, 3)
        answer = await self._send(
            "GET", f"/readPrediction/{_id(id)}", params=params, timeout=self._timeout_seconds + hold_seconds
        )
        return Request.from_answer(answer)

    async def _wait(self, id: str, timeout: float | None = None) -> Request:
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            began_at = time.monotonic()
            found = await self._read(id, self._hold_until(give_up_at))
            if found.is_final:
                return found
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise StillWaiting(f"The request {id} is not done yet. {found.waiting_for or ''}", code="still_waiting")
            await self._poll_delay(began_at)

    async def _read_known(self, request: Request, hold_seconds: float = 0.0, top: int | None = None) -> Request:
        """Read a request that the server has accepted; return it as failed if it has been deleted since."""
        try:
            return await self._read(request.id, hold_seconds, top)
        except Refused as error:
            if error.code != "unknown_request":
                raise
            return replace(request, status="failed", reason=error.reason, code=error.code)

    def _hold_until(self, give_up_at: float | None) -> float:
        """Return for how many seconds the next read may be held."""
        if give_up_at is None:
            return self.hold_seconds
        return max(0.0, min(self.hold_seconds, give_up_at - time.monotonic()))

    async def _poll_delay(self, began_at: float) -> None:
        """Pause after a read that the server did not hold: it holds only a limited number."""
        if time.monotonic() - began_at < self.hold_seconds / 2:
            await self._sleep(POLL_SECONDS)

    async def _submit_all(
        self,
        uploads: Iterable[ImageUpload],
        model: str,
        query: Sequence[tuple[str, str]],
        key: str | None = None,
        *,
        batch_path: str | None = None,
        shared: Sequence[tuple[str, Any]] = (),
    ) -> Batch:
        """Send images in batches.

        :param batch_path: where to; None sends them for the model, or one by one.
        :param shared: fields that every batch, or request, has too.
        """
        outcomes: list[tuple[ImageUpload, Request | Refused]] = []
        raw: list[Mapping[str, Any]] = []
        key = key or uuid.uuid4().hex
        for number, part in enumerate(split(uploads)):
            part_key = f"{key}-{number}"
            answer: dict[str, Any] | None = None
            if batch_path is not None:
                answer = await self._post(batch_path, query=query, files=_batch_fields(part), key=part_key)
            elif len(part) > 1:
                answer = await self._post_batch(part, model, query, part_key, shared)
            if answer is None:
                outcomes += await self._submit_singly(part, model, query, part_key, shared)
                continue
            raw.append(answer)
            facts = {"model": answer.get("model", model), "batch_id": answer["batch_id"]}
            for one, item in zip(part, answer["items"], strict=True):
                if item.get("req_id") is None:
                    code = str(item.get("code") or "refused")
                    outcomes.append((one, Refused(str(item.get("reason")), code=code)))
                else:
                    outcomes.append((one, Request.from_answer({"name": one.name, **facts, **item})))
        return Batch(
            ids=tuple(str(answer["batch_id"]) for answer in raw),
            requests=tuple(outcome for _, outcome in outcomes if isinstance(outcome, Request)),
            refused=tuple((one.id, outcome.reason) for one, outcome in outcomes if isinstance(outcome, Refused)),
            outcomes=tuple(outcome for _, outcome in outcomes),
            raw=tuple(raw),
        )

    async def _post_batch(
        self,
        uploads: Sequence[ImageUpload],
        model: str,
        query: Sequence[tuple[str, str]],
        key: str,
        shared: Sequence[tuple[str, Any]],
    ) -> dict[str, Any] | None:
        """Send images as one batch; None if the server has no batches or refuses this one as a whole."""
        if not self._has_batches:
            return None
        path = f"/requestPredictions/{quote(model, safe='')}"
        try:
            return await self._post(path, query=query, files=[*shared, *_batch_fields(uploads)], key=key)
        except Refused as error:
            if error.status in _MISSING_STATUSES and error.code in ("not_found", "method_not_allowed"):
                self._has_batches = False
            elif not error.is_about_one_image:
                raise
            return None

    async def _submit_singly(
        self,
        uploads: Sequence[ImageUpload],
        model: str,
        query: Sequence[tuple[str, str]],
        key: str,
        shared: Sequence[tuple[str, Any]],
    ) -> list[tuple[ImageUpload, Request | Refused]]:
        async def send(numbered: tuple[int, ImageUpload]) -> tuple[ImageUpload, Request | Refused]:
            number, one = numbered
            try:
                fields = [one.form_field, *shared]
                return one, await self._submit_fields(fields, one.name, model, query, f"{key}-{number}")
            except Refused as error:
                if not error.is_about_one_image:
                    raise
                return one, error

        return await self._map(send, list(enumerate(uploads)))

    async def _submit_fields(
        self,
        fields: Sequence[tuple[str, Any]],
        name: str | None,
        model: str,
        query: Sequence[tuple[str, str]],
        key: str | None,
    ) -> Request:
        path = f"/requestPrediction/{quote(model, safe='')}"
        answer = await self._post(path, query=query, files=fields, key=key)
        return Request.from_answer({"name": name, **answer})

    async def _listen(
        self, waiting: dict[str, Request], give_up_at: float | None, top: int | None
    ) -> AsyncGenerator[Request, None]:
        """Yield requests as the server's events report their end; return if the server has no events."""
        while waiting:
            batches = {request.raw.get("batch_id") for request in waiting.values()}
            batch_id = batches.pop() if len(batches) == 1 else None
            # The id of an event is a position in the stream of these requests only.
            listened = set(list(waiting) if batch_id else list(waiting)[:_MAX_EVENT_IDS])
            last_id: str | None = None
            failures = 0
            while listened & waiting.keys():
                _check_time(waiting, give_up_at)
                ids = [id for id in waiting if id in listened]
                try:
                    async with self._open(self._event_request(ids, batch_id, last_id, give_up_at)) as response:
                        kind = response.headers.get("Content-Type", "")
                        if response.status_code == 200 and kind.startswith("text/event-stream"):
                            event = Event()
                            async for line in self._lines(response):
                                failures = 0
                                if event.add(line):
                                    ended = await self._ended(event.data, waiting, top)
                                    if ended is not None:
                                        del waiting[ended.id]
                                        yield ended
                                    last_id = event.id or last_id
                                    event = Event()
                                if not listened & waiting.keys():
                                    break
                                _check_time(waiting, give_up_at)
                        elif response.status_code in RETRYABLE:
                            failures += 1
                        else:
                            return
                except httpx.TransportError:
                    failures += 1
                if failures > 3:
                    return  # polling retries for longer, and reports the error
                if listened & waiting.keys():
                    _check_time(waiting, give_up_at)
                    await self._sleep(min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**failures))

    async def _ended(self, data: Mapping[str, Any], waiting: Mapping[str, Request], top: int | None) -> Request | None:
        """Return the request that an event reports as final, with its result; None if it is not waited for."""
        request = waiting.get(str(data.get("req_id")))
        if request is None or data.get("status") not in FINAL:
            return None
        ended = Request.from_answer(data)
        is_list = isinstance(ended.preds, list)  # other services than classification have other outputs
        if not ended.is_read or (top is not None and is_list and len(ended.preds) < top):
            return await self._read_known(request, top=top)
        return replace(ended, preds=ended.preds[:top]) if is_list else ended

    def _event_request(
        self, ids: Sequence[str], batch_id: str | None, last_id: str | None, give_up_at: float | None
    ) -> httpx.Request:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
        left = _MAX_SILENCE_SECONDS if give_up_at is None else max(0.05, give_up_at - time.monotonic())
        timeout = min(_MAX_SILENCE_SECONDS, left)
        if batch_id:
            path = f"/batches/{quote(str(batch_id), safe='')}/events"
            return self._request("GET", path, headers=headers, timeout=timeout)
        return self._request("GET", "/events", params={"ids": ",".join(ids)}, headers=headers, timeout=timeout)

    async def _post(
        self,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        files: Sequence[tuple[str, Any]] = (),
        key: str | None = None,
        json: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        size_bytes = sum(len(content[1]) for _, content in files)
        return await self._send(
            "POST",
            path,
            headers={"Idempotency-Key": key or uuid.uuid4().hex},
            timeout=self._timeout_seconds + size_bytes / _SLOW_BYTES_PER_SECOND,
            params=list(query) or None,
            files=files or None,
            json=json,
        )

    async def _send(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        return await self._exchange(_read_answer, method, path, **more)

    async def _bytes(self, path: str) -> bytes:
        return await self._exchange(lambda response: response.content, "GET", path)

    async def _exchange(self, read: Callable[[httpx.Response], T | None], method: str, path: str, **more: Any) -> T:
        """Send a request, and retry until the retry timeout.

        :param read: reads a successful response; None if it is not one.
        :raises ClientError:
        """
        request = self._request(method, path, **more)
        give_up_at = time.monotonic() + self._retry_timeout_seconds
        delay = _FIRST_DELAY_SECONDS
        while True:
            requested_delay = 0.0
            try:
                response = await self._transmit(request)
            except httpx.UnsupportedProtocol as error:
                raise self._bad_url(error) from error
            except httpx.TransportError as error:
                failure: ClientError = Unreachable(
                    f"The server at {self.url} does not answer ({error or type(error).__name__}).",
                    code="server_unreachable",
                )
                failure.__cause__ = error
            else:
                answer = read(response) if response.is_success else None
                if answer is not None:
                    return answer
                failure = error_of(response, _parse(response))
                if isinstance(failure, Refused) or failure.code in FATAL:
                    raise failure
                requested_delay = retry_after(response)
            # Randomised, so that clients do not all retry at the same moment.
            pause = max(requested_delay, delay * random.uniform(0.5, 1.0))
            if time.monotonic() + pause > give_up_at:
                raise failure
            await self._sleep(pause)
            delay = min(delay * 2, _MAX_DELAY_SECONDS)

    def _request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> httpx.Request:
        """Build a request that can be sent any number of times."""
        read = self._timeout_seconds if timeout is None else timeout
        try:
            request = self._http.build_request(
                method,
                self.url + path,
                headers={**self._headers, **(headers or {})},
                timeout=httpx.Timeout(read, connect=min(read, 5.0)),
                **more,
            )
        except httpx.InvalidURL as error:
            raise self._bad_url(error) from error
        request.read()
        return request

    def _bad_url(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self.url} is not a server's address ({error}).", code="bad_url")

    async def _map(self, call: Callable[[Item], Coroutine[Any, Any, T]], items: Sequence[Item]) -> list[T]:
        """Make a call for each item, at most IN_FLIGHT at once. :return: the results, in order."""
        results: list[T] = []
        for start in range(0, len(items), IN_FLIGHT):
            results += await self._gather([functools.partial(call, item) for item in items[start : start + IN_FLIGHT]])
        return results

    # What each client does in its own way

    @abc.abstractmethod
    async def _transmit(self, request: httpx.Request) -> httpx.Response:
        """Send a request and read its response."""

    @abc.abstractmethod
    def _open(self, request: httpx.Request) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        """Send a request; the response is read in the `with` statement."""

    @abc.abstractmethod
    def _lines(self, response: httpx.Response) -> AsyncIterator[str]:
        """Iterate over the lines of an open response."""

    @abc.abstractmethod
    async def _sleep(self, seconds: float) -> object:
        """Pause."""

    @abc.abstractmethod
    async def _gather(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Make several calls at the same time. :return: the results, in order."""


def _check_time(waiting: Mapping[str, Request], give_up_at: float | None) -> None:
    if waiting and give_up_at is not None and time.monotonic() >= give_up_at:
        raise StillWaiting(f"{len(waiting)} requests are not done yet.", code="still_waiting")


def _id(request: Request | str) -> str:
    return quote(request if isinstance(request, str) else request.id, safe="")


def _batch_fields(uploads: Iterable[ImageUpload]) -> list[tuple[str, Any]]:
    """Build the form of a batch."""
    return [field for one in uploads for field in (("client_id", (None, one.id)), one.form_field)]


def _query(
    labels: Mapping[str, str] | None, params: Mapping[str, Any] | None, webhook: str | None
) -> list[tuple[str, str]]:
    """Build the query of an upload."""
    query = [(name, str(int(value) if isinstance(value, bool) else value)) for name, value in (params or {}).items()]
    query += [("label", f"{name}:{value}") for name, value in (labels or {}).items()]
    return [*query, ("webhook", webhook)] if webhook else query


def _parse(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _read_answer(response: httpx.Response) -> dict[str, Any] | None:
    answer = _parse(response)
    return answer if answer.get("success") is True else None
