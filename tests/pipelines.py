"""Services for tests of pipelines, which find spots and cut them out, with models for them, and a pipeline.

Nothing runs these services: the tests answer their requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batcher.pipelines import PipelineRunner
from provider_image.models.catalogue import ModelFacts
from provider_image.service import IMAGE_INPUT, Input, OutputFile, Param
from provider_image.services import REGISTRY
from store import new_id
from store.files import NewFile
from store.pipelines.definition import PIPELINE, parse_pipeline
from store.requests import Answer, Claim, NewRequest, RequestRecord
from store.states import RequestState
from store.store import Store
from tests.extensions import install_affine

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SPOTS = """
title = "Spots"

[steps.find]
model = "spot_finder"

[steps.cut]
model = "scissors"
for_each = "find.spots"
params = { left = "each.box.left", angle = 3 }

[steps.embed]
model = "efficientnet_lite0_embedding"
image = "cut.image"
when = "each.score >= 0.6"
"""


class Spots:
    """See `provider_image.service.Service`: the part that pipelines need."""

    name = "spots"
    title = "Spots"
    help = "Finds spots."
    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT}
    params: tuple[Param, ...] = ()
    outputs: Mapping[str, OutputFile] = {}
    output_schema: Mapping[str, Any] = {
        "type": "object",
        "properties": {
            "spots": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "box": {"type": "object", "properties": {"left": {"type": "number"}}},
                        "score": {"type": "number"},
                        "caption": {"type": "string"},
                    },
                },
            }
        },
    }

    def view(self, output: Any, params: Any) -> Any:
        return output


class Cut:
    """Likewise."""

    name = "cut"
    title = "Cut"
    help = "Cuts out a part."
    inputs: Mapping[str, Input] = {"image": IMAGE_INPUT}
    params: tuple[Param, ...] = (
        Param(name="left", kind="number", default=0.0, minimum=0, maximum=1000, help="Left."),
        Param(name="angle", kind="number", default=0.0, minimum=-180, maximum=180, help="Angle."),
        Param(name="mode", kind="choice", default="fast", choices=("fast", "fine"), help="Mode."),
    )
    outputs: Mapping[str, OutputFile] = {"image": OutputFile(help="The part.", media_type="image/png", max_bytes=1000)}
    output_schema: Mapping[str, Any] = {"type": "object", "properties": {"width": {"type": "integer"}}}

    def view(self, output: Any, params: Any) -> Any:
        return output


@contextmanager
def pipeline_models(models: Path) -> Iterator[None]:
    """Register the services in this process, and install models for them."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Spots, Cut):
            patch.setitem(REGISTRY._built_in, kind.name, f"{__name__}:{kind.__name__}")  # type: ignore[arg-type]
        for name, service in (("spot_finder", "spots"), ("scissors", "cut"), ("reader", "text")):
            row = ModelFacts(
                name=name, title=name, service=service, height=0, width=0, preprocessing="none", source="own"
            )
            install_affine(models, row, matrix=np.eye(3), bias=np.zeros(3))
        yield


def spot(left: float = 1.0, score: float = 0.9) -> dict[str, Any]:
    """An item of the list that `find` returns."""
    return {"box": {"left": left}, "score": score}


class PipelineBench:
    """A store with requests to a pipeline, a runner, and what a worker would answer."""

    def __init__(self, store: Store, models: Path, text: str = SPOTS, *, now: datetime = NOW) -> None:
        self.store = store
        self.now = now
        self.pipeline = parse_pipeline("dots", text, models)
        self.runner = PipelineRunner(store, models, clock=lambda: self.now)

    def send(self, image: bytes = b"photo", **facts: Any) -> RequestRecord:
        new = NewRequest(
            id=new_id(),
            service=PIPELINE,
            model="dots",
            created_at=self.now - timedelta(seconds=5),
            pipeline=self.pipeline.to_text(),
            **facts,
        )
        return self.store.requests.add(new, self.store.images.stage(image))

    def go_on(self) -> None:
        """Let all runs go on as far as they can without a worker."""
        while self.runner.run_ready():
            pass

    def get(self, id: str) -> RequestRecord:
        return self.store.requests.get(id)

    def claim(self, *models: str, limit: int = 1000) -> list[Claim]:
        chosen = models or {step.model for step in self.pipeline.steps}
        return self.store.requests.claim(
            models=chosen, limit=limit, now=self.now, lease_ends_at=self.now + timedelta(seconds=30), oldest_before=None
        )

    def answer(self, claims: list[Claim], output: Any, **files: bytes) -> None:
        found = {name: NewFile(data=data, media_type="image/png") for name, data in files.items()}
        answers = [
            Answer(claim=one, output=output, digest="d" * 64, chunk_id="c", provider="p", seconds=0.1, files=found)
            for one in claims
        ]
        self.store.requests.finish(answers, now=self.now)

    def fail(self, claims: list[Claim]) -> None:
        self.store.requests.fail(claims, code="broken_image", reason="It is broken.", now=self.now)

    def step(self, model: str, output: Any, **files: bytes) -> int:
        """Answer all queued steps of a model and go on. :return: how many there were."""
        claims = self.claim(model)
        for number, one in enumerate(claims):
            self.answer([one], output, **{name: data + bytes([number]) for name, data in files.items()})
        self.go_on()
        return len(claims)

    def children(self, parent: str, step: str) -> list[RequestRecord]:
        run = self.get(parent).run
        assert run is not None
        return [child for (name, _), child in sorted(run.children.items()) if name == step]

    def statuses(self, parent: str) -> dict[str, list[str]]:
        """The statuses of the steps' entries, by step."""
        run = self.get(parent).run
        assert run is not None
        entries = sorted(
            [(place, str(child.status)) for place, child in run.children.items()]
            + [(place, outcome.status) for place, outcome in run.outcomes.items()]
        )
        found: dict[str, list[str]] = {}
        for (name, _), status in entries:
            found.setdefault(name, []).append(status)
        return found

    def is_done(self, parent: str) -> bool:
        return self.get(parent).state is RequestState.DONE
