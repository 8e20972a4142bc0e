"""The records of trainings, their states and errors."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from provider_image.errors import MlgError
from store.errors import UnknownRequest


class TrainingKind(enum.StrEnum):
    """What a training learns from."""

    #: Images with a class or a number; a head on the features of a backbone.
    IMAGES = "images"
    #: The rows of a table.
    TABLE = "table"
    #: Texts.
    TEXT = "text"


class TrainingState(enum.StrEnum):
    """State of a training: `waiting_for_features -> fitting -> done | failed | cancelled`.

    One whose process was killed goes back to `waiting_for_features`.
    """

    WAITING = "waiting_for_features"
    FITTING = "fitting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Tell whether the state changes no more."""
        return self not in (TrainingState.WAITING, TrainingState.FITTING)


class UnknownTraining(UnknownRequest):
    """There is no training with this id. It was never accepted here, or it was deleted."""


class NameTaken(MlgError):
    """There is a model with this name that was not trained with your key. Choose another name."""

    permanent = True


class TrainingEnded(MlgError):
    """The training has ended already, so it cannot be cancelled."""

    permanent = True


class TrainingInProgress(MlgError):
    """The training has not ended. Cancel it, or wait until it has."""

    permanent = True


class VersionInUse(MlgError):
    """This version of the model is installed. Go back to another one first, then delete this."""

    permanent = True


class TooManyTrainings(MlgError):
    """Too many trainings of this key have not ended. Wait for one of them, or cancel it."""


class TooManyModels(MlgError):
    """The API key has trained as many models as it may. Train one of them again, or delete all trainings of one."""

    permanent = True


@dataclass(frozen=True, kw_only=True)
class TrainingRights:
    """What the key of a training may do."""

    #: It may train again what was trained without a key.
    is_operator: bool = True
    #: Names that it may have trained; None is unlimited.
    max_models: int | None = None


#: Those of an operator, and of everybody where no key is required.
ANY_RIGHTS = TrainingRights()


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One training."""

    #: Unguessable and unique; see `store.new_id`.
    id: str
    #: The name of the model that it makes.
    name: str
    kind: TrainingKind
    state: TrainingState = TrainingState.WAITING
    #: The API key it was sent with; None where none is required.
    key_id: str | None = None
    #: The model whose features are used; None for tables and texts.
    backbone: str | None = None
    #: The column of a table with the class or the number; None where the folders of the images are the classes.
    target: str | None = None
    #: Further options of its kind, by name.
    options: Mapping[str, str] = field(default_factory=dict)
    #: Decides the split, and everything else that is random.
    seed: int = 0
    #: The batch of the requests for features; None for tables and texts.
    batch_id: str | None = None
    #: Examples that were accepted, or rows of the table.
    examples: int = 0
    #: What the process that fits does now; None before and after.
    step: str | None = None
    #: How often its process ended before it had finished.
    failures: int = 0
    #: Counts up with every process that fits; what an earlier one says is dropped.
    token: int = 0
    #: The process that fits, see `process_lock.py`.
    worker: str | None = None
    #: Counts the finished trainings of a name from 1; None before it is done.
    version: int | None = None
    #: Digest of the model that was made.
    digest: str | None = None
    #: How good the model is, as JSON; None before.
    figures: Mapping[str, Any] = field(default_factory=dict)
    #: Name of each file of the result -> its media type.
    files: Mapping[str, str] = field(default_factory=dict)
    #: Code and message of its failure.
    code: str | None = None
    reason: str | None = None
    created_at: datetime
    #: When its last process began to fit.
    started_at: datetime | None = None
    ended_at: datetime | None = None
    #: Counts up in the order of arrival; 0 before it is added.
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingExample:
    """One example of a training from images: the request for its features, and what it is an example of."""

    #: Counts from 0.
    position: int
    request_id: str
    #: The client's name of the image.
    name: str
    #: Its class; None if it has a number.
    label: str | None = None
    #: Its number; None if it has a class.
    target: float | None = None
