"""The activities: which exe-unit runs for which agreement, and what is remembered of those that are over.

Made by `running.Devnet`, asked by the API. An activity lives only as long as the daemon; what it used is written into
its agreement.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from devnet.errors import NotFound
from devnet.faults import Faults
from devnet.provider.exe_unit import ExeUnit
from devnet.records import Agreement
from devnet.scenario import ProviderPlan
from devnet.transfers import Transfers


class ActivityOwner(Protocol):
    """The provider that an activity runs at."""

    plan: ProviderPlan
    cpus: frozenset[int] | None

    def record_contact(self) -> None:
        """The requestor gave a sign of life."""

    def activity_ended(self, agreement: Agreement, activity_id: str) -> None:
        """One of its activities is over; its usage is in the agreement."""


@dataclass(frozen=True, kw_only=True)
class Activity:
    """One that lives."""

    activity_id: str
    agreement: Agreement
    owner: ActivityOwner
    unit: ExeUnit


class Activities:
    """All activities of a daemon.

    :param folder: gets a folder for each; its path is short, because sockets lie in it.
    :param environment: of the providers' processes.
    """

    def __init__(
        self,
        *,
        folder: Path,
        transfers: Transfers,
        faults: Faults,
        environment: Mapping[str, str],
        on_change: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._transfers = transfers
        self._faults = faults
        self._environment = dict(environment)
        self._on_change = on_change
        self._live: dict[str, Activity] = {}
        #: Those that are over -> why.
        self._end_reasons: dict[str, str] = {}
        self._agreements: dict[str, Agreement] = {}

    def restore(self, agreement: Agreement) -> None:
        """Know an agreement's activities from before a restart: all of them are dead."""
        for activity_id in agreement.usage:
            self._agreements[activity_id] = agreement
            self._end_reasons[activity_id] = "The daemon was started again."

    def create(self, agreement: Agreement, owner: ActivityOwner) -> str:
        """Start an activity. :return: its id."""
        activity_id = secrets.token_hex(16)
        short_id = activity_id[:8]
        environment = {**self._environment, "MLG_PLACE": str(self._folder / f"{short_id}.p")}
        Path(environment["MLG_PLACE"]).mkdir(mode=0o700)
        unit = ExeUnit(
            activity_id,
            plan=owner.plan,
            folder=self._folder / short_id,
            transfers=self._transfers,
            faults=self._faults,
            environment=environment,
            cpus=owner.cpus,
            on_crash=self._on_crash,
        )
        self._live[activity_id] = Activity(activity_id=activity_id, agreement=agreement, owner=owner, unit=unit)
        self._agreements[activity_id] = agreement
        agreement.usage[activity_id] = [0.0, 0.0]
        self._on_change()
        return activity_id

    def find(self, activity_id: str) -> Activity:
        """Find one that lives.

        :raises NotFound: there is none, or not any more.
        """
        activity = self._live.get(activity_id)
        if activity is None:
            reason = self._end_reasons.get(activity_id)
            raise NotFound(f"There is no activity {activity_id}." if reason is None else f"It is over. {reason}")
        return activity

    def agreement_of(self, activity_id: str) -> Agreement:
        """Find the agreement of an activity, also of one that is over."""
        if activity_id not in self._agreements:
            raise NotFound(f"There is no activity {activity_id}.")
        return self._agreements[activity_id]

    def reason(self, activity_id: str) -> str | None:
        """Return why an activity is over, None if it lives."""
        self.agreement_of(activity_id)
        return self._end_reasons.get(activity_id)

    def usage(self, activity_id: str) -> list[float]:
        """Return an activity's counters; the last ones if it is over."""
        agreement = self.agreement_of(activity_id)
        if activity_id in self._live:
            agreement.usage[activity_id] = [float(each) for each in self._live[activity_id].unit.usage()]
        return agreement.usage[activity_id]

    def live_ids(self, agreement: Agreement) -> list[str]:
        """List the activities of an agreement that live."""
        return [each.activity_id for each in self._live.values() if each.agreement is agreement]

    async def destroy(self, activity_id: str, reason: str) -> None:
        """End an activity, its processes and its folder. Nothing happens if it is over."""
        self.agreement_of(activity_id)
        activity = self._live.get(activity_id)
        if activity is None:
            return
        self.usage(activity_id)
        del self._live[activity_id]
        self._end_reasons[activity_id] = reason
        await activity.unit.end(reason)
        await _remove(self._folder / f"{activity_id[:8]}.p")
        activity.owner.activity_ended(activity.agreement, activity_id)
        self._on_change()

    async def close(self) -> None:
        """End all of them, telling nobody: the daemon dies."""
        self.record_usage()
        units = [each.unit for each in self._live.values()]
        self._live.clear()
        for unit in units:
            await unit.end()

    def record_usage(self) -> None:
        """Write the usage of those that live into their agreements."""
        for activity_id in self._live:
            self.usage(activity_id)

    def _on_crash(self, activity_id: str) -> None:
        # The unit answers for itself until the requestor destroys the activity.
        if activity_id in self._live:
            self.usage(activity_id)
            self._on_change()


async def _remove(folder: Path) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def assign_cpus(offset: int, cores: int) -> frozenset[int]:
    """Choose the processors of a provider, beside those of the ones before it; in turns if there are too few."""
    available = sorted(os.sched_getaffinity(0))
    return frozenset(available[(offset + number) % len(available)] for number in range(min(cores, len(available))))
