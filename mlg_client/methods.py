"""Turns coroutines into methods of both clients: `Client` runs them to their end, `AsyncClient` returns them.

Every call is written once, in `calls.py` or `collections.py`, as a coroutine or an asynchronous generator that does all
I/O through methods of its client. Those of `Client` block and never suspend, so its calls run without an event loop,
see `run`.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

if TYPE_CHECKING:
    from mlg_client import AsyncClient, Client

P = ParamSpec("P")
T = TypeVar("T")


def run(call: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends."""
    try:
        call.send(None)
    except StopIteration as end:
        value: T = end.value
        return value
    raise AssertionError("a synchronous call waits for an event loop")


def iterate(values: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Iterate over an asynchronous generator that never suspends."""
    try:
        while True:
            yield run(anext(values))
    except StopAsyncIteration:
        return
    finally:
        run(values.aclose())


class ClientMethod(Generic[P, T]):
    """A method that returns one value: directly in `Client`, with `await` in `AsyncClient`; a decorator."""

    def __init__(self, call: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self._call = call
        self.__doc__ = call.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        return self if client is None else _bind(self._call, client, run)


class ClientStream(Generic[P, T]):
    """A method that yields values: with `for` in `Client`, with `async for` in `AsyncClient`; a decorator."""

    def __init__(self, call: Callable[Concatenate[Any, P], AsyncGenerator[T, None]]) -> None:
        self._call = call
        self.__doc__ = call.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Client, owner: type) -> Callable[P, Generator[T, None, None]]: ...
    @overload
    def __get__(self, client: AsyncClient, owner: type) -> Callable[P, AsyncGenerator[T, None]]: ...
    def __get__(self, client: Client | AsyncClient | None, owner: type) -> Any:
        return self if client is None else _bind(self._call, client, iterate)


def _bind(call: Callable[..., Any], client: Client | AsyncClient, execute: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def method(*args: Any, **kwargs: Any) -> Any:
        started = call(client, *args, **kwargs)
        return started if client.is_async else execute(started)

    return method
