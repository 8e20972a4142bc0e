"""Scenarios: valid and invalid files, and when faults occur."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from devnet.provider.invoicing import activity_amount
from devnet.scenario import (
    DAEMON,
    DAEMON_KINDS,
    PROVIDER_KINDS,
    Fault,
    FaultSchedule,
    ProviderPlan,
    default_scenario,
    read_scenario,
)
from provider_image.errors import ConfigError

FULL_SCENARIO = """
funds = 12.5
subnet = "mine"
[[faults]]
kind = "http-500"
path = "GET /me"
times = 1
[[providers]]
name = "alpha"
price_per_second = 0.00000000000000001
runtimes = ["mlg"]
speed = 1
[[providers.faults]]
kind = "slow-approval"
seconds = 3
[[providers]]
name = "beta"
start_price = "0.5"
"""


def test_a_scenario_file_is_read_exactly(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(FULL_SCENARIO)

    scenario = read_scenario(file)

    alpha, beta = scenario.providers
    assert (scenario.funds, scenario.subnet) == (Decimal("12.5"), "mine")
    assert scenario.faults == (Fault(kind="http-500", path="GET /me", times=1),)
    assert alpha.price_per_second == Decimal("0.00000000000000001")
    assert (alpha.runtimes, alpha.speed) == (("mlg",), 1.0)
    assert alpha.faults == (Fault(kind="slow-approval", seconds=3.0),)
    assert beta.start_price == Decimal("0.5")
    assert len(beta.node_id) == 42 and beta.node_id != alpha.node_id


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fund = 1", "Did you mean funds"),
        ("[[providers]]\nname = 'a'\nstart_prise = 1", r"providers\[0\].start_prise.*Did you mean start_price"),
        ("[[providers]]\nname = 'a'\n[[providers.faults]]\nkind = 'dye'", "Did you mean die"),
        ("[[providers]]\nname = 'a'\n[[providers.faults]]\nkind = 'http-500'", "a cannot have a fault"),
        ("[[providers]]\nname = 'a'\n[[providers.faults]]\ntimes = 1", r"faults\[0\]: kind is missing"),
        ("[[faults]]\nkind = 'hang'\n[[providers]]\nname = 'a'", "Did you mean http-hang"),
        ("[[providers]]\nname = 'a'\ncores = 1.5", "cores must be an integer"),
        ("[[providers]]\nname = 'a'\ncores = 0", "cores"),
        ("[[providers]]\nname = 'a'\nspeed = 'fast'", "speed must be a number"),
        ("[[providers]]\nname = 'a'\nspeed = nan", "speed must be a number"),
        ("[[providers]]\nname = 'a'\nruntimes = 'vm'", "runtimes must be a list"),
        ("[[providers]]\nname = 'a'\nstart_price = -1", "prices"),
        ("[[providers]]\nname = 'a'\nnode_id = '0x1'", "node_id"),
        ("[[providers]]\nname = 'a'\n[[providers]]\nname = 'a'", "same name"),
        ("[[providers]]\ncores = 1", "name is missing"),
        ("[providers]\nname = 'a'", "list of tables"),
        ("", "no .*providers"),
        ("name = ", "not TOML"),
    ],
)
def test_an_error_in_a_scenario_names_the_key(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(text)

    with pytest.raises(ConfigError, match=reason):
        read_scenario(file)


def test_a_missing_scenario_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        read_scenario(tmp_path / "absent.toml")


def test_default_providers_have_different_names_and_prices() -> None:
    plans = default_scenario(30).providers

    assert len({plan.name for plan in plans}) == len({plan.node_id for plan in plans}) == 30
    assert len({plan.start_price for plan in plans}) == 30


def test_a_fault_occurs_as_after_every_and_times_say() -> None:
    fault = Fault(kind="die", after=2, every=3, times=2)
    faults = FaultSchedule({"alpha": (fault,)})

    triggered = [faults.triggers("alpha", "die") is fault for _ in range(12)]

    assert [number for number, each in enumerate(triggered) if each] == [2, 5]


def test_occasions_are_counted_by_owner_kind_and_path() -> None:
    once = Fault(kind="http-500", path="GET /a/*", times=1)
    faults = FaultSchedule({DAEMON: (once,), "alpha": (Fault(kind="hang", times=1),)})

    assert faults.triggers("beta", "hang") is None
    assert faults.triggers("alpha", "die") is None
    assert faults.triggers("alpha", "hang") is not None
    assert faults.triggers("alpha", "hang") is None
    assert faults.triggers(DAEMON, "http-500", "POST /a/b") is None
    assert faults.triggers(DAEMON, "http-500", "GET /a/b") is once
    assert faults.triggers(DAEMON, "http-500", "GET /a/b") is None


def test_every_kind_has_a_description() -> None:
    assert all(text.endswith(".") for text in (PROVIDER_KINDS | DAEMON_KINDS).values())


def test_amounts_are_exact_to_the_smallest_unit() -> None:
    plan = ProviderPlan(
        name="a",
        start_price=Decimal("0.1"),
        price_per_cpu_second=Decimal("0.000000000000000003"),
        price_per_second=Decimal("0.7"),
    )

    # 0.1 + 1.5 * 3e-18 + 0.1 * 0.7, and a half unit is rounded up
    assert activity_amount(plan, [1.5, 0.1]) == Decimal("0.170000000000000005")
    assert activity_amount(plan, [0.0, 0.0], factor=2.5) == Decimal("0.25")
