"""The `.keras` file of a custom model: checked, and copied for Keras from what was checked.

Called by `custom.py`, and by `keras_applications.py` for weights. No code of the file is run and no file that it names
is read: the config is compared with lists of what is allowed (`keras_config.py`), and weights that refer to other files
are refused. Keras loads a copy with nothing else in it, so that two readers cannot see different things in one archive.
Weakness: the HDF5 library reads
damaged files, which is why the command runs all of this in a confined process (`confined.py`).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from provider_image.compiler.keras_config import check_config
from provider_image.errors import CompilerMissing, UnsafeModelFile, UnsuitableModel, WeightsMissing

_WEIGHTS_FILE = "model.weights.h5"
#: Members of the archive -> their largest sizes in bytes.
_MEMBERS = {"metadata.json": 65_536, "config.json": 16 * 1024 * 1024, _WEIGHTS_FILE: 4 * 1024**3}
#: Largest ratio of the size of a member to its stored size, above the first megabyte.
_MAX_EXPANSION = 100
_BOMB_ALLOWANCE_BYTES = 1024 * 1024
#: Most groups and arrays in the weights.
_MAX_OBJECTS = 200_000
#: gzip, shuffle, fletcher32, which are part of HDF5. For any other filter it would load a plug-in library.
_FILTERS = frozenset({1, 2, 3})
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_RESAVE_HINT = 'Load it where it was made and save it with Keras 3: model.save("model.keras")'


@dataclass(frozen=True, kw_only=True)
class CheckedFile:
    """A file that Keras may load."""

    #: The copy with only what was checked.
    copy: Path
    #: Digest of the file as the user gave it.
    sha256: str
    #: Its name, for messages.
    display_name: str


def _refusal(what: str) -> UnsafeModelFile:
    return UnsafeModelFile(f"{what} {_RESAVE_HINT}")


def check_keras_file(path: Path, folder: Path) -> CheckedFile:
    """Check a `.keras` file and write a copy of what was checked.

    :param folder: private folder for the copy and, temporarily, the unpacked weights.
    :raises WeightsMissing: there is no such file.
    :raises UnsafeModelFile: it could run code or read files, or cannot be checked; names the part.
    :raises OSError: the folder cannot be written.
    """
    if path.is_dir():
        raise _refusal(f"{path} is a folder; a SavedModel contains code.")
    try:
        source = path.open("rb")
    except OSError as error:
        raise WeightsMissing(f"The model file {path} cannot be read: {error.strerror or error}") from error
    with source:
        if source.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC:
            raise _refusal(f"{path.name} is a legacy HDF5 file, which can contain code.")
        source.seek(0)
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
        try:
            config = _unpack(source, path, folder)
        except UnsafeModelFile as error:
            raise UnsafeModelFile(f"{path.name} is refused. {error.reason}") from error
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
            raise _refusal(f"{path.name} is not a valid .keras file ({error}).") from error
    weights, copy = folder / _WEIGHTS_FILE, folder / "checked.keras"
    try:
        check_weights(weights)
    except UnsafeModelFile as error:
        raise UnsafeModelFile(f"{path.name} is refused. {error.reason}") from error
    with zipfile.ZipFile(copy, "w") as archive:
        archive.writestr("metadata.json", json.dumps({"keras_version": "3", "date_saved": ""}))
        archive.writestr("config.json", json.dumps(config))
        archive.write(weights, _WEIGHTS_FILE)
    weights.unlink()
    return CheckedFile(copy=copy, sha256=sha256, display_name=path.name)


def load_checked(keras: Any, checked: CheckedFile) -> Any:
    """Load a checked file. :raises UnsuitableModel: this version of Keras cannot load it."""
    try:
        return keras.models.load_model(str(checked.copy), compile=False, safe_mode=True)
    except Exception as error:  # inconsistent values can make Keras raise anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsuitableModel(
            f"Keras {keras.__version__} cannot load {checked.display_name}: {first_line[:300]} {_RESAVE_HINT}"
        ) from error


def _unpack(source: IO[bytes], path: Path, folder: Path) -> dict[str, Any]:
    """Check the archive, unpack the weights into the folder, and return the checked config."""
    with zipfile.ZipFile(source) as archive:
        members = archive.infolist()
        unexpected = sorted({info.filename for info in members} - _MEMBERS.keys())
        if unexpected:
            raise UnsafeModelFile(
                f"It contains {unexpected[0][:80]!r}. Only {', '.join(sorted(_MEMBERS))} are allowed; layers with "
                "further files (vocabularies, lookup tables) are not supported."
            )
        if sorted(info.filename for info in members) != sorted(_MEMBERS):
            raise _refusal(f"It must contain {', '.join(sorted(_MEMBERS))}, each once.")
        for info in members:
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _refusal(f"Its {info.filename} is encrypted or has an unsupported compression.")
            if info.file_size > _MEMBERS[info.filename] or _is_bomb(info.file_size, info.compress_size):
                raise UnsafeModelFile(
                    f"Its {info.filename} would unpack to {info.file_size} bytes, which is more than allowed. "
                    f"{_RESAVE_HINT}"
                )
        config = check_config(archive.read("config.json"))
        with archive.open(_WEIGHTS_FILE) as packed, (folder / _WEIGHTS_FILE).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1024 * 1024)
    return config


def check_weights(path: Path) -> None:
    """Check that an HDF5 file contains only numbers and no references to other files, whose bytes would be published.

    :raises UnsafeModelFile: it does not; names the entry.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise CompilerMissing() from error
    try:
        with h5py.File(path, "r") as file:
            seen: set[int] = set()
            total_bytes = 0
            groups = [file]
            while groups:
                group = groups.pop()
                for name in group:
                    location = f"{group.name.rstrip('/')}/{name}"[:200]
                    # Reads the link, not its target, which would open the other file.
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                        raise _refusal(f"Its weights refer to another file or place at {location}.")
                    entry = group[name]
                    address = h5py.h5o.get_info(entry.id).addr
                    if address in seen or len(seen) > _MAX_OBJECTS:
                        raise _refusal(f"Its weights hold {location} twice, or too many entries.")
                    seen.add(address)
                    if isinstance(entry, h5py.Group):
                        groups.append(entry)
                    else:
                        total_bytes += _check_array(h5py, entry, location)
                    if total_bytes > _MEMBERS[_WEIGHTS_FILE]:
                        raise UnsafeModelFile(f"Its weights unpack to more than {_MEMBERS[_WEIGHTS_FILE]} bytes.")
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _refusal(f"Its {_WEIGHTS_FILE} is damaged ({error}).") from error


def _check_array(h5py: Any, entry: Any, location: str) -> int:
    """Check one array of the weights and return its size in bytes. :raises UnsafeModelFile:"""
    if not isinstance(entry, h5py.Dataset):
        raise _refusal(f"Its weights contain something other than numbers at {location}.")
    if entry.is_virtual or entry.external:
        raise _refusal(f"Its weights take {location} from another file.")
    creation = entry.id.get_create_plist()
    if any(creation.get_filter(number)[0] not in _FILTERS for number in range(creation.get_nfilters())):
        raise _refusal(f"Its weights need a plug-in to unpack {location}.")
    # bfloat16 is stored as two opaque bytes.
    if entry.dtype.kind not in "fiub" and entry.dtype.str != "|V2":
        raise _refusal(f"Its weights contain something other than numbers at {location}.")
    size_bytes = int(entry.dtype.itemsize) * int(entry.size or 0)
    if _is_bomb(size_bytes, entry.id.get_storage_size()):
        raise _refusal(f"Its weights would unpack {location} to {size_bytes} bytes.")
    return size_bytes


def _is_bomb(size_bytes: int, stored_bytes: int) -> bool:
    return size_bytes > _BOMB_ALLOWANCE_BYTES + _MAX_EXPANSION * stored_bytes
