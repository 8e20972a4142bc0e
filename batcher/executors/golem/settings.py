"""The settings of the golem executor: budgets, price limits, numbers of workers, timeouts.

Read by `executor.py` from its context's environment. The daemon, subnet and payment network are set by yagna's own
variables. They are read here and passed on, because yapapi reads some of them at import and others later.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from provider_image.environment import Environment
from provider_image.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GolemSettings:
    """Settings of the golem executor. Amounts are in GLM."""

    #: The daemon's app key, YAGNA_APPKEY; required.
    app_key: str = ""
    #: The daemon's address, YAGNA_API_URL; empty takes yapapi's default.
    api_url: str = ""
    #: YAGNA_SUBNET: the part of the network whose offers are used.
    subnet: str = "public"
    #: YAGNA_PAYMENT_DRIVER and YAGNA_PAYMENT_NETWORK: how providers are paid.
    payment_driver: str = "erc20"
    payment_network: str = "holesky"
    #: Most that one run of the batcher may spend. MLG_BUDGET_RUN. Defaults to none.
    budget_run: Decimal | None = None
    #: Most that all batchers of this home may spend on one day (UTC). MLG_BUDGET_DAY. Defaults to 1.
    budget_day: Decimal | None = Decimal(1)
    #: Most that all batchers of this home may spend in total. MLG_BUDGET_TOTAL. Defaults to none.
    budget_total: Decimal | None = None
    #: Offers above this price per hour, with all threads busy, are rejected. MLG_MAX_PRICE_HOUR. Defaults to 0.5.
    max_price_hour: Decimal | None = Decimal("0.5")
    #: Offers above this price per start are rejected. MLG_MAX_PRICE_START. Defaults to 0.01.
    max_price_start: Decimal | None = Decimal("0.01")
    #: Workers kept for a model that has had work within the last hour. MLG_GOLEM_MIN_WORKERS. Defaults to 0.
    min_workers: int = 0
    #: Workers at the same time, all models together. MLG_GOLEM_MAX_WORKERS. Defaults to 8.
    max_workers: int = 8
    #: Seconds that a provider may take to start, including the download of its container image.
    #: MLG_GOLEM_START_SECONDS. Defaults to 300.
    start_seconds: float = 300.0
    #: Seconds after which a demand is renewed; its agreements end with it. MLG_GOLEM_RENTAL_SECONDS. Defaults to 10800.
    rental_seconds: float = 10800.0
    #: Seconds that an idle worker is kept at most. MLG_GOLEM_IDLE_SECONDS. Defaults to 60.
    idle_seconds: float = 60.0
    #: Seconds that a chunk waits for a provider before it is released. MLG_GOLEM_OFFER_SECONDS. Defaults to 120.
    offer_seconds: float = 120.0
    #: Seconds that a provider is banned after its first failure; doubles with each.
    #: MLG_GOLEM_BAN_SECONDS. Defaults to 900.
    ban_seconds: float = 900.0
    #: Different providers that a chunk is tried on before it fails. MLG_GOLEM_ATTEMPTS. Defaults to 3.
    attempts: int = 3
    #: Seconds that a batcher waits for the last invoices when it stops. MLG_GOLEM_SETTLE_SECONDS. Defaults to 8.
    settle_seconds: float = 8.0
    #: Runtime of providers with built-in models; used for models without a published container image.
    #: MLG_GOLEM_RUNTIME. Defaults to mlg.
    runtime: str = "mlg"
    #: Registry of published container images. MLG_GOLEM_REGISTRY. Defaults to https://registry.golem.network.
    registry: str = "https://registry.golem.network"

    @classmethod
    def from_env(cls, variables: Mapping[str, str]) -> GolemSettings:
        """Read the settings. :raises ConfigError: a value cannot be used; names the variable."""
        env = Environment(variables)
        return cls(
            app_key=env.text("YAGNA_APPKEY", cls.app_key),
            api_url=env.text("YAGNA_API_URL", cls.api_url).rstrip("/"),
            subnet=env.text("YAGNA_SUBNET", cls.subnet),
            payment_driver=env.text("YAGNA_PAYMENT_DRIVER", cls.payment_driver),
            payment_network=env.text("YAGNA_PAYMENT_NETWORK", cls.payment_network),
            budget_run=_amount(env, "MLG_BUDGET_RUN", cls.budget_run),
            budget_day=_amount(env, "MLG_BUDGET_DAY", cls.budget_day),
            budget_total=_amount(env, "MLG_BUDGET_TOTAL", cls.budget_total),
            max_price_hour=_amount(env, "MLG_MAX_PRICE_HOUR", cls.max_price_hour),
            max_price_start=_amount(env, "MLG_MAX_PRICE_START", cls.max_price_start),
            min_workers=env.integer("MLG_GOLEM_MIN_WORKERS", cls.min_workers, minimum=0, maximum=1000),
            max_workers=env.integer("MLG_GOLEM_MAX_WORKERS", cls.max_workers, minimum=1, maximum=1000),
            start_seconds=env.number("MLG_GOLEM_START_SECONDS", cls.start_seconds, minimum=1, maximum=3600),
            # From five hours on, providers demand interim payments, which yapapi does not handle well.
            rental_seconds=env.number("MLG_GOLEM_RENTAL_SECONDS", cls.rental_seconds, minimum=60, maximum=17000),
            idle_seconds=env.number("MLG_GOLEM_IDLE_SECONDS", cls.idle_seconds, minimum=0, maximum=3600),
            offer_seconds=env.number("MLG_GOLEM_OFFER_SECONDS", cls.offer_seconds, minimum=1, maximum=86400),
            ban_seconds=env.number("MLG_GOLEM_BAN_SECONDS", cls.ban_seconds, minimum=1, maximum=604800),
            attempts=env.integer("MLG_GOLEM_ATTEMPTS", cls.attempts, minimum=1, maximum=10),
            settle_seconds=env.number("MLG_GOLEM_SETTLE_SECONDS", cls.settle_seconds, minimum=0, maximum=600),
            runtime=env.text("MLG_GOLEM_RUNTIME", cls.runtime),
            registry=env.text("MLG_GOLEM_REGISTRY", cls.registry),
        )

    @property
    def caps(self) -> dict[str, Decimal]:
        """The budgets that are set: run, day, total."""
        amounts = {"run": self.budget_run, "day": self.budget_day, "total": self.budget_total}
        return {name: amount for name, amount in amounts.items() if amount is not None}


def _amount(env: Environment, name: str, default: Decimal | None) -> Decimal | None:
    text = env.text(name, "none" if default is None else str(default))
    if text == "none":
        return None
    with contextlib.suppress(InvalidOperation):
        amount = Decimal(text)
        if amount.is_finite() and amount >= 0:
            return amount
    raise ConfigError(f"{name} is {text!r}, which is not an amount. Use for example 0.5, or none.")
