"""Images per second from the first POST to the last recorded result, against the limit of the machine.

The limit is one process with two threads that decode and infer, without HTTP and store. It is measured twice, with
JPEGs decoded at full scale and at reduced scale like in the runtime.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import io
import json
import sqlite3
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from provider_image.compiler import ensure_installed
from provider_image.images import decoding
from scripts.benchmarks import photos, processes

MODEL = "efficientnet_lite0"


def plain_limit(models: Path, jpegs: list[bytes], *, is_reduced: bool) -> float:
    """Decode and infer in two threads. :return: images per second."""
    import numpy as np
    import openvino as ov
    from PIL import Image

    artefact = ensure_installed(models, MODEL)
    core = ov.Core()
    core.set_property({"CACHE_DIR": ""})
    net = core.compile_model(
        str(artefact.folder / "model.xml"),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": "2",
            "INFERENCE_NUM_THREADS": "2",
        },
    )

    def decode_whole(jpeg: bytes) -> Any:
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        side = int(0.875 * min(image.size))
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box=box))

    def work(part: list[bytes]) -> None:
        request = net.create_infer_request()
        for jpeg in part:
            pixels = decoding.decode(jpeg, 224, 224, 0.875) if is_reduced else decode_whole(jpeg)
            request.infer({0: pixels[None]})

    work(jpegs[:8])
    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(jpegs[part::2],)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(jpegs) / (time.perf_counter() - started)


def post(port: int, jpegs: list[bytes]) -> list[str]:
    """Post images over one connection. A minimal client, because it shares the cores. :return: ids."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    ids = []
    for jpeg in jpegs:
        connection.request("POST", f"/requestPrediction/{MODEL}", jpeg, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        answer = json.load(response)
        if response.status != 202:
            raise RuntimeError(answer)
        ids.append(answer["req_id"])
    connection.close()
    return ids


def drain(home: Path, jpegs: list[bytes], log: Path) -> float:
    """Post all images to a running system and wait for the last result. :return: images per second."""
    port = processes.free_port()
    base = f"http://127.0.0.1:{port}"
    with processes.running(
        processes.mlg("up", "--home", str(home), "--port", str(port)), url=f"{base}/readyz", log=log
    ):
        warm = post(port, jpegs[:1])
        with urllib.request.urlopen(f"{base}/readPrediction/{warm[0]}?wait=30"):
            started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            posted = sum(len(ids) for ids in pool.map(lambda part: post(port, jpegs[1 + part :: 4]), range(4)))
        database = sqlite3.connect(f"file:{home / 'mlg.db'}?mode=ro", uri=True)
        try:
            while True:
                (done,) = database.execute("SELECT count(*) FROM requests WHERE state = 'done'").fetchone()
                if done == len(jpegs):
                    break
                (failed,) = database.execute("SELECT count(*) FROM requests WHERE state = 'failed'").fetchone()
                if failed:
                    raise RuntimeError(f"{failed} failed")
                time.sleep(0.05)
        finally:
            database.close()
        return posted / (time.perf_counter() - started)


@click.command()
@click.option("--images", "count", default=2000, show_default=True, help="Number of images.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each; the median is reported.")
def main(count: int, rounds: int) -> None:
    """Measure draining. Example: scripts/bench drain --images 1000"""
    base = photos.photo_jpegs()
    seen: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        work = Path(folder)
        for turn in range(rounds):
            jpegs = [photos.make_unique(base[n % len(base)], turn * count + n) for n in range(count + 1)]
            seen.setdefault("limit, JPEGs at full scale", []).append(
                plain_limit(work / "models", jpegs, is_reduced=False)
            )
            seen.setdefault("limit, JPEGs at reduced scale", []).append(
                plain_limit(work / "models", jpegs, is_reduced=True)
            )
            seen.setdefault("mlg up, end to end", []).append(drain(work / f"home-{turn}", jpegs, work / "log"))
    median = {name: statistics.median(figures) for name, figures in seen.items()}
    table = Table("what", "images/s", "runs", title=f"{count} JPEGs of 113 KB, 800 x 600, {MODEL}")
    for name, figures in seen.items():
        table.add_row(name, f"{median[name]:.0f}", " ".join(f"{figure:.0f}" for figure in figures))
    console = Console()
    console.print(table)
    ours = median["mlg up, end to end"]
    for name in list(seen)[:2]:
        console.print(f"{ours / median[name]:.0%} of the {name}")
