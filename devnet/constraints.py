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
from typing import Any

from devnet.errors import ApiError
from devnet.records import parse_decimal

#: Deeper nesting is an error or an attack.
MAX_DEPTH = 60

#: Tells whether properties satisfy what a node requires of another one.
Constraint = Callable[[Mapping[str, Any]], bool]

_ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"([^()=<>!&|\s][^()=<>]*?)\s*(>=|<=|=|>|<)([^()]*)")
_ESCAPE = re.compile(r"\\([0-9a-fA-F]{2})")


@functools.lru_cache(maxsize=512)
def parse(text: str) -> Constraint:
    """Parse a constraint. An empty one is always satisfied. :raises ApiError: with the position of the error."""
    parser = _Parser(text)
    if not parser.peek():
        return lambda properties: True
    constraint = parser.group(0)
    if parser.peek():
        raise parser.error("there is more after the last bracket")
    return constraint


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0

    def error(self, what: str) -> ApiError:
        near = self._text[self._position : self._position + 20]
        location = f"at character {self._position + 1}, before {near!r}" if near else "at its end"
        return ApiError(f"The constraint is wrong {location}: {what}.")

    def group(self, depth: int) -> Constraint:
        if depth > MAX_DEPTH:
            raise self.error(f"it is nested deeper than {MAX_DEPTH} brackets")
        self._expect("(")
        symbol = self.peek()
        parts: list[Constraint] = []
        if symbol == "!":
            self._position += 1
            parts = [self.group(depth + 1)]
        elif symbol in ("&", "|"):
            self._position += 1
            while self.peek() == "(":
                parts.append(self.group(depth + 1))
        elif symbol != ")":
            parts = [self._comparison()]
        self._expect(")")
        if symbol == "!":
            return lambda properties: not parts[0](properties)
        combine = any if symbol == "|" else all
        return lambda properties: combine(part(properties) for part in parts)

    def _comparison(self) -> Constraint:
        found = _COMPARISON.match(self._text, self._position)
        if found is None:
            raise self.error("a comparison such as golem.inf.mem.gib>=1 was expected")
        self._position = found.end()
        key, symbol, value = found[1], found[2], found[3].strip()
        if not value:
            raise self.error(f"there is nothing to compare {key} with")

        def compare(properties: Mapping[str, Any]) -> bool:
            if key not in properties:
                return False
            given = properties[key]
            items = given if isinstance(given, list | tuple) else [given]
            return (symbol, value) == ("=", "*") or any(_matches_item(item, symbol, value) for item in items)

        return compare

    def _expect(self, symbol: str) -> None:
        if self.peek() != symbol:
            raise self.error(f"{symbol!r} was expected")
        self._position += 1

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end."""
        while self._text[self._position : self._position + 1].isspace():
            self._position += 1
        return self._text[self._position : self._position + 1]


def _matches_item(item: object, symbol: str, wanted: str) -> bool:
    text = str(item).lower() if isinstance(item, bool) else str(item)
    if symbol == "=" and "*" in wanted:
        pieces = (re.escape(_unescape(piece)) for piece in wanted.split("*"))
        return re.fullmatch(".*".join(pieces), text, re.DOTALL) is not None
    wanted = _unescape(wanted)
    wanted_number, number = parse_decimal(wanted), None if isinstance(item, bool) else parse_decimal(text)
    if symbol == "=":
        return text == wanted or (wanted_number is not None and wanted_number == number)
    if wanted_number is not None and number is not None:
        return _ORDERINGS[symbol](number, wanted_number)
    return _ORDERINGS[symbol](text, wanted)


def _unescape(value: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), value)
