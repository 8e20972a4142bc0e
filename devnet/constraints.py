"""The constraint language of demands and offers: LDAP filters, as Golem uses them.

    (&(golem.runtime.name=mlg)(|(golem.inf.cpu.cores>=2)(golem.inf.mem.gib>4))(!(golem.node.id.name=b*)))

A constraint is parsed once and then matched against many sets of properties. Two numbers are compared as numbers, all
else as text; a list matches if one of its items does. A missing property matches no comparison, so its negation is
true: the real market calls that undefined.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from provider_image.errors import MlgError

#: Deeper nesting is an error or an attack.
MAX_DEPTH = 60

_ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"([^()=<>!&|\s][^()=<>]*?)\s*(>=|<=|=|>|<)([^()]*)")
_ESCAPE = re.compile(r"\\([0-9a-fA-F]{2})")


class BadConstraint(MlgError):
    """The constraint does not have the form (&(golem.runtime.name=vm)(golem.inf.mem.gib>=1))."""

    permanent = True


class Constraint(Protocol):
    """What a node requires of another node's properties."""

    def matches(self, properties: Mapping[str, Any]) -> bool:
        """Return whether the properties satisfy the constraint."""


@dataclass(frozen=True)
class _All:
    parts: tuple[Constraint, ...]

    def matches(self, properties: Mapping[str, Any]) -> bool:
        return all(part.matches(properties) for part in self.parts)


@dataclass(frozen=True)
class _Any:
    parts: tuple[Constraint, ...]

    def matches(self, properties: Mapping[str, Any]) -> bool:
        return any(part.matches(properties) for part in self.parts)


@dataclass(frozen=True)
class _Not:
    part: Constraint

    def matches(self, properties: Mapping[str, Any]) -> bool:
        return not self.part.matches(properties)


@dataclass(frozen=True)
class _Comparison:
    key: str
    symbol: str
    value: str

    def matches(self, properties: Mapping[str, Any]) -> bool:
        if self.key not in properties:
            return False
        actual = properties[self.key]
        items = actual if isinstance(actual, list | tuple) else [actual]
        if self.symbol == "=" and self.value == "*":
            return True
        return any(self._matches_item(item) for item in items)

    def _matches_item(self, item: object) -> bool:
        text = _text(item)
        if self.symbol == "=" and "*" in self.value:
            pieces = (re.escape(_unescape(piece)) for piece in self.value.split("*"))
            return re.fullmatch(".*".join(pieces), text, re.DOTALL) is not None
        value = _unescape(self.value)
        wanted, given = _number(value), None if isinstance(item, bool) else _number(text)
        if self.symbol == "=":
            return text == value or (wanted is not None and wanted == given)
        if wanted is not None and given is not None:
            return _ORDERINGS[self.symbol](given, wanted)
        return _ORDERINGS[self.symbol](text, value)


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Constraint:
    """Parse a constraint. An empty one is always satisfied.

    :raises BadConstraint: with the position of the error.
    """
    parser = _Parser(text)
    if parser.is_at_end():
        return _All(())
    constraint = parser.group(0)
    if not parser.is_at_end():
        raise parser.error("there is more after the last bracket")
    return constraint


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def is_at_end(self) -> bool:
        self._skip_space()
        return self._position >= len(self._text)

    def error(self, what: str) -> BadConstraint:
        near = self._text[self._position : self._position + 20]
        location = f"at character {self._position + 1}, before {near!r}" if near else "at its end"
        return BadConstraint(f"The constraint is wrong {location}: {what}.")

    def group(self, depth: int) -> Constraint:
        if depth > MAX_DEPTH:
            raise self.error(f"it is nested deeper than {MAX_DEPTH} brackets")
        self._expect("(")
        symbol = self._peek()
        constraint: Constraint
        if symbol == ")":
            constraint = _All(())
        elif symbol in ("&", "|"):
            self._position += 1
            parts = []
            while self._peek() == "(":
                parts.append(self.group(depth + 1))
            constraint = _All(tuple(parts)) if symbol == "&" else _Any(tuple(parts))
        elif symbol == "!":
            self._position += 1
            constraint = _Not(self.group(depth + 1))
        else:
            constraint = self._comparison()
        self._expect(")")
        return constraint

    def _comparison(self) -> Constraint:
        found = _COMPARISON.match(self._text, self._position)
        if found is None:
            raise self.error("a comparison such as golem.inf.mem.gib>=1 was expected")
        key, symbol, value = found[1], found[2], found[3].strip()
        if not value:
            self._position = found.end()
            raise self.error(f"there is nothing to compare {key} with")
        self._position = found.end()
        return _Comparison(key, symbol, value)

    def _expect(self, symbol: str) -> None:
        if self._peek() != symbol:
            raise self.error(f"{symbol!r} was expected")
        self._position += 1

    def _peek(self) -> str:
        self._skip_space()
        return self._text[self._position : self._position + 1]

    def _skip_space(self) -> None:
        while self._position < len(self._text) and self._text[self._position].isspace():
            self._position += 1


def _text(item: object) -> str:
    if isinstance(item, bool):
        return "true" if item else "false"
    return str(item)


def _unescape(value: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), value)


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
