"""Settings are read as they are declared: variable, type, range, choices, and what depends on the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from provider_image.environment import Settings, home_setting, setting, without_secrets
from provider_image.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Example(Settings):
    folder: Path = home_setting("models")
    is_open: bool = setting("T_OPEN", False)
    port: int = setting("T_PORT", 5000, minimum=1, maximum=65535)
    seconds: float = setting("T_SECONDS", 1.5, minimum=0, maximum=10)
    mode: str = setting("T_MODE", "auto", choices=("auto", "on"))
    names: tuple[str, ...] = setting("T_NAMES", (), parse=lambda variable, text: (variable, *text.split(",")))
    workers: int = setting("T_WORKERS", 1, unset=lambda: 7, minimum=1, maximum=9)


def test_settings_that_are_not_set_have_their_defaults() -> None:
    read = _Example.from_env({"MLG_HOME": "/srv/mlg", "T_PORT": " "})

    assert read == _Example(folder=Path("/srv/mlg/models"), workers=7)


def test_settings_are_read_by_their_types() -> None:
    variables = {"T_OPEN": "yes", "T_PORT": "1", "T_SECONDS": "10", "T_MODE": "ON", "T_NAMES": "a,b", "T_WORKERS": "9"}

    read = _Example.from_env({"MLG_HOME": "/srv/mlg", **variables})

    assert read == _Example(
        folder=Path("/srv/mlg/models"),
        is_open=True,
        port=1,
        seconds=10.0,
        mode="on",
        names=("T_NAMES", "a", "b"),
        workers=9,
    )


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("T_OPEN", "maybe"),
        ("T_PORT", "0"),
        ("T_PORT", "1.5"),
        ("T_SECONDS", "nan"),
        ("T_MODE", "off"),
        ("T_WORKERS", "10"),
    ],
)
def test_a_value_that_cannot_be_used_names_its_variable(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        _Example.from_env({variable: text})


def test_a_folder_of_the_home_has_no_default() -> None:
    with pytest.raises(TypeError, match="folder"):
        _Example()


def test_secrets_are_left_out() -> None:
    variables = {"YAGNA_APPKEY": "x", "MLG_API_KEY": "x", "REGISTRY_TOKEN": "x", "MLG_HOME": "/home", "PATH": "/bin"}

    assert without_secrets(variables) == {"MLG_HOME": "/home", "PATH": "/bin"}
