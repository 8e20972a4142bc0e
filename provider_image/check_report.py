"""What a check of a model found: the record, its JSON, and its lines for people.

Made by `check.py`; shown by `mlg-provider check` and `mlg models check`. Must not import anything heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageCheck:
    """What became of one self-test picture."""

    #: File name in the artefact's folder.
    file: str
    #: Largest difference of a probability from the recorded answer; None if there is no answer to compare.
    difference: float | None = None
    #: What is wrong; None if nothing is.
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """What a check found. Where it ended early, what comes later is empty."""

    #: The model's name, and as people write it.
    name: str
    title: str = ""
    #: The artefact's folder.
    folder: str
    #: Of the artefact.
    digest: str = ""
    #: Bytes of the graph and its weights, and how those are stored: f32 or f16.
    size_bytes: int = 0
    storage: str = ""
    #: What gave the recorded answers.
    reference: str = ""
    #: f32, bf16 or auto.
    precision: str
    #: Pictures side by side.
    threads: int
    #: The processor's name, and program -> version.
    cpu: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    #: Seconds to load the model in a fresh process, checking its files and starting OpenVINO included.
    load_seconds: float | None = None
    #: A probability may differ by this much; for f32 the five likeliest labels must keep their order as well.
    tolerance: float | None = None
    #: In the artefact's order.
    pictures: tuple[ImageCheck, ...] = ()
    #: Pictures a second as in a chunk, decoding included, and the rate of the net alone.
    images_per_second: float | None = None
    net_images_per_second: float | None = None
    #: Most memory that the process ever had; 0 if the model was not loaded, or where the system does not tell.
    peak_memory_bytes: int = 0
    #: What is wrong and what to do; None if the model is sound.
    problem: str | None = None

    @property
    def is_ok(self) -> bool:
        """Tell whether the model is sound here."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, the verdict first."""
        return {"ok": self.is_ok, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CheckReport:
        """Read what `to_json` gave. :raises TypeError, KeyError: it is something else."""
        facts = {key: value for key, value in document.items() if key != "ok"}
        return cls(**{**facts, "pictures": tuple(ImageCheck(**picture) for picture in facts["pictures"])})


def describe(report: CheckReport) -> list[str]:
    """Return the report as lines for people, the verdict last; a picture has a line only if something is wrong."""
    lines = [f"{report.name} ({report.title})" if report.title else report.name]

    def add_line(what: str, text: str) -> None:
        lines.append(f"  {what:<10} {text}")

    add_line("folder", report.folder)
    if report.digest:
        size = f"{report.size_bytes / 1e6:.1f} MB"
        add_line("artefact", f"digest {report.digest[:12]}, {size}, weights stored as {report.storage}")
    if report.load_seconds is not None:
        threads = f"{report.threads} thread{'' if report.threads == 1 else 's'}"
        add_line("machine", f"{report.cpu}, {threads}, computing in {report.precision}")
        # OpenVINO's goes on with its build and branch.
        add_line("versions", ", ".join(f"{name} {text.partition('-')[0]}" for name, text in report.versions.items()))
        add_line("loading", f"{report.load_seconds:.2f} s")
    if report.pictures:
        add_line("self-test", _self_test(report))
        lines += [f"  {'':<10} {picture.file}: {picture.problem}" for picture in report.pictures if picture.problem]
    if report.images_per_second is not None and report.net_images_per_second is not None:
        rates = f"{report.images_per_second:.1f} images/s decoding included, {report.net_images_per_second:.1f} without"
        add_line("speed", rates)
    if report.peak_memory_bytes:
        add_line("memory", f"{report.peak_memory_bytes / 1e6:.0f} MB at most")
    add_line("verdict", "ok" if report.problem is None else f"FAILED: {report.problem}")
    return lines


def _self_test(report: CheckReport) -> str:
    good = sum(picture.problem is None for picture in report.pictures)
    differences = [picture.difference for picture in report.pictures if picture.difference is not None]
    text = f"{good} of {len(report.pictures)} pictures answered as recorded ({report.reference})"
    if not differences or report.tolerance is None:
        return text
    return f"{text}; largest difference {max(differences):.2g}, allowed {report.tolerance:.2g}"
