"""The ways in which the devnet misbehaves, and the count of when it does.

Asked by whoever is about to do something that could go wrong: the market, the providers, the API, an exe-unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devnet.scenario import Fault, Scenario

#: Who has the faults that are the daemon's own and no provider's.
DAEMON = "daemon"

#: Faults of a provider -> what happens.
PROVIDER_KINDS = {
    "no-answer": "Does not answer a proposal.",
    "reject": "Refuses an agreement: the requestor's wait ends with 410.",
    "slow-approval": "Approves an agreement only after `seconds`.",
    "never-approve": "Neither approves nor refuses an agreement.",
    "drop-agreement": "Terminates the agreement `seconds` after a batch of the requestor's began.",
    "no-activity": "Refuses to create an activity: 500.",
    "overbill": "Asks for `factor` times what was used.",
    "late-bill": "Sends the invoice `seconds` after the agreement's end.",
    "never-bill": "Never sends the invoice.",
    "payable-debit-note": "Sends debit notes that ask for payment at once, which nobody agreed to.",
    "frequent-debit-notes": "Sends a debit note every `seconds`, half a second if it is not said.",
    "fail-deploy": "The deploy command fails.",
    "exit-nonzero": "The program ends with an exit status other than 0.",
    "hang": "The program runs for ever.",
    "garbage": "What comes back is random bytes.",
    "truncate": "What comes back is cut in half.",
    "oversize": "What comes back is far larger than announced.",
    "wrong-digest": "What comes back names another model's digest.",
    "swap-results": "What comes back has the answers of two pictures exchanged.",
    "die": "The exe-unit dies in mid-batch.",
    "vanish-http": "The daemon's calls for that activity hang.",
}
#: Faults of the daemon -> what happens.
DAEMON_KINDS = {
    "http-500": "Answers a call that `path` matches with 500.",
    "http-hang": "Answers a call that `path` matches `seconds` later; never, if it is not said.",
    "gone": "Does what a call that `path` matches asks for, but closes the connection without an answer.",
}
#: All of them -> what happens.
KINDS = {**PROVIDER_KINDS, **DAEMON_KINDS}


class Faults:
    """Which faults strike; counts the occasions of each.

    :param faults: a provider's name, or DAEMON -> the faults it has.
    """

    def __init__(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        self._faults = {owner: tuple(some) for owner, some in faults.items()}
        self._occasions: Counter[tuple[str, str, int]] = Counter()

    @classmethod
    def from_scenario(cls, scenario: Scenario) -> Faults:
        """Take a scenario's faults, the daemon's and every provider's."""
        return cls({DAEMON: scenario.faults, **{plan.name: plan.faults for plan in scenario.providers}})

    def triggers(self, owner: str, kind: str, path: str = "") -> Fault | None:
        """Count one occasion for a fault and return it if it strikes this time.

        :param path: "METHOD /path" for the daemon's kinds; a call that a fault's glob does not match is no occasion.
        """
        triggered = None
        for number, fault in enumerate(self._faults.get(owner, ())):
            if fault.kind != kind or (fault.path and not fnmatchcase(path, fault.path)):
                continue
            key = (owner, kind, number)
            since = self._occasions[key] - fault.after
            self._occasions[key] += 1
            is_due = since >= 0 and since % fault.every == 0
            if is_due and (fault.times is None or since // fault.every < fault.times):
                triggered = triggered or fault
        return triggered
