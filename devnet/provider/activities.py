"""The activities: which exe-unit runs for which agreement, and why others ended.

Made by `Devnet`, called by the API. An activity ends with the daemon; its usage is kept in its agreement.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from devnet.errors import NotFound
from devnet.image import Image, load_image
from devnet.provider.exe_unit import ExeUnit
from devnet.records import Agreement
from devnet.scenario import FaultSchedule

if TYPE_CHECKING:
    from devnet.provider.agent import Provider


@dataclass(frozen=True, kw_only=True)
class Activity:
    """A running activity."""

    activity_id: str
    agreement: Agreement
    owner: Provider
    unit: ExeUnit


@dataclass(kw_only=True)
class Activities:
    """All activities of a daemon."""

    #: Contains a folder per activity; its path must be short, because there are sockets in it.
    folder: Path
    #: The folder that the `gftp` program shares with the daemon.
    exchange: Path
    faults: FaultSchedule
    #: The built-in image of the providers' other runtimes; `vm` takes the one that the demand names.
    image: Image
    #: Environment of the providers' processes.
    environment: Mapping[str, str]
    #: Called after every change of the state that is kept over a restart.
    on_change: Callable[[], None]
    _running: dict[str, Activity] = field(default_factory=dict)
    #: Activities that have ended -> reason.
    _end_reasons: dict[str, str] = field(default_factory=dict)
    _agreements: dict[str, Agreement] = field(default_factory=dict)

    def restore(self, agreement: Agreement) -> None:
        """Restore the activities of an agreement after a restart. All of them have ended."""
        for activity_id in agreement.usage:
            self._agreements[activity_id] = agreement
            self._end_reasons[activity_id] = "The daemon was restarted."

    def create(self, agreement: Agreement, owner: Provider) -> str:
        """Start an activity for an agreement. :return: its id."""
        activity_id = secrets.token_hex(16)
        package = str(agreement.demand["properties"].get("golem.srv.comp.task_package", ""))
        is_built_in = agreement.offer["properties"].get("golem.runtime.name") != "vm"
        unit = ExeUnit(
            activity_id,
            plan=owner.plan,
            folder=self.folder / activity_id[:8],
            exchange=self.exchange,
            faults=self.faults,
            load_image=(lambda: self.image) if is_built_in else functools.partial(load_image, package),
            environment=self.environment,
            cpus=owner.cpus,
        )
        self._running[activity_id] = Activity(activity_id=activity_id, agreement=agreement, owner=owner, unit=unit)
        self._agreements[activity_id] = agreement
        agreement.usage[activity_id] = [0.0, 0.0]
        self.on_change()
        return activity_id

    def find(self, activity_id: str) -> Activity:
        """Return a running activity. :raises NotFound: it does not exist or has ended."""
        activity = self._running.get(activity_id)
        if activity is None:
            reason = self._end_reasons.get(activity_id)
            raise NotFound(
                f"There is no activity {activity_id}." if reason is None else f"The activity has ended. {reason}"
            )
        return activity

    def agreement_of(self, activity_id: str) -> Agreement:
        """Return the agreement of an activity, running or ended. :raises NotFound: it does not exist."""
        if activity_id not in self._agreements:
            raise NotFound(f"There is no activity {activity_id}.")
        return self._agreements[activity_id]

    def reason(self, activity_id: str) -> str | None:
        """Return why an activity ended; None if it is running."""
        self.agreement_of(activity_id)
        return self._end_reasons.get(activity_id)

    def usage(self, activity_id: str) -> list[float]:
        """Return the usage counters of an activity; the final ones if it has ended."""
        agreement = self.agreement_of(activity_id)
        if activity_id in self._running:
            agreement.usage[activity_id] = [float(each) for each in self._running[activity_id].unit.usage()]
        return agreement.usage[activity_id]

    def running_ids(self, agreement: Agreement) -> list[str]:
        """Return the ids of the running activities of an agreement."""
        return [each.activity_id for each in self._running.values() if each.agreement is agreement]

    async def destroy(self, activity_id: str, reason: str) -> None:
        """End an activity and remove its processes and its folder. Does nothing if it has ended."""
        self.agreement_of(activity_id)
        activity = self._running.get(activity_id)
        if activity is None:
            return
        self.usage(activity_id)
        del self._running[activity_id]
        self._end_reasons[activity_id] = reason
        await activity.unit.end(reason)
        activity.owner.activity_ended(activity.agreement, activity_id)
        self.on_change()

    async def close(self) -> None:
        """End all activities without notifying their owners, because the daemon ends."""
        units = [each.unit for each in self._running.values()]
        self._running.clear()
        for unit in units:
            await unit.end()

    def record_usage(self) -> None:
        """Write the usage of running activities into their agreements."""
        for activity_id in self._running:
            self.usage(activity_id)
