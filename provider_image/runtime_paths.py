"""The folders of warm processes and the paths of their sockets.

Used by the warm process, by its client and by the local executor. The client is started for every chunk, so this module
imports only what that needs.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from provider_image.errors import ConfigError

#: The limit of Linux is 107 bytes; a margin is left for temporary names.
_MAX_SOCKET_PATH_BYTES = 100


def user_runtime_folder() -> Path:
    """Return this user's folder for sockets, whose path is always short enough. It may not exist yet."""
    return Path(f"/tmp/mlg-{os.getuid()}")


def socket_path(runtime_folder: Path) -> Path:
    """Return the path of the socket of the warm process with this folder."""
    path = runtime_folder.absolute() / "socket"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    return user_runtime_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.socket"


def make_private_folder(path: Path) -> Path:
    """Make a folder that only this user can access. One that exists is not changed, because it may have other uses.

    :raises ConfigError: the path is a link, or a folder that another user owns or can access, or it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(f"{path} is a link or belongs to another user. Remove it or choose another --place.")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise ConfigError(f"Other users can access {path}. Choose a --place that does not exist yet.")
    except OSError as error:
        raise ConfigError(f"The folder {path} cannot be used: {error}") from error
    return path
