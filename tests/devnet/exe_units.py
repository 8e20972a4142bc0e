"""Exe-units and gftp servers for the tests, and the commands that yapapi would send."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from devnet.faults import Faults
from devnet.gftp import write_program
from devnet.provider.exe_unit import ExeUnit
from devnet.scenario import Fault, ProviderPlan
from devnet.transfers import Transfers

BOOT_COMMANDS: list[dict[str, Any]] = [{"deploy": {}}, {"start": {"args": []}}]
STREAM = {"stdout": {"stream": {}}, "stderr": {"stream": {}}}
#: Writes a mark and does not end; the mark says that it has begun.
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
    """A `gftp server`, started as yapapi starts it."""

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
        answer = self.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params, "id": 495}))
        assert answer["jsonrpc"] == "2.0" and answer["id"] == 495
        return answer["result"] if "result" in answer else answer["error"]

    def publish(self, path: Path) -> str:
        [link] = self.call("publish", files=[str(path)])
        assert link["file"] == str(path)
        return link["url"]

    def receive(self, path: Path) -> str:
        link = self.call("receive", output_file=str(path))
        assert link["file"] == str(path)
        return link["url"]

    def end(self) -> int:
        """Close its standard input and wait."""
        self.process.stdin.close()
        status = self.process.wait(10)
        self.process.stdout.close()
        return status


@contextlib.asynccontextmanager
async def exe_unit(
    folder: Path,
    *faults: Fault,
    shared_faults: Faults | None = None,
    environment: dict[str, str] | None = None,
    cpus: frozenset[int] | None = None,
    activity_id: str = "activity",
    is_started: bool = True,
    on_crash: Any = None,
    **plan: Any,
) -> AsyncIterator[ExeUnit]:
    """Give an exe-unit, by default one that is deployed and started; ends it afterwards."""
    unit = ExeUnit(
        activity_id,
        plan=ProviderPlan(name="alpha", faults=faults, **plan),
        folder=folder / activity_id,
        transfers=Transfers(folder / "exchange"),
        faults=shared_faults or Faults({"alpha": faults}),
        environment=environment or {"PATH": os.defpath},
        cpus=cpus,
        on_crash=on_crash,
    )
    try:
        if is_started:
            results = await run_batch(unit, *BOOT_COMMANDS)
            assert [result["result"] for result in results] == ["Ok", "Ok"]
        yield unit
    finally:
        await unit.end()


async def run_batch(unit: ExeUnit, *commands: dict[str, Any]) -> list[dict[str, Any]]:
    """Send a batch and return its results when it is finished."""
    results = await unit.results(await unit.execute(list(commands)), 60)
    assert results[-1]["isBatchFinished"]
    return results
