"""Code for subprocesses of tests: decoding of marked images that signals its start and blocks until it is released."""

from __future__ import annotations

#: For a `sitecustomize.py`, which every process loads at its start. The decoding of an image that ends in HOLD:PATH
#: creates PATH.begun with the process id in it, and blocks until PATH exists.
DECODE_GATE = """
import os, pathlib, time
from concurrent.futures import ThreadPoolExecutor
import provider_image.images.decoding as imaging

# Its thread begins before a process that decodes images takes the user's files from itself.
unrestricted = ThreadPoolExecutor(1)
unrestricted.submit(int).result()

def signal_start(path):
    path.with_suffix(".half").write_text(str(os.getpid()))
    path.with_suffix(".half").rename(path.with_suffix(".begun"))

def decode(data, *arguments, plain=imaging.decode, **options):
    head, mark, path = bytes(data).rpartition(b"HOLD:")
    if mark:
        path = pathlib.Path(os.fsdecode(path))
        unrestricted.submit(signal_start, path).result()
        while not path.exists():
            time.sleep(0.01)
    return plain(data, *arguments, **options)

imaging.decode = decode
"""
