"""What an exception of yapapi means, and whose fault it is. Called by `worker.py`."""

from __future__ import annotations

from dataclasses import dataclass

from batcher.errors import GolemUnavailable
from batcher.executors.golem.yapapi_adapter import explain
from provider_image.errors import ChunkTimeout, MalformedResults, MlgError, WorkerDied

#: What yapapi raises when it cannot make sense of what the daemon returned, which may be what the provider sent.
_UNREADABLE = (AssertionError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class AttemptFailure:
    """Why an attempt failed."""

    error: MlgError
    #: True when the provider is at fault, or may be.
    is_provider_fault: bool
    #: True when the local file server can no longer be used.
    is_file_server_fault: bool = False
    #: True when the daemon responds, but its call for the activity failed: its own fault, or what the provider sent it.
    is_unclear: bool = False


def classify_error(error: Exception, what: str) -> AttemptFailure:
    """Return what an exception of yapapi means, and whose fault it is. :param what: the step that failed, as a verb."""
    name, status = type(error).__name__, getattr(error, "status", None)
    if isinstance(error, MlgError):
        found = error
    elif name == "BatchTimeoutError":
        found = ChunkTimeout(f"The provider did not {what} in time.")
    elif name == "CommandExecutionError":
        message = " ".join(f"{getattr(error, 'message', '') or ''} {getattr(error, 'stderr', '') or ''}".split())
        found = WorkerDied(f"The provider could not {what}: {message[:400]}")
    elif name == "BatchError":
        parts = " ".join(str(each) for each in error.args if each)
        found = WorkerDied(f"The provider ended the activity: {parts[:300]}")
    elif name in ("ProtocolError", "TransportError", "JSONDecodeError", "BrokenPipeError") or (
        "gftp" in str(error) and status is None  # what the daemon answers may quote the provider
    ):
        broken = GolemUnavailable(f"The file server gftp failed: {explain(error)}. It is restarted.")
        return AttemptFailure(error=broken, is_provider_fault=False, is_file_server_fault=True)
    elif isinstance(error, FileNotFoundError):
        found = MalformedResults(f"The results file was not downloaded: {error.strerror}.")
    else:
        failed = GolemUnavailable(f"A call to the Golem daemon failed: {explain(error)}.")
        is_unclear = status not in (None, 401) or isinstance(error, _UNREADABLE)
        return AttemptFailure(error=failed, is_provider_fault=False, is_unclear=is_unclear)
    return AttemptFailure(error=found, is_provider_fault=True)
