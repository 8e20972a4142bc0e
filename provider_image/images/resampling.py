"""Resizes images as Pillow does, and faster where the compiled part of this package runs.

The compiled part is `_resampling.c`, an optional extension for processors with AVX2. It is used only if it gives
exactly the pixels of Pillow, which is tried once in each process, and for RGB alone. The rest is left to Pillow: other
modes and filters, images of a few pixels, and systems where it was not built. Pillow is imported on the first use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import PIL.Image

log = logging.getLogger(__name__)

#: A box in pixels: left, top, right, bottom.
_Box = tuple[float, float, float, float]

_LIBRARY = "provider_image.images._resampling"
#: Pillow keeps an image of up to so many bytes in one piece, as the compiled part needs it; by itself, of up to 16 MB.
_BLOCK_BYTES = 256 * 1024 * 1024
#: What is tried before the compiled part is used: sizes, box and filter. Pillow begins with the columns where an image
#: loses many more rows than columns.
_TRIALS: tuple[tuple[tuple[int, int], tuple[int, int], _Box, str], ...] = (
    ((167, 61), (24, 20), (0, 0, 167, 61), "BICUBIC"),
    ((41, 307), (24, 22), (0.3, 2.6, 40.7, 299.1), "BICUBIC"),
    ((23, 19), (45, 43), (1.25, 0.5, 22.5, 19), "BICUBIC"),
    ((101, 83), (37, 29), (0, 5, 96, 83), "BILINEAR"),
)


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """What resizes images in a process."""

    #: "avx2", or "pillow".
    name: str
    #: Why it is Pillow; empty if it is not.
    reason: str = ""
    #: The compiled part, if it is used.
    library: ctypes.CDLL | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name

    def resize(
        self, image: PIL.Image.Image, size: tuple[int, int], filter: PIL.Image.Resampling, box: _Box
    ) -> PIL.Image.Image:
        """Resize the part of an image in a box, to the pixels that `image.resize(size, filter, box)` returns."""
        resized = self.resize_compiled(image, size, filter, box)
        return image.resize(size, filter, box) if resized is None else resized

    def resize_compiled(
        self, image: PIL.Image.Image, size: tuple[int, int], filter: PIL.Image.Resampling, box: _Box
    ) -> PIL.Image.Image | None:
        """Do as `resize`, without Python's lock. :return: None if it is left to Pillow."""
        import PIL.Image

        support = {PIL.Image.Resampling.BILINEAR: 1, PIL.Image.Resampling.BICUBIC: 2}.get(filter)
        is_copied = image.size == size and box == (0, 0, *size)
        if self.library is None or image.mode != "RGB" or support is None or is_copied:
            return None
        try:
            exported: Any = image.__arrow_c_array__()
        except ValueError:  # the image is in several pieces
            return None
        pixels = _capsule_pointer()(exported[1], b"arrow_array")
        out = bytearray(4 * size[0] * size[1])
        target = (ctypes.c_char * len(out)).from_buffer(out)
        corners = (ctypes.c_float * 4)(*box)
        if not self.library.mlg_resample_1(pixels, *image.size, corners, support, *size, ctypes.addressof(target)):
            return None
        return PIL.Image.frombytes("RGB", size, out, "raw", "RGBX")


@functools.cache
def resampler() -> Resampler:
    """Return what resizes images in this process."""
    found = importlib.util.find_spec(_LIBRARY)
    return choose_resampler(None if found is None else found.origin)


def choose_resampler(path: str | None) -> Resampler:
    """Compare the compiled part with Pillow, and choose it only if it gives the same pixels.

    :param path: the file of the compiled part; None if there is none.
    """
    import PIL.Image

    if path is None:
        return Resampler(name="pillow", reason="the compiled part was not built")
    try:
        library = ctypes.CDLL(path)
        if not library.mlg_can_resample():
            return Resampler(name="pillow", reason="the compiled part is for processors with AVX2")
        library.mlg_resample_1.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_int),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_void_p),
        ]
    except (OSError, AttributeError) as error:
        log.warning("images are resized by Pillow: the compiled part cannot be loaded: %s", error)
        return Resampler(name="pillow", reason="the compiled part cannot be loaded")
    chosen = Resampler(name="avx2", library=library)
    try:
        is_exact = all(_is_exact(chosen, *trial) for trial in _TRIALS)
        if is_exact:
            PIL.Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - another Pillow may lack or change anything that is used here
        log.warning("images are resized by Pillow %s: %s: %s", PIL.__version__, type(error).__name__, error)
        return Resampler(name="pillow", reason="the compiled part does not fit this Pillow")
    if not is_exact:
        log.warning("images are resized by Pillow %s: the compiled part gives other pixels", PIL.__version__)
        return Resampler(name="pillow", reason="the compiled part gives other pixels than this Pillow")
    return chosen


def _is_exact(chosen: Resampler, size: tuple[int, int], target: tuple[int, int], box: _Box, filter: str) -> bool:
    """Tell whether the compiled part gives Pillow's pixels of an image of noise."""
    import PIL.Image

    noise = PIL.Image.frombytes("RGB", size, random.Random(0).randbytes(3 * size[0] * size[1]))
    method = PIL.Image.Resampling[filter]
    resized = chosen.resize_compiled(noise, target, method, box)
    return resized is not None and resized.tobytes() == noise.resize(target, method, box).tobytes()


@functools.cache
def _capsule_pointer() -> Any:
    return ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
