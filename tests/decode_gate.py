"""Code for processes of a test: pictures that say that they were begun, and are held until the test lets them go."""

from __future__ import annotations

#: For a `sitecustomize.py`, which every process loads at its start. A picture that ends in HOLD:PATH says that it was
#: begun, by making PATH.begun with the process's id in it, and is held until PATH is there.
DECODE_GATE = """
import os, pathlib, time
import provider_image.images.decoding as imaging

def decode(data, *arguments, plain=imaging.decode, **options):
    head, mark, path = bytes(data).rpartition(b"HOLD:")
    if mark:
        path = pathlib.Path(os.fsdecode(path))
        path.with_suffix(".half").write_text(str(os.getpid()))
        path.with_suffix(".half").rename(path.with_suffix(".begun"))
        while not path.exists():
            time.sleep(0.01)
    return plain(data, *arguments, **options)

imaging.decode = decode
"""
