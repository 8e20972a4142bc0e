"""BentoML: a worker process for each core, with threads for requests that come to the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from classifier import Classifier, cores


@bentoml.service(workers=cores(), threads=cores(), traffic={"timeout": 60}, logging={"access": {"enabled": False}})
class Service:
    """The model behind POST /predict."""

    def __init__(self) -> None:
        """Load the model in a worker."""
        self.classifier = Classifier.from_environment(threads=cores())

    @bentoml.api
    def predict(self, image: Path) -> Any:
        """Classify the field `image` of a form."""
        return self.classifier.classify(image.read_bytes())
