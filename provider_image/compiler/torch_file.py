"""Torch's legacy weights files, read without torch.

Called by `lite0.py`. The file consists of five pickles and the raw numbers. Unpickling calls what the file names, so
only the few names that such files need are allowed, and each is mapped to a function of this module. Weakness: the
memory that a malicious pickle requests is not limited, so check the file's sha256 first.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import DAMAGED_FILE_ERRORS, WeightsMismatch

if TYPE_CHECKING:
    import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
#: Torch's storage class -> (numpy type, bytes per element).
_STORAGES = {"FloatStorage": ("<f4", 4), "LongStorage": ("<i8", 8)}
_READ_ERRORS = (pickle.UnpicklingError, ImportError, *DAMAGED_FILE_ERRORS)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A view of a storage that is read later."""

    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDict(collections.OrderedDict[str, Any]):
    """The state dict; torch sets `_metadata` on it, which is ignored."""

    def __setstate__(self, state: object) -> None:
        del state


def _rebuild_tensor(storage: tuple[Any, ...], offset: int, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    return _Tensor(key=storage[2], offset=int(offset), shape=tuple(shape), strides=tuple(strides))


class _Unpickler(pickle.Unpickler):
    _allowed = {  # noqa: RUF012 - a constant
        ("collections", "OrderedDict"): _StateDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        **{("torch", name): name for name in _STORAGES},
    }

    def __init__(self, stream: io.BytesIO, kinds: dict[str, str]) -> None:
        super().__init__(stream)
        #: Key of a storage -> its class; filled while loading.
        self._kinds = kinds

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise WeightsMismatch(f"The weights file names {module}.{name}, which is not allowed. It was not loaded.")
        return self._allowed[module, name]

    def persistent_load(self, reference: Any) -> Any:
        if not (isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"):
            raise WeightsMismatch("The weights file refers to something other than a storage.")
        self._kinds[reference[2]] = reference[1]
        return reference[:5]


def read_tensors(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Read all tensors of a legacy torch file.

    :return: name -> a copy, in C order regardless of the strides in the file.
    :raises WeightsMismatch: the file has another format, is cut short, or contains anything but tensors.
    """
    import numpy as np

    storages: dict[str, np.ndarray[Any, Any]] = {}
    kinds: dict[str, str] = {}
    stream = io.BytesIO(data)

    def load() -> Any:
        return _Unpickler(stream, kinds).load()

    try:
        if [load(), load()] != [_MAGIC, _PROTOCOL]:
            raise WeightsMismatch("The weights file is not in torch's legacy format.")
        load()  # facts about the system
        state = load()
        keys = load()
        position = stream.tell()
        for key in keys:
            kind, width = _STORAGES[kinds[key]]
            (count,) = struct.unpack_from("<q", data, position)
            storages[key] = np.frombuffer(data, dtype=kind, count=count, offset=position + 8)
            position += 8 + count * width
        if position != len(data):
            raise WeightsMismatch("The weights file is longer than its tensors.")
        return {name: _array(tensor, storages[tensor.key]) for name, tensor in state.items()}
    except _READ_ERRORS as error:
        raise WeightsMismatch(f"The weights file cannot be read: {type(error).__name__}: {error}") from error


def _array(tensor: _Tensor, storage: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Copy a strided view; a reshape would give wrong weights, because some tensors are not in C order."""
    import numpy as np

    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.offset < 0 or min(tensor.strides, default=0) < 0 or last >= len(storage):
        raise WeightsMismatch("The weights file has a tensor that reaches beyond its storage.")
    width = storage.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage[tensor.offset :], tensor.shape, [stride * width for stride in tensor.strides], writeable=False
    )
    return np.array(view, order="C")  # ascontiguousarray would turn a 0-d array into one of shape (1,)
