"""The Python client of mlg's HTTP API: send images and wait for results, from synchronous or asynchronous code.

    from mlg_client import Client

    with Client() as client:                              # MLG_URL and MLG_API_KEY, or arguments
        batch = client.submit_dir("photos/", "efficientnet_lite0")
        for request in client.as_completed(batch.requests):
            print(request.name, request.best)

For any Python program; `mlg submit` uses it too. It needs httpx and the standard library, and imports no other package
of mlg. The calls are in `calls.py`; the two classes here execute their operations.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from mlg_client.calls import DEFAULT_URL, IN_FLIGHT, Calls
from mlg_client.errors import ClientError, Refused, StillWaiting, Unavailable, Unreachable
from mlg_client.operations import Open, ReadLine, Return, Send, Sleep, Steps, Yield, advance
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


class Client(Calls):
    """A synchronous client of one server; thread-safe. A context manager.

    :param url: address of the server. Defaults to MLG_URL, then http://127.0.0.1:5000.
    :param api_key: defaults to MLG_API_KEY; without either no key is sent.
    :param retry_timeout_seconds: how long to retry while the server is busy or unreachable.
    :param timeout_seconds: maximum time for one response.
    :param connections: maximum number of open connections.
    :param transport: httpx transport for all requests; None uses the network.
    :param pause: called with the seconds to wait between two attempts.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        retry_timeout_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        transport: httpx.BaseTransport | None = None,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        super().__init__(url, api_key, retry_timeout_seconds=retry_timeout_seconds, timeout_seconds=timeout_seconds)
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

    def _run(self, steps: Steps[T]) -> T:
        with contextlib.closing(self._drive(steps)) as results:
            for result in results:
                if isinstance(result, Return):
                    value: T = result.value
                    return value
        raise AssertionError("a call ended without a result")

    def _iterate(self, steps: Steps[None]) -> Iterator[Any]:
        with contextlib.closing(self._drive(steps)) as results:
            for result in results:
                if isinstance(result, Yield):
                    yield result.value

    def _drive(self, steps: Steps[Any]) -> Generator[Yield | Return, None, None]:
        outcome: Any = None
        error: Exception | None = None
        lines: Iterator[str] = iter(())
        with contextlib.ExitStack() as opened:
            while True:
                operation = advance(steps, outcome, error)
                outcome, error = None, None
                if isinstance(operation, Yield | Return):
                    yield operation
                    if isinstance(operation, Return):
                        return
                    continue
                try:
                    if isinstance(operation, Send):
                        outcome = self._http.send(operation.request)
                    elif isinstance(operation, Open):
                        opened.close()
                        outcome = self._http.send(operation.request, stream=True)
                        opened.callback(outcome.close)
                        lines = outcome.iter_lines()
                    elif isinstance(operation, ReadLine):
                        outcome = next(lines, None)
                    elif isinstance(operation, Sleep):
                        self._sleep(operation.seconds)
                    else:
                        outcome = self._gather(operation.calls)
                except Exception as raised:  # noqa: BLE001 - raised again in the call, which handles it
                    error = raised

    def _gather(self, calls: Sequence[Callable[[], Steps[Any]]]) -> list[Any]:
        if len(calls) == 1:
            return [self._run(calls[0]())]
        pool = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="mlg-client")
        try:
            return list(pool.map(lambda call: self._run(call()), calls))
        finally:
            # After Ctrl-C do not wait for reads that the server still holds.
            pool.shutdown(wait=not isinstance(sys.exception(), KeyboardInterrupt), cancel_futures=True)


class AsyncClient(Calls):
    """An asynchronous client of one server: the calls of `Client` with `await` and `async for`. A context manager.

    The parameters are those of `Client`.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        retry_timeout_seconds: float = 60.0,
        timeout_seconds: float = 30.0,
        connections: int = IN_FLIGHT,
        transport: httpx.AsyncBaseTransport | None = None,
        pause: Callable[[float], Coroutine[Any, Any, object]] = asyncio.sleep,
    ) -> None:
        super().__init__(url, api_key, retry_timeout_seconds=retry_timeout_seconds, timeout_seconds=timeout_seconds)
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

    async def _run(self, steps: Steps[T]) -> T:
        async with contextlib.aclosing(self._drive(steps)) as results:
            async for result in results:
                if isinstance(result, Return):
                    value: T = result.value
                    return value
        raise AssertionError("a call ended without a result")

    async def _iterate(self, steps: Steps[None]) -> AsyncIterator[Any]:
        async with contextlib.aclosing(self._drive(steps)) as results:
            async for result in results:
                if isinstance(result, Yield):
                    yield result.value

    async def _drive(self, steps: Steps[Any]) -> AsyncGenerator[Yield | Return, None]:
        outcome: Any = None
        error: Exception | None = None
        lines: AsyncIterator[str] | None = None
        async with contextlib.AsyncExitStack() as opened:
            while True:
                operation = advance(steps, outcome, error)
                outcome, error = None, None
                if isinstance(operation, Yield | Return):
                    yield operation
                    if isinstance(operation, Return):
                        return
                    continue
                try:
                    if isinstance(operation, Send):
                        outcome = await self._http.send(operation.request)
                    elif isinstance(operation, Open):
                        await opened.aclose()
                        outcome = await self._http.send(operation.request, stream=True)
                        opened.push_async_callback(outcome.aclose)
                        lines = outcome.aiter_lines()
                    elif isinstance(operation, ReadLine):
                        outcome = None if lines is None else await anext(lines, None)
                    elif isinstance(operation, Sleep):
                        await self._sleep(operation.seconds)
                    else:
                        outcome = await self._gather(operation.calls)
                except Exception as raised:  # noqa: BLE001 - raised again in the call, which handles it
                    error = raised

    async def _gather(self, calls: Sequence[Callable[[], Steps[Any]]]) -> list[Any]:
        tasks = [asyncio.ensure_future(self._run(call())) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _limits(connections: int) -> httpx.Limits:
    return httpx.Limits(max_connections=connections, max_keepalive_connections=connections)


def _uses_proxies(url: str) -> bool:
    """Tell whether to use the proxies of the environment: not for a server on this machine."""
    try:
        return urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")
    except ValueError:
        return False
