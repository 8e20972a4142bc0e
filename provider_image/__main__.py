"""The command `mlg-provider`, also `python -m provider_image`: the entry point on a provider.

Imports only the standard library, hence argparse and not click: the provider image has no other packages. One process
is started per chunk, so each command imports what only it needs.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from provider_image.environment import Environment
from provider_image.errors import MlgError
from provider_image.precision import FASTEST, PRECISIONS
from provider_image.schemas import MAX_CHUNK_SECONDS

if TYPE_CHECKING:
    from provider_image.backends import Device
    from provider_image.check import CheckReport

_DEFAULT_KEEP_WARM_SECONDS = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. :return: the exit status; 1 after an error, which is one line on standard error."""
    environment = Environment(os.environ)
    is_debugging = False
    try:
        is_debugging = environment.boolean("MLG_DEBUG", False)
        options = _parser(environment).parse_args(arguments)
        if options.command == "run" and options.threads is not None:
            from provider_image.cores import limit_cores

            limit_cores(options.threads)  # also for the warm process that it may start
        if options.command == "serve" and options.cores is not None:
            from provider_image.cores import use_cores

            use_cores(options.cores)  # before any thread is started
        if options.command == "run" and not options.cold:
            _run_warm(options, environment)
            return 0
        _prepare_for_work()
        if options.command == "device":
            from provider_image.backends import Device
            from provider_image.backends.onnxruntime import check_device

            print(check_device(Device(name=options.name, threads=1)))
            return 0
        if options.command == "check":
            if options.confined:
                from provider_image.system_calls import MAX_CPU_SECONDS, confine, memory_limit_bytes

                confine(memory_limit_bytes(), MAX_CPU_SECONDS, map(Path, options.names))
            return _check(options)
        _run_here(options)
    except (MlgError, OSError) as error:
        if is_debugging:
            import traceback

            traceback.print_exc()
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as in shells, and without a traceback for Ctrl-C
    return 0


def _prepare_for_work() -> None:
    import logging
    import warnings

    # An item is worked on by one core. Otherwise numpy would start a thread for each core, which wait for one another
    # in every product of matrices. That takes four times the processor time where other processes are busy.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    # Pillow warns of invalid metadata in images, about which nothing can be done here.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _device(options: argparse.Namespace) -> Device:
    from provider_image.backends import Device
    from provider_image.cores import available_cores

    threads = options.threads or available_cores()
    if options.command != "serve":
        return Device(threads=threads, precision=options.precision)
    return Device(name=options.device, threads=threads, precision=options.precision, batch_items=options.batch_items)


def _run_warm(options: argparse.Namespace, environment: Environment) -> None:
    from provider_image.pipes import ACCEPTS_NEXT, accepts_next
    from provider_image.warm_client import run, server_folder

    keep_warm_seconds = environment.number(
        "MLG_KEEP_WARM_SECONDS", _DEFAULT_KEEP_WARM_SECONDS, minimum=0.1, maximum=86400
    )
    run(
        options.chunk,
        options.results,
        models=options.models,
        runtime_root=options.place,
        threads=options.threads,
        precision=options.precision,
        keep_warm_seconds=keep_warm_seconds,
        limit_seconds=options.timeout,
    )
    if accepts_next(server_folder(options.place, options.models, options.threads, options.precision)):
        print(ACCEPTS_NEXT)  # a requestor reads it, who cannot know which version runs here


def _run_here(options: argparse.Namespace) -> None:
    from provider_image.runtime import NetCache, run_chunk
    from provider_image.warm_server import serve

    if options.command == "run":
        run_chunk(options.chunk, options.results, NetCache(options.models, _device(options)))
        return
    nets = NetCache(options.models, _device(options), max_bytes=options.models_bytes)
    serve(
        options.place,
        nets,
        idle_seconds=options.idle_seconds,
        exit_with_stdin=options.exit_with_stdin,
        on_ready=lambda: print("ready", flush=True),
        has_pipes=options.pipes,
        chunks=options.chunks,
    )


def _check(options: argparse.Namespace) -> int:
    from provider_image.check import check_in_process, check_model, print_reports, record_speed
    from provider_image.models.registry import find_folder, installed_folders

    folders = [find_folder(options.models, text) for text in options.names] or installed_folders(options.models)

    def check(folder: Path) -> CheckReport:
        if len(folders) > 1:
            # One process per model: the memory in a report must not include that of the previous models.
            return check_in_process(folder, options.models, threads=options.threads, precision=options.precision)
        name = folder.name if folder.parent == options.models else None
        report = check_model(folder, _device(options), installed_as=name)
        if not options.confined:  # else the process that started this one does, and it may not write here
            record_speed(report, options.models)
        return report

    write = functools.partial(print, flush=True)
    return 0 if print_reports(map(check, folders), as_json=options.json, write=write) else 1


def _parser(environment: Environment) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlg-provider",
        description="Classifies chunks of images: reads a chunk file, writes a results file.",
        epilog="example:\n  mlg-provider run chunk.zip results.zip\n\nMLG_DEBUG=1 shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="process one chunk",
        description="Process one chunk in a warm process, which keeps models loaded; start one if none is running.",
        epilog=(
            "example:\n  mlg-provider run chunk.zip results.zip --models ~/.mlg/models\n\n"
            "A warm process exits after MLG_KEEP_WARM_SECONDS (default: 300) without work."
        ),
    )
    run.add_argument("chunk", type=Path, metavar="CHUNK.zip", help="the chunk file")
    run.add_argument("results", type=Path, metavar="RESULTS.zip", help="where to write the results file")
    run.add_argument(
        "--place",
        type=_path,
        metavar="DIR",
        default=environment.path("MLG_PLACE", "") if environment.text("MLG_PLACE", "") else None,
        help="folder for the warm processes' sockets (default: MLG_PLACE, else /tmp/mlg-UID)",
    )
    run.add_argument(
        "--timeout",
        type=_seconds,
        metavar="S",
        default=MAX_CHUNK_SECONDS,
        help="end the warm process if it needs more than S seconds for the chunk (default: %(default)g)",
    )
    run.add_argument("--cold", action="store_true", help="process the chunk in this process, not in a warm one")
    serve = commands.add_parser(
        "serve",
        help="run as a warm process",
        description=(
            "Keep models loaded and process chunks, in their order, that are sent to a Unix socket in DIR: "
            'each line {"chunk": PATH, "results": PATH} is answered by a line {"ok": true, "seconds": S}. '
            "Prints `ready` when it accepts connections. SIGTERM ends it after the current chunk."
        ),
        epilog="example:\n  mlg-provider serve --place /tmp/warm --models ~/.mlg/models --idle-seconds 60",
    )
    serve.add_argument(
        "--place",
        type=_path,
        metavar="DIR",
        required=True,
        help="folder for the lock and the socket, which must be private or is made",
    )
    serve.add_argument(
        "--idle-seconds",
        type=_seconds,
        metavar="S",
        default=_DEFAULT_KEEP_WARM_SECONDS,
        help="exit after S seconds without work; 0 disables this (default: %(default)g)",
    )
    serve.add_argument(
        "--models-bytes",
        type=int,
        metavar="N",
        help=(
            "most memory of models that stay loaded, and of what a chunk takes beside them; one model may need more "
            "(default: half of the memory)"
        ),
    )
    serve.add_argument(
        "--pipes", action="store_true", help="also take the chunks that `next` of the provider image gives it"
    )
    serve.add_argument(
        "--device",
        metavar="NAME",
        default="cpu",
        help="cpu, or for example cuda:0, a GPU, on which models for onnxruntime run then (default: %(default)s)",
    )
    serve.add_argument(
        "--batch-items",
        type=_threads,
        metavar="N",
        default=1,
        help="items that a model for onnxruntime gets at once, from all chunks under way (default: %(default)s)",
    )
    serve.add_argument(
        "--chunks",
        type=_threads,
        metavar="N",
        default=1,
        help="chunks under way at the same time, which share the threads (default: %(default)s)",
    )
    serve.add_argument(
        "--cores",
        type=_cores,
        metavar="LIST",
        help="run on these cores only, for example 0-3,8 (default: those that the process may use)",
    )
    serve.add_argument("--exit-with-stdin", action="store_true", help="exit immediately when standard input is closed")
    check = commands.add_parser(
        "check",
        help="check the installed models",
        description=(
            "Check models on this machine: verify their files, compare the results for the self-test images with "
            "those recorded when the model was built, and measure speed and memory. The exit status is 0 only if all "
            "models pass."
        ),
        epilog="example:\n  mlg-provider check --models ~/.mlg/models\n  mlg-provider check efficientnet_lite0 --json",
    )
    check.add_argument(
        "names", nargs="*", metavar="MODEL", help="name of a model, or path of its folder (default: all in --models)"
    )
    check.add_argument("--json", action="store_true", help="write JSON, one object per line")
    check.add_argument("--confined", action="store_true", help=argparse.SUPPRESS)  # for `check_in_process`
    device = commands.add_parser(
        "device",
        help="try a device",
        description="Load onnxruntime and run a trivial model on a device; the exit status is 0 only if that works.",
        epilog="example:\n  mlg-provider device cuda:0",
        formatter_class=parser.formatter_class,
    )
    device.add_argument("name", metavar="NAME", help="cpu, or for example cuda:0")
    home = environment.path("MLG_HOME", "~/.mlg")
    for command in (run, serve, check):
        command.formatter_class = parser.formatter_class
        command.add_argument(
            "--models",
            type=_path,
            metavar="DIR",
            default=home / "models",
            help="folder of the models (default: %(default)s)",
        )
        command.add_argument(
            "--threads",
            type=_threads,
            metavar="N",
            help="items processed at the same time (default: the number of cores)",
        )
        command.add_argument(
            "--precision",
            choices=(*PRECISIONS, *([] if command is check else [FASTEST])),
            default="f32",
            help="precision of the inference (default: %(default)s)",
        )
    return parser


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1024")
    return int(text)


def _cores(text: str) -> frozenset[int]:
    from provider_image.cores import parse_cores

    try:
        cores = parse_cores(text)
    except ValueError:
        cores = frozenset()
    if not cores:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of cores such as 0-3,8")
    return cores


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e6:  # also refuses nan
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
