"""Tensors of a safetensors file, read without its library.

The file is a JSON header with name, type, shape and place of each tensor, and the raw numbers: nothing in it is
executed. Called by `builder.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from provider_image.errors import DAMAGED_FILE_ERRORS, WeightsMismatch, WeightsMissing

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: Most bytes of the header. That of ViT-L has 50 KB.
_MAX_HEADER_BYTES = 10_000_000
#: Most characters of a tensor's name.
_MAX_NAME_LENGTH = 200
#: Type in the header -> numpy's. bf16 has none: it is the upper half of an f32. Tensors of other types are left out.
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Weights:
    """The tensors of a file, by name. Each is converted when it is asked for, so that memory holds few of them."""

    def __init__(self, path: Path) -> None:
        """Read the header. :raises WeightsMismatch: the file is damaged. :raises WeightsMissing: it is not readable."""
        self._path = path
        try:
            self._tensors = self._read()
        except OSError as error:
            raise WeightsMissing(f"The weights file {path} cannot be read: {error.strerror or error}") from error
        except (RecursionError, *DAMAGED_FILE_ERRORS) as error:
            raise WeightsMismatch(f"{path} is not a valid safetensors file: {error}") from error

    def _read(self) -> dict[str, tuple[str, Array]]:
        """Return name -> (type, view into the file) of each tensor of floating-point numbers."""
        import numpy as np

        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header does not fit into it")
            header = json.loads(file.read(length))
        data = np.memmap(self._path, np.uint8, "r", 8 + length) if size > 8 + length else np.empty(0, np.uint8)
        tensors = {}
        for name, facts in header.items():
            if name == "__metadata__" or facts["dtype"] not in _TYPES:
                continue
            kind, shape, (begin, end) = np.dtype(_TYPES[facts["dtype"]]), facts["shape"], facts["data_offsets"]
            if len(name) > _MAX_NAME_LENGTH or not all(
                type(each) is int and each >= 0 for each in (*shape, begin, end)
            ):
                raise ValueError(f"{name[:_MAX_NAME_LENGTH]!r} has no valid name, shape or place")
            if end > len(data) or end - begin != kind.itemsize * math.prod(shape):
                raise ValueError(f"the numbers of {name!r} are not all there")
            tensors[name] = (facts["dtype"], data[begin:end].view(kind).reshape(shape))
        return tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def get(self, name: str, *shape: int) -> Array:
        """Return a tensor as f32, its own copy. :raises WeightsMismatch: there is none of this name and shape."""
        import numpy as np

        kind, found = self._tensors.get(name, ("", None))
        if found is None or found.shape != shape:
            what = "no such tensor" if found is None else f"one of shape {found.shape}"
            raise WeightsMismatch(f"{self._path} should have {name} of shape {shape}; it has {what}.")
        if kind == "BF16":
            return (found.astype(np.uint32) << 16).view(np.float32)
        return np.array(found, np.float32)
