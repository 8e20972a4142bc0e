"""Reads torch's legacy weight files without torch.

Used by the builders. The file is five pickles and then the raw numbers. Unpickling runs what the file names, so only
the few names that such files need are allowed, and each stands for a small function of this module. Check the file's
sha256 first all the same: nothing here bounds the memory that a hostile pickle could ask for.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from provider_image.errors import WeightsMismatch

if TYPE_CHECKING:
    import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
#: Storage class in torch -> (numpy type, bytes an element).
_STORAGES = {"FloatStorage": ("<f4", 4), "LongStorage": ("<i8", 8)}
_READ_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    EOFError,
    OverflowError,
)


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """A view into a storage that is read later."""

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

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise WeightsMismatch(f"The weights file asks for {module}.{name}, which no weights need. It is not used.")
        return self._allowed[module, name]

    def persistent_load(self, reference: Any) -> Any:
        if not (isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"):
            raise WeightsMismatch("The weights file refers to something that is no storage.")
        return reference[:5]


def read_tensors(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Read every tensor of a legacy torch file.

    :return: name -> array of its own, in C order whatever the strides in the file were.
    :raises WeightsMismatch: the file is not such a file, is cut short, or asks for anything but tensors.
    """
    import numpy as np

    storages: dict[str, np.ndarray[Any, Any]] = {}
    kinds: dict[str, str] = {}
    stream = io.BytesIO(data)

    class Unpickler(_Unpickler):
        def persistent_load(self, reference: Any) -> Any:
            checked = super().persistent_load(reference)
            kinds[checked[2]] = checked[1]
            return checked

    try:
        if [Unpickler(stream).load(), Unpickler(stream).load()] != [_MAGIC, _PROTOCOL]:
            raise WeightsMismatch("The weights file is not in torch's legacy format.")
        Unpickler(stream).load()  # the system's facts
        state = Unpickler(stream).load()
        keys = Unpickler(stream).load()
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
    """Copy a strided view; a plain reshape would give wrong weights, the tensors lie in another framework's order."""
    import numpy as np

    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.offset < 0 or min(tensor.strides, default=0) < 0 or last >= len(storage):
        raise WeightsMismatch("The weights file has a tensor that reaches beyond its storage.")
    width = storage.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage[tensor.offset :], tensor.shape, [stride * width for stride in tensor.strides], writeable=False
    )
    return np.array(view, order="C")  # ascontiguousarray would turn a 0-d array into one of shape (1,)
