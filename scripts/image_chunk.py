"""A chunk of real photos, its results files, and the layers of a container image; for `scripts/check_image`.

image_chunk.py write MODEL CHUNK           writes a chunk of photos from scikit-image's wheel
image_chunk.py read MODEL DIGEST RESULTS...    checks and prints each; they must be from the model with DIGEST
image_chunk.py layers OCI_FOLDER           prints the sizes of the layers of the image in a folder in OCI format
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from pathlib import Path

from provider_image.chunk import ChunkItem, read_results, write_chunk
from provider_image.models.catalogue import look_up

#: Photo -> its format in the chunk, and the labels of which one must be among the top five.
PHOTOS = {
    "chelsea": ("JPEG", ("tabby", "tiger_cat", "Egyptian_cat")),
    "coffee": ("PNG", ("espresso", "cup", "coffee_mug")),
    "rocket": ("WEBP", ("missile", "projectile", "space_shuttle")),
}
_ID = "check-image"


def write(model: str, chunk: Path) -> None:
    """Write the chunk."""
    import skimage.data
    from PIL import Image

    items = []
    for number, (name, (format, _)) in enumerate(PHOTOS.items()):
        file = io.BytesIO()
        Image.fromarray(getattr(skimage.data, name)()).save(file, format)
        items.append(ChunkItem(number=number, inputs={"image": file.getvalue()}))
    row = look_up(model)
    service = "classification" if row is None else row.service
    print(f"chunk: {write_chunk(chunk, _ID, service, model, None, items)} bytes, {', '.join(PHOTOS)}")


def read(model: str, digest: str, results: Path) -> bool:
    """Print a results file. :return: whether every photo was recognised; True for answers that are no labels."""
    found = read_results(results, _ID, model, range(len(PHOTOS)), digest)
    print(
        f"{results.stem}: loaded in {found.load_seconds:.2f} s, at most {found.peak_memory_bytes / 1e6:.0f} MB of "
        f"memory, {found.precision}, {', '.join(f'{name} {value[:12]}' for name, value in found.versions.items())}"
    )
    is_right = True
    for item, (name, (_, expected)) in zip(found.items, PHOTOS.items(), strict=True):
        if item.error is not None:
            sys.exit(f"image_chunk.py: {name}: {item.error.code}: {item.error.reason}")
        if not isinstance(item.output, list):
            print(f"  {name:8} {item.seconds * 1000:5.0f} ms  {json.dumps(item.output)[:90]}")
            continue
        best = [row[1] for row in item.output[:5]]
        is_right = is_right and not set(best).isdisjoint(expected)
        shown = ", ".join(f"{label} {probability:.3f}" for _, label, probability in item.output[:3])
        print(f"  {name:8} {item.seconds * 1000:5.0f} ms  {shown}")
    return is_right


def layers(folder: Path) -> None:
    """Print the layers with their sizes, unpacked and packed (gzip)."""

    def blob(digest: str) -> Path:
        return folder / "blobs" / digest.replace(":", "/")

    manifest = json.loads(blob(json.loads((folder / "index.json").read_text())["manifests"][0]["digest"]).read_text())
    history = json.loads(blob(manifest["config"]["digest"]).read_text()).get("history", [])
    makers = [entry.get("created_by", "") for entry in history if not entry.get("empty_layer")]
    total_packed = total = 0
    for layer, maker in zip(manifest["layers"], makers, strict=True):
        packed, unpacked = layer["size"], 0
        with blob(layer["digest"]).open("rb") as file:
            stream = zlib.decompressobj(wbits=31)
            while data := file.read(1 << 20):
                unpacked += len(stream.decompress(data))
        if unpacked > 100_000:  # the others only contain settings
            print(f"{unpacked / 1e6:7.1f} MB, {packed / 1e6:6.1f} MB packed  {' '.join(maker.split())[:90]}")
        total_packed, total = total_packed + packed, total + unpacked
    print(f"{total / 1e6:7.1f} MB, {total_packed / 1e6:6.1f} MB packed  in all")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "write":
        write(rest[0], Path(rest[1]))
    elif command == "layers":
        layers(Path(rest[0]))
    else:
        recognised = [read(rest[0], rest[1], Path(path)) for path in rest[2:]]
        if command == "read-right" and not all(recognised):
            sys.exit("image_chunk.py: a photo was not recognised")
