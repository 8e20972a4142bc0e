"""Operations: the I/O steps of a call, independent of whether they are executed with or without asyncio.

A call is a generator that yields operations (send a request, pause, read a line) and receives the outcome of each. So
every call is written once, in `calls.py`, and `Client` and `AsyncClient` differ only in how they execute operations.
`ClientMethod` and `ClientStream` turn such generators into methods, with types for both clients.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload

import httpx

if TYPE_CHECKING:
    from mlg_client import AsyncClient, Client

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """Send a request; the outcome is the response, read completely."""

    request: httpx.Request


@dataclass(frozen=True)
class Open:
    """Send a request; the outcome is the response, whose lines `ReadLine` reads. Only one is open at a time."""

    request: httpx.Request


@dataclass(frozen=True)
class ReadLine:
    """Read the next line of the open response; None at its end."""


@dataclass(frozen=True)
class Sleep:
    """Wait for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Gather:
    """Run several calls concurrently; the outcome is the list of their results, in the same order."""

    calls: Sequence[Callable[[], Steps[Any]]]


@dataclass(frozen=True)
class Yield:
    """Pass a value to the caller that iterates."""

    value: Any


@dataclass(frozen=True)
class Return:
    """The call has returned. Created only by `advance`, never yielded by a call."""

    value: Any


Operation = Send | Open | ReadLine | Sleep | Gather | Yield
Steps = Generator[Operation, Any, T]


def advance(steps: Steps[Any], outcome: Any, error: Exception | None) -> Operation | Return:
    """Resume a call with the outcome or the error of its operation, and return the next operation."""
    try:
        return steps.send(outcome) if error is None else steps.throw(error)
    except StopIteration as end:
        return Return(end.value)


class ClientMethod(Generic[P, T]):
    """A method that returns one value: directly in `Client`, with `await` in `AsyncClient`."""

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
        return self if client is None else _bind(self._steps, client, client._run)


class ClientStream(Generic[P, T]):
    """A method that yields values: with `for` in `Client`, with `async for` in `AsyncClient`.

    :param kind: type of the values, for the type checker only.
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
        return self if client is None else _bind(self._steps, client, client._iterate)


def client_stream(kind: type[T]) -> Callable[[Callable[Concatenate[Any, P], Steps[None]]], ClientStream[P, T]]:
    """Turn a generator into a `ClientStream`; a decorator."""
    return lambda steps: ClientStream(steps, kind)


def _bind(steps: Callable[..., Steps[Any]], client: Any, run: Callable[[Steps[Any]], Any]) -> Callable[..., Any]:
    @functools.wraps(steps)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(steps(client, *args, **kwargs))

    return call
