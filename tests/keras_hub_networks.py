"""Networks of keras-hub with given weights. It is no dependency, because it requires the whole of tensorflow."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tests.transformer_folders import Arrays

#: What installs it.
INSTALL = "pip install --no-deps keras-hub==0.32.0 regex tokenizers"


def keras_hub_network(config: dict[str, Any], tensors: Arrays) -> Any:
    """Build a ViT or a DeiT: preprocessed images (n, height, width, 3) in, probabilities (n, classes) out.

    :raises ImportError: keras-hub is not installed.
    """
    os.environ["KERAS_BACKEND"] = "tensorflow"
    models = importlib.import_module("keras_hub").models
    kind, heads, size = config["model_type"], config["num_attention_heads"], config["hidden_size"]
    shared = {
        "image_shape": (config["image_size"], config["image_size"], 3),
        "patch_size": config["patch_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "hidden_dim": size,
        "layer_norm_epsilon": config["layer_norm_eps"],
    }
    if kind == "vit":
        backbone = models.ViTBackbone(**shared, mlp_dim=config["intermediate_size"])
        make = models.ViTImageClassifier
    else:
        backbone = models.DeiTBackbone(**shared, intermediate_dim=config["intermediate_size"])
        make = models.DeiTImageClassifier
    network = make(backbone=backbone, num_classes=len(config["id2label"]), activation="softmax")

    def take(variable: Any, name: str, axes: tuple[int, ...] | None = None) -> None:
        tensor = tensors[name]
        variable.assign((tensor if axes is None else tensor.transpose(axes)).reshape(variable.shape))

    def take_dense(layer: Any, name: str) -> None:
        take(layer.kernel, f"{name}.weight", (1, 0))
        take(layer.bias, f"{name}.bias")

    def take_norm(layer: Any, name: str) -> None:
        take(layer.gamma, f"{name}.weight")
        take(layer.beta, f"{name}.bias")

    _, embedding, encoder = backbone.layers
    take(embedding.patch_embedding.kernel, f"{kind}.embeddings.patch_embeddings.projection.weight", (2, 3, 1, 0))
    take(embedding.patch_embedding.bias, f"{kind}.embeddings.patch_embeddings.projection.bias")
    take(embedding.class_token, f"{kind}.embeddings.cls_token")
    positions = embedding.position_embedding
    take(positions.embeddings if kind == "vit" else positions, f"{kind}.embeddings.position_embeddings")
    if kind == "deit":
        take(embedding.distillation_token, f"{kind}.embeddings.distillation_token")
    for number, block in enumerate(encoder.encoder_layers):
        layer = f"{kind}.encoder.layer.{number}"
        take_norm(block.layer_norm_1, f"{layer}.layernorm_before")
        take_norm(block.layer_norm_2, f"{layer}.layernorm_after")
        for part in ("query", "key", "value"):
            take_dense(getattr(block.mha, f"{part}_dense"), f"{layer}.attention.attention.{part}")
        take_dense(block.mha.output_dense, f"{layer}.attention.output.dense")
        first, second = (
            (block.mlp.dense_1, block.mlp.dense_2) if kind == "vit" else (block.mlp.dense, block.output_layer.dense)
        )
        take_dense(first, f"{layer}.intermediate.dense")
        take_dense(second, f"{layer}.output.dense")
    take_norm(encoder.layer_norm, f"{kind}.layernorm")
    take_dense(network.output_dense, "classifier")
    return network
