"""The command `mlg submit`: sends images, texts or table rows to a server, in batches, and collects the results.

It talks to the server only through `mlg_client`. A journal (`journal.py`) records what the server has
acknowledged, so that an interrupted run can be repeated and sends only what is missing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.options import environment, file_option, home_option, url_option
from cli.submission.files import PLAIN_SUFFIXES, find_files, find_input, read_file, split_files
from cli.submission.journal import SentBatch, SubmitJournal
from provider_image.environment import Environment
from provider_image.errors import ConfigError, MlgError
from server.csv_cells import to_cell
from store.errors import StoreUnavailable

if TYPE_CHECKING:
    from rich.progress import Progress

    from mlg_client import Client, Refused, Request

#: Images and bytes per batch. Less than `mlg_client` sends at once, because an interrupted batch is uploaded again.
MAX_BATCH_IMAGES, MAX_BATCH_BYTES = 100, 8 * 1024 * 1024
#: After this time KeyboardInterrupt is raised again, in case Python has dropped the first.
_REPEAT_INTERRUPT_SECONDS = 0.5
#: Columns of a .csv file.
COLUMNS = ("file", "req_id", "status", "rank", "wnid", "label", "probability", "model", "cached", "reason", "code")


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE|DIR...")
@click.option("--model", required=True, metavar="MODEL", help="Model to run; `mlg models` lists them.")
@click.option("--wait", is_flag=True, help="Wait for the results and print them.")
@file_option("--out", "Wait for the results and write them to this .jsonl or .csv file.")
@file_option(
    "--images", "Wait for the results and write those that are images to this folder.", metavar="DIR", file_okay=False
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE",
    help="A further input of the model, the same for all images; may be repeated.",
)
@click.option(
    "--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the model; may be repeated."
)
@url_option
@click.option("--top", type=click.IntRange(1, 20), help="Number of labels per image. [default: 5]")
@click.option(
    "--retry-timeout",
    "--patience",
    "retry_timeout_seconds",
    type=click.FloatRange(0, 86400),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to retry while the server is busy or unreachable.",
)
@home_option
def submit(
    paths: Sequence[Path],
    model: str,
    wait: bool,
    out: Path | None,
    images: Path | None,
    inputs: Sequence[str],
    params: Sequence[str],
    url: str | None,
    top: int | None,
    retry_timeout_seconds: float,
) -> None:
    """Send images, texts or table rows to a server: files, or folders of them.

    To a model that takes texts send .txt files; to one that takes table rows .json files with an object each, or .jsonl
    files with an object in each line.

    After an interruption run the same command again: images that the server has acknowledged are not sent twice, except
    those that have failed, expired or been cancelled since. With another --input or --param they are others.

    Each line on stdout is a file and its request id, separated by a tab; with --wait the status and the best label
    follow, or the JSON of an answer that has no labels. A .jsonl file has the URLs of the answers' files, such as the
    vectors of an embedding. The exit status is 1 if any image failed.

    \b
    Example:
      mlg submit --model efficientnet_lite0 --wait kitten.jpg
      mlg submit --model efficientnet_lite0 --out results.csv photos/
      mlg submit --model efficientnet_lite0_embedding --out vectors.jsonl photos/
      mlg submit --model texture --input style=painting.jpg --images painted/ photos/
      mlg submit --model rent --out rents.csv flats.jsonl
    """
    from mlg_client import Client, ClientError, Unreachable

    home = Environment(environment()).path("MLG_HOME", "~/.mlg")
    if out is not None:
        check_out(out)
    if images is not None:
        make_folder(images)
    extras = Extras.parse(inputs, params)
    rows, input = list[Row](), "image"
    is_waiting = wait or out is not None or images is not None
    _handle_interrupt()
    try:
        with (
            Client(url, retry_timeout_seconds=retry_timeout_seconds) as client,
            SubmitJournal(home, client.url, extras.key(model)) as journal,
            _progress_bars() as progress,
        ):
            input = find_input(paths, client, model)
            files = find_files(paths, PLAIN_SUFFIXES.get(input))
            rows += [Row(file=file) for file in (split_files(files) if input == "row" else files)]
            sent = progress.add_task("sent", total=len(rows))
            answered = progress.add_task("answered", total=len(rows), visible=is_waiting)
            for row in send_all(rows, client, Destination(model=model, input=input), journal, extras, top=top):
                progress.advance(sent)
                if row.request is None:
                    progress.advance(answered)
                elif not is_waiting:
                    _print_line([os.fsencode(row.file), row.request.id.encode()])
            for _ in wait_for_all(rows, client, top=top) if is_waiting else ():
                progress.advance(answered)
            if images is not None:
                save_images(rows, client, images)
    except (ClientError, MlgError, KeyboardInterrupt) as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if rows:
            if out is not None:
                write_rows(rows, out)
            acknowledged = sum(row.request is not None for row in rows)
            click.echo(
                f"mlg: The server has {acknowledged} of {len(rows)} {input}s. Run the same command again to continue.",
                err=True,
            )
        if isinstance(error, KeyboardInterrupt):
            # A normal exit would wait for the client's threads, whose reads the server may hold for seconds.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        if isinstance(error, ClientError):
            hint = " Start it: mlg serve. Or give another address: --url." if isinstance(error, Unreachable) else ""
            raise MlgError(error.reason + hint) from error
        raise
    if out is not None:
        write_rows(rows, out)
    if images is not None and not wait:
        click.echo(f"mlg: {sum(row.image is not None for row in rows)} images are in {images}.", err=True)
    elif out is None and is_waiting:
        for row in rows:
            _print_result(row)
    failed = [row for row in rows if row.is_failed]
    for row in failed:
        click.echo(f"mlg: {os.fsencode(row.file).decode('utf-8', 'replace')}: {row.reason or row.status}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


@dataclass(kw_only=True)
class Row:
    """One file and its current state, updated during the run."""

    #: The path as it was given or found.
    file: Path
    #: The request as the server last reported it; None until it is acknowledged.
    request: Request | None = None
    #: The status of the request; before that "waiting", or "refused" by the server, or "unreadable".
    status: str = "waiting"
    #: Why it failed, for people and for programs.
    reason: str | None = None
    code: str | None = None
    #: Where its image answer is.
    image: Path | None = None

    @property
    def is_failed(self) -> bool:
        """Tell whether there will be no result."""
        return self.status in ("refused", "unreadable", "failed", "cancelled", "expired")

    def update(self, outcome: Request | Refused) -> None:
        """Take over what the server reported."""
        from mlg_client import Refused

        self.reason, self.code = outcome.reason, outcome.code
        if isinstance(outcome, Refused):
            self.status = "refused"
        else:
            self.request, self.status = outcome, outcome.status


@dataclass(frozen=True, kw_only=True)
class Destination:
    """What everything is sent to."""

    model: str
    #: Its name of what it takes.
    input: str


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What is sent beside each image: further inputs and parameters."""

    inputs: Mapping[str, bytes]
    params: Mapping[str, str]

    @classmethod
    def parse(cls, inputs: Iterable[str], params: Iterable[str]) -> Extras:
        """Read NAME=FILE and NAME=VALUE. :raises ConfigError: one is malformed, or the file cannot be read."""
        data: dict[str, bytes] = {}
        for name, path in _pairs("--input", inputs, "FILE").items():
            try:
                data[name] = Path(path).read_bytes()
            except OSError as error:
                raise ConfigError(f"--input {name}: {path} cannot be read: {error.strerror}.") from error
        return cls(inputs=data, params=_pairs("--param", params, "VALUE"))

    def key(self, model: str) -> str:
        """Return what the journal is for: requests with another key are others, though the image is the same."""
        if not self.inputs and not self.params:
            return model.lower()
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in self.inputs.items()}
        return json.dumps([model.lower(), digests, dict(self.params)], sort_keys=True)


def _pairs(option: str, given: Iterable[str], what: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in given:
        name, separator, value = text.partition("=")
        if not name or not separator or name in pairs:
            raise ConfigError(f"{option} takes NAME={what}, each name once, not {text!r}.")
        pairs[name] = value
    return pairs


@dataclass(frozen=True, kw_only=True)
class _SentFile:
    """The contents of a file."""

    file: Path
    data: bytes = field(repr=False)
    sha256: str

    @classmethod
    def read(cls, file: Path) -> _SentFile:
        data = read_file(file)
        return cls(file=file, data=data, sha256=hashlib.sha256(data).hexdigest())


def send_all(
    rows: Sequence[Row],
    client: Client,
    destination: Destination,
    journal: SubmitJournal,
    extras: Extras,
    *,
    top: int | None,
) -> Iterator[Row]:
    """Send the images that the server has not acknowledged yet, or that ended without a result; identical ones once.

    :return: each file when it was acknowledged, now or in an earlier run, or refused, in the order of the files.
    :raises ClientError: the server is unreachable, or refuses every image for this model. The journal has what was
        sent so far.
    """
    # By sha256.
    outcomes = _send_unfinished(rows, client, destination, journal, extras)
    for part in _read_in_parts(rows):
        new: dict[str, _SentFile] = {}
        for _, image in part:
            if image is not None and image.sha256 not in outcomes:
                new.setdefault(image.sha256, image)
        known = {sha256: id for sha256 in new if (id := journal.find(sha256)) is not None}
        for sha256, request in zip(known, client.read_many(known.values(), top=top), strict=True):
            # What ended without a result is sent again.
            if request is not None and (request.status == "done" or not request.is_final):
                outcomes[sha256] = request
        missing = [image for sha256, image in new.items() if sha256 not in outcomes]
        batch = SentBatch(key=uuid.uuid4().hex, files={image.sha256: str(image.file.absolute()) for image in missing})
        if missing:
            journal.begin(batch)
            outcomes |= _send_batch(batch, missing, client, destination, extras)
        for row, image in part:
            if image is not None:
                row.update(outcomes[image.sha256])
        if missing:
            # After the rows, so that an interrupted run shows at least what its journal has.
            _finish(batch, outcomes, journal)
        yield from (row for row, _ in part)


def wait_for_all(rows: Sequence[Row], client: Client, *, top: int | None) -> Iterator[Row]:
    """Wait for the results of all acknowledged images; yields each file that has one.

    :raises ClientError: the server is unreachable.
    """
    requests = {row.request.id: row.request for row in rows if row.request is not None}
    waiting: dict[str, list[Row]] = {id: [] for id in requests}
    for row in rows:
        if row.request is not None:
            waiting[row.request.id].append(row)
    for request in client.as_completed(requests.values(), top=top):
        for row in waiting[request.id]:
            row.update(request)
            yield row


def make_folder(folder: Path) -> None:
    """Make the folder of image answers. :raises ConfigError: it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--images: {folder} cannot be made: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"--images: {folder} cannot be written.")


def save_images(rows: Sequence[Row], client: Client, folder: Path) -> None:
    """Write the image answers into a folder; rows of the same request share a file.

    :raises ClientError: the server is unreachable. :raises StoreUnavailable: a file cannot be written.
    """
    requests = {row.request.id: row.request for row in rows if row.request is not None}
    try:
        files = dict(zip(requests, client.save_images(requests.values(), folder), strict=True))
    except OSError as error:
        raise StoreUnavailable(f"{folder} cannot be written: {error.strerror}.") from error
    for row in rows:
        row.image = files[row.request.id] if row.request is not None else None


def write_rows(rows: Sequence[Row], out: Path) -> None:
    """Write the current state of all files as .jsonl or .csv, atomically.

    :raises StoreUnavailable: the file cannot be written.
    """
    text = io.StringIO(newline="")
    if out.suffix.lower() == ".csv":
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerows({name: to_cell(value) for name, value in one.items()} for one in _csv_rows(row))
    else:
        for row in rows:
            text.write(json.dumps(_json_row(row)) + "\n")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # surrogateescape writes file names that are not UTF-8 as their original bytes.
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreUnavailable(f"{out} cannot be written: {error.strerror}.") from error


def check_out(out: Path) -> None:
    """Check that the results file can be written at the end. :raises ConfigError: it cannot."""
    if out.suffix.lower() not in (".jsonl", ".csv"):
        raise ConfigError(f"--out needs a file name that ends in .jsonl or .csv, not {out.name!r}.")
    if out.is_dir() or not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise ConfigError(f"--out: {out} cannot be written.")


def _handle_interrupt() -> None:
    """Raise KeyboardInterrupt on Ctrl-C, repeatedly: Python drops it where it cannot be raised, as in finalisers."""

    def interrupt(number: int, frame: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_INTERRUPT_SECONDS)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGALRM, interrupt)


def _read_in_parts(rows: Iterable[Row]) -> Iterator[list[tuple[Row, _SentFile | None]]]:
    """Read the files, one batch at a time; the image is None if the file cannot be read."""
    part: list[tuple[Row, _SentFile | None]] = []
    size_bytes = 0
    for row in rows:
        image = None
        try:
            image = _SentFile.read(row.file)
        except OSError as error:
            row.status, row.reason, row.code = "unreadable", f"cannot be read: {error.strerror}", "unreadable"
        image_bytes = len(image.data) if image is not None else 0
        if part and (len(part) == MAX_BATCH_IMAGES or size_bytes + image_bytes > MAX_BATCH_BYTES):
            yield part
            part, size_bytes = [], 0
        part.append((row, image))
        size_bytes += image_bytes
    if part:
        yield part


def _send_unfinished(
    rows: Iterable[Row], client: Client, destination: Destination, journal: SubmitJournal, extras: Extras
) -> dict[str, Request | Refused]:
    """Send the batch that an earlier run left without an answer, under its key, so that the server accepts it once.

    This needs all its files to be given again, unchanged; otherwise its images are sent like any others.

    :return: by sha256.
    """
    from mlg_client import Refused

    batch = journal.unfinished
    given = {str(row.file.absolute()) for row in rows}
    if batch is None or not given.issuperset(batch.files.values()):
        return {}
    try:
        images = [_SentFile.read(Path(file)) for file in batch.files.values()]
        if [image.sha256 for image in images] == list(batch.files):
            outcomes = _send_batch(batch, images, client, destination, extras)
            _finish(batch, outcomes, journal)
            return outcomes
    except OSError:
        pass  # reported when the file is read again, with all others
    except Refused as error:
        # The server has another request under this key: the model was spelled differently, or only a part arrived.
        if error.code != "key_reused":
            raise
    return {}


def _send_batch(
    batch: SentBatch, images: Sequence[_SentFile], client: Client, destination: Destination, extras: Extras
) -> dict[str, Request | Refused]:
    """Send images. :return: by sha256. :raises ClientError:"""
    names = [os.fsencode(image.file.name).decode("utf-8", "replace") for image in images]
    sent = client.submit_many(
        [image.data for image in images],
        destination.model,
        names=names,
        input=destination.input,
        inputs=extras.inputs,
        params=extras.params,
        idempotency_key=batch.key,
    )
    return dict(zip(batch.files, sent.outcomes, strict=True))


def _finish(batch: SentBatch, outcomes: Mapping[str, Request | Refused], journal: SubmitJournal) -> None:
    """Record what the server acknowledged of a batch. :raises StoreUnavailable:"""
    from mlg_client import Request

    ids = {sha256: one.id for sha256 in batch.files if isinstance(one := outcomes[sha256], Request)}
    journal.finish(batch, ids)


def _print_result(row: Row) -> None:
    best, preds = (row.request.best, row.request.preds) if row.request else (None, None)
    id = row.request.id if row.request else ""
    text = f"{best[0]} {best[1]:.3f}" if best else "" if preds is None else json.dumps(preds)
    _print_line([os.fsencode(row.file), id.encode(), row.status.encode(), text.encode()])


def _print_line(fields: list[bytes]) -> None:
    # As bytes, because a file name need not be UTF-8.
    sys.stdout.buffer.write(b"\t".join(fields) + b"\n")
    sys.stdout.buffer.flush()


def _json_row(row: Row) -> dict[str, Any]:
    answer = row.request.raw if row.request else {}
    return {
        "file": str(row.file),
        "req_id": row.request.id if row.request else None,
        "status": row.status,
        "preds": row.request.preds if row.request else None,
        **{name: answer[name] for name in ("files", "steps") if answer.get(name)},
        **({"image": str(row.image)} if row.image is not None else {}),
        "reason": row.reason,
        "code": row.code,
        **{name: answer.get(name) for name in ("model", "cached", "digest", "provider", "seconds", "finished_at")},
    }


def _csv_rows(row: Row) -> Iterator[dict[str, Any]]:
    full = _json_row(row)
    shared = {name: full[name] for name in COLUMNS if name in full}
    preds = full["preds"] if isinstance(full["preds"], list) and full["preds"] else [None]
    for rank, pred in enumerate(preds, start=1):
        is_label = isinstance(pred, list) and len(pred) == 3
        labels = dict(zip(("wnid", "label", "probability"), pred, strict=True)) if is_label else {}
        yield {**shared, **labels, "rank": rank if is_label else None}


def _progress_bars() -> Progress:
    """Create progress bars on stderr, if that is a terminal; a context manager."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
