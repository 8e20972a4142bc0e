"""Typed settings from environment variables; the error for a bad value names its variable.

A package declares its settings as a dataclass whose fields are made by `setting` and `home_setting`; the commands read
it once with `from_env`. Nothing else reads `os.environ`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Self

from provider_image.errors import ConfigError

#: Variables that give access to money or to accounts.
_SECRETS = frozenset(
    {"YAGNA_APPKEY", "YAGNA_AUTOCONF_APPKEY", "MLG_API_KEY", "MLG_TELEGRAM_TOKEN", "REGISTRY_USER", "REGISTRY_TOKEN"}
)
_TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
_FALSE_WORDS = frozenset({"0", "false", "no", "off", ""})


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a process that reads bytes of strangers, who might take control of it."""
    return {name: value for name, value in variables.items() if name not in _SECRETS}


class Environment:
    """Environment variables, read by type."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

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


def setting(
    variable: str,
    default: Any,
    *,
    minimum: float = 0,
    maximum: float = 0,
    choices: tuple[str, ...] = (),
    parse: Callable[[str, str], Any] | None = None,
    unset: Callable[[], Any] | None = None,
) -> Any:
    """Declare a field of Settings that an environment variable sets; it is read as what its default is.

    :param minimum: with `maximum`, the range of a number.
    :param choices: the texts that are allowed.
    :param parse: reads the variable's name and text, if it is of another type.
    :param unset: returns the value if the variable is not set, where that depends on the machine.
    """

    def read(env: Environment) -> Any:
        value = default if unset is None else unset()
        if parse is not None:
            text = env.text(variable, "")
            return parse(variable, text) if text else value
        if isinstance(value, bool):
            return env.boolean(variable, value)
        if isinstance(value, int):
            return env.integer(variable, value, minimum=int(minimum), maximum=int(maximum))
        if isinstance(value, float):
            return env.number(variable, value, minimum=minimum, maximum=maximum)
        return env.choice(variable, value, choices) if choices else env.text(variable, value)

    return field(default=default, metadata={"variable": variable, "read": read})


def home_setting(folder: str = "") -> Any:
    """Declare a field of Settings with the home, or a folder in it; it has no default."""
    return field(metadata={"variable": "MLG_HOME", "read": lambda env: env.path("MLG_HOME", "~/.mlg") / folder})


class Settings:
    """A dataclass whose fields are declared by `setting` and `home_setting`."""

    @classmethod
    def from_env(cls, variables: Mapping[str, str]) -> Self:
        """Read the settings. :raises ConfigError: a value cannot be used; names the variable."""
        env = Environment(variables)
        return cls(**{one.name: one.metadata["read"](env) for one in fields(cls)})  # type: ignore[arg-type]
