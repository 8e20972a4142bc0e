"""The features of a table row: standardised numbers, marks for missing ones, and one mark for each category.

Used by the service `table` and by `trainer/tables.py`, which learns the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from provider_image.errors import NotARow
from provider_image.features.normal_form import normalise
from provider_image.rows import Value

if TYPE_CHECKING:
    import numpy as np

#: Most columns of a table, and most features of a row.
MAX_COLUMNS = 1000
MAX_FEATURES = 20_000
#: Longest name of a column and longest category, in characters; a longer category counts as an unknown one.
MAX_NAME_LENGTH = 100
MAX_CATEGORY_LENGTH = 200
#: Words for a missing value, in lower case.
MISSING = frozenset(("", "na", "n/a", "nan", "null", "?"))
#: A number that is further from the mean, in deviations, is refused: sums could not be computed with it.
MAX_DEVIATIONS = 1e9


@dataclass(frozen=True, kw_only=True)
class NumberColumn:
    """A column of numbers: its feature is (number - mean) / deviation, 0 where there is none."""

    name: str
    mean: float
    #: Standard deviation; 1 if all numbers are equal.
    deviation: float
    #: True if there is one more feature: 1 where the number is missing, else 0.
    marks_missing: bool

    def is_valid(self) -> bool:
        """Tell whether features can be computed with it."""
        return math.isfinite(self.mean) and math.isfinite(self.deviation) and self.deviation > 0


@dataclass(frozen=True, kw_only=True)
class CategoryColumn:
    """A column of categories: its features are 1 for the row's category, 0 for all others."""

    name: str
    #: Each has a feature, in this order; "" is a missing value.
    categories: tuple[str, ...]
    #: True if there is one more feature, for all other categories; otherwise such a row has only zeros.
    has_other: bool

    def is_valid(self) -> bool:
        """Tell whether features can be computed with it."""
        return all(isinstance(one, str) for one in self.categories) and len(set(self.categories)) == len(
            self.categories
        )


Column = NumberColumn | CategoryColumn


class TableFeatures:
    """The features of the rows of one table.

    In this order: each number, the marks for missing numbers, the categories of each column and its mark for others.

    :raises ValueError: a column is invalid, or there are too many features.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        self._numbers = [one for one in self.columns if isinstance(one, NumberColumn)]
        self._categories = [one for one in self.columns if isinstance(one, CategoryColumn)]
        #: Number of features.
        self.count = len(self._numbers) + sum(one.marks_missing for one in self._numbers)
        #: Of each column of categories: place of its first feature, category -> place, or that of others.
        self._places: list[tuple[str, dict[str, int], int | None]] = []
        for one in self._categories:
            places = {category: self.count + number for number, category in enumerate(one.categories)}
            self.count += len(places) + one.has_other
            self._places.append((one.name, places, self.count - 1 if one.has_other else None))
        names = [one.name for one in self.columns]
        if not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable() for name in names):
            raise ValueError(f"the name of a column has 1 to {MAX_NAME_LENGTH} characters and no control characters")
        if not 0 < len(names) <= MAX_COLUMNS or len(set(names)) != len(names):
            raise ValueError(f"a table has 1 to {MAX_COLUMNS} columns, each with its own name")
        if not 0 < self.count <= MAX_FEATURES:
            raise ValueError(f"a row has 1 to {MAX_FEATURES} features")
        if not all(one.is_valid() for one in self.columns):
            raise ValueError("a column has numbers that are not finite, or a category twice")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns, in their order."""
        return tuple(one.name for one in self.columns)

    def vector(self, row: Mapping[str, Value]) -> np.ndarray[Any, Any]:
        """Compute the features of a row that has these columns.

        :return: f64, shape (count,).
        :raises NotARow: a value does not fit its column.
        """
        import numpy as np

        vector = np.zeros(self.count)
        mark = len(self._numbers)
        for place, one in enumerate(self._numbers):
            number = to_number(one.name, row[one.name])
            if number is not None:
                vector[place] = (number - one.mean) / one.deviation
                if not abs(vector[place]) <= MAX_DEVIATIONS:
                    raise NotARow(f"The number in the column {one.name!r} is too far from those of the training data.")
            if one.marks_missing:
                vector[mark] = number is None
                mark += 1
        for name, places, other in self._places:
            found = places.get(to_category(row[name]), other)
            if found is not None:
                vector[found] = 1.0
        return vector

    def to_json(self) -> dict[str, Any]:
        """Describe the features as JSON."""
        kinds = {NumberColumn: "number", CategoryColumn: "category"}
        return {"kind": "table", "columns": [{"kind": kinds[type(one)], **asdict(one)} for one in self.columns]}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> TableFeatures:
        """Read what `to_json` returned, without its kind. :raises ValueError, KeyError, TypeError, AttributeError:"""
        return cls([_column(dict(one)) for one in facts["columns"][: MAX_COLUMNS + 1]])


def _column(facts: dict[str, Any]) -> Column:
    kind = facts.pop("kind")
    if kind == "number":
        numbers = {name: float(facts.pop(name)) for name in ("mean", "deviation")}
        return NumberColumn(**facts | numbers | {"marks_missing": bool(facts["marks_missing"])})
    if kind == "category":
        return CategoryColumn(
            name=facts["name"], categories=tuple(facts["categories"]), has_other=bool(facts["has_other"])
        )
    raise ValueError(f"there is no kind of column {str(kind)[:20]!r}")


def is_missing(value: Value) -> bool:
    """Tell whether a value stands for a missing one."""
    return value is None or (isinstance(value, str) and value.strip().lower() in MISSING)


def to_number(name: str, value: Value) -> float | None:
    """Read the value of a column of numbers; text may be a number, as from a CSV.

    :return: None if it is missing: null, or a text in MISSING.
    :raises NotARow: it is no finite number.
    """
    if is_missing(value):
        return None
    try:
        number = math.nan if value is None or isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise NotARow(f"The column {name!r} takes a number or null, not {str(value)[:40]!r}.")
    return number


def to_category(value: Value) -> str:
    """Read the value of a column of categories, in normal form C.

    :return: "" if it is missing; 3 and 3.0 are the category 3, and True of a CSV is the true of JSON.
    """
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = normalise(value).strip() if isinstance(value, str) else str(value)
    return text.lower() if text.lower() in ("true", "false") else text
