"""Builds from files of strangers in a process of their own: without a network, and with limits.

Called by `mlg models compile`. Keras, HDF5 and tensorflow read such files in C code, and a small file may describe a
huge network. The process may use a share of the memory and some processor time, opens no socket, cannot trace other
processes, gets no secrets, reads no files of the user but those that its arguments name, writes into the models folder
and a temporary one only, and ends with its parent. What it says is only used after it was checked. Weaknesses: it can
change other models, and where the system cannot restrict it (`provider_image/system_calls.py`) it keeps the network or
the user's files; the steps then say so.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from provider_image.compiler.installing import build_folder
from provider_image.environment import without_secrets
from provider_image.errors import CompilationFailed, MlgError, error_from_reply
from provider_image.models.artefact import Artefact, is_model_name, read_artefact
from provider_image.system_calls import MAX_CPU_SECONDS, confine, memory_limit_bytes

logger = logging.getLogger(__name__)

#: Longest line that is read from it.
_MAX_LINE_BYTES = 65_536
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def build(
    target: str,
    models: Path,
    name: str,
    *arguments: Any,
    on_step: Callable[[str], None] = lambda step: None,
    max_bytes: int | None = None,
    max_cpu_seconds: int = MAX_CPU_SECONDS,
    **options: Any,
) -> Artefact:
    """Call a builder in a confined process.

    :param target: "module:function" of the builder, which takes the models folder, the arguments and the options. It
        may read the files that these name, also in the fields of a record.
    :param name: the model's name.
    :param on_step: called with the name of each step.
    :param max_bytes: most memory; None takes `memory_limit_bytes`.
    :raises MlgError: as the builder.
    :raises CompilationFailed: the process ended without an answer, for example because of its limits.
    """
    max_bytes = memory_limit_bytes() if max_bytes is None else max_bytes
    # The folder for relative paths: the process starts in another, where it finds this package.
    job = pickle.dumps((Path.cwd(), target, max_bytes, max_cpu_seconds, (models, *arguments), options))
    if is_model_name(name):  # otherwise the builder refuses it
        models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mlg-build-") as folder:
        # Keras would read and write its own settings elsewhere.
        own = {"TMPDIR": folder, "KERAS_HOME": folder, "PYTHONSAFEPATH": ""}
        process = subprocess.Popen(
            [sys.executable, "-m", "provider_image.compiler.confined", str(os.getpid())],
            cwd=_PACKAGE_PARENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**without_secrets(os.environ), **own},
        )
        return _follow(process, job, models, name, on_step=on_step, limits=(max_bytes, max_cpu_seconds))


def _follow(
    process: subprocess.Popen[bytes],
    job: bytes,
    models: Path,
    name: str,
    *,
    on_step: Callable[[str], None],
    limits: tuple[int, int],
) -> Artefact:
    """Give a process its job, and wait for its end. :return, raises: as `build`. :param limits: for messages."""
    assert process.stdin is not None and process.stdout is not None
    reply: dict[str, Any] | None = None
    is_done = False
    try:
        with process.stdin as stdin:
            stdin.write(job)
        while line := process.stdout.readline(_MAX_LINE_BYTES):
            message = _parse(line)
            if "step" in message:
                on_step(_printable(message["step"])[:200])
            else:
                reply = message
        status = process.wait()
        is_done = reply == {"done": True} and status == 0
    except BrokenPipeError:
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if not is_done and is_model_name(name):
            with build_folder(models, name):
                pass  # this has removed what it left
    if is_done:
        return read_artefact(models / name)
    if reply is not None and isinstance(reply.get("error"), dict):
        raise error_from_reply({**reply["error"], "reason": _printable(reply["error"].get("reason"))})
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    max_bytes, max_cpu_seconds = limits
    raise CompilationFailed(
        f"The process that builds {name} {how}. It may use {max_bytes / 1e9:.1f} GB of memory and {max_cpu_seconds} s "
        "of processor time: the model needs more than that, or its file is damaged."
    )


def _printable(text: object) -> str:
    return "".join(filter(str.isprintable, str(text)))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


# In the process


def main(parent: int) -> int:
    """Run the builder that standard input describes, and write its steps and its end as lines of JSON."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no message
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which kills this process

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")

    folder, target, max_bytes, max_cpu_seconds, arguments, options = pickle.loads(sys.stdin.buffer.read())
    os.chdir(folder)
    readable = _paths((arguments, options))
    problems = confine(max_bytes, max_cpu_seconds, readable, [arguments[0], Path(os.environ["TMPDIR"])])
    for what, problem in problems.items():
        send({"step": f"{what} cannot be taken from the process: {problem}"})
    if os.getppid() != parent:  # it ended before this process would have been told
        return 1
    module, _, function = target.partition(":")
    try:
        getattr(importlib.import_module(module), function)(
            *arguments, on_step=lambda step: send({"step": step}), **options
        )
    except MlgError as error:
        send({"error": error.to_reply()})
        return 1
    except Exception as error:
        logger.exception("build failed")
        send({"error": CompilationFailed(f"{type(error).__name__}: {error}"[:1000]).to_reply()})
        return 1
    send({"done": True})
    return 0


def _paths(value: object) -> Iterator[Path]:
    """Yield the paths in arguments: also those in lists, mappings and the fields of records."""
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _paths([getattr(value, each.name) for each in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from _paths(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _paths(each)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
