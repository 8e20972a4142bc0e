"""The command `mlg models compile`: installs models by building their artefacts from weights.

Found through the group in `model_commands.py`. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli.custom_model_options import CustomModelOptions, custom_model_options
from cli.options import environment, home_option
from provider_image.errors import CompilerMissing, MlgError, NotInstalled
from store.settings import HomeSettings

if TYPE_CHECKING:
    from provider_image.compiler.keras_weights import WeightsSources
    from provider_image.models.artefact import Artefact
    from provider_image.models.catalogue import ModelRow


@click.command("compile")
@home_option
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="Weights, or a folder of them under Keras' own file names. [MLG_WEIGHTS_DIR, then Keras' address]",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Models folder to write to. [the home's models]"
)
@click.option("--again", is_flag=True, help="Also if it is installed already.")
@click.option(
    "--f16-within",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Store weights as f16, half the size, if no probability differs by more than P. [0.0001]",
)
@click.argument("names", nargs=-1, required=True, metavar="MODEL|all...")
@custom_model_options
@click.pass_obj
def compile_models(
    group_home: Path | None,
    home: Path | None,
    weights: Path | None,
    out: Path | None,
    again: bool,
    f16_within: float | None,
    names: Sequence[str],
    custom: CustomModelOptions,
) -> None:
    """Install models: build their artefacts from their weights.

    Each artefact is compared with Keras before it is installed. Those of Keras need the extra [compile]
    (tensorflow), efficientnet_lite0 needs nothing.

    \b
    Example:
      mlg models compile efficientnet_lite0
      mlg models compile densenet121 resnet50
      mlg models compile all --weights ~/keras-weights
      mlg models compile my_pets --keras pets.keras --labels pets.txt
    """
    variables = environment(home=home or group_home)
    settings = HomeSettings.from_env(variables)
    from provider_image.compiler.keras_weights import WeightsSources
    from provider_image.models.catalogue import CATALOGUE, find_model

    if custom.is_given(names, weights):
        _compile_custom(custom, names[0], (out or settings.models).absolute(), f16_within)
        return
    is_all = [name.lower() for name in names] == ["all"]
    rows = list(CATALOGUE.values()) if is_all else [find_model(name) for name in names]
    if weights is not None and weights.is_file() and len(rows) > 1:
        raise click.UsageError("--weights FILE is for one model; for several give a folder.")
    sources = WeightsSources.from_env(variables, given=weights)
    failures = 0
    for row in rows:
        try:
            artefact = _build(row, (out or settings.models).absolute(), sources, again=again, f16_within=f16_within)
        except CompilerMissing:
            raise  # the same for all that follow
        except MlgError as error:
            if len(rows) == 1:
                raise
            click.echo(f"mlg: {row.name}: {error.reason}", err=True)
            failures += 1
        else:
            click.echo(_installed_message(artefact))
    if failures:
        raise NotInstalled(f"{failures} of {len(rows)} models were not installed; the lines above say why.")


def _build(row: ModelRow, models: Path, sources: WeightsSources, *, again: bool, f16_within: float | None) -> Artefact:
    steps = _StepReporter(row.name)
    try:
        if row.source == "keras":
            from provider_image.compiler import keras_applications
            from provider_image.compiler.keras_weights import find_weights
            from provider_image.precision import TOLERANCE

            steps.tell("looking for weights")
            weights = find_weights(row, sources, progress=steps.downloaded)
            if not weights.is_published:
                steps.note(f"{weights.path} is not the file that Keras publishes; the model is marked as `own`.")
            return keras_applications.build(
                models,
                row,
                weights,
                again=again,
                f16_within=TOLERANCE if f16_within is None else f16_within,
                on_step=steps.tell,
            )
        from provider_image.compiler import build

        return build(models, row, again=again, f16_within=f16_within)
    finally:
        steps.end()


def _compile_custom(options: CustomModelOptions, name: str, models: Path, f16_within: float | None) -> None:
    from provider_image.compiler.custom import CustomModel, build
    from provider_image.precision import TOLERANCE

    assert options.keras is not None and options.labels is not None
    custom = CustomModel(
        name=name,
        file=options.keras,
        labels=options.labels,
        preprocessing=options.preprocessing or "none",
        title=options.title,
        size=options.size,
    )
    steps = _StepReporter(name[:64])
    click.echo(
        _installed_message(
            build(models, custom, f16_within=TOLERANCE if f16_within is None else f16_within, on_step=steps.tell)
        )
    )


def _installed_message(artefact: Artefact) -> str:
    storage = artefact.storage
    other, change = ("f32", "without") if storage.kept == "f16" else ("f16", "with")
    other_bytes = storage.f32_bytes if storage.kept == "f16" else storage.f16_bytes
    return (
        f"{artefact.name} is installed in {artefact.folder} (digest {artefact.digest[:12]}, "
        f"{artefact.size_bytes / 1e6:.1f} MB as {storage.kept}; {other_bytes / 1e6:.1f} MB as {other}, "
        f"{change} f16 probabilities differ by up to {storage.largest_difference:.1g})"
    )


class _StepReporter:
    """Says on stderr what is being done to a model; a download's progress on one line that is written over."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started_at = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._last_percent = -1
        self._is_line_open = False

    def tell(self, step: str) -> None:
        """Say that a step begins."""
        self.end()
        click.echo(f"{self._name}: {step} ({time.monotonic() - self._started_at:.0f} s)", err=True)

    def note(self, text: str) -> None:
        """Say something that the operator should know."""
        self.end()
        click.echo(f"{self._name}: {text}", err=True)

    def downloaded(self, done: int, total: int) -> None:
        """Say how much of a download is there: every percent on a terminal, every tenth elsewhere."""
        percent = int(100 * done / total) if total else 0
        if total and percent // (1 if self._is_terminal else 10) == self._last_percent:
            return
        self._last_percent = percent // (1 if self._is_terminal else 10)
        amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB ({percent} %)" if total else f"{done / 1e6:.0f} MB"
        click.echo(f"{self._name}: downloading {amount}", err=True, nl=not self._is_terminal)
        if self._is_terminal:
            click.echo("\r", err=True, nl=False)
            self._is_line_open = True

    def end(self) -> None:
        """Finish the line that is written over."""
        if self._is_line_open:
            click.echo(err=True)
            self._is_line_open = False
