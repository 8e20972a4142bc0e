"""LitServe: one worker for each core, which decodes and infers."""

import sys
from typing import Any

import litserve
from classifier import Classifier, cores
from fastapi import Request


class Api(litserve.LitAPI):
    """The model behind POST /predict."""

    def setup(self, device: str) -> None:
        """Load the model in a worker."""
        self.classifier = Classifier.from_environment(threads=1)

    def decode_request(self, request: Request) -> Any:
        """Decode the field `image` of a form."""
        return self.classifier.decode(request["image"].file.read())

    def predict(self, pixels: Any) -> Any:
        """Infer."""
        return self.classifier.infer(pixels)

    def encode_response(self, labels: Any) -> Any:
        """Return what is sent as JSON."""
        return labels


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=cores())
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
