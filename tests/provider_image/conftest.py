"""Fixtures of the package: images, chunks and warm processes."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from provider_image.chunk import ChunkItem, write_chunk
from provider_image.runtime_paths import socket_path
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[2]


def encode_image(image, format: str, **options) -> bytes:
    """Save a Pillow image to bytes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_chunk(path: Path, images: list[bytes], **changes) -> Path:
    """Write a chunk of images for efficientnet_lite0."""
    facts = {
        "chunk_id": "chunk-1",
        "service": "classification",
        "model": "efficientnet_lite0",
        "digest": None,
    } | changes
    write_chunk(path, items=[ChunkItem(number=i, inputs={"image": p}) for i, p in enumerate(images)], **facts)
    return path


class WarmProcess:
    """A `serve` process and its client."""

    def __init__(self, runtime_folder: Path, models: Path, *options: str) -> None:
        self.runtime_folder = runtime_folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "provider_image", "serve", "--place", runtime_folder, "--models", models, *options],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> WarmProcess:
        assert self.process.stdout.readline() == "ready\n", self.process.stderr.read()
        return self

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(120)
        connection.connect(str(socket_path(self.runtime_folder)))
        return connection

    def send(self, line: object) -> socket.socket:
        connection = self.connect()
        connection.sendall((line if isinstance(line, str) else json.dumps(line)).encode() + b"\n")
        return connection

    def send_and_receive(self, line: object) -> dict:
        with self.send(line) as connection:
            return read_reply(connection)

    def wait_for_exit(self) -> int:
        """Wait until it exits and return the exit status."""
        status = self.process.wait(DEADLINE_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            stream.close()
        return status


def read_reply(connection: socket.socket) -> dict:
    """Read one reply; an empty one if the other side ended."""
    with connection.makefile() as lines:
        return json.loads(lines.readline() or "{}")


@pytest.fixture
def start_warm_server(tmp_path: Path, models_folder: Path) -> Iterator[Callable[..., WarmProcess]]:
    """Start warm processes, which are killed after the test."""
    started = []

    def start(
        runtime_folder: Path = tmp_path / "place", models: Path = models_folder, options: tuple[str, ...] = ()
    ) -> WarmProcess:
        started.append(WarmProcess(runtime_folder, models, *options))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.wait_for_exit()


@pytest.fixture(scope="session")
def slow_chunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chunk that takes several seconds: 16 images of the largest size."""
    from PIL import Image

    image = encode_image(Image.new("RGB", (6000, 6000), "teal"), "PNG", compress_level=1)
    return make_chunk(tmp_path_factory.mktemp("slow") / "slow.zip", [image] * 16)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with changes."""
    return {**os.environ, **changes}
