"""The Python client of mlg's HTTP API: send images and wait for results, from synchronous or asynchronous code.

    from mlg_client import Client

    with Client() as client:                              # MLG_URL and MLG_API_KEY, or arguments
        batch = client.submit_dir("photos/", "efficientnet_lite0")
        for request in client.as_completed(batch.requests):
            print(request.name, request.best)

For any Python program; `mlg submit` uses it too. It needs httpx and the standard library, and imports no other package
of mlg. The calls are in `calls.py` and `collections.py`; the two classes here do their I/O.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from mlg_client.calls import DEFAULT_URL, IN_FLIGHT, USER_AGENT
from mlg_client.collections import CollectionCalls
from mlg_client.errors import ClientError, Refused, StillWaiting, Unavailable, Unreachable
from mlg_client.methods import run
from mlg_client.records import FINAL, Batch, Model, Request, to_dataframe
from mlg_client.uploads import SUFFIXES, Image

__all__ = [
    "DEFAULT_URL",
    "FINAL",
    "SUFFIXES",
    "AsyncClient",
    "Batch",
    "Client",
    "ClientError",
    "Image",
    "Model",
    "Refused",
    "Request",
    "StillWaiting",
    "Unavailable",
    "Unreachable",
    "to_dataframe",
]

T = TypeVar("T")


class Client(CollectionCalls):
    """A synchronous client of one server; thread-safe. A context manager.

    :param url: address of the server. Defaults to MLG_URL, then http://127.0.0.1:5000.
    :param api_key: defaults to MLG_API_KEY; without either no key is sent.
    :param retry_timeout_seconds: how long to retry while the server is busy or unreachable.
    :param timeout_seconds: maximum time for one response.
    :param connections: maximum number of open connections.
    :param user_agent: what the program calls itself.
    :param transport: httpx transport for all requests; None uses the network.
    :param pause: called with the seconds to wait between two attempts.
    """

    is_async = False
    _http: httpx.Client

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        retry_timeout_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        user_agent: str = USER_AGENT,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(
            url,
            api_key,
            retry_timeout_seconds=retry_timeout_seconds,
            timeout_seconds=timeout_seconds,
            user_agent=user_agent,
        )
        self._http = httpx.Client(transport=transport, **_http_options(self.url, connections))
        self._pause = pause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    async def _transmit(self, request: httpx.Request) -> httpx.Response:
        return self._http.send(request)

    @contextlib.asynccontextmanager
    async def _open(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        with contextlib.closing(self._http.send(request, stream=True)) as response:
            yield response

    async def _lines(self, response: httpx.Response) -> AsyncGenerator[str, None]:
        for line in response.iter_lines():
            yield line

    async def _sleep(self, seconds: float) -> None:
        self._pause(seconds)

    async def _gather(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        if len(calls) == 1:
            return [await calls[0]()]
        pool = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="mlg-client")
        try:
            return list(pool.map(lambda call: run(call()), calls))
        finally:
            # After Ctrl-C do not wait for reads that the server still holds.
            pool.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)


class AsyncClient(CollectionCalls):
    """An asynchronous client of one server: the calls of `Client` with `await` and `async for`. A context manager.

    The parameters are those of `Client`.
    """

    is_async = True
    _http: httpx.AsyncClient

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        retry_timeout_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        user_agent: str = USER_AGENT,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Callable[[float], Coroutine[Any, Any, object]] = asyncio.sleep,
    ) -> None:
        super().__init__(
            url,
            api_key,
            retry_timeout_seconds=retry_timeout_seconds,
            timeout_seconds=timeout_seconds,
            user_agent=user_agent,
        )
        self._http = httpx.AsyncClient(transport=transport, **_http_options(self.url, connections))
        self._pause = pause

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _transmit(self, request: httpx.Request) -> httpx.Response:
        return await self._http.send(request)

    @contextlib.asynccontextmanager
    async def _open(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        async with contextlib.aclosing(await self._http.send(request, stream=True)) as response:
            yield response

    def _lines(self, response: httpx.Response) -> AsyncIterator[str]:
        return response.aiter_lines()

    async def _sleep(self, seconds: float) -> object:
        return await self._pause(seconds)

    async def _gather(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        tasks = [asyncio.ensure_future(call()) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _http_options(url: str, connections: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    return {"limits": limits, "verify": _ssl_context(), "trust_env": uses_proxies(url)}


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """Return what all clients of a process share: it takes a megabyte."""
    return ssl.create_default_context()


def uses_proxies(url: str) -> bool:
    """Tell whether to use the proxies of the environment: not for a server on this machine."""
    try:
        return urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False
