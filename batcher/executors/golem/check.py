"""Checks what the golem executor needs, one thing after another, and says for each what is wrong and what to do.

Called by `cli/rentals/golem.py`. It makes the calls of the executor without its session, so that every failure has a
place of its own: nothing is rented, and what is opened at the daemon is closed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from batcher.executors.golem.offers import BadOffer, Price
from batcher.executors.golem.payload import make_payload
from batcher.executors.golem.settings import GolemSettings
from provider_image.errors import MlgError

#: yapapi's default.
_URL = "http://127.0.0.1:7465"
_CALL_SECONDS, _GFTP_SECONDS, _DOWNLOAD_SECONDS = 15.0, 20.0, 30.0
#: Longest answer of the daemon that is read: it passes on what a hundred providers offer.
_MAX_RESPONSE_BYTES = 64 * 1024 * 1024
#: What the executor allocates if no budget is set.
_DEFAULT_AMOUNT = Decimal(10)
#: Providers refuse demands that expire within minutes.
_EXPIRATION = timedelta(minutes=30)
_NETWORKS = "Real GLM: polygon (low fees), mainnet. Test GLM: hoodi, or holesky and amoy where the daemon has them."


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of one check."""

    #: What was checked, in a word or two.
    name: str
    is_ok: bool
    #: What was found, a sentence.
    finding: str
    #: What to do; empty if all is well.
    remedy: str = ""


class CallFailed(Exception):
    """The daemon refused a call, or did not respond. :ivar status: of the response; None if there was none."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class GolemCheck:
    """The checks of one command.

    :param folder: the home's folder of models.
    :param models: whose images and offers are checked.
    :param environment: of the programs that are started.
    :param seconds: how long offers are waited for.
    :param is_downloading: download each image and check its hash.
    """

    def __init__(
        self,
        settings: GolemSettings,
        folder: Path,
        models: Sequence[str],
        *,
        environment: Mapping[str, str],
        seconds: float,
        is_downloading: bool,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._models = models
        self._environment = environment
        self._seconds = seconds
        self._is_downloading = is_downloading
        self._url = settings.api_url or _URL
        #: The address of the daemon's owner, once the daemon accepted the key.
        self._identity: str | None = None
        #: Model -> its demand, as yapapi's builder.
        self._demands: dict[str, Any] = {}
        self._allocation: dict[str, Any] | None = None

    def run(self) -> Iterator[CheckResult]:
        """Yield the results one by one. A check whose condition is not met is left out."""
        yield from self._check_daemon()
        yield self._check_gftp()
        if not self._models:
            finding, remedy = f"No model is installed in {self._folder}.", "mlg models compile efficientnet_lite0"
            yield CheckResult(name="models", is_ok=False, finding=finding, remedy=f"Install one: {remedy}")
        for model in self._models:
            yield self._check_image(model)
        if self._identity is None:
            return
        try:
            yield from self._check_money(self._identity)
            if self._allocation is not None and self._demands:
                yield from self._check_offers(self._allocation["allocationId"])
        except CallFailed as error:
            yield CheckResult(name="daemon", is_ok=False, finding=f"{error}", remedy="See its log, and check again.")
        except (LookupError, TypeError, AttributeError) as error:
            finding = f"What responds at {self._url} answers unlike yagna ({type(error).__name__}: {error})."
            yield CheckResult(name="daemon", is_ok=False, finding=finding, remedy="Check YAGNA_API_URL.")
        finally:
            if self._allocation is not None:
                with contextlib.suppress(CallFailed):  # it ends by itself with its timeout
                    self._call("DELETE", f"/payment-api/v1/allocations/{self._allocation['allocationId']}")

    # The daemon

    def _check_daemon(self) -> Iterator[CheckResult]:
        if not self._settings.app_key:
            remedy = "Create one (yagna app-key create mlg), and set YAGNA_APPKEY to it. To try without: mlg devnet"
            yield CheckResult(name="app key", is_ok=False, finding="YAGNA_APPKEY is not set.", remedy=remedy)
            return
        try:
            version = self._call("GET", "/version/get")["current"]["version"]
            finding = f"yagna {version} responds at {self._url}."
        except CallFailed as error:
            if error.status is None:
                remedy = "Start it: yagna service run. Set YAGNA_API_URL if it listens at another address."
                finding = f"No daemon responds at {self._url}: {error}"
                yield CheckResult(name="daemon", is_ok=False, finding=finding, remedy=remedy)
                return
            finding = f"A daemon responds at {self._url}."
        except (LookupError, TypeError):
            remedy = "Set YAGNA_API_URL to the address of the daemon."
            yield CheckResult(
                name="daemon", is_ok=False, finding=f"What responds at {self._url} is not yagna.", remedy=remedy
            )
            return
        yield CheckResult(name="daemon", is_ok=True, finding=finding)
        try:
            self._identity = str(self._call("GET", "/me")["identity"])
        except (LookupError, TypeError):
            remedy = "Set YAGNA_API_URL to the address of the daemon."
            finding = f"What responds at {self._url} is not yagna."
            yield CheckResult(name="app key", is_ok=False, finding=finding, remedy=remedy)
            return
        except CallFailed as error:
            remedy = "Set YAGNA_APPKEY to a key of this daemon (yagna app-key list)."
            finding = "The daemon does not accept the app key." if error.status == 401 else str(error)
            yield CheckResult(name="app key", is_ok=False, finding=finding, remedy=remedy)
            return
        yield CheckResult(name="app key", is_ok=True, finding=f"The daemon's identity is {self._identity}.")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Call the daemon. :return: the response, parsed. :raises CallFailed:"""
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._settings.app_key}", "Content-Type": "application/json"},
        )
        # yapapi uses no proxy either.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_CALL_SECONDS) as response:
                text = response.read(_MAX_RESPONSE_BYTES)
                return json.loads(text) if text.strip() else None
        except urllib.error.HTTPError as error:
            text = error.read(10_000).decode(errors="replace")
            with contextlib.suppress(ValueError, AttributeError):
                text = str(json.loads(text).get("message") or text)
            raise CallFailed(f"{method} {path}: {' '.join(text.split())[:300]}", error.code) from error
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise CallFailed(str(getattr(error, "reason", error)) or type(error).__name__) from error

    # Files

    def _check_gftp(self) -> CheckResult:
        """Publish a file as yapapi does, for which gftp must reach the daemon."""
        program = shutil.which("gftp", path=self._environment.get("PATH"))
        if program is None:
            remedy = "Install yagna, which includes it, and add its folder to the PATH of the batcher."
            return CheckResult(name="gftp", is_ok=False, finding="gftp is not on the PATH.", remedy=remedy)
        responses, problem = self._call_gftp(program)
        if "result" in responses.get(1, {}):
            return CheckResult(
                name="gftp", is_ok=True, finding=f"{program} {responses.get(0, {}).get('result')} publishes files."
            )
        reason = str(responses.get(1, {}).get("error") or problem or "It does not respond.")
        return CheckResult(
            name="gftp",
            is_ok=False,
            finding=f"{program} cannot publish a file: {reason.splitlines()[-1][:300]}",
            remedy="Set GSB_URL to the socket of the daemon, the same for both; this user must be able to open it. "
            "Under systemd PrivateTmp hides the default, /tmp/yagna.sock.",
        )

    def _call_gftp(self, program: str) -> tuple[dict[Any, Any], str]:
        """Ask gftp for its version, and to publish a file. :return: the responses, 0 and 1; what it says of errors."""
        responses: dict[Any, Any] = {}
        with tempfile.NamedTemporaryFile(prefix="mlg-check-") as file, tempfile.TemporaryFile() as errors:
            file.write(b"mlg")
            file.flush()
            calls: tuple[tuple[str, dict[str, Any]], ...] = (("version", {}), ("publish", {"files": [file.name]}))
            try:
                process = subprocess.Popen(
                    [program, "server"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=self._environment,
                )
            except OSError as error:
                return {}, str(error)
            timer = threading.Timer(_GFTP_SECONDS, process.kill)
            timer.start()
            with contextlib.suppress(BrokenPipeError), process:
                assert process.stdin is not None and process.stdout is not None
                for number, (method, params) in enumerate(calls):
                    call = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
                    process.stdin.write(json.dumps(call).encode() + b"\n")
                    process.stdin.flush()
                    # It ends with its input, which therefore stays open until it has responded.
                    with contextlib.suppress(ValueError, TypeError):
                        responses[number] = dict(json.loads(process.stdout.readline()))
                process.kill()
            timer.cancel()
            errors.seek(0)
            return responses, errors.read(10_000).decode(errors="replace").strip()

    # Images

    def _check_image(self, model: str) -> CheckResult:
        name = f"image of {model}"
        try:
            demand = asyncio.run(self._make_demand(model))
        except MlgError as error:
            finding, _, remedy = error.reason.partition(". ")
            return CheckResult(name=name, is_ok=False, finding=f"{finding.rstrip('.')}.", remedy=remedy)
        self._demands[model] = demand
        package = demand.properties.get("golem.srv.comp.task_package")
        if package is None:
            return CheckResult(name=name, is_ok=True, finding=f"The runtime {self._settings.runtime} has it built in.")
        image_hash, _, url = package.removeprefix("hash:sha3:").partition(":")
        if self._is_downloading:
            problem = _hash_problem(url, image_hash)
            if problem:
                remedy = "Publish it again (mlg image push), or correct MLG_GOLEM_IMAGE."
                return CheckResult(name=name, is_ok=False, finding=problem, remedy=remedy)
        return CheckResult(name=name, is_ok=True, finding=f"{url} has the image {image_hash[:12]}.")

    async def _make_demand(self, model: str) -> Any:
        payload = await make_payload(model, "check", self._folder, self._settings)
        from yapapi.props.builder import DemandBuilder

        demand = DemandBuilder()
        await payload.decorate_demand(demand)
        return demand

    # Money

    def _check_money(self, identity: str) -> Iterator[CheckResult]:
        settings = self._settings
        network, driver = settings.payment_network, settings.payment_driver
        accounts = self._call("GET", "/payment-api/v1/requestorAccounts")
        usable = [each for each in accounts if (each.get("driver"), each.get("network")) == (driver, network)]
        if not usable:
            known = ", ".join(sorted({str(each.get("network")) for each in accounts})) or "none"
            yield CheckResult(
                name="account",
                is_ok=False,
                finding=f"The daemon has no account for payments by {driver} on {network}. It has: {known}.",
                remedy=f"Run: yagna payment init --sender --network={network}. Or set YAGNA_PAYMENT_NETWORK. "
                f"{_NETWORKS}",
            )
            return
        platform = str(usable[0]["platform"])
        yield CheckResult(name="account", is_ok=True, finding=f"The daemon can pay by {platform}.")
        amount = min(settings.caps.values(), default=_DEFAULT_AMOUNT)
        now = datetime.now(UTC)
        body = {
            **{"allocationId": "", "spentAmount": "", "remainingAmount": "", "makeDeposit": False},
            **{"address": identity, "paymentPlatform": platform, "totalAmount": format(amount, "f")},
            **{"timestamp": now.isoformat(), "timeout": (now + _EXPIRATION).isoformat()},
        }
        try:
            self._allocation = self._call("POST", "/payment-api/v1/allocations", body)
        except CallFailed as error:
            yield CheckResult(
                name="funds",
                is_ok=False,
                finding=f"{amount} GLM cannot be allocated: {error}",
                remedy=f"Run: yagna payment fund --network={network}. See: yagna payment status --network={network}. "
                "Or lower MLG_BUDGET_DAY: the batcher allocates what it may spend.",
            )
            return
        yield CheckResult(name="funds", is_ok=True, finding=f"{amount} GLM can be allocated.")

    # Offers

    def _check_offers(self, allocation_id: str) -> Iterator[CheckResult]:
        decorations = self._call("GET", f"/payment-api/v1/demandDecorations?allocationIds={allocation_id}")
        subscriptions: dict[str, str] = {}
        offers: dict[str, dict[str, Mapping[str, Any]]] = {model: {} for model in self._demands}
        try:
            for model, demand in self._demands.items():
                subscriptions[model] = self._subscribe(demand, decorations)
            deadline = time.monotonic() + self._seconds
            while time.monotonic() < deadline:
                for model, subscription in subscriptions.items():
                    path = f"/market-api/v1/demands/{subscription}/events?timeout=1&maxEvents=100"
                    for event in self._call("GET", path) or ():
                        if event.get("eventType") == "ProposalEvent":
                            offers[model][event["proposal"]["issuerId"]] = event["proposal"]["properties"]
        finally:
            for subscription in subscriptions.values():
                with contextlib.suppress(CallFailed):  # it expires
                    self._call("DELETE", f"/market-api/v1/demands/{subscription}")
        for model, found in offers.items():
            yield self._judge_offers(f"offers for {model}", list(found.values()))

    def _subscribe(self, demand: Any, decorations: Mapping[str, Any]) -> str:
        subnet = self._settings.subnet
        properties = {
            **demand.properties,
            "golem.srv.comp.expiration": int((datetime.now(UTC) + _EXPIRATION).timestamp() * 1000),
            "golem.srv.caps.multi-activity": True,
            "golem.node.debug.subnet": subnet,
            **{each["key"]: each["value"] for each in decorations["properties"]},
        }
        constraints = "".join([f"(golem.node.debug.subnet={subnet})", *decorations["constraints"], demand.constraints])
        body = {"properties": properties, "constraints": f"(&{constraints})"}
        return str(self._call("POST", "/market-api/v1/demands", body))

    def _judge_offers(self, name: str, offers: Sequence[Mapping[str, Any]]) -> CheckResult:
        settings = self._settings
        if not offers:
            return CheckResult(
                name=name,
                is_ok=False,
                finding=f"No provider made an offer within {self._seconds:g} s.",
                remedy="A daemon that has just started hears of offers after some minutes: try --seconds 300. "
                f"Otherwise check the subnet (YAGNA_SUBNET={settings.subnet}), and whether providers take payments on "
                f"{settings.payment_network} (YAGNA_PAYMENT_NETWORK). {_NETWORKS}",
            )
        rejections: Counter[str] = Counter()
        prices: list[Price] = []
        for properties in offers:
            try:
                price = Price.from_offer(properties)
            except BadOffer:
                rejections["with unreadable prices"] += 1
                continue
            rejection = settings.price_rejection(price)
            if rejection is None:
                prices.append(price)
            else:
                rejections[rejection] += 1
        parts = [f"{len(prices)} acceptable", *(f"{count} {reason}" for reason, count in sorted(rejections.items()))]
        finding = f"{len(offers)} providers made offers: {', '.join(parts)}."
        if not prices:
            return CheckResult(
                name=name,
                is_ok=False,
                finding=finding,
                remedy="Raise the limit that is named, or look elsewhere: YAGNA_SUBNET.",
            )
        cheapest = min(prices, key=lambda price: price.per_hour)
        finding += f" The cheapest takes {cheapest.per_hour:.4f} GLM per hour and {cheapest.start:.4f} per start."
        return CheckResult(name=name, is_ok=True, finding=finding)


def _hash_problem(url: str, image_hash: str) -> str:
    """Download an image. :return: why it is not the one of this hash; empty if it is."""
    digest = hashlib.sha3_224()
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as response:
            while block := response.read(1024 * 1024):
                digest.update(block)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"{url} cannot be downloaded: {error}."
    found = digest.hexdigest()
    return "" if found == image_hash else f"The file at {url} has the hash {found}, not {image_hash}."
