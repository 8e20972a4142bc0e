"""Writes pip.conf and containers.conf so that a build uses this machine's package index; for `scripts/check_image`.

Usage: image_pip.py FOLDER. Both files, and local files that they name, are mounted into the build, so nothing of them
gets into an image.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

_COPIED_OPTIONS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy")


def main(folder: Path) -> None:
    """Write both files."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # the environment overrides the files
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if key in _COPIED_OPTIONS and section in ("global", ":env:") and (key not in settings or section == ":env:"):
            settings[key] = " ".join(ast.literal_eval(value).split())
    conf = folder / "pip.conf"
    conf.write_text("[global]\ndisable-pip-version-check = 1\n" + "".join(f"{k} = {v}\n" for k, v in settings.items()))
    paths = set()
    for word in " ".join(settings.values()).split():
        if word.startswith("file:"):
            # The parent, because the pages of an index usually refer to files beside it.
            paths.add(Path(unquote(urlsplit(word).path)).parent)
        elif word.startswith("/"):
            paths.add(Path(word))
    volumes = [f"{conf}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(paths) if path.exists())]
    (folder / "containers.conf").write_text(f"[containers]\nvolumes = {json.dumps(volumes)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
