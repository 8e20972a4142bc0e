"""Exe-units and gftp servers for tests, and the commands that yapapi sends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from devnet.gftp import write_program
from devnet.image import Image
from devnet.provider.exe_unit import ExeUnit
from devnet.scenario import Fault, FaultSchedule, ProviderPlan
from tests.timing import DEADLINE_SECONDS

BOOT_COMMANDS: list[dict[str, Any]] = [{"deploy": {}}, {"start": {"args": []}}]
STREAM = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}
#: An image with nothing but the system.
SYSTEM_IMAGE = Image(programs={})
#: A command that creates the file `begun` and never ends.
FOREVER = "touch /golem/work/begun; while :; do sleep 60; done"


def run(entry_point: str, *arguments: str, capture: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "run": {"entry_point": entry_point, "args": list(arguments), "capture": STREAM if capture is None else capture}
    }


def sh(text: str, capture: dict[str, Any] | None = None) -> dict[str, Any]:
    return run("/bin/sh", "-c", text, capture=capture)


def transfer(source: str, target: str) -> dict[str, Any]:
    return {"transfer": {"from": source, "to": target}}


class GftpProcess:
    """A `gftp server` process, started as yapapi starts it."""

    def __init__(self, folder: Path) -> None:
        write_program(folder / "bin", folder / "exchange")
        self.process = subprocess.Popen(
            "gftp server",
            shell=True,
            env={"PATH": f"{folder / 'bin'}:{os.defpath}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def send(self, line: str) -> Any:
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def call(self, method: str, **params: Any) -> Any:
        response = self.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": 495}))
        assert response["jsonrpc"] == "2.0" and response["id"] == 495
        return response["result"] if "result" in response else response["error"]

    def publish(self, path: Path) -> str:
        [link] = self.call("publish", files=[str(path)])
        assert link["file"] == str(path)
        return link["url"]

    def receive(self, path: Path) -> str:
        link = self.call("receive", output_file=str(path))
        assert link["file"] == str(path)
        return link["url"]

    def end(self) -> int:
        """Close its standard input and wait for its end. :return: the exit status."""
        self.process.stdin.close()
        status = self.process.wait(DEADLINE_SECONDS)
        self.process.stdout.close()
        return status


@contextlib.asynccontextmanager
async def exe_unit(
    folder: Path,
    *faults: Fault,
    shared_faults: FaultSchedule | None = None,
    environment: dict[str, str] | None = None,
    image: Image = SYSTEM_IMAGE,
    cpus: frozenset[int] | None = None,
    activity_id: str = "activity",
    is_started: bool = True,
    **plan: Any,
) -> AsyncIterator[ExeUnit]:
    """Make an exe-unit, by default deployed and started, and end it after the block."""
    unit = ExeUnit(
        activity_id,
        plan=ProviderPlan(name="alpha", faults=faults, **plan),
        folder=folder / activity_id,
        exchange=folder / "exchange",
        faults=shared_faults or FaultSchedule({"alpha": faults}),
        load_image=lambda: image,
        environment=environment or {"PATH": os.defpath},
        cpus=cpus,
    )
    try:
        if is_started:
            results = await run_batch(unit, *BOOT_COMMANDS)
            assert [result["result"] for result in results] == ["Ok", "Ok"]
        yield unit
    finally:
        await unit.end()


async def run_batch(unit: ExeUnit, *commands: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a batch and return its results when it is finished."""
    results = await unit.results(await unit.execute(list(commands)), 60)
    assert results[-1]["isBatchFinished"]
    return results
