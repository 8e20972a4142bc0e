"""The options of `mlg models compile` for a user's own classifier, and which of them go together.

Used by `compile_command.py`. Must not import the builder: the command line starts without it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True, kw_only=True)
class CustomModelOptions:
    """What was said of a user's own model; None where nothing was."""

    #: The saved model.
    keras: Path | None
    #: The names of its classes.
    labels: Path | None
    #: How pixel values become its input.
    preprocessing: str | None
    #: The name as people write it.
    title: str | None
    #: Height and width in pixels.
    size: tuple[int, int] | None

    def is_given(self, names: Sequence[str], weights: Path | None) -> bool:
        """Tell whether an own model is to be installed. :raises click.UsageError: options do not go together."""
        if self.keras is None:
            given = [name for name in ("labels", "preprocessing", "title", "size") if getattr(self, name) is not None]
            if given:
                raise click.UsageError(f"--{given[0]} is for a model of your own: name its file with --keras FILE.")
            return False
        if self.labels is None:
            raise click.UsageError("--keras FILE needs --labels FILE: a line for each class, in the model's order.")
        if weights is not None:
            raise click.UsageError("--weights is for the models of the catalogue; a --keras FILE holds its own.")
        if len(names) != 1 or names[0].lower() == "all":
            raise click.UsageError("--keras FILE makes one model. Give it one name, for example: my_pets")
        return True


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", value)
    if match is None:
        raise click.BadParameter("give height and width in pixels, for example 224x224")
    return int(match[1]), int(match[2])


_OPTIONS = (
    click.option(
        "--keras",
        type=click.Path(path_type=Path),
        metavar="FILE.keras",
        help="A classifier of your own, saved with Keras 3; MODEL is the name it gets. No code of the file is run.",
    ),
    click.option(
        "--labels",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="With --keras: a line for each class in the model's order, a name or an id, a tab and a name.",
    ),
    click.option(
        "--preprocessing",
        type=click.Choice(["none", "unit", "tf", "torch", "caffe"]),
        help="With --keras: what the model takes. none: 0 to 255 (it scales itself), unit: 0 to 1, tf: -1 to 1, "
        "torch, caffe: as keras.applications has them. [none]",
    ),
    click.option("--title", metavar="TEXT", help="With --keras: the name as people write it. [MODEL]"),
    click.option(
        "--size",
        metavar="HxW",
        callback=_size,
        help="With --keras: height and width of the input, only if the model leaves them open.",
    ),
)


def custom_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to a command, which gets them together as `custom`."""

    @functools.wraps(command)
    def with_custom(*arguments: Any, **options: Any) -> None:
        custom = CustomModelOptions(**{name: options.pop(name) for name in CustomModelOptions.__dataclass_fields__})
        command(*arguments, custom=custom, **options)

    wrapped: Callable[..., None] = with_custom
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
