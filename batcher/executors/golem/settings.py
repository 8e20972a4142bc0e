"""The settings of the golem executor: budgets, price limits, numbers of workers, timeouts.

Read by `executor.py` from its context's environment. The daemon, subnet and payment network are set by yagna's own
variables. They are read here and passed on, because yapapi reads some of them at import and others later.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from batcher.executors.golem.offers import Price
from batcher.image_build.lock import ImageAddress
from provider_image.environment import Settings, setting
from provider_image.errors import ConfigError


def _amount(variable: str, text: str) -> Decimal | None:
    if text == "none":
        return None
    try:
        amount = Decimal(text)
    except InvalidOperation as error:
        raise ConfigError(f"{variable} is {text!r}, which is not an amount. Use for example 0.5, or none.") from error
    if not amount.is_finite() or amount < 0:
        raise ConfigError(f"{variable} is {text}, which is not an amount. Use for example 0.5, or none.")
    return amount


def _image(variable: str, text: str) -> ImageAddress:
    try:
        return ImageAddress.from_text(text)
    except ValueError as error:
        raise ConfigError(
            f"{variable}={text!r} does not have the form HASH@URL: the SHA3-224 of the image file, 56 hexadecimal "
            "digits in lower case, and an address that begins with http:// or https://."
        ) from error


@dataclass(frozen=True, kw_only=True)
class GolemSettings(Settings):
    """Settings of the golem executor. Amounts are in GLM."""

    #: The daemon's app key, YAGNA_APPKEY; required.
    app_key: str = setting("YAGNA_APPKEY", "")
    #: The daemon's address, YAGNA_API_URL; empty takes yapapi's default.
    api_url: str = setting("YAGNA_API_URL", "", parse=lambda _, text: text.rstrip("/"))
    #: YAGNA_SUBNET: the part of the network whose offers are used.
    subnet: str = setting("YAGNA_SUBNET", "public")
    #: YAGNA_PAYMENT_DRIVER and YAGNA_PAYMENT_NETWORK: how providers are paid.
    payment_driver: str = setting("YAGNA_PAYMENT_DRIVER", "erc20")
    payment_network: str = setting("YAGNA_PAYMENT_NETWORK", "holesky")
    #: Most that one run of the batcher may spend. MLG_BUDGET_RUN. Defaults to none.
    budget_run: Decimal | None = setting("MLG_BUDGET_RUN", None, parse=_amount)
    #: Most that all batchers of this home may spend on one day (UTC). MLG_BUDGET_DAY. Defaults to 1.
    budget_day: Decimal | None = setting("MLG_BUDGET_DAY", Decimal(1), parse=_amount)
    #: Most that all batchers of this home may spend in total. MLG_BUDGET_TOTAL. Defaults to none.
    budget_total: Decimal | None = setting("MLG_BUDGET_TOTAL", None, parse=_amount)
    #: Offers above this price per hour, with one thread busy, are rejected. MLG_MAX_PRICE_HOUR. Defaults to 0.5.
    max_price_hour: Decimal | None = setting("MLG_MAX_PRICE_HOUR", Decimal("0.5"), parse=_amount)
    #: Offers above this price per start are rejected. MLG_MAX_PRICE_START. Defaults to 0.01.
    max_price_start: Decimal | None = setting("MLG_MAX_PRICE_START", Decimal("0.01"), parse=_amount)
    #: Workers kept for a model that has had work within the last hour, as long as the budget allows.
    #: MLG_GOLEM_MIN_WORKERS. Defaults to 0.
    min_workers: int = setting("MLG_GOLEM_MIN_WORKERS", 0, minimum=0, maximum=1000)
    #: Workers at the same time, all models together. MLG_GOLEM_MAX_WORKERS. Defaults to 8.
    max_workers: int = setting("MLG_GOLEM_MAX_WORKERS", 8, minimum=1, maximum=1000)
    #: Seconds that a provider may take to start, including the download of its container image.
    #: MLG_GOLEM_START_SECONDS. Defaults to 300.
    start_seconds: float = setting("MLG_GOLEM_START_SECONDS", 300.0, minimum=1, maximum=3600)
    #: Seconds after which a demand is renewed: new agreements are made, and the old ones end after their chunks.
    #: MLG_GOLEM_RENTAL_SECONDS. Defaults to 10800.
    rental_seconds: float = setting("MLG_GOLEM_RENTAL_SECONDS", 10800.0, minimum=60, maximum=17000)
    #: Seconds that an idle worker is kept at most. MLG_GOLEM_IDLE_SECONDS. Defaults to 60.
    idle_seconds: float = setting("MLG_GOLEM_IDLE_SECONDS", 60.0, minimum=0, maximum=3600)
    # A daemon that has just started needs minutes to hear of offers.
    #: Seconds that a chunk waits without any provider before it is released. MLG_GOLEM_OFFER_SECONDS. Defaults to 300.
    offer_seconds: float = setting("MLG_GOLEM_OFFER_SECONDS", 300.0, minimum=1, maximum=86400)
    #: Seconds that a provider is banned after its first failure; doubles with each.
    #: MLG_GOLEM_BAN_SECONDS. Defaults to 900.
    ban_seconds: float = setting("MLG_GOLEM_BAN_SECONDS", 900.0, minimum=1, maximum=604800)
    #: Different providers that a chunk is tried on before it fails. MLG_GOLEM_ATTEMPTS. Defaults to 3.
    attempts: int = setting("MLG_GOLEM_ATTEMPTS", 3, minimum=1, maximum=10)
    #: Seconds that a batcher waits for the last invoices when it stops. MLG_GOLEM_SETTLE_SECONDS. Defaults to 8.
    settle_seconds: float = setting("MLG_GOLEM_SETTLE_SECONDS", 8.0, minimum=0, maximum=600)
    #: The container image for all models, HASH@URL, in place of those that `mlg image push` recorded in images.lock.
    #: MLG_GOLEM_IMAGE. Defaults to none.
    image: ImageAddress | None = setting("MLG_GOLEM_IMAGE", None, parse=_image)
    #: Runtime of providers with built-in models, for models without a container image.
    #: MLG_GOLEM_RUNTIME. Defaults to none.
    runtime: str | None = setting("MLG_GOLEM_RUNTIME", None, parse=lambda _, text: text)
    #: Registry of published container images. MLG_GOLEM_REGISTRY. Defaults to https://registry.golem.network.
    registry: str = setting("MLG_GOLEM_REGISTRY", "https://registry.golem.network")

    def price_rejection(self, price: Price) -> str | None:
        """Return why an offer is rejected for its price, in words that fit after "2 providers"; None if it is not."""
        if self.max_price_start is not None and price.start > self.max_price_start:
            return f"above {self.max_price_start} GLM per start (MLG_MAX_PRICE_START)"
        if self.max_price_hour is not None and price.per_hour > self.max_price_hour:
            return f"above {self.max_price_hour} GLM per hour (MLG_MAX_PRICE_HOUR)"
        return None

    @property
    def caps(self) -> dict[str, Decimal]:
        """The budgets that are set: run, day, total."""
        amounts = {"run": self.budget_run, "day": self.budget_day, "total": self.budget_total}
        return {name: amount for name, amount in amounts.items() if amount is not None}
