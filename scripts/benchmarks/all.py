"""All benchmarks, each in a short form: writes docs/benchmarks.html."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from scripts.benchmarks.registry import RUNS, Run, import_benchmark
from scripts.benchmarks.support import machine
from scripts.benchmarks.support.page import Section, read_output, render


def run(name: str, how: Run, timeout: float) -> Section:
    """Run a benchmark in a process of its own, and end what it leaves after a time."""
    words = shlex.split(how.options)
    load, started, failure = machine.load(), time.monotonic(), None
    # Files, not pipes: a process that a benchmark has left behind would keep a pipe open.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "scripts.benchmarks", name, *words]
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            status = process.wait(timeout)
            errors.seek(0)
            if status:
                failure = (errors.read().strip().splitlines() or [f"It ended with status {status}."])[-1]
        except subprocess.TimeoutExpired:
            failure = f"It took longer than {timeout:.0f} s."
        finally:
            _end(process)
        output.seek(0)
        printed = output.read()
    tables, text = read_output(printed)
    module = import_benchmark(name)
    return Section(
        name=name,
        about=(module.__doc__ or name).strip().partition("\n\n")[0].replace("\n", " "),
        command=shlex.join(["scripts/bench", name, *words]),
        full_command=f"scripts/bench {name}",
        seconds=time.monotonic() - started,
        load=load,
        tables=tables,
        text=text,
        failure=failure,
        column=how.column,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a benchmark that still runs, as Ctrl-C does: it stops what it has started. Then end what it has left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@click.command()
@click.option("--only", "names", default=",".join(RUNS), show_default=True, help="Which ones, in this order.")
@click.option("--timeout", default=1200.0, show_default=True, help="Seconds after which a benchmark is stopped.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=machine.ROOT / "docs" / "benchmarks.html",
    help="The page.  [default: docs/benchmarks.html]",
)  # fmt: skip
def main(names: str, timeout: float, out: Path) -> None:
    """Run benchmarks in a short form and write a page. Example: scripts/bench all --only drain,scale --out /tmp/b.html

    All of them take about an hour and a half on two cores, and about 3 GB of disk. A benchmark that fails is said so
    on the page, and the others go on.
    """
    chosen = [name for name in names.split(",") if name]
    unknown = [name for name in chosen if name not in RUNS]
    if unknown:
        raise click.BadParameter(f"there is no {unknown[0]}; there are: {', '.join(RUNS)}", param_hint="--only")
    facts, sections = machine.facts(), []
    left_out = [name for name in RUNS if name not in chosen]
    if left_out:
        facts["Left out"] = ", ".join(left_out)
    for name in chosen:
        click.echo(f"{name} ...", err=True)
        section = run(name, RUNS[name], timeout)
        click.echo(f"{name}: {section.failure or 'done'} ({section.seconds:.0f} s)", err=True)
        sections.append(section)
        # After each one: what was measured stays if the rest is interrupted.
        out.write_text(render(facts, sections))
    click.echo(f"Written: {out}")
