"""The errors of the server, and the HTTP status of every error that a client can get.

Raised in all of `server/`; `server/api/responses.py` turns them into responses. No message may repeat an API key or a
part of one.
"""

from __future__ import annotations

from collections.abc import Mapping

from provider_image import errors
from provider_image.compiler.versions import UnknownVersion
from provider_image.errors import BadInput, MlgError, TooManyBytes
from store import errors as store_errors
from store.batches import BatchInProgress, BatchStopped, DuplicateClientId
from store.clients.idempotency import IdempotencyKeyReused
from store.clients.keys import UnknownKey
from store.clients.webhooks import UnknownWebhook
from store.collections.collections import CollectionExists
from store.collections.likeness import ComparisonTooLong
from store.pipelines.definition import InvalidPipeline
from store.rentals.providers import UnknownProvider
from store.trainings.records import (
    NameTaken,
    TooManyModels,
    TooManyTrainings,
    TrainingEnded,
    TrainingInProgress,
    VersionInUse,
)

# Access


class AccessRefused(MlgError):
    """This is not allowed."""

    permanent = True


class KeyMissing(AccessRefused):
    """An API key is required: send the header `Authorization: Bearer KEY`. An operator creates one: mlg keys create"""


class KeyRefused(AccessRefused):
    """The API key is unknown, expired or revoked. An operator creates a new one: mlg keys create"""


class ScopeMissing(AccessRefused):
    """The API key lacks the scope for this."""


class CrossSite(AccessRefused):
    """A page of another site sent this. Use the pages of this server, or send the request from a program."""


class WrongHost(AccessRefused):
    """This server does not serve this host name. Add it to MLG_ALLOWED_HOSTS, or use http://127.0.0.1"""


class RateLimited(store_errors.LimitReached):
    """The API key sends too many requests. Send the next one when this minute is over."""


# Intake


class FetchingDisabled(AccessRefused):
    """This server fetches no images. Send the image itself; an operator may allow URLs with MLG_FETCH_URLS=1."""

    code = "fetching_is_off"


class UrlRefused(BadInput):
    """This URL is not fetched. It must be https, on port 443, of a public host."""


class FetchFailed(MlgError):
    """The image could not be fetched. Check its URL, or send the image itself."""


class PoorQuality(BadInput):
    """The image does not meet the limits of quality that were sent with it. Send a better one."""


class NotMeasured(MlgError):
    """The quality of the image could not be measured. Send it again, or without limits."""


class FacesDisabled(AccessRefused):
    """This server takes no images of faces, which are biometric data. An operator allows them with MLG_FACES=on."""

    code = "faces_are_off"


class LengthMissing(BadInput):
    """This body needs a Content-Length: without one, a connection that broke would look like its end."""


class TooManyUploads(MlgError):
    """Too many requests of this client are being received at once. Send it again in a moment."""


class TooManyDownloads(MlgError):
    """Too many large responses are being sent to this client. Read one to its end, and send the request again."""


class UnsupportedMediaType(BadInput):
    """This content type is not accepted. Send multipart/form-data with the field `image`, or raw bytes as image/*."""


class TooManyItems(TooManyBytes):
    """A batch takes at most 10000 images. Send several batches."""


class BacklogFull(MlgError):
    """Too many requests are waiting already. Send the image again later."""


class KeyUnderWay(MlgError):
    """The first request under this Idempotency-Key is still running. Send it again in a moment."""


# Collections


class ModelChanged(MlgError):
    """The model was installed anew since, so its vectors cannot be compared with those of the collection."""

    permanent = True


class NotEmbedded(MlgError):
    """There is no vector of the image, because its request has ended without one."""

    permanent = True


class SearchBusy(MlgError):
    """Too many searches are running already. Send it again in a moment."""


class IndexBehind(SearchBusy):
    """The collection is being made ready to be searched. Send it again in a moment."""


# Live events and webhooks


class StreamsFull(MlgError):
    """Too many event streams are open. Try again in a moment, or read with ?wait=SECONDS instead."""


class DeliveryFailed(MlgError):
    """The receiver could not be reached."""


#: HTTP status -> the errors that have it.
_KINDS: Mapping[int, tuple[type[MlgError], ...]] = {
    500: (MlgError,),
    400: (BadInput,),
    401: (KeyMissing, KeyRefused),
    403: (AccessRefused,),
    404: (
        errors.UnknownModel,
        store_errors.UnknownRequest,
        UnknownKey,
        UnknownProvider,
        UnknownVersion,
        UnknownWebhook,
    ),
    409: (
        store_errors.NotCancellable,
        store_errors.NotRetryable,
        store_errors.NotRemovable,
        BatchInProgress,
        BatchStopped,
        DuplicateClientId,
        NameTaken,
        TooManyModels,
        TooManyTrainings,
        TrainingEnded,
        TrainingInProgress,
        VersionInUse,
        KeyUnderWay,
        CollectionExists,
        ComparisonTooLong,
        ModelChanged,
        NotEmbedded,
    ),
    410: (store_errors.ImageGone,),
    411: (LengthMissing,),
    413: (errors.ImageTooLarge, TooManyBytes),
    415: (errors.UnsupportedFormat, UnsupportedMediaType),
    421: (WrongHost,),
    422: (IdempotencyKeyReused, PoorQuality),
    429: (store_errors.LimitReached,),
    502: (FetchFailed,),
    503: (
        errors.NotInstalled,
        errors.ModelError,
        InvalidPipeline,
        errors.DecodingUnavailable,
        BacklogFull,
        NotMeasured,
        SearchBusy,
        StreamsFull,
        TooManyDownloads,
        TooManyUploads,
        store_errors.StoreError,
    ),
    507: (store_errors.DiskFull,),
}
#: HTTP status of each error: the class's own row, else that of its nearest base class.
HTTP_STATUS = {kind: status for status, kinds in _KINDS.items() for kind in kinds}
#: Seconds after which a client may try again, for temporary errors; looked up in the same way.
RETRY_AFTER_SECONDS: Mapping[type[MlgError], int] = {
    store_errors.StoreBusy: 1,
    store_errors.StoreError: 5,
    store_errors.DiskFull: 60,
    BacklogFull: 30,
    SearchBusy: 1,
    IndexBehind: 3,
    StreamsFull: 5,
    TooManyDownloads: 1,
    TooManyUploads: 1,
    KeyUnderWay: 1,
    errors.DecodingUnavailable: 2,
    errors.NotInstalled: 60,
    errors.ModelError: 60,
}


def http_status(kind: type[MlgError]) -> int:
    """Return the HTTP status of an error."""
    return next((HTTP_STATUS[base] for base in kind.__mro__ if base in HTTP_STATUS), 500)


def retry_after_seconds(kind: type[MlgError]) -> int | None:
    """Return the seconds after which a client may try again; None for an error that does not pass by itself."""
    return next((RETRY_AFTER_SECONDS[base] for base in kind.__mro__ if base in RETRY_AFTER_SECONDS), None)
