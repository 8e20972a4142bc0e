"""The list: pages of requests, newest first, narrowed by what a client asks for, at any depth of a long history.

Used by `server/api/views/requests.py` and by the pages. `Store.list` is for operators' commands.

A page costs a bounded time: only so many requests are looked at. When few of them fit what is asked for, a page comes
back short, or empty, and `next_before` says where to go on; only None is the end. What is asked for alone (a state, a
model, a batch, a label, a key) has an index of its own, so its pages are always full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from provider_image.errors import MlgError

if TYPE_CHECKING:
    from store.chunks import ChunkRecord
    from store.records import RequestRecord


class NotRemovable(MlgError):
    """Only a request that has ended can be deleted. Cancel it first, or wait for its answer."""

    code = "not_removable"
    permanent = True


class ImageGone(MlgError):
    """The picture is not kept any more: its retention time is over."""

    code = "picture_gone"
    permanent = True


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for; what is None does not narrow."""

    #: A state of the store, or "expired"; "cancelled" leaves the expired ones out.
    status: str | None = None
    #: The model's canonical name.
    model: str | None = None
    #: The batch it came in with.
    batch_id: str | None = None
    #: The key it came in with.
    key_id: str | None = None
    #: All of these, as (name, value).
    labels: Sequence[tuple[str, str]] = field(default_factory=tuple)
    #: Came in at that time or later.
    since: datetime | None = None
    #: Came in before that time.
    until: datetime | None = None
    #: The file name has this in it; case does not matter for ASCII letters.
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some of what was looked for, newest first."""

    #: The requests.
    requests: Sequence[RequestRecord]
    #: The page after this one has numbers below this; None at the end.
    next_before: int | None


class Search(Protocol):
    """Looking through many requests, and the end of one."""

    def find(self, query: Query, *, before: int | None = None, limit: int = 50) -> Page:
        """List requests, newest first. :param before: only numbers below this, as the page before said."""

    def get_chunk(self, id: str) -> ChunkRecord | None:
        """Read one dispatch; None when it is not known."""

    def remove(self, id: str) -> None:
        """Delete a request that has ended, with its picture unless another needs it.

        :raises UnknownRequest: :raises NotRemovable:
        """
