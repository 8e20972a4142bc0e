"""A requestor with the unmodified yapapi, run as a program: six tasks, answers as a JSON line on stdout."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from yapapi import Golem, Task
from yapapi.payload import Payload
from yapapi.props.base import constraint


@dataclass
class Mlg(Payload):
    runtime: str = constraint("golem.runtime.name", default="mlg")


async def main(folder: Path) -> None:
    answers: dict[str, str] = {}
    providers: set[str] = set()

    async def worker(context: Any, tasks: Any) -> AsyncIterator[Any]:
        providers.add(context.provider_name)
        async for task in tasks:
            script = context.new_script(timeout=timedelta(seconds=20))
            target = folder / f"answer-{task.data}"
            script.upload_bytes(f"task {task.data}".encode(), "/golem/input/task")
            # Long enough for several providers to get tasks: yapapi starts a worker every two seconds.
            script.run("/bin/sh", "-c", "sleep 1; tr a-z A-Z < /golem/input/task > /golem/output/answer")
            script.download_file("/golem/output/answer", str(target))
            yield script
            task.accept_result(target.read_text())

    async with Golem(budget=Decimal("1"), subnet_tag="devnet") as golem:
        tasks = [Task(data=number) for number in range(6)]
        limit = timedelta(minutes=10)  # providers refuse less than five
        async for task in golem.execute_tasks(worker, tasks, payload=Mlg(), max_workers=3, timeout=limit):
            answers[str(task.data)] = str(task.result)
    sys.stdout.write(json.dumps({"answers": answers, "providers": sorted(providers)}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
