"""How often the top five change when JPEGs are decoded at reduced scale, by the margin that is kept."""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.table import Table

from provider_image import imaging
from provider_image.models.compilers import ensure_installed
from provider_image.services.classification import Classification
from scripts.benchmarks import pictures

SIZES = (
    (640, 560), (800, 600), (900, 600), (1024, 768), (1100, 740),
    (1280, 960), (1600, 1200), (2000, 1500), (3000, 2000), (4000, 3000),
)  # fmt: skip
QUALITIES = (60, 75, 85, 92, 96)
MARGINS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)


@click.command()
def main() -> None:
    """Measure what reduced scale changes. Example: scripts/bench scale"""
    service = Classification()
    changed_first, changed_five = dict.fromkeys(MARGINS, 0), dict.fromkeys(MARGINS, 0)
    cases = 0
    with tempfile.TemporaryDirectory(prefix="mlg-bench-") as folder:
        artefact = ensure_installed(Path(folder), "efficientnet_lite0")
        net = service.load(artefact, 2, "f32")

        def classify(jpeg: bytes, margin: float) -> list[str]:
            picture = imaging.decode(jpeg, artefact.height, artefact.width, artefact.crop, margin=margin)
            return [row[1] for row in service.run(net, picture)[:5]]

        for name in pictures.PHOTOS:
            photo = Image.open(pictures.album() / name).convert("RGB")
            for size in SIZES:
                resized = photo.resize(size, Image.Resampling.BICUBIC)
                for quality in QUALITIES:
                    buffer = io.BytesIO()
                    resized.save(buffer, "JPEG", quality=quality)
                    whole = classify(buffer.getvalue(), math.inf)
                    cases += 1
                    for margin in MARGINS:
                        found = classify(buffer.getvalue(), margin)
                        changed_first[margin] += found[0] != whole[0]
                        changed_five[margin] += set(found) != set(whole)
    table = Table("margin", "first label changed", "top five changed", title=f"{cases} pictures, of each")
    for margin in MARGINS:
        table.add_row(f"{margin:g}", str(changed_first[margin]), str(changed_five[margin]))
    Console().print(table)
