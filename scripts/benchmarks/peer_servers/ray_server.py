"""Ray Serve: a replica for each core, with the settings for throughput and its own HAProxy in front."""

import signal
import sys
from typing import Any

import ray
from classifier import Classifier, cores
from fastapi import FastAPI, UploadFile
from ray import serve

app = FastAPI()


@serve.deployment(num_replicas=cores(), max_ongoing_requests=16, ray_actor_options={"num_cpus": 1})
@serve.ingress(app)
class Service:
    """The model behind POST /predict."""

    def __init__(self) -> None:
        """Load the model in a replica."""
        self.classifier = Classifier.from_environment(threads=1)

    @app.post("/predict")
    def predict(self, image: UploadFile) -> Any:
        """Classify the field `image` of a form."""
        return self.classifier.classify(image.file.read())


if __name__ == "__main__":
    ray.init(num_cpus=cores(), _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Service.bind())
    # Ray has set a handler of its own, which does not end what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    signal.pause()
