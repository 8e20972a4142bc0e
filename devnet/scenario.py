"""What a devnet consists of: its providers, their prices and speeds, and what goes wrong.

Read once, from a TOML file or made by a test, and passed on. A file names fields as here:

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
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TypeVar

from devnet.faults import DAEMON_KINDS, PROVIDER_KINDS
from provider_image.errors import ConfigError

PROVIDER_NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong; an occasion is when it could."""

    #: One of `faults.KINDS`.
    kind: str
    #: On how many occasions; always if None.
    times: int | None = None
    #: How many occasions pass unharmed first.
    after: int = 0
    #: Then it strikes on every n-th.
    every: int = 1
    #: For what is slow or late.
    seconds: float = 0.0
    #: For bills: how many times too much.
    factor: float = 1.0
    #: For the daemon's: a glob over "METHOD /path"; every call if empty.
    path: str = ""

    def __post_init__(self) -> None:
        if self.every < 1 or self.after < 0 or (self.times is not None and self.times < 0) or self.seconds < 0:
            raise ConfigError(f"fault {self.kind}: every is 1 or more; after, times and seconds are 0 or more.")


@dataclass(frozen=True, kw_only=True)
class ProviderPlan:
    """One provider: what it offers, what it asks for it, and how it misbehaves."""

    #: Its name in offers and in what the devnet tells.
    name: str
    #: 0x and 40 hexadecimal digits; made from the name if it is not given.
    node_id: str = ""
    #: GLM an agreement costs beside what is used.
    start_price: Decimal = Decimal("0.001")
    #: GLM for a second of one processor core at work.
    price_per_cpu_second: Decimal = Decimal("0.0001")
    #: GLM for a second of an activity's life.
    price_per_second: Decimal = Decimal("0.00002")
    cores: int = 1
    threads: int = 1
    memory_gib: float = 8.0
    storage_gib: float = 20.0
    #: 0.5 takes twice as long.
    speed: float = 1.0
    #: One offer for each.
    runtimes: tuple[str, ...] = ("vm", "mlg")
    faults: tuple[Fault, ...] = ()
    #: Between two debit notes; none are sent if 0.
    debit_note_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.node_id:
            digest = hashlib.sha256(self.name.encode()).hexdigest()[:40]
            object.__setattr__(self, "node_id", "0x" + digest)
        digits = self.node_id.removeprefix("0x")
        if len(self.node_id) != 42 or len(digits) != 40 or set(digits) - set("0123456789abcdef"):
            raise ConfigError(f"node_id of {self.name}: {self.node_id!r} is not 0x and 40 small hexadecimal digits.")
        if min(self.start_price, self.price_per_cpu_second, self.price_per_second) < 0:
            raise ConfigError(f"The prices of {self.name} must be 0 or more.")
        if self.speed <= 0 or self.cores < 1 or self.threads < 1 or self.debit_note_seconds < 0:
            raise ConfigError(
                f"{self.name}: speed is more than 0, cores and threads are 1 or more, debit_note_seconds 0 or more."
            )
        _check_kinds(self.faults, PROVIDER_KINDS, self.name)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A whole devnet."""

    providers: tuple[ProviderPlan, ...]
    #: The daemon's.
    faults: tuple[Fault, ...] = ()
    #: GLM in the requestor's wallet.
    funds: Decimal = Decimal(1000)
    subnet: str = "devnet"
    #: A provider ends an agreement without an activity after so long, and any of which it hears nothing for so long.
    idle_seconds: float = 90.0
    silent_seconds: float = 1800.0

    def __post_init__(self) -> None:
        names = [plan.name for plan in self.providers]
        ids = [plan.node_id for plan in self.providers]
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            raise ConfigError(f"Two providers have the same name or node_id: {', '.join(names)}.")
        if self.idle_seconds <= 0 or self.silent_seconds <= 0 or self.funds < 0:
            raise ConfigError("idle_seconds and silent_seconds are more than 0, funds 0 or more.")
        _check_kinds(self.faults, DAEMON_KINDS, "the daemon")


def default_scenario(count: int) -> Scenario:
    """Make a scenario of honest providers with different names and prices.

    :raises ConfigError: not even one provider is asked for.
    """
    if count < 1:
        raise ConfigError(f"A devnet has 1 provider or more, not {count}.")
    return Scenario(providers=tuple(_default_plan(number) for number in range(count)))


def _default_plan(number: int) -> ProviderPlan:
    round_number, index = divmod(number, len(PROVIDER_NAMES))
    # Each a tenth dearer than the one before, so that a requestor has something to choose.
    factor = Decimal(10 + number) / 10
    return ProviderPlan(
        name=PROVIDER_NAMES[index] + (str(round_number + 1) if round_number else ""),
        start_price=Decimal("0.001") * factor,
        price_per_cpu_second=Decimal("0.0001") * factor,
        price_per_second=Decimal("0.00002") * factor,
    )


# Files

_Record = TypeVar("_Record", Fault, ProviderPlan, Scenario)


def read_scenario(path: Path) -> Scenario:
    """Read a scenario from a TOML file.

    :raises ConfigError: it cannot be read, or names a key, a kind or a value that there is not.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The scenario {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The scenario {path} is not TOML: {error}") from error
    try:
        _check_keys(Scenario, document, "")
        providers = tuple(
            _make_record(ProviderPlan, {**table, "faults": _faults(table.get("faults", []), key_path)}, key_path)
            for key_path, table in _tables(document.get("providers", []), "providers")
        )
        if not providers:
            raise ConfigError("it has no [[providers]].")
        return _make_record(
            Scenario, {**document, "providers": providers, "faults": _faults(document.get("faults", []), "")}, ""
        )
    except ConfigError as error:
        raise ConfigError(f"The scenario {path}: {error.reason}") from error


def _faults(tables: object, key_path: str) -> tuple[Fault, ...]:
    prefix = f"{key_path}.faults" if key_path else "faults"
    return tuple(_make_record(Fault, table, full_path) for full_path, table in _tables(tables, prefix))


def _tables(value: object, key_path: str) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ConfigError(f"{key_path} is a list of tables, each under a line [[...]].")
    return [(f"{key_path}[{number}]", each) for number, each in enumerate(value)]


def _make_record(kind: type[_Record], table: Mapping[str, Any], key_path: str) -> _Record:
    """Make a record of a table, checking its keys and the types of its values."""
    known = _check_keys(kind, table, key_path)
    values: dict[str, Any] = {}
    for key, value in table.items():
        values[key] = _value(value, known[key], f"{key_path}.{key}" if key_path else key)
    missing = [name for name in ("kind", "name") if name in known and name not in values]
    if missing:
        raise ConfigError(f"{key_path}: {missing[0]} is missing.")
    return kind(**values)


def _check_keys(kind: type[_Record], table: Mapping[str, Any], key_path: str) -> dict[str, str]:
    """Return the type of each key that a table may have, refusing others."""
    known = {field.name: str(field.type) for field in fields(kind)}
    for key in table:
        if key not in known:
            full_path = f"{key_path}.{key}" if key_path else key
            raise ConfigError(f"{full_path}: there is no such key.{_suggestion(key, known)}")
    return known


def _value(value: object, kind: str, full_path: str) -> object:
    """Turn what TOML gave into what the field wants."""
    is_number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    if kind == "str" and isinstance(value, str):
        return value
    if kind in ("int", "int | None") and is_number and isinstance(value, int):
        return value
    if (kind in ("float", "Decimal") and is_number) or (kind == "Decimal" and isinstance(value, str)):
        try:
            number = Decimal(str(value))
        except InvalidOperation:
            number = Decimal("NaN")
        if number.is_finite():
            return number if kind == "Decimal" else float(number)
    if kind == "tuple[str, ...]" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if isinstance(value, tuple):
        return value
    expected = {"str": "a text", "float": "a number", "Decimal": "a number", "tuple[str, ...]": "a list of texts"}
    raise ConfigError(f"{full_path} is {expected.get(kind, 'a whole number')}, not {value!r}.")


def _check_kinds(faults: Iterable[Fault], known: Mapping[str, str], who: str) -> None:
    for fault in faults:
        if fault.kind not in known:
            raise ConfigError(f"{who} has no fault of the kind {fault.kind!r}.{_suggestion(fault.kind, known)}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known)}."
