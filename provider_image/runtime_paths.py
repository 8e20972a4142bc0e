"""The places of warm processes: private folders, and paths for sockets that are short enough.

Used by the warm process and by the door that looks for one. The door is started for every chunk, so nothing is imported
here that it does not need.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from provider_image.errors import ConfigError

#: Longest path of a Unix socket on Linux is 107 bytes; some room is left for the temporary names of others.
_MAX_SOCKET_PATH_BYTES = 100


def user_runtime_folder() -> Path:
    """Return this user's folder for sockets, whatever the length of other paths; may not exist yet."""
    return Path(f"/tmp/mlg-{os.getuid()}")


def socket_path(runtime_folder: Path) -> Path:
    """Return the path of the socket of a process that serves in this place."""
    path = runtime_folder.absolute() / "socket"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    return user_runtime_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.socket"


def make_private_folder(path: Path) -> Path:
    """Make a folder that only this user can enter.

    :raises ConfigError: somebody else's folder or a link is in its place, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(f"{path} is a link or belongs to somebody else. Remove it or choose another --place.")
        if stat.S_IMODE(status.st_mode) & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path} cannot be used as a place: {error}") from error
    return path
