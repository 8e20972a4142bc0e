"""What a devnet consists of: its providers, their prices and speeds, and the faults to inject.

A scenario is read once, from a TOML file or made by a test, and passed on. A file uses the field names below as keys:

    funds = 50
    [[faults]]
    kind = "http-500"
    path = "GET /payment-api/v1/invoiceEvents"
    times = 1
    [[providers]]
    name = "alpha"
    price_per_second = 0.00002
    [[providers.faults]]
    kind = "die"
    after = 2
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from devnet.records import parse_decimal
from provider_image.errors import ConfigError

PROVIDER_NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")

# Faults

#: The owner of the daemon's faults, beside the providers' names.
DAEMON = "daemon"
#: Faults of a provider -> what happens.
PROVIDER_KINDS = {
    "no-answer": "Does not answer a proposal.",
    "reject": "Rejects an agreement: the requestor's wait ends with 410.",
    "slow-approval": "Approves an agreement after `seconds`.",
    "never-approve": "Neither approves nor rejects an agreement.",
    "drop-agreement": "Terminates the agreement `seconds` after a batch of the requestor's began.",
    "no-activity": "Fails to create an activity: 500.",
    "overbill": "Bills `factor` times the amount due.",
    "late-bill": "Sends the invoice `seconds` after the end of the agreement.",
    "never-bill": "Never sends the invoice.",
    "payable-debit-note": "Sends debit notes with a payment due date, which were not negotiated.",
    "frequent-debit-notes": "Sends a debit note every `seconds`, every half second if not given.",
    "fail-deploy": "The deploy command fails.",
    "exit-nonzero": "The program ends with a nonzero exit status.",
    "hang": "The program never ends.",
    "garbage": "The output files are random bytes.",
    "truncate": "The output files are cut in half.",
    "oversize": "The output files are far larger than announced.",
    "wrong-digest": "The results file names the digest of another model.",
    "swap-results": "The results file names another chunk.",
    "die": "The exe-unit dies during a batch.",
    "vanish-http": "The daemon's calls for the activity hang.",
}
#: Faults of the daemon -> what happens.
DAEMON_KINDS = {
    "http-500": "Answers a call that matches `path` with 500.",
    "http-hang": "Answers a call that matches `path` after `seconds`; never, if not given.",
    "gone": "Executes a call that matches `path`, but closes the connection without a response.",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault to inject. An occasion is an event at which it can occur."""

    #: One of PROVIDER_KINDS or DAEMON_KINDS.
    kind: str
    #: How many times it occurs; unlimited if None.
    times: int | None = None
    #: Number of occasions to skip first.
    after: int = 0
    #: Then it occurs on every n-th occasion.
    every: int = 1
    #: Delay, or interval, of the kinds that have one.
    seconds: float = 0.0
    #: Factor on the amount of a bill.
    factor: float = 1.0
    #: Glob over "METHOD /path", for faults of the daemon; every call if empty.
    path: str = ""

    def __post_init__(self) -> None:
        if self.every < 1 or self.after < 0 or (self.times is not None and self.times < 0) or self.seconds < 0:
            raise ConfigError(f"fault {self.kind}: every must be 1 or more; after, times and seconds 0 or more.")


class FaultSchedule:
    """Decides when each fault of a provider or of DAEMON occurs, by counting its occasions."""

    def __init__(self, faults: Mapping[str, Sequence[Fault]]) -> None:
        self._faults = {owner: tuple(some) for owner, some in faults.items()}
        self._occasions: Counter[tuple[str, str, int]] = Counter()

    @classmethod
    def from_scenario(cls, scenario: Scenario) -> FaultSchedule:
        """Collect the faults of the daemon and of all providers."""
        return cls({DAEMON: scenario.faults, **{plan.name: plan.faults for plan in scenario.providers}})

    def triggers(self, owner: str, kind: str, path: str = "") -> Fault | None:
        """Count one occasion of a kind of fault and return the fault if it occurs this time.

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


# Providers


@dataclass(frozen=True, kw_only=True)
class ProviderPlan:
    """A provider: its offer, its prices and its faults."""

    #: Its name in offers and in the output of the devnet.
    name: str
    #: 0x and 40 hexadecimal digits; derived from the name if empty.
    node_id: str = ""
    #: Fixed price of an agreement, in GLM.
    start_price: Decimal = Decimal("0.001")
    #: GLM per second of processor time.
    price_per_cpu_second: Decimal = Decimal("0.0001")
    #: GLM per second that an activity exists.
    price_per_second: Decimal = Decimal("0.00002")
    cores: int = 1
    threads: int = 4
    memory_gib: float = 8.0
    storage_gib: float = 20.0
    #: Relative speed: 0.5 takes twice as long.
    speed: float = 1.0
    #: The provider makes one offer per runtime.
    runtimes: tuple[str, ...] = ("vm", "mlg")
    faults: tuple[Fault, ...] = ()
    #: Time between two debit notes; if 0, only one is sent, at the end of the activity.
    debit_note_seconds: float = 120.0
    #: Time before the provider answers a proposal, approves an agreement, or begins a batch.
    latency_seconds: float = 0.0
    #: Speed of its transfers, which arrive in parts; unlimited if 0.
    bytes_per_second: float = 0.0

    def __post_init__(self) -> None:
        if not self.node_id:
            digest = hashlib.sha256(self.name.encode()).hexdigest()[:40]
            object.__setattr__(self, "node_id", "0x" + digest)
        digits = self.node_id.removeprefix("0x")
        if len(self.node_id) != 42 or len(digits) != 40 or set(digits) - set("0123456789abcdef"):
            raise ConfigError(f"node_id of {self.name} must be 0x and 40 lower-case hex digits, not {self.node_id!r}.")
        if min(self.start_price, self.price_per_cpu_second, self.price_per_second) < 0:
            raise ConfigError(f"The prices of {self.name} must be 0 or more.")
        if self.speed <= 0 or self.cores < 1 or self.threads < 1:
            raise ConfigError(f"{self.name}: speed must be more than 0, cores and threads 1 or more.")
        if min(self.debit_note_seconds, self.latency_seconds, self.bytes_per_second) < 0:
            raise ConfigError(
                f"{self.name}: debit_note_seconds, latency_seconds and bytes_per_second must be 0 or more."
            )
        _check_kinds(self.faults, PROVIDER_KINDS, self.name)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The description of a whole devnet."""

    providers: tuple[ProviderPlan, ...] = ()
    #: Faults of the daemon.
    faults: tuple[Fault, ...] = ()
    #: GLM in the requestor's wallet.
    funds: Decimal = Decimal(1000)
    subnet: str = "devnet"
    #: A provider ends an agreement that has had no activity for this long.
    idle_seconds: float = 90.0
    #: A provider ends an agreement for which the requestor has made no call for this long.
    silent_seconds: float = 1800.0
    #: A provider refuses an agreement whose demand expires sooner.
    min_expiration_seconds: float = 300.0
    #: A provider ends an agreement if a debit note has not been accepted for this long.
    debit_note_accept_seconds: float = 240.0

    def __post_init__(self) -> None:
        names = [plan.name for plan in self.providers]
        ids = [plan.node_id for plan in self.providers]
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            raise ConfigError(f"Two providers have the same name or node_id: {', '.join(names)}.")
        if min(self.idle_seconds, self.silent_seconds, self.debit_note_accept_seconds) <= 0:
            raise ConfigError("idle_seconds, silent_seconds and debit_note_accept_seconds must be more than 0.")
        if self.funds < 0 or self.min_expiration_seconds < 0:
            raise ConfigError("funds and min_expiration_seconds must be 0 or more.")
        _check_kinds(self.faults, DAEMON_KINDS, "the daemon")


def default_scenario(count: int) -> Scenario:
    """Make a scenario of at least one provider without faults, with different names and prices."""
    if count < 1:
        raise ConfigError(f"A devnet needs at least 1 provider, not {count}.")
    return Scenario(providers=tuple(_default_plan(number) for number in range(count)))


def _default_plan(number: int) -> ProviderPlan:
    round_number, index = divmod(number, len(PROVIDER_NAMES))
    # Prices grow by a tenth from provider to provider, so that a requestor has a choice.
    factor = Decimal(10 + number) / 10
    return ProviderPlan(
        name=PROVIDER_NAMES[index] + (str(round_number + 1) if round_number else ""),
        start_price=Decimal("0.001") * factor,
        price_per_cpu_second=Decimal("0.0001") * factor,
        price_per_second=Decimal("0.00002") * factor,
        latency_seconds=0.05,
        bytes_per_second=20e6,
    )


# Scenario files


def read_scenario(path: Path) -> Scenario:
    """Read a scenario from a TOML file. :raises ConfigError: it has an unknown key or an invalid value."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The scenario {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The scenario {path} is not TOML: {error}") from error
    try:
        scenario: Scenario = _record(Scenario, document, "")
        if not scenario.providers:
            raise ConfigError("there are no [[providers]].")
    except ConfigError as error:
        raise ConfigError(f"The scenario {path}: {error.reason}") from error
    return scenario


def _record(kind: Any, table: Mapping[str, Any], path: str) -> Any:
    """Make a record from a table; check its keys and the types of its values.

    :param path: of the table in the file; empty for the whole file.
    """
    types = {field.name: str(field.type) for field in fields(kind)}
    paths = {key: f"{path}.{key}" if path else key for key in table}
    for key in table:
        if key not in types:
            raise ConfigError(f"{paths[key]}: unknown key.{_suggestion(key, types)}")
    values = {key: _value(value, types[key], paths[key]) for key, value in table.items()}
    missing = [field.name for field in fields(kind) if field.default is MISSING and field.name not in table]
    if missing:
        raise ConfigError(f"{path}: {missing[0]} is missing.")
    return kind(**values)


def _value(value: object, kind: str, path: str) -> object:
    """Convert a TOML value to the type of the field."""
    record = {"tuple[Fault, ...]": Fault, "tuple[ProviderPlan, ...]": ProviderPlan}.get(kind)
    if record is not None:
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise ConfigError(f"{path} must be a list of tables, each under a line [[...]].")
        return tuple(_record(record, each, f"{path}[{number}]") for number, each in enumerate(value))
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if kind == "str" and isinstance(value, str):
        return value
    if kind in ("int", "int | None") and is_number and isinstance(value, int):
        return value
    if (kind in ("float", "Decimal") and is_number) or (kind == "Decimal" and isinstance(value, str)):
        number = parse_decimal(value)
        if number is not None:
            return number if kind == "Decimal" else float(number)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    expected = {"str": "a string", "float": "a number", "Decimal": "a number", "tuple[str, ...]": "a list of strings"}
    raise ConfigError(f"{path} must be {expected.get(kind, 'an integer')}, not {value!r}.")


def _check_kinds(faults: Iterable[Fault], known: Mapping[str, str], owner: str) -> None:
    for fault in faults:
        if fault.kind not in known:
            raise ConfigError(f"{owner} cannot have a fault of kind {fault.kind!r}.{_suggestion(fault.kind, known)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" Known: {', '.join(known)}."
