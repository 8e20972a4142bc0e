"""A folder as Hugging Face's library saves a model: what its network is, its classes, and how it takes images.

Called by `builder.py`. Everything is read from JSON, with limits; what this version does not compute is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from provider_image.compiler.keras_graph import TORCH_DEVIATIONS, TORCH_MEANS
from provider_image.compiler.labels import MAX_LABELS, check_labels, imagenet_labels
from provider_image.errors import UnsuitableModel, WeightsMismatch, WeightsMissing
from provider_image.models.catalogue import ModelRow

_T = TypeVar("_T")

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_MAX_BYTES = 8 * 1024 * 1024
_MODEL_TYPES = ("vit", "deit", "beit")
#: Facts of config.json -> (what the library takes where they are left out, the most that is allowed).
_NUMBERS = {
    "num_hidden_layers": (12, 100),
    "num_attention_heads": (12, 256),
    "hidden_size": (768, 8192),
    "intermediate_size": (3072, 32768),
    "image_size": (224, 2048),
    "patch_size": (16, 2048),
}
#: Most patches of an image: the scores of a layer have this many squared for each head.
_MAX_PATCHES = 4096
#: What config.json must state, if it states it: for all, and for BEiT.
_STRUCTURE = {"hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}
_BEIT_STRUCTURE = {
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": True,
    "use_shared_relative_position_bias": False,
    "use_mean_pooling": True,
}
#: (mean, deviation) of red, green and blue -> the name of a preprocessing.
_PREPROCESSINGS: dict[tuple[tuple[float, ...], tuple[float, ...]], str] = {
    ((0.5,) * 3, (0.5,) * 3): "tf",
    (TORCH_MEANS, TORCH_DEVIATIONS): "torch",
    ((0.0,) * 3, (1.0,) * 3): "unit",
}
#: Share of ImageNet's names that must be found at their places: the library writes more names into some labels.
_MIN_SAME_NAMES = 0.9


@dataclass(frozen=True, kw_only=True)
class Description:
    """A network, as `config.json` describes it."""

    #: One of vit, deit and beit: the beginning of the weights' names.
    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    #: Sides of the image and of a patch, in pixels.
    image_size: int
    patch_size: int
    layer_norm_eps: float
    #: The names of the classes, in the order of the outputs.
    names: tuple[str, ...]

    @property
    def side(self) -> int:
        """Return the number of patches along a side."""
        return self.image_size // self.patch_size


def weights_paths(folder: Path) -> tuple[Path, Path]:
    """Return the paths of description and weights. :raises WeightsMissing: the folder does not have both."""
    paths = (folder / CONFIG, folder / WEIGHTS)
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise WeightsMissing(
            f"There is no {missing[0]}. Save the model into the folder with Hugging Face's library (save_pretrained), "
            f"or copy {CONFIG} and {WEIGHTS} of its repository there."
        )
    return paths


def read_description(path: Path) -> Description:
    """Read a `config.json`. :raises UnsuitableModel: it does not describe a classifier that this version computes."""

    def parse(facts: Any) -> Description:
        numbers = {name: facts.get(name, default) for name, (default, _) in _NUMBERS.items()}
        names = facts["id2label"]
        return Description(
            model_type=facts["model_type"],
            **numbers,
            layer_norm_eps=float(facts.get("layer_norm_eps", 1e-12)),
            names=tuple(str(names[str(number)]) for number in range(len(names))),
        )

    facts, found = _read(path, parse)
    if found.model_type not in _MODEL_TYPES:
        raise UnsuitableModel(
            f"{path} describes a model of type {str(found.model_type)[:40]!r}. Supported are {', '.join(_MODEL_TYPES)}."
        )
    for name, (_, most) in _NUMBERS.items():
        number = getattr(found, name)
        if type(number) is not int or not 1 <= number <= most:
            raise UnsuitableModel(f"{path} has the value {str(number)[:40]} for {name}. It must be from 1 to {most}.")
    structure = _STRUCTURE | (_BEIT_STRUCTURE if found.model_type == "beit" else {})
    for name, value in structure.items():
        if facts.get(name, value) != value:
            raise UnsuitableModel(
                f"{path} has the value {str(facts[name])[:40]} for {name}. Supported is {value} only."
            )
    if facts.get("problem_type") not in (None, "single_label_classification"):
        raise UnsuitableModel(
            f"{path} has the problem_type {str(facts['problem_type'])[:40]}. Only one class per image is supported."
        )
    if not 2 <= len(found.names) <= MAX_LABELS:
        raise UnsuitableModel(f"{path} has {len(found.names)} classes in id2label; 2 to {MAX_LABELS} are allowed.")
    if found.hidden_size % found.num_attention_heads or not 1 <= found.side**2 <= _MAX_PATCHES:
        raise UnsuitableModel(
            f"{path} has numbers that do not fit together: hidden_size must be a multiple of num_attention_heads, and "
            f"an image must have 1 to {_MAX_PATCHES} patches."
        )
    if not (math.isfinite(found.layer_norm_eps) and found.layer_norm_eps > 0):
        raise UnsuitableModel(f"{path} has a layer_norm_eps that is not a positive number.")
    return found


def require_row(path: Path, found: Description, row: ModelRow) -> None:
    """Check that a description is that of a catalogue row. :raises WeightsMismatch: it is not."""
    wanted = row.transformer
    assert wanted is not None
    shape = (found.hidden_size, found.num_hidden_layers, found.image_size)
    expected = (wanted.hidden_size, wanted.layers, row.height)
    if found.model_type not in wanted.model_types or shape != expected:
        raise WeightsMismatch(
            f"{path} describes a {found.model_type} with {shape[0]} values, {shape[1]} layers and images of {shape[2]} "
            f"pixels. {row.title} is a {' or '.join(wanted.model_types)} with {expected[0]}, {expected[1]} and "
            f"{expected[2]}: {wanted.repository}. Another model is installed with `mlg models compile NAME "
            "--huggingface FOLDER`."
        )
    names = [name.replace("_", " ").lower() for _, name in imagenet_labels()]
    same = sum(name in label.replace("_", " ").lower() for name, label in zip(names, found.names, strict=False))
    if len(found.names) != len(names) or same < _MIN_SAME_NAMES * len(names):
        raise WeightsMismatch(
            f"{path} does not list the {len(names)} classes of ImageNet in their usual order ({len(found.names)} "
            f"classes, {same} of them as expected). A model with other classes is installed with `mlg models compile "
            "NAME --huggingface FOLDER`."
        )


def labels_of(path: Path, found: Description) -> tuple[tuple[str, str], ...]:
    """Return (id, name) of each class. :raises UnsuitableModel: a name is no label, or two are equal."""
    return check_labels(
        ((name, name) for name in found.names),
        lambda number: f"Class {number - 1} in {path}",
        "add --labels FILE with names for all classes",
    )


def read_preprocessing(path: Path) -> tuple[str | None, float | None]:
    """Read how a model takes images from its `preprocessor_config.json`.

    :return: one of `keras_graph.preprocess`, None if the numbers have no name here; and `ModelFacts.crop`.
    :raises UnsuitableModel: it does what this version does not.
    """

    def parse(facts: Any) -> tuple[tuple[float, ...], tuple[float, ...], float | None, bool]:
        is_normalised = facts.get("do_normalize", True)
        mean = tuple(map(float, facts["image_mean"])) if is_normalised else (0.0,) * 3
        deviation = tuple(map(float, facts["image_std"])) if is_normalised else (1.0,) * 3
        factor = float(facts.get("rescale_factor", 1 / 255))
        is_rescaled = bool(facts.get("do_rescale", True)) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
        crop = _side(facts["crop_size"]) / _side(facts["size"]) if facts.get("do_center_crop") else None
        return mean, deviation, crop, is_rescaled

    _, (mean, deviation, crop, is_rescaled) = _read(path, parse)
    if not is_rescaled or (crop is not None and not 0 < crop <= 1):
        raise UnsuitableModel(
            f"{path} does not scale pixel values by 1/255, or cuts out more than the image. This is not supported."
        )
    return _PREPROCESSINGS.get((mean, deviation)), crop


def _side(size: Any) -> float:
    """Return the side in pixels of a size: a number, or an object with `shortest_edge` or `height`."""
    if isinstance(size, dict):
        size = size["shortest_edge" if "shortest_edge" in size else "height"]
    return float(size)


def _read(path: Path, parse: Callable[[Any], _T]) -> tuple[dict[str, Any], _T]:
    """Read a JSON file, and what a function finds in it. :raises WeightsMissing: :raises UnsuitableModel:"""
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        facts = json.loads(raw)
        return facts, parse(facts)
    except OSError as error:
        raise WeightsMissing(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UnsuitableModel(
            f"{path} is not what Hugging Face's library writes for an image classifier ({type(error).__name__}: "
            f"{str(error)[:80]})."
        ) from error
