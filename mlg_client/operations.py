"""Operations: what a call wants done, one after the other, whoever does it.

A call is a generator that yields operations (send this, pause, read a line) and gets the outcome of each back. So every
call is written once, in `calls.py`, and `Client` and `AsyncClient` are two ways of doing the operations. `Call` and
`Stream` make methods of such generators, with types for both.
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
    """Send a request and get the response, read to its end."""

    request: httpx.Request


@dataclass(frozen=True)
class Open:
    """Send a request and get the response, whose lines are read one by one. One is open at a time."""

    request: httpx.Request


@dataclass(frozen=True)
class ReadLine:
    """Get the next line of the open response; None at its end."""


@dataclass(frozen=True)
class Pause:
    """Do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True)
class Gather:
    """Make several calls at once, and get their results in the same order."""

    calls: Sequence[Callable[[], Steps[Any]]]


@dataclass(frozen=True)
class Yield:
    """Give a value to whoever iterates."""

    value: Any


@dataclass(frozen=True)
class Return:
    """The call has returned. Never yielded by a call, only made by `advance`."""

    value: Any


Operation = Send | Open | ReadLine | Pause | Gather | Yield
Steps = Generator[Operation, Any, T]


def advance(steps: Steps[Any], outcome: Any, error: Exception | None) -> Operation | Return:
    """Give a call the outcome of its operation, or the error, and get the next operation."""
    try:
        return steps.send(outcome) if error is None else steps.throw(error)
    except StopIteration as end:
        return Return(end.value)


class Call(Generic[P, T]):
    """A method that returns one thing: plain at Client, awaited at AsyncClient."""

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


class Stream(Generic[P, T]):
    """A method that gives one thing after the other: iterated with `for`, or with `async for`.

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
        return self if client is None else _bind(self._steps, client, client._iterate)


def stream_of(kind: type[T]) -> Callable[[Callable[Concatenate[Any, P], Steps[None]]], Stream[P, T]]:
    """Make a `Stream` of a generator; a decorator."""
    return lambda steps: Stream(steps, kind)


def _bind(steps: Callable[..., Steps[Any]], client: Any, run: Callable[[Steps[Any]], Any]) -> Callable[..., Any]:
    @functools.wraps(steps)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(steps(client, *args, **kwargs))

    return call
