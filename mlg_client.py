"""The Python client of mlg's HTTP API: send pictures, wait for answers, from plain or from async code.

    from mlg_client import Client

    with Client() as client:                              # MLG_URL and MLG_API_KEY, or arguments
        batch = client.submit_dir("photos/", "efficientnet_lite0")
        for request in client.as_completed(batch.requests):
            print(request.name, request.best)

For everybody's programs, and for `mlg submit`. It stands alone: httpx and the standard library, nothing of the server.

Every call is written once, as a generator that yields what it wants done (send this, pause, read a line) and gets the
outcome back. `Client` and `AsyncClient` are two ways of doing that; `_Call` and `_Stream` make their methods of it,
with types. It is longer than other modules because it is handed out as one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import ssl
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload
from urllib.parse import quote, urlsplit

import httpx

__all__ = [
    "AsyncClient",
    "Batch",
    "Client",
    "ClientError",
    "Model",
    "Refused",
    "Request",
    "StillWaiting",
    "Unavailable",
    "Unreachable",
    "to_dataframe",
]

P = ParamSpec("P")
T = TypeVar("T")
#: A path, the bytes themselves, or a file opened for reading in binary.
Picture = str | os.PathLike[str] | bytes | IO[bytes]

DEFAULT_URL = "http://127.0.0.1:5000"
#: Files with these endings are taken from a folder.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"})
#: States in which nothing more happens by itself.
FINAL = frozenset({"done", "failed", "cancelled", "expired"})
#: A server may come back from these.
PASSING = frozenset({429, 502, 503, 504, 507})
#: Codes that no patience helps against: somebody has to do something first.
HOPELESS = frozenset({"not_installed", "broken_artefact", "model_error", "quota_reached"})
#: How long one read asks the server to hold the answer.
HOLD_SECONDS = 5.0
#: Seconds between two reads when the server does not hold them.
POLL_SECONDS = 0.25
#: Reads or uploads in flight.
IN_FLIGHT = 8
#: Pictures and bytes that go out as one batch; a server takes more.
BATCH_PICTURES, BATCH_BYTES = 500, 32 * 1024 * 1024
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.2, 10.0
#: A stream of events on which nothing comes for so long is opened again; servers say something more often.
_SILENCE_SECONDS = 60.0
#: Requests that one stream of events is asked about by their ids; proxies take addresses of 8 KB.
_EVENT_IDS = 150
#: Statuses that say something about one picture, and nothing about the next.
_ITS_OWN_FAULT = frozenset({400, 413, 415})
_NOT_OF_A_PICTURE = frozenset({"invalid_params", "url_refused"})
#: The first sending of a POST is not answered yet; its answer can be had in a moment.
_UNDER_WAY = "key_under_way"
#: Longest id of a picture in a batch.
_LONGEST_ID = 200
#: What a slow line sends.
_SLOW_BYTES_PER_SECOND = 100_000
#: A server says one of these about an address that it does not have.
_NOT_THERE = frozenset({404, 405, 501})


# Errors


class ClientError(Exception):
    """Something did not work; `code` is for programs, `reason` for people, `status` is HTTP's or None."""

    def __init__(self, reason: str, *, code: str = "error", status: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.status = status


class Refused(ClientError):
    """The server does not do this, and will not if it is asked again."""


class Unavailable(ClientError):
    """The server cannot do this now, and could not for as long as the client was patient."""


class Unreachable(ClientError):
    """The server does not answer."""


class StillWaiting(ClientError):
    """The time that the caller gave is over; the request goes on."""


# What comes back


@dataclass(frozen=True, kw_only=True)
class Request:
    """A picture that a server took, as it stood when it was asked."""

    #: Reads the answer.
    id: str
    #: queued, claimed, done, failed, cancelled or expired.
    status: str
    #: The model's own name.
    model: str
    #: The file's name.
    name: str | None = None
    #: Rows of [wnid, label, probability], likeliest first; None while there is no answer.
    preds: list[list[Any]] | None = None
    #: Whether the answer is an earlier one.
    is_cached: bool = False
    #: Why there is no answer, for people and for programs.
    reason: str | None = None
    code: str | None = None
    #: Why it waits, and for how many seconds more.
    waiting_for: str | None = None
    eta_seconds: float | None = None
    #: The client's own words about it.
    labels: Mapping[str, str] = field(default_factory=dict)
    #: All that the server said.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_final(self) -> bool:
        """Tell whether nothing more will happen by itself."""
        return self.status in FINAL

    @property
    def is_read(self) -> bool:
        """Tell whether all is known that will be."""
        return self.is_final and (self.status != "done" or self.preds is not None)

    @property
    def best(self) -> tuple[str, float] | None:
        """Return the likeliest label and its probability."""
        return None if not self.preds else (str(self.preds[0][1]), float(self.preds[0][2]))

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Request:
        """Build the record from what a server says."""
        return cls(
            id=str(answer["req_id"]),
            status=str(answer.get("status") or ("done" if answer.get("preds") else "queued")),
            model=str(answer.get("model", "")),
            name=answer.get("name"),
            preds=answer.get("preds"),
            is_cached=bool(answer.get("cached", False)),
            reason=answer.get("reason"),
            code=answer.get("code"),
            waiting_for=answer.get("waiting_for"),
            eta_seconds=answer.get("eta_seconds"),
            labels=dict(answer.get("labels") or {}),
            raw=dict(answer),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures that were sent together. The server may keep them as several batches of its own, or as none."""

    #: The server's own batches; empty if the pictures were sent one by one.
    ids: tuple[str, ...] = ()
    #: The requests, in the order of the files.
    requests: tuple[Request, ...] = ()
    #: (file's name, why the server did not take it).
    refused: tuple[tuple[str, str], ...] = ()
    #: All that the server said of each of its batches.
    raw: tuple[Mapping[str, Any], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the server's catalogue."""

    #: The name to send pictures under.
    name: str
    title: str
    #: What kind of work it does.
    service: str
    #: Whether it answers there.
    is_installed: bool
    #: All that the server said.
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Model:
        """Build the record from what a server says."""
        return cls(
            name=str(answer["name"]),
            title=str(answer.get("title", answer["name"])),
            service=str(answer.get("service", "")),
            is_installed=bool(answer.get("installed") or answer.get("builds_on_first_use")),
            raw=dict(answer),
        )


def to_dataframe(results: Iterable[Request], *, top: int = 1) -> Any:
    """Make a pandas DataFrame of requests: a row for each of the `top` likeliest labels of each.

    :raises ImportError: pandas is not installed; mlg does not need it otherwise.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_dataframe needs pandas. Install it: pip install pandas") from error
    rows = []
    for request in results:
        shared = {"req_id": request.id, "name": request.name, "model": request.model, "status": request.status}
        for rank, pred in enumerate((request.preds or [[None, None, None]])[:top], start=1):
            label = dict(zip(("wnid", "label", "probability"), pred, strict=False))
            rows.append({**shared, "rank": rank if request.preds else None, **label, "reason": request.reason})
    return pandas.DataFrame(rows)


# What a call wants done, and how it is done


@dataclass(frozen=True)
class _Send:
    """Send a request and get the response, read to its end."""

    request: httpx.Request


@dataclass(frozen=True)
class _Open:
    """Send a request and get the response, whose lines are asked for one by one. One is open at a time."""

    request: httpx.Request


@dataclass(frozen=True)
class _Line:
    """Get the next line of what is open; None at its end."""


@dataclass(frozen=True)
class _Pause:
    """Do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True)
class _Together:
    """Take several roads at once, and get what is at the end of each, in their order."""

    roads: Sequence[Callable[[], Steps[Any]]]


@dataclass(frozen=True)
class _Give:
    """Give something to who iterates."""

    value: Any


@dataclass(frozen=True)
class _End:
    """Never yielded by a call: that it has returned."""

    value: Any


_Wish = _Send | _Open | _Line | _Pause | _Together | _Give
Steps = Generator[_Wish, Any, T]


def _advance(steps: Steps[Any], outcome: Any, error: Exception | None) -> _Wish | _End:
    """Tell a call how its wish turned out, and get the next one."""
    try:
        return steps.send(outcome) if error is None else steps.throw(error)
    except StopIteration as end:
        return _End(end.value)


class _Call(Generic[P, T]):
    """A method that gives one thing: plain at Client, to be awaited at AsyncClient."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        if client is None:
            return self

        @functools.wraps(self._steps)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client._finish(self._steps(client, *args, **kwargs))

        return call


class _Stream(Generic[P, T]):
    """A method that gives one thing after the other: to be iterated with `for`, or with `async for`.

    :param kind: what it gives; only for the types.
    """

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[None]], kind: type[T]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        if client is None:
            return self

        @functools.wraps(self._steps)
        def call(*args: P.args, **kwargs: P.kwargs) -> Any:
            return client._iterate(self._steps(client, *args, **kwargs))

        return call


def _gives(kind: type[T]) -> Callable[[Callable[Concatenate[Any, P], Steps[None]]], _Stream[P, T]]:
    return lambda steps: _Stream(steps, kind)


class _Calls:
    """The calls; see the module. No transport."""

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        *,
        patience_seconds: float,
        timeout_seconds: float,
    ) -> None:
        self.url = (url or os.environ.get("MLG_URL") or DEFAULT_URL).rstrip("/")
        self._patience_seconds = patience_seconds
        self._timeout_seconds = timeout_seconds
        key = api_key if api_key is not None else os.environ.get("MLG_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        #: False once the server has said that it has no such address.
        self._has_batches = True

    # One picture

    @_Call
    def submit(
        self,
        picture: Picture,
        model: str,
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
        idempotency_key: str | None = None,
    ) -> Steps[Request]:
        """Send one picture.

        :param name: a file name for those who look at the request; the path's own unless it is given.
        :param labels: your own words about it.
        :param params: what the model's service takes, and `fresh`, `deadline`, `keep_seconds`.
        :param webhook: an address that the server calls when the answer is there.
        :param idempotency_key: sending again under the same one makes no second request. Made up if not given.
        :raises Refused: :raises Unavailable: :raises Unreachable:
        """
        data, own_name = _load(picture)
        answer = yield from self._post(
            f"/requestPrediction/{quote(model, safe='')}",
            query=_query(labels, params, webhook),
            files=[_image(name or own_name, data)],
            key=idempotency_key,
        )
        return Request.from_answer({"name": name or own_name, **answer})

    @_Call
    def read(self, id: str, *, hold_seconds: float = 0.0, top: int | None = None) -> Steps[Request]:
        """Read an answer. :param hold_seconds: how long the server may wait for it before it answers.

        :raises Refused: with the code unknown_request if the server does not know the id.
        """
        return (yield from self._read(id, hold_seconds, top))

    @_Call
    def wait(self, request: Request | str, timeout: float | None = None) -> Steps[Request]:
        """Wait until a request has ended, and return it with its answer. :raises StillWaiting: the timeout is over."""
        id = request if isinstance(request, str) else request.id
        give_up_at = None if timeout is None else time.monotonic() + timeout
        while True:
            began = time.monotonic()
            left = HOLD_SECONDS if give_up_at is None else max(0.0, give_up_at - began)
            found = yield from self._read(id, min(HOLD_SECONDS, left))
            if found.is_final:
                return found
            if give_up_at is not None and time.monotonic() >= give_up_at:
                raise StillWaiting(f"The request {id} is not done yet. {found.waiting_for or ''}", code="still_waiting")
            yield from self._breathe(began)

    @_Call
    def cancel(self, request: Request | str) -> Steps[Request]:
        """Cancel what has not been dispatched. :raises Refused:"""
        answer = yield from self._ask_json("DELETE", f"/requests/{_id(request)}")
        return Request.from_answer(answer)

    @_Call
    def retry(self, request: Request | str) -> Steps[Request]:
        """Queue a failed or cancelled request again. :raises Refused:"""
        answer = yield from self._post(f"/requests/{_id(request)}/retry")
        return Request.from_answer(answer)

    # Many pictures

    @_Call
    def submit_many(
        self,
        pictures: Iterable[Picture],
        model: str,
        *,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
    ) -> Steps[Batch]:
        """Send many pictures, many at a time where the server takes that. Those it does not take are listed.

        :raises Unavailable: :raises Unreachable:
        """
        steps = self._submit_all(((None, picture) for picture in pictures), model, _query(labels, params, webhook))
        return (yield from steps)

    @_Call
    def submit_dir(
        self,
        folder: str | os.PathLike[str],
        model: str,
        *,
        labels: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
        webhook: str | None = None,
    ) -> Steps[Batch]:
        """Send all images of a folder and the folders in it, in the order of their names; see `submit_many`.

        :raises FileNotFoundError: there is no image.
        """
        found = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(f"No image files in {folder}. Taken are: {' '.join(sorted(SUFFIXES))}")
        named = ((path.relative_to(folder).as_posix(), path) for path in found)
        return (yield from self._submit_all(named, model, _query(labels, params, webhook)))

    @_Call
    def batch(self, id: str, *, hold_seconds: float = 0.0) -> Steps[Mapping[str, Any]]:
        """Read what the server says of one of its batches: counts, progress, cost.

        :param hold_seconds: how long the server may wait for its end before it answers.
        :raises Refused:
        """
        params = {"wait": round(hold_seconds, 3)} if hold_seconds > 0 else {}
        timeout = self._timeout_seconds + hold_seconds
        return (yield from self._ask_json("GET", f"/batches/{_id(id)}", params=params, timeout=timeout))

    @_Call
    def cancel_batch(self, id: str) -> Steps[Mapping[str, Any]]:
        """Cancel what has not been dispatched of one of the server's batches. :raises Refused:"""
        return (yield from self._post(f"/batches/{_id(id)}/cancel"))

    @_Call
    def retry_batch(self, id: str) -> Steps[Mapping[str, Any]]:
        """Queue the failed requests of one of the server's batches again. :raises Refused:"""
        return (yield from self._post(f"/batches/{_id(id)}/retry"))

    @_gives(Request)
    def as_completed(self, requests: Iterable[Request], timeout: float | None = None) -> Steps[None]:
        """Give each request as it ends, with its answer, in the order in which they end.

        Listens to the server's events where it has them, over any number of broken connections, and holds reads else.

        :raises StillWaiting: the timeout is over.
        """
        waiting: dict[str, Request] = {}
        for request in requests:
            if request.is_read:
                yield _Give(request)
            else:
                waiting[request.id] = request
        give_up_at = None if timeout is None else time.monotonic() + timeout
        yield from self._listen(waiting, give_up_at)
        while waiting:
            began = time.monotonic()
            looked_at = list(waiting)[:IN_FLIGHT]
            hold = HOLD_SECONDS if give_up_at is None else max(0.0, min(HOLD_SECONDS, give_up_at - began))
            found: list[Request] = yield _Together([functools.partial(self._read, id, hold) for id in looked_at])
            for request in found:
                # Those that are not done go to the end of the row.
                earlier = waiting.pop(request.id)
                if request.is_final:
                    yield _Give(request)
                else:
                    waiting[request.id] = earlier
            _check_time(waiting, give_up_at)
            if waiting and len(waiting) <= IN_FLIGHT:
                yield from self._breathe(began)

    @_gives(Request)
    def results(self, batch: Batch) -> Steps[None]:
        """Give the requests of a batch in the order of the files, each as soon as it and those before it have ended."""
        requests = list(batch.requests)
        for start in range(0, len(requests), IN_FLIGHT):
            part = requests[start : start + IN_FLIGHT]
            done = {request.id: request for request in part if request.is_read}
            while len(done) < len({request.id for request in part}):
                began = time.monotonic()
                todo = [request.id for request in part if request.id not in done]
                found = yield _Together([functools.partial(self._read, id, HOLD_SECONDS) for id in todo])
                done.update({request.id: request for request in found if request.is_final})
                if len(done) < len(part):
                    yield from self._breathe(began)
            for request in part:
                yield _Give(done[request.id])

    # The rest

    @_Call
    def models(self) -> Steps[list[Model]]:
        """List the server's models."""
        answer = yield from self._ask_json("GET", "/models")
        return [Model.from_answer(model) for model in answer["models"]]

    # Below this, nothing is for callers.

    def _read(self, id: str, hold_seconds: float = 0.0, top: int | None = None) -> Steps[Request]:
        params: dict[str, Any] = {} if top is None else {"top": top}
        if hold_seconds > 0:
            params["wait"] = round(hold_seconds, 3)
        answer = yield from self._ask_json(
            "GET", f"/readPrediction/{_id(id)}", params=params, timeout=self._timeout_seconds + hold_seconds
        )
        return Request.from_answer(answer)

    def _breathe(self, began: float) -> Steps[None]:
        """Pause after a read that should have been held and was not: the server holds only so many."""
        if time.monotonic() - began < HOLD_SECONDS / 2:
            yield _Pause(POLL_SECONDS)

    def _submit_all(
        self, pictures: Iterable[tuple[str | None, Picture]], model: str, query: Sequence[tuple[str, str]]
    ) -> Steps[Batch]:
        requests: list[Request] = []
        refused: list[tuple[str, str]] = []
        raw: list[Mapping[str, Any]] = []
        for part in _parts(pictures):
            answer = (yield from self._post_batch(model, part, query)) if len(part) > 1 else None
            if answer is None:
                yield from self._post_singly(model, part, query, requests, refused)
                continue
            raw.append(answer)
            shared = {"model": answer.get("model", model), "batch_id": answer["batch_id"]}
            for one, item in zip(part, answer["items"], strict=True):
                if item.get("req_id") is None:
                    refused.append((one.id, str(item.get("reason"))))
                else:
                    requests.append(Request.from_answer({"name": one.name, **shared, **item}))
        ids = tuple(str(answer["batch_id"]) for answer in raw)
        return Batch(ids=ids, requests=tuple(requests), refused=tuple(refused), raw=tuple(raw))

    def _post_batch(
        self, model: str, part: Sequence[_Loaded], query: Sequence[tuple[str, str]]
    ) -> Steps[dict[str, Any] | None]:
        """Send pictures as one batch; None if the server takes no batches, or not this one as a whole."""
        if not self._has_batches:
            return None
        files: list[tuple[str, Any]] = []
        for one in part:
            files += [("client_id", (None, one.id)), _image(one.name, one.data)]
        try:
            return (yield from self._post(f"/requestPredictions/{quote(model, safe='')}", query=query, files=files))
        except Refused as error:
            if error.status in _NOT_THERE and error.code in ("not_found", "method_not_allowed"):
                self._has_batches = False
            elif not _is_of_one_picture(error):
                raise
            return None

    def _post_singly(
        self,
        model: str,
        part: Sequence[_Loaded],
        query: Sequence[tuple[str, str]],
        requests: list[Request],
        refused: list[tuple[str, str]],
    ) -> Steps[None]:
        def send(one: _Loaded) -> Steps[Request | Refused]:
            path = f"/requestPrediction/{quote(model, safe='')}"
            try:
                answer = yield from self._post(path, query=query, files=[_image(one.name, one.data)])
            except Refused as error:
                if not _is_of_one_picture(error):
                    raise
                return error
            return Request.from_answer({"name": one.name, **answer})

        for start in range(0, len(part), IN_FLIGHT):
            some = part[start : start + IN_FLIGHT]
            sent = yield _Together([functools.partial(send, one) for one in some])
            for one, outcome in zip(some, sent, strict=True):
                if isinstance(outcome, Refused):
                    refused.append((one.id, outcome.reason))
                else:
                    requests.append(outcome)

    def _listen(self, waiting: dict[str, Request], give_up_at: float | None) -> Steps[None]:
        """Give what ends, as the server's events tell; returns when there are no events to be had."""
        while waiting:
            batches = {request.raw.get("batch_id") for request in waiting.values()}
            batch_id = batches.pop() if len(batches) == 1 else None
            # An id of an event says where a listener to these very requests stands, and nothing about others.
            listened = set(list(waiting) if batch_id else list(waiting)[:_EVENT_IDS])
            last_id: str | None = None
            failures = 0
            while listened & waiting.keys():
                _check_time(waiting, give_up_at)
                ids = [id for id in waiting if id in listened]
                try:
                    response: httpx.Response = yield _Open(self._event_request(ids, batch_id, last_id, give_up_at))
                    kind = response.headers.get("Content-Type", "")
                    if response.status_code == 200 and kind.startswith("text/event-stream"):
                        event = _Event()
                        while (line := (yield _Line())) is not None:
                            failures = 0
                            if event.take(line):
                                ended = _ended(event.data, waiting)
                                if ended is not None:
                                    del waiting[ended.id]
                                    yield _Give(ended if ended.is_read else (yield from self._read(ended.id)))
                                last_id = event.id or last_id
                                event = _Event()
                            if not listened & waiting.keys():
                                break
                            _check_time(waiting, give_up_at)
                    elif response.status_code in PASSING:
                        failures += 1
                    else:
                        return
                except httpx.TransportError:
                    failures += 1
                if failures > 3:
                    return  # held reads are patient, and say what is wrong
                if listened & waiting.keys():
                    _check_time(waiting, give_up_at)
                    yield _Pause(min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2**failures))

    def _event_request(
        self, ids: Sequence[str], batch_id: str | None, last_id: str | None, give_up_at: float | None
    ) -> httpx.Request:
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
        left = _SILENCE_SECONDS if give_up_at is None else max(0.05, give_up_at - time.monotonic())
        timeout = min(_SILENCE_SECONDS, left)
        if batch_id:
            path = f"/batches/{quote(str(batch_id), safe='')}/events"
            return self._request("GET", path, headers=headers, timeout=timeout)
        return self._request("GET", "/events", params={"ids": ",".join(ids)}, headers=headers, timeout=timeout)

    def _post(
        self,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        files: Sequence[tuple[str, Any]] = (),
        key: str | None = None,
    ) -> Steps[dict[str, Any]]:
        size = sum(len(content[1]) for _, content in files)
        more: dict[str, Any] = {"params": list(query)} if query else {}
        if files:
            more["files"] = files
        return (
            yield from self._ask_json(
                "POST",
                path,
                headers={"Idempotency-Key": key or uuid.uuid4().hex},
                timeout=self._timeout_seconds + size / _SLOW_BYTES_PER_SECOND,
                **more,
            )
        )

    def _request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        **more: Any,
    ) -> httpx.Request:
        """Make a request that can be sent any number of times."""
        read = self._timeout_seconds if timeout is None else timeout
        try:
            request = self._build(
                method,
                self.url + path,
                headers={**self._headers, **(headers or {})},
                timeout=httpx.Timeout(read, connect=min(read, 5.0)),
                **more,
            )
        except httpx.InvalidURL as error:
            raise self._no_address(error) from error
        request.read()
        return request

    def _build(self, method: str, url: str, **more: Any) -> httpx.Request:
        raise NotImplementedError

    def _no_address(self, error: Exception) -> Unreachable:
        return Unreachable(f"{self.url} is not a server's address ({error}).", code="bad_url")

    def _ask_json(self, method: str, path: str, **more: Any) -> Steps[dict[str, Any]]:
        """Ask until there is an answer, or patience is over. :raises ClientError:"""
        request = self._request(method, path, **more)
        give_up_at = time.monotonic() + self._patience_seconds
        delay = _FIRST_DELAY_SECONDS
        while True:
            asked_for = 0.0
            try:
                response: httpx.Response = yield _Send(request)
            except httpx.UnsupportedProtocol as error:
                raise self._no_address(error) from error
            except httpx.TransportError as error:
                failure: ClientError = Unreachable(
                    f"The server at {self.url} does not answer ({error or type(error).__name__}).",
                    code="server_unreachable",
                )
                failure.__cause__ = error
            else:
                answer = _parse(response)
                if response.is_success and answer.get("success") is True:
                    return answer
                failure = _failure(response, answer)
                if isinstance(failure, Refused) or failure.code in HOPELESS:
                    raise failure
                asked_for = _retry_after(response)
            # Spread out, so that not all clients come back at the same moment.
            pause = max(asked_for, delay * random.uniform(0.5, 1.0))
            if time.monotonic() + pause > give_up_at:
                raise failure
            yield _Pause(pause)
            delay = min(delay * 2, _LONGEST_DELAY_SECONDS)


class Client(_Calls):
    """A server, for plain code; may be shared by threads. A context manager.

    :param url: MLG_URL unless it is given, else this machine's port 5000.
    :param api_key: MLG_API_KEY unless it is given; none is sent if there is none.
    :param patience_seconds: how long to try again when the server is busy or away.
    :param timeout_seconds: how long one answer may take.
    :param connections: how many are open at once.
    :param transport: what requests go through; the network unless it is given.
    :param pause: what to do instead of sleeping between two attempts; gets seconds.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(url, api_key, patience_seconds=patience_seconds, timeout_seconds=timeout_seconds)
        self._http = httpx.Client(
            transport=transport,
            limits=_limits(connections),
            verify=ssl.create_default_context(),
            trust_env=_uses_proxies(self.url),
        )
        self._sleep = pause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _build(self, method: str, url: str, **more: Any) -> httpx.Request:
        return self._http.build_request(method, url, **more)

    def _finish(self, steps: Steps[T]) -> T:
        with contextlib.closing(self._drive(steps)) as events:
            for event in events:
                if isinstance(event, _End):
                    result: T = event.value
                    return result
        raise AssertionError("a call has no end")

    def _iterate(self, steps: Steps[None]) -> Iterator[Any]:
        with contextlib.closing(self._drive(steps)) as events:
            for event in events:
                if isinstance(event, _Give):
                    yield event.value

    def _drive(self, steps: Steps[Any]) -> Generator[_Give | _End, None, None]:
        outcome: Any = None
        error: Exception | None = None
        lines: Iterator[str] = iter(())
        with contextlib.ExitStack() as opened:
            while True:
                wish = _advance(steps, outcome, error)
                outcome, error = None, None
                if isinstance(wish, _Give | _End):
                    yield wish
                    if isinstance(wish, _End):
                        return
                    continue
                try:
                    if isinstance(wish, _Send):
                        outcome = self._http.send(wish.request)
                    elif isinstance(wish, _Open):
                        opened.close()
                        outcome = self._http.send(wish.request, stream=True)
                        opened.callback(outcome.close)
                        lines = outcome.iter_lines()
                    elif isinstance(wish, _Line):
                        outcome = next(lines, None)
                    elif isinstance(wish, _Pause):
                        self._sleep(wish.seconds)
                    else:
                        outcome = self._together(wish.roads)
                except Exception as raised:  # noqa: BLE001 - the call that wished for it decides
                    error = raised

    def _together(self, roads: Sequence[Callable[[], Steps[Any]]]) -> list[Any]:
        if len(roads) == 1:
            return [self._finish(roads[0]())]
        with ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="mlg-client") as pool:
            return list(pool.map(lambda road: self._finish(road()), roads))


class AsyncClient(_Calls):
    """A server, for async code: the calls of `Client`, awaited, and iterated with `async for`. A context manager.

    The parameters are those of Client.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        patience_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Callable[[float], Coroutine[Any, Any, object]] = asyncio.sleep,
    ) -> None:
        super().__init__(url, api_key, patience_seconds=patience_seconds, timeout_seconds=timeout_seconds)
        self._http = httpx.AsyncClient(
            transport=transport,
            limits=_limits(connections),
            verify=ssl.create_default_context(),
            trust_env=_uses_proxies(self.url),
        )
        self._sleep = pause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _build(self, method: str, url: str, **more: Any) -> httpx.Request:
        return self._http.build_request(method, url, **more)

    async def _finish(self, steps: Steps[T]) -> T:
        async with contextlib.aclosing(self._drive(steps)) as events:
            async for event in events:
                if isinstance(event, _End):
                    result: T = event.value
                    return result
        raise AssertionError("a call has no end")

    async def _iterate(self, steps: Steps[None]) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._drive(steps)) as events:
            async for event in events:
                if isinstance(event, _Give):
                    yield event.value

    async def _drive(self, steps: Steps[Any]) -> AsyncGenerator[_Give | _End, None]:
        outcome: Any = None
        error: Exception | None = None
        lines: AsyncIterator[str] | None = None
        async with contextlib.AsyncExitStack() as opened:
            while True:
                wish = _advance(steps, outcome, error)
                outcome, error = None, None
                if isinstance(wish, _Give | _End):
                    yield wish
                    if isinstance(wish, _End):
                        return
                    continue
                try:
                    if isinstance(wish, _Send):
                        outcome = await self._http.send(wish.request)
                    elif isinstance(wish, _Open):
                        await opened.aclose()
                        outcome = await self._http.send(wish.request, stream=True)
                        opened.push_async_callback(outcome.aclose)
                        lines = outcome.aiter_lines()
                    elif isinstance(wish, _Line):
                        outcome = None if lines is None else await anext(lines, None)
                    elif isinstance(wish, _Pause):
                        await self._sleep(wish.seconds)
                    else:
                        outcome = await self._together(wish.roads)
                except Exception as raised:  # noqa: BLE001 - the call that wished for it decides
                    error = raised

    async def _together(self, roads: Sequence[Callable[[], Steps[Any]]]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._finish(road())) for road in roads]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


# Small parts


class _Event:
    """One event of a stream, line by line (WHATWG HTML, 9.2.6)."""

    def __init__(self, id: str | None = None) -> None:
        self.id = id
        self._data: list[str] = []

    @property
    def data(self) -> dict[str, Any]:
        """Return what it says; empty if that is not JSON."""
        try:
            said = json.loads("\n".join(self._data))
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}

    def take(self, line: str) -> bool:
        """Take a line. :return: True when the event is whole."""
        if not line:
            return bool(self._data)
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self.id = value
        return False


def _ended(said: Mapping[str, Any], waiting: Collection[str]) -> Request | None:
    """Return the request that an event tells the end of, if anybody waits for it."""
    if said.get("req_id") not in waiting or said.get("status") not in FINAL:
        return None
    return Request.from_answer(said)


def _check_time(waiting: Collection[str], give_up_at: float | None) -> None:
    if waiting and give_up_at is not None and time.monotonic() >= give_up_at:
        raise StillWaiting(f"{len(waiting)} requests are not done yet.", code="still_waiting")


def _id(request: Request | str) -> str:
    return quote(request if isinstance(request, str) else request.id, safe="")


def _load(picture: Picture) -> tuple[bytes, str]:
    """Read a picture. :return: its bytes and a name."""
    if isinstance(picture, bytes):
        return picture, "image"
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        return path.read_bytes(), os.fsencode(path.name).decode("utf-8", "replace")
    name = getattr(picture, "name", None)
    return picture.read(), Path(name).name if isinstance(name, str) else "image"


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A picture that is about to be sent."""

    #: Unique in its batch; the file as it was named.
    id: str
    name: str
    data: bytes = field(repr=False)


def _parts(pictures: Iterable[tuple[str | None, Picture]]) -> Iterator[list[_Loaded]]:
    """Read pictures, some at a time, so that a large folder is never in memory."""
    part: dict[str, _Loaded] = {}
    size = 0
    for id, picture in pictures:
        data, name = _load(picture)
        if part and (len(part) == BATCH_PICTURES or size + len(data) > BATCH_BYTES):
            yield list(part.values())
            part, size = {}, 0
        wanted = (id or name)[-_LONGEST_ID:]
        if wanted in part:
            wanted = f"{len(part)}:{wanted}"[:_LONGEST_ID]
        part[wanted] = _Loaded(id=wanted, name=name, data=data)
        size += len(data)
    if part:
        yield list(part.values())


def _image(name: str, data: bytes) -> tuple[str, tuple[str, bytes, str]]:
    """Make the field of a form that holds a picture."""
    return "image", (name, data, "application/octet-stream")


def _query(
    labels: Mapping[str, str] | None, params: Mapping[str, Any] | None, webhook: str | None
) -> list[tuple[str, str]]:
    """Write what is wished beside a picture as the query."""
    query = [(name, str(int(value) if isinstance(value, bool) else value)) for name, value in (params or {}).items()]
    query += [("label", f"{name}:{value}") for name, value in (labels or {}).items()]
    return [*query, ("webhook", webhook)] if webhook else query


def _limits(connections: int) -> httpx.Limits:
    return httpx.Limits(max_connections=connections, max_keepalive_connections=connections)


def _uses_proxies(url: str) -> bool:
    """Tell whether proxies of the environment count: they are not meant for this very machine."""
    try:
        return urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False


def _parse(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _failure(response: httpx.Response, answer: Mapping[str, Any]) -> ClientError:
    status = response.status_code
    reason = str(answer.get("reason") or f"The server answered {status}.")
    code = str(answer.get("code") or f"http_{status}")
    passes = status in PASSING or code == _UNDER_WAY
    return (Unavailable if passes else Refused)(reason, code=code, status=status)


def _is_of_one_picture(error: ClientError) -> bool:
    """Tell whether another picture may fare better."""
    return error.status in _ITS_OWN_FAULT and error.code not in _NOT_OF_A_PICTURE


def _retry_after(response: httpx.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0
