"""The report of a check of a model: the record, its JSON, and its text.

Made by `check.py`; printed by `mlg-provider check` and `mlg models check`, in the second case by another process than
that of the check. Must not import anything heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageCheck:
    """The result of one self-test image."""

    #: File name in the artefact's folder.
    file: str
    #: Largest difference of a probability from the recorded result; None if there was nothing to compare.
    difference: float | None = None
    #: What is wrong with it; None if it is ok.
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The findings of a check. Where it ended early, later fields are empty."""

    #: The model's name and title.
    name: str
    title: str = ""
    #: The artefact's folder.
    folder: str
    #: The artefact's digest.
    digest: str = ""
    #: Size of the graph and its weights, and how those are stored: f32 or f16.
    size_bytes: int = 0
    storage: str = ""
    #: The program that gave the recorded results, for example `keras 3.15.1`.
    reference: str = ""
    #: f32, bf16 or auto.
    precision: str
    #: Images processed at the same time.
    threads: int
    #: The processor's name, and program -> version.
    cpu: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    #: Seconds to load the model in a new process, including the check of its files and the start of OpenVINO.
    load_seconds: float | None = None
    #: Largest allowed difference of a probability; in f32 the top five labels must have the same order as well.
    tolerance: float | None = None
    #: The self-test images in the artefact's order. Named as in the JSON, which must not change.
    pictures: tuple[ImageCheck, ...] = ()
    #: Images per second with decoding, as in a chunk, and of the net alone.
    images_per_second: float | None = None
    net_images_per_second: float | None = None
    #: Peak memory of the process; 0 if the model was not loaded, or where the system does not provide it.
    peak_memory_bytes: int = 0
    #: What is wrong and what to do; None if the model passed.
    problem: str | None = None

    @property
    def is_ok(self) -> bool:
        """Tell whether the model passed."""
        return self.problem is None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON, `ok` first."""
        return {"ok": self.is_ok, **asdict(self)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> CheckReport:
        """Read what `to_json` returned. :raises TypeError, KeyError: it is something else."""
        facts = {key: value for key, value in document.items() if key != "ok"}
        return cls(**{**facts, "pictures": tuple(ImageCheck(**image) for image in facts["pictures"])})


def describe(report: CheckReport) -> list[str]:
    """Return the report as lines of text, the verdict last; an image has a line only if there is a problem."""
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
        # OpenVINO's version ends in its build and branch, which are left out.
        add_line("versions", ", ".join(f"{name} {text.partition('-')[0]}" for name, text in report.versions.items()))
        add_line("loading", f"{report.load_seconds:.2f} s")
    if report.pictures:
        add_line("self-test", _self_test(report))
        lines += [f"  {'':<10} {image.file}: {image.problem}" for image in report.pictures if image.problem]
    if report.images_per_second is not None and report.net_images_per_second is not None:
        rates = f"{report.images_per_second:.1f} images/s with decoding, {report.net_images_per_second:.1f} without"
        add_line("speed", rates)
    if report.peak_memory_bytes:
        add_line("memory", f"{report.peak_memory_bytes / 1e6:.0f} MB at peak")
    add_line("verdict", "ok" if report.problem is None else f"FAILED: {report.problem}")
    return lines


def _self_test(report: CheckReport) -> str:
    passed = sum(image.problem is None for image in report.pictures)
    differences = [image.difference for image in report.pictures if image.difference is not None]
    text = f"{passed} of {len(report.pictures)} images give the recorded results ({report.reference})"
    if not differences or report.tolerance is None:
        return text
    return f"{text}; largest difference {max(differences):.2g}, allowed {report.tolerance:.2g}"
