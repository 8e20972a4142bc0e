"""The command `mlg models compile`: installs models by building their artefacts from weights.

Part of the group in `models.py`. Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import environment, file_option, home_option
from provider_image.errors import CompilerMissing, ConfigError, MlgError, NotInstalled
from provider_image.models.artefact import installed_digest
from provider_image.precision import REDUCED, TOLERANCE_BF16
from store.settings import HomeSettings

if TYPE_CHECKING:
    from provider_image.compiler.custom import CustomModel
    from provider_image.compiler.keras_weights import WeightsSources
    from provider_image.models.artefact import Artefact
    from provider_image.models.catalogue import ModelFacts


#: Options whose values have another name here.
_OPTIONS = {"takes": "input", "backend": "gpu"}
#: Service -> the builder of its models from Keras' weights, where it is another than that of classifiers.
_KERAS_BUILDERS = {"style_transfer": "provider_image.compiler.style.vgg19:build"}


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", value)
    if match is None:
        raise click.BadParameter("give height and width in pixels, for example 224x224")
    return int(match[1]), int(match[2])


@click.command("compile")
@home_option
@file_option(
    "--weights",
    "A weights file, or a folder of weights files with Keras' file names; for a vision transformer the folder that "
    "Hugging Face's library saved, or one that has it as the folder MODEL. [MLG_WEIGHTS_DIR; download from Keras]",
    metavar="FILE|DIR",
)
@file_option("--out", "Folder to write the artefacts to. [default: models in the home]", metavar="DIR")
@click.option("--again", is_flag=True, help="Build models again that are installed already.")
@click.option(
    "--f16-within",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Store weights as f16, half the size, if no result differs by more than P. [default: 0.0001]",
)
@click.option(
    "--precision",
    type=click.Choice(REDUCED),
    help="Install a copy of each classifier, MODEL_bf16 or MODEL_int8, that computes in this precision, if its answers "
    "are nearly those of f32. Needs --calibrate, and int8 the extra [quantise].",
)
@file_option(
    "--calibrate",
    "With --precision: photos such as the model is for, best 1,500 or more. int8 is calibrated with a quarter of them, "
    "at most 300; the others judge the copy.",
    metavar="FOLDER",
)
@click.option(
    "--within",
    type=click.FloatRange(0, 1),
    metavar="P",
    help=f"With --precision: the most that a probability may differ on a photo. [default: {TOLERANCE_BF16:g}]",
)
@click.argument("names", nargs=-1, required=True, metavar="MODEL|all...")
@file_option(
    "--keras",
    "Install a custom classifier, saved with Keras 3, as MODEL. No code in the file is executed.",
    metavar="FILE.keras",
)
@file_option(
    "--onnx",
    "Install a custom model, saved as ONNX, as MODEL. Needs the extra [onnx].",
    metavar="FILE.onnx",
)
@file_option(
    "--huggingface",
    "Install a custom classifier as MODEL: a ViT, DeiT or BEiT in a folder that Hugging Face's library saved, with "
    "config.json, model.safetensors and preprocessor_config.json.",
    metavar="FOLDER",
)
@file_option(
    "--labels",
    "With --keras or --onnx: one line per class in the model's order: a name, or an id, a tab and a name. With "
    "--huggingface: in place of the names in config.json. With a model of the list: other names for its classes, as in "
    "mlg models labels.",
)
@click.option(
    "--preprocessing",
    type=click.Choice(["none", "unit", "tf", "torch", "caffe"]),
    help="With a custom model: pixel values that it expects. none: 0 to 255 (it scales them itself), unit: 0 to 1, "
    "tf: -1 to 1, torch, caffe: as in keras.applications. [default: what file or folder state, or none]",
)
@click.option("--title", metavar="TEXT", help="With a custom model: the name for people. [default: MODEL]")
@click.option(
    "--size",
    metavar="HxW",
    callback=_size,
    help="With --keras or --onnx: height and width of the input, if the model does not fix them.",
)
@click.option(
    "--returns",
    type=click.Choice(["probabilities", "logits", "none", "unit", "tf"]),
    help="With --keras or --onnx: what the model returns; a softmax is added to logits. With --service image_to_image: "
    "the range of its values, named as in --preprocessing. [default: found out]",
)
@click.option(
    "--channels",
    type=click.Choice(["rgb", "bgr"]),
    help="With --onnx: order of the channels that the model expects. [default: what the file states, or rgb]",
)
@click.option(
    "--service",
    type=click.Choice(["classification", "embedding", "face_detection", "image_to_image"]),
    help="With --onnx, or with --keras for image_to_image: what the model does. embedding: it returns a vector; "
    "face_detection: it has the outputs of a YuNet, or of an SSD with decoded boxes; image_to_image: it returns an RGB "
    "image of the same size, or enlarged by a whole number. [default: classification]",
)
@click.option(
    "--gpu",
    "backend",
    flag_value="onnxruntime",
    help="With --onnx: install the model for onnxruntime, which runs on a GPU with MLG_DEVICE=cuda:0, else on the "
    "processor. [default: for OpenVINO, on the processor]",
)
@click.option(
    "--input",
    "takes",
    type=click.Choice(["image", "face"]),
    help="With a custom model: face if it is for images of one face, which the pipeline `faces` cuts out. "
    "[default: image]",
)
def compile_models(
    weights: Path | None,
    out: Path | None,
    again: bool,
    f16_within: float | None,
    precision: str | None,
    calibrate: Path | None,
    within: float | None,
    names: Sequence[str],
    labels: Path | None,
    **custom: Any,
) -> None:
    """Install models. Builds their artefacts from their weights.

    Models of Keras need the extra [compile] (tensorflow), and each artefact is compared with Keras before it is
    installed. efficientnet_lite0 and texture need neither an extra nor a download. Vision transformers need no extra,
    but the folder of their weights. `all` are all models of the catalogue, without embeddings, and without vision
    transformers whose folder is not there.

    With --precision, a copy of an installed classifier is installed beside it, which is quicker on many processors. It
    is judged with your photos: on at least 99 % of them its first label must be that of the model, and no probability
    may differ by more than --within. Otherwise it is not installed, and the figures are shown. With
    MLG_PRECISION=fastest workers take the quickest; MODEL_int8 can also be named in requests. Photos are not stored.

    MODEL_embedding is the model without its last layer, which returns a vector. It is built from the installed model;
    one of the catalogue that is not installed yet is compiled before.

    \b
    Example:
      mlg models compile efficientnet_lite0
      mlg models compile densenet121 resnet50
      mlg models compile style_vgg19
      mlg models compile all --weights ~/keras-weights
      mlg models compile my_pets --keras pets.keras --labels pets.txt
      mlg models compile arcface --onnx arcface.onnx --service embedding --input face
      mlg models compile my_style --onnx style.onnx --service image_to_image
      mlg models compile my_cars --onnx cars.onnx --labels cars.txt --preprocessing torch
      mlg models compile vit_base_patch16_224 --weights ~/vit-base-patch16-224
      mlg models compile my_birds --huggingface ~/vit-birds
      mlg models compile resnet50 --labels german.tsv
      mlg models compile my_pets_embedding
      mlg models compile my_pets --precision int8 --calibrate photos/
    """
    variables = environment()
    settings = HomeSettings.from_env(variables)
    from provider_image.compiler.keras_weights import WeightsSources
    from provider_image.models.catalogue import CATALOGUE
    from provider_image.models.registry import find_row

    models = (out or settings.models).absolute()
    reducing = _reducing(precision, calibrate, within)
    if reducing is not None and (labels is not None or f16_within is not None or any(custom.values())):
        raise click.UsageError("--precision is for an installed model: build that first, without --precision.")
    custom_model = _custom_model(names, weights, labels=labels, **custom)
    if custom_model is not None:
        from store.pipelines.folder import PipelineFolder

        if PipelineFolder(settings.home, models).has(custom_model.name):
            raise ConfigError(f"There is a pipeline {custom_model.name}. Choose another name for the model.")
        click.echo(installed_message(_build_custom(custom_model, models, f16_within)))
        return
    is_all = [name.lower() for name in names] == ["all"]
    rows: list[ModelFacts] = [row for row in CATALOGUE.values() if row.base is None]
    if not is_all:
        rows = [find_row(models, name) for name in names]
    if weights is not None and weights.is_file() and len(rows) > 1:
        raise click.UsageError("--weights FILE is for one model; for several give a folder.")
    if labels is not None and len(rows) > 1:
        raise click.UsageError("--labels FILE is for one model.")
    sources = WeightsSources.from_env(variables, given=weights)
    if is_all and reducing is not None:
        rows = [row for row in rows if row.service == "classification" and installed_digest(models, row.name)]
    elif is_all:
        rows = _without_absent(rows, sources)
    failures = 0
    for row in rows:
        try:
            if reducing is None:
                artefact = _build(row, models, sources, again=again, f16_within=f16_within)
            else:
                artefact = _build_copy(row, models, sources, *reducing)
            if labels is not None:
                from provider_image.compiler.class_names import replace_names

                artefact = replace_names(models, row.name, labels)
        except CompilerMissing:
            raise  # the other models would fail in the same way
        except MlgError as error:
            if len(rows) == 1:
                raise
            click.echo(f"mlg: {row.name}: {error.reason}", err=True)
            failures += 1
        else:
            click.echo(installed_message(artefact))
    if failures:
        raise NotInstalled(f"{failures} of {len(rows)} models were not installed; see the lines above.")


def _build(
    row: ModelFacts, models: Path, sources: WeightsSources, *, again: bool, f16_within: float | None
) -> Artefact:
    from provider_image.compiler import build, can_build_now, confined
    from provider_image.models.catalogue import CATALOGUE, ModelRow, install_command
    from provider_image.precision import TOLERANCE

    within = TOLERANCE if f16_within is None else f16_within
    if row.base is not None and not can_build_now(row):
        classifier = CATALOGUE.get(row.base)
        is_given = again or sources.given is not None
        if classifier is not None and (is_given or installed_digest(models, classifier.name) is None):
            click.echo(installed_message(_build(classifier, models, sources, again=again, f16_within=f16_within)))
        return confined.build(
            "provider_image.compiler.embedding:build",
            models,
            row.name,
            row.base,
            f16_within=within,
            on_step=_StepReporter(row.name).begin,
        )
    if not isinstance(row, ModelRow):
        raise ConfigError(f"{row.name} is a custom model, which is built from its file: {install_command(row.name)}")
    steps = _StepReporter(row.name)
    try:
        if row.transformer is not None:
            from provider_image.compiler.keras_weights import find_folder

            return confined.build(
                "provider_image.compiler.transformers.builder:build",
                models,
                row.name,
                row,
                find_folder(row, sources),
                again=again,
                f16_within=within,
                on_step=steps.begin,
            )
        if row.weights is not None:
            from provider_image.compiler.keras_weights import find_weights

            steps.begin("looking for weights")
            weights = find_weights(row, sources, progress=steps.downloaded)
            if not weights.is_published:
                steps.note(f"{weights.path} is not the file that Keras publishes; the model is listed as `own`.")
            return confined.build(
                _KERAS_BUILDERS.get(row.service, "provider_image.compiler.keras_applications:build"),
                models,
                row.name,
                row,
                weights,
                again=again,
                f16_within=within,
                on_step=steps.begin,
            )
        return build(models, row, again=again, f16_within=f16_within)
    finally:
        steps.end()


def _reducing(precision: str | None, calibrate: Path | None, within: float | None) -> tuple[str, Path, float] | None:
    """Return precision, photos and bound of the copies to build, None for other builds. :raises click.UsageError:"""
    if precision is None:
        if calibrate is not None or within is not None:
            raise click.UsageError("--calibrate and --within are for --precision.")
        return None
    if calibrate is None:
        raise click.UsageError("--precision needs --calibrate FOLDER: photos such as the model is for.")
    return precision, calibrate, TOLERANCE_BF16 if within is None else within


def _build_copy(
    row: ModelFacts, models: Path, sources: WeightsSources, precision: str, photos: Path, bound: float
) -> Artefact:
    """Build the copy of a model in another precision; a model of the catalogue that is not installed is built first."""
    from provider_image.compiler import confined
    from provider_image.models.catalogue import ModelRow
    from provider_image.models.quickest import copy_name

    if isinstance(row, ModelRow) and installed_digest(models, row.name) is None:
        click.echo(installed_message(_build(row, models, sources, again=False, f16_within=None)))
    name = copy_name(row.name, precision)
    return confined.build(
        "provider_image.compiler.reduced.builder:build",
        models,
        name,
        row.name,
        precision,
        photos.absolute(),
        bound=bound,
        on_step=_StepReporter(name).begin,
    )


def _without_absent(rows: Sequence[ModelFacts], sources: WeightsSources) -> list[ModelFacts]:
    """Leave out the vision transformers whose folders are not there, and say so."""
    from provider_image.compiler.keras_weights import has_folder

    absent = [row.name for row in rows if row.source == "folder" and not has_folder(row, sources)]
    if absent:
        click.echo(
            f"mlg: left out, because their weights are in no folder of these names in --weights or MLG_WEIGHTS_DIR: "
            f"{', '.join(absent)}",
            err=True,
        )
    return [row for row in rows if row.name not in absent]


def _custom_model(
    names: Sequence[str],
    weights: Path | None,
    *,
    keras: Path | None,
    onnx: Path | None,
    huggingface: Path | None,
    labels: Path | None,
    **more: Any,
) -> CustomModel | None:
    """Return the custom model that the options describe, if any. :raises click.UsageError: they do not fit."""
    given = {name: value for name, value in more.items() if value is not None}
    files = {"keras": keras, "onnx": onnx, "huggingface": huggingface}
    kinds = [kind for kind, file in files.items() if file is not None]
    if not kinds:
        if given:
            name = next(iter(given))
            raise click.UsageError(
                f"--{_OPTIONS.get(name, name)} is for custom models: give one with --keras FILE, --onnx FILE or "
                "--huggingface FOLDER."
            )
        return None
    if len(kinds) > 1:
        raise click.UsageError(f"--{kinds[0]} and --{kinds[1]} exclude each other: a model has one file.")
    kind, what = kinds[0], "FOLDER" if kinds == ["huggingface"] else "FILE"
    if "channels" in given and kind != "onnx":
        raise click.UsageError("--channels is for --onnx FILE: other models take RGB.")
    if "backend" in given and kind != "onnx":
        raise click.UsageError("--gpu is for --onnx FILE: other models run on the processor.")
    service = given.get("service", "classification")
    if service in ("embedding", "face_detection") and (kind != "onnx" or "returns" in given):
        what = "--returns" if kind == "onnx" else f"--{kind}"
        raise click.UsageError(f"--service {service} is for --onnx FILE, and {what} is not for it.")
    fixed = sorted({"size", "returns"} & given.keys()) if kind == "huggingface" else []
    if fixed:
        raise click.UsageError(f"--{fixed[0]} is not for --huggingface FOLDER: its config.json fixes that.")
    if given.get("preprocessing") == "caffe" and kind == "huggingface":
        raise click.UsageError("--preprocessing caffe is not for --huggingface FOLDER, whose models take RGB.")
    if service != "classification" and (kind == "huggingface" or labels is not None):
        what = "--huggingface FOLDER" if kind == "huggingface" else "--labels FILE"
        raise click.UsageError(f"{what} is for classifiers, not for --service {service}.")
    if labels is None and kind != "huggingface" and service == "classification":
        raise click.UsageError(f"--{kind} FILE needs --labels FILE: one line per class, in the model's order.")
    if weights is not None:
        raise click.UsageError(f"--weights is for models of the catalogue; --{kind} {what} contains its weights.")
    if len(names) != 1 or names[0].lower() == "all":
        raise click.UsageError(f"--{kind} {what} installs one model. Give it one name, for example: my_pets")
    from provider_image.compiler.custom import CustomModel

    takes_faces = given.pop("takes", "image") == "face"
    file = files[kind]
    assert file is not None
    weights_folder = None if onnx is None else onnx.parent
    return CustomModel(
        name=names[0],
        file=file,
        kind=kind,
        labels=labels,
        weights_folder=weights_folder,
        takes_faces=takes_faces,
        **given,
    )


def _build_custom(custom: CustomModel, models: Path, f16_within: float | None) -> Artefact:
    from provider_image.compiler import confined
    from provider_image.compiler.custom import BUILDERS, IMAGE_BUILDERS, IMAGE_SERVICE
    from provider_image.precision import TOLERANCE

    return confined.build(
        (IMAGE_BUILDERS if custom.service == IMAGE_SERVICE else BUILDERS)[custom.kind],
        models,
        custom.name,
        custom,
        f16_within=TOLERANCE if f16_within is None else f16_within,
        on_step=_StepReporter(custom.name[:64]).begin,
    )


def installed_message(artefact: Artefact) -> str:
    """Say what was installed where."""
    storage, kept = artefact.storage, artefact.precision
    facts = f"digest {artefact.digest[:12]}, {artefact.size_bytes / 1e6:.1f} MB as {kept}"
    if artefact.dimensions:
        facts = f"a vector of {artefact.dimensions} values, {facts}"
    if storage is not None:  # None for the embedding of a model that has f16, and for other backends
        other, change = ("f32", "without") if kept == "f16" else ("f16", "with")
        other_bytes = storage.f32_bytes if kept == "f16" else storage.f16_bytes
        facts += f"; {other_bytes / 1e6:.1f} MB as {other}, "
        facts += f"{change} f16 results differ by up to {storage.largest_difference:.1g}"
    if artefact.reduced is not None:
        facts += f"; {artefact.reduced.figures}"
    if artefact.backend != "openvino":
        facts += f", runs on {artefact.backend}"
    return f"{artefact.name} is installed in {artefact.folder} ({facts})"


class _StepReporter:
    """Reports the steps of one model's build on stderr, a download on one line that is rewritten."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started_at = time.monotonic()
        self._is_terminal = sys.stderr.isatty()
        self._last_percent = -1
        self._is_line_open = False

    def begin(self, step: str) -> None:
        """Report that a step begins."""
        self.end()
        click.echo(f"{self._name}: {step} ({time.monotonic() - self._started_at:.0f} s)", err=True)

    def note(self, text: str) -> None:
        """Report something that the operator should know."""
        self.end()
        click.echo(f"{self._name}: {text}", err=True)

    def downloaded(self, done: int, total: int) -> None:
        """Report the progress of a download: every percent on a terminal, every ten percent elsewhere."""
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
        """End the line that is rewritten."""
        if self._is_line_open:
            click.echo(err=True)
            self._is_line_open = False
