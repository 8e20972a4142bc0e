"""An executor whose workers are not trusted, without the models that take images of faces.

Made by `load_executor` around each such executor unless MLG_FACES_REMOTE allows it. With several executors the chunks
go to those that are trusted; else the requests wait and say why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from batcher.errors import ExecutorUnavailable
from batcher.executors import Executor, Job, Outcome
from provider_image.environment import Settings, setting
from provider_image.errors import MlgError
from provider_image.models.artefact import find_artefact
from provider_image.models.catalogue import CATALOGUE

_REASON = (
    "Images of faces are not sent to computers of strangers. They are processed on this machine with "
    "MLG_EXECUTOR=local or golem,local; an operator may send them with MLG_FACES_REMOTE=1."
)


@dataclass(frozen=True, kw_only=True)
class FacesSettings(Settings):
    """Where images of faces may go."""

    #: Send images of faces to computers of strangers too, who can look at them. MLG_FACES_REMOTE. Defaults to 0.
    faces_remote: bool = setting("MLG_FACES_REMOTE", False)


class WithoutFaces:
    """See `batcher.executors.Executor`. :param models: the folder of artefacts."""

    def __init__(self, executor: Executor, models: Path) -> None:
        self._executor = executor
        self._models = models
        self.name = executor.name
        self.is_remote = executor.is_remote
        self.is_trusted = executor.is_trusted

    async def start(self) -> None:
        await self._executor.start()

    def capacity(self, model: str) -> int:
        return self._executor.capacity(model)

    def workers(self) -> int:
        return self._executor.workers()

    def has_quick_transfers(self, model: str) -> bool:
        return self._executor.has_quick_transfers(model)

    def unavailable_reason(self, model: str) -> str | None:
        return _REASON if self._takes_faces(model) else self._executor.unavailable_reason(model)

    async def run(self, job: Job) -> Outcome:
        if self._takes_faces(job.model):
            return Outcome.not_run(ExecutorUnavailable(_REASON))
        return await self._executor.run(job)

    def stop_seconds(self) -> float:
        return self._executor.stop_seconds()

    async def close(self) -> None:
        await self._executor.close()

    def _takes_faces(self, model: str) -> bool:
        row = CATALOGUE.get(model)
        if row is not None and row.takes_faces:
            return True
        try:
            return find_artefact(self._models, model).takes_faces
        except MlgError:
            return row is None  # a model of the operator's own, of which nothing is known now
