"""Typed settings from environment variables; the error for a bad value names its variable.

Used by the `from_env` of each package's settings, which the commands call once. Nothing else reads `os.environ`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from provider_image.errors import ConfigError

_TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
_FALSE_WORDS = frozenset({"0", "false", "no", "off", ""})

Record = TypeVar("Record")


def setting(variable: str, default: Any, **limits: Any) -> Any:
    """Declare a field of a settings record, which `Environment.record` reads.

    :param limits: what the method of `Environment` for the default's type takes.
    """
    import dataclasses  # here, because this module is imported for every chunk

    return dataclasses.field(default=default, metadata={"variable": variable, "limits": limits})


class Environment:
    """Environment variables, read by type."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def record(self, kind: type[Record], **given: Any) -> Record:
        """Read a settings record: the fields that `setting` declared; `given` has the others.

        :raises ConfigError: a value cannot be used.
        """
        import dataclasses

        readers: dict[object, Callable[..., Any]] = {bool: self.boolean, int: self.integer, float: self.number}
        for each in dataclasses.fields(kind):  # type: ignore[arg-type]
            if each.name not in given and "variable" in each.metadata:
                limits = each.metadata["limits"]
                read = readers.get(type(each.default), self.choice if limits else self.text)
                given[each.name] = read(each.metadata["variable"], each.default, **limits)
        return kind(**given)

    def text(self, name: str, default: str) -> str:
        """Return a text; an empty value counts as unset."""
        return self._variables.get(name, "").strip() or default

    def path(self, name: str, default: str) -> Path:
        """Return an absolute path; `~` is the user's home."""
        return Path(self.text(name, default)).expanduser().absolute()

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """Return one of the choices, in lower case. :raises ConfigError: another value."""
        value = self.text(name, default).lower()
        if value not in choices:
            raise ConfigError(f"{name}={value!r} is unknown. Use one of: {', '.join(choices)}.")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """Return a boolean. :raises ConfigError: neither yes nor no."""
        value = self._variables.get(name)
        if value is None:
            return default
        if value.strip().lower() in _TRUE_WORDS:
            return True
        if value.strip().lower() in _FALSE_WORDS:
            return False
        raise ConfigError(f"{name}={value!r} is neither yes nor no. Use 1 or 0.")

    def integer(self, name: str, default: int, *, minimum: int, maximum: int) -> int:
        """Return a whole number in a range, both ends included. :raises ConfigError: another value."""
        text = self.text(name, str(default))
        try:
            value = int(text)
        except ValueError as error:
            raise ConfigError(f"{name}={text!r} is not a whole number.") from error
        if not minimum <= value <= maximum:
            raise ConfigError(f"{name}={value} is out of range: {minimum} to {maximum}.")
        return value

    def number(self, name: str, default: float, *, minimum: float, maximum: float) -> float:
        """Return a number in a range, both ends included. :raises ConfigError: another value."""
        text = self.text(name, repr(default))
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(f"{name}={text!r} is not a number.") from error
        if not minimum <= value <= maximum:  # also refuses nan
            raise ConfigError(f"{name}={text} is out of range: {minimum:g} to {maximum:g}.")
        return value
