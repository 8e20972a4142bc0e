"""Folders as Hugging Face's library saves vision transformers, with small networks and seeded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from provider_image.compiler.labels import imagenet_labels
from provider_image.models.catalogue import ModelRow

Arrays = dict[str, np.ndarray[Any, Any]]

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}


def config_of(kind: str, names: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """Make a config.json. :param names: the classes; None takes ImageNet's, as the library writes them."""
    if names is None:
        names = [f"{name.replace('_', ' ')}, other name" for _, name in imagenet_labels()]
    return {"model_type": kind, **SMALL, "id2label": {str(n): name for n, name in enumerate(names)}, **changes}


def seeded_tensors(config: dict[str, Any], heads: tuple[str, ...] = ("classifier",), seed: int = 0) -> Arrays:
    """Make seeded weights under the library's names. :param heads: the names of the last layers."""
    random = np.random.default_rng(seed)
    kind, size, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    side, patch = config["image_size"] // config["patch_size"], config["patch_size"]
    tensors: Arrays = {}

    def add(name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> None:
        scale = (2 / shape[-1]) ** 0.5 if scale is None else scale
        tensors[name] = (around + scale * random.standard_normal(shape)).astype(np.float32)

    def add_linear(name: str, out: int, values: int, *, has_bias: bool = True) -> None:
        add(f"{name}.weight", out, values)
        if has_bias:
            add(f"{name}.bias", out, scale=0.1)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", size, scale=0.2, around=1.0)
        add(f"{name}.bias", size, scale=0.2)

    add(f"{kind}.embeddings.cls_token", 1, 1, size, scale=0.5)
    if kind == "deit":
        add(f"{kind}.embeddings.distillation_token", 1, 1, size, scale=0.5)
    if kind != "beit":
        add(f"{kind}.embeddings.position_embeddings", 1, side**2 + (2 if kind == "deit" else 1), size, scale=0.5)
    add(f"{kind}.embeddings.patch_embeddings.projection.weight", size, 3, patch, patch, scale=1 / patch)
    add(f"{kind}.embeddings.patch_embeddings.projection.bias", size, scale=0.1)
    for number in range(config["num_hidden_layers"]):
        layer = f"{kind}.encoder.layer.{number}"
        add_norm(f"{layer}.layernorm_before")
        add_norm(f"{layer}.layernorm_after")
        for part in ("query", "key", "value"):
            add_linear(f"{layer}.attention.attention.{part}", size, size, has_bias=(kind, part) != ("beit", "key"))
        add_linear(f"{layer}.attention.output.dense", size, size)
        add_linear(f"{layer}.intermediate.dense", inner, size)
        add_linear(f"{layer}.output.dense", size, inner)
        if kind == "beit":
            count, table = (2 * side - 1) ** 2 + 3, "relative_position_bias.relative_position_bias_table"
            add(f"{layer}.attention.attention.{table}", count, config["num_attention_heads"], scale=1.0)
            add(f"{layer}.lambda_1", size, scale=0.3, around=0.5)
            add(f"{layer}.lambda_2", size, scale=0.3, around=0.5)
    add_norm(f"{kind}.pooler.layernorm" if kind == "beit" else f"{kind}.layernorm")
    for head in heads:
        add_linear(head, len(config["id2label"]), size)
    return tensors


def safetensors_of(tensors: Arrays, kinds: dict[str, str] | None = None, **more: Any) -> bytes:
    """Write a safetensors file. :param kinds: type of a tensor, F32 by default. :param more: header entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts = []
    offset = 0
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name, "F32")
        if kind == "BF16":
            raw = (np.ascontiguousarray(tensor, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = tensor.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8", "I64": "<i8"}[kind]).tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(raw)]}
        offset += len(raw)
        parts.append(raw)
    text = json.dumps(header | more).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def read_tensors(path: Path) -> Arrays:
    """Return views into a safetensors file that has f32 only."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, np.uint8, "r", 8 + length)
    del header["__metadata__"]
    return {
        name: data[slice(*facts["data_offsets"])].view("<f4").reshape(facts["shape"]) for name, facts in header.items()
    }


def catalogue_config(row: ModelRow) -> dict[str, Any]:
    """Make the config.json of a catalogue row's network in its real size."""
    assert row.transformer is not None
    size = row.transformer.hidden_size
    return config_of(
        row.transformer.model_types[-1],
        hidden_size=size,
        num_hidden_layers=row.transformer.layers,
        num_attention_heads=size // 64,
        intermediate_size=4 * size,
        image_size=row.height,
        patch_size=16,
    )


def write_folder(folder: Path, config: dict[str, Any], tensors: Arrays, preprocessor: Any = None) -> Path:
    """Write config.json, model.safetensors and, if given, preprocessor_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_of(tensors))
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
