"""The rules for requests to models that take images of faces, which are biometric data.

Used by `server/intake/accept.py` and by the pages. A request is accepted only if the operator has turned faces on, and
it is deleted after MLG_FACES_RETENTION with all that belongs to it. Who may compute it is in
`batcher/executors/trusted.py`.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from server.errors import FacesDisabled
from server.intake.request_options import RequestOptions
from server.settings import ServerSettings

#: A request may wait at least so long, however short the retention time is.
_MIN_WAIT_SECONDS = 3600.0


def check_faces(settings: ServerSettings, options: RequestOptions, now: datetime) -> RequestOptions:
    """Return the options of a request to such a model: it waits, and what it leaves is kept, only as long as allowed.

    :raises FacesDisabled: the operator has not turned faces on.
    """
    if not settings.faces:
        raise FacesDisabled()
    seconds = settings.faces_seconds if options.keep_seconds is None else options.keep_seconds
    waits_until = now + timedelta(seconds=max(settings.faces_seconds, _MIN_WAIT_SECONDS))
    deadline_at = waits_until if options.deadline_at is None else min(options.deadline_at, waits_until)
    return replace(options, keep_seconds=min(seconds, settings.faces_seconds), deadline_at=deadline_at)
