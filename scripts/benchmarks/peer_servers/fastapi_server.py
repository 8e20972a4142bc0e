"""FastAPI, run by `uvicorn --workers`: a process for each core; requests are computed in its pool of threads."""

from __future__ import annotations

from typing import Any

from classifier import Classifier, cores
from fastapi import FastAPI, UploadFile

classifier = Classifier.from_environment(threads=cores())
app = FastAPI()


# Not `async`: such a function runs in a thread, so that others of the same process go on.
@app.post("/predict")
def predict(image: UploadFile) -> Any:
    """Classify the field `image` of a form."""
    return classifier.classify(image.file.read())
