"""What a measurement was made on: processor, memory, system, versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sqlite3
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from provider_image.cores import available_cores

ROOT = Path(__file__).parents[3]
PACKAGES = ("mlg", "openvino", "numpy", "pillow", "granian", "flask")


def facts() -> dict[str, str]:
    """Describe this machine and this project, now."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "Processor": f"{processor}, {available_cores()} cores for this process",
        "Memory": f"{memory:.0f} GiB",
        "System": f"{platform.system()} {platform.release()} on {platform.machine()}",
        "Versions": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {versions}",
        "Commit": _commit(),
        "Begun": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def load() -> float:
    """Return how many processes wanted to run, on average, in the last minute."""
    return os.getloadavg()[0]


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}, with changes" if git("status", "--porcelain", "--untracked-files=no") else commit
