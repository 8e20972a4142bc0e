"""The offers that a provider makes on the market, one per runtime, in Golem's properties."""

from __future__ import annotations

from typing import Any

from devnet.scenario import ProviderPlan, Scenario
from devnet.wallet import PLATFORMS

#: The order of an activity's usage counters.
USAGE_VECTOR = ["golem.usage.cpu_sec", "golem.usage.duration_sec"]
_CAPABILITIES = {"vm": ["inet", "manifest-support", "start-entrypoint"]}


def offer_constraints(subnet: str) -> str:
    """Return what every offer in a subnet requires of a demand."""
    return f"(&(golem.srv.comp.expiration>0)(golem.node.debug.subnet={subnet}))"


def offer_properties(plan: ProviderPlan, runtime: str, scenario: Scenario) -> dict[str, Any]:
    """Return the properties of a provider's offer of a runtime."""
    return {
        "golem.node.id.name": plan.name,
        "golem.node.debug.subnet": scenario.subnet,
        "golem.srv.caps.multi-activity": True,
        "golem.runtime.name": runtime,
        "golem.runtime.version": "0.4.0",
        "golem.runtime.capabilities": _CAPABILITIES.get(runtime, []),
        # As on the network, where the runtime for images exists for no other.
        "golem.inf.cpu.architecture": "x86_64",
        "golem.inf.cpu.cores": plan.cores,
        "golem.inf.cpu.threads": plan.threads,
        "golem.inf.mem.gib": plan.memory_gib,
        "golem.inf.storage.gib": plan.storage_gib,
        "golem.activity.caps.transfer.protocol": ["gftp", "http", "https"],
        "golem.com.scheme": "payu",
        "golem.com.scheme.payu.debit-note.interval-sec?": 120,
        "golem.com.scheme.payu.payment-timeout-sec?": 18000,
        "golem.com.payment.debit-notes.accept-timeout?": max(1, round(scenario.debit_note_accept_seconds)),
        "golem.com.pricing.model": "linear",
        # yapapi rejects integers.
        "golem.com.pricing.model.linear.coeffs": [
            float(plan.price_per_cpu_second),
            float(plan.price_per_second),
            float(plan.start_price),
        ],
        "golem.com.usage.vector": USAGE_VECTOR,
        "golem.com.payment.protocol.version": 3,
        **{f"golem.com.payment.platform.{name}.address": plan.node_id for name in PLATFORMS},
    }
