"""The files in deploy/ match this program: their commands, options, metrics and settings exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from batcher.executors import REGISTRY, load_executor
from batcher.settings import BatcherSettings, BatcherTimings
from mlg import COMMANDS, cli
from server.app import create_app
from server.process import request_threads
from server.settings import ServerSettings
from store import new_id
from store.processes.batchers import BatcherRecord
from store.requests import Answer, NewRequest
from store.store import Store
from tests.contexts import make_context
from tests.programs import find_program
from tests.timing import DEADLINE_SECONDS

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("mlg*.service"))
#: Words of PromQL that the rules and the dashboard use.
WORDS = {
    *("sum", "max", "min", "avg", "count", "by", "without", "on", "ignoring", "group_left", "and", "or", "unless"),
    *("rate", "increase", "histogram_quantile", "clamp_min"),
}
#: Labels that Prometheus adds to every series.
PROMETHEUS_LABELS = {"job", "instance"}


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


COMPOSE = read_yaml("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def check_command(words: list[str]) -> None:
    """Check that the commands and options of an mlg command line exist."""
    assert words[0].rsplit("/", 1)[-1] == "mlg"
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group):
        context = click.Context(command)
        found = command.get_command(context, rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    for word in rest:
        if word.startswith("-"):
            assert word.split("=")[0] in known, words


# docker compose


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.y*ml")), ids=lambda path: path.name)
def test_every_yaml_file_is_one_document(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_containers_of_mlg_run_commands_that_exist() -> None:
    for name in ("server", "batcher"):
        check_command(SERVICES[name]["command"])
    check = SERVICES["batcher"]["healthcheck"]["test"]
    assert check[0] == "CMD-SHELL"
    if "operate" in COMMANDS:
        check_command(check[1].split("|")[0].split())
    assert (ROOT / "deploy" / SERVICES["server"]["build"]["context"] / "Dockerfile").exists()
    assert SERVICES["server"]["image"] == SERVICES["batcher"]["image"]


def test_the_batchers_health_check_finds_its_own_host_in_the_status() -> None:
    line = SERVICES["batcher"]["healthcheck"]["test"][1].replace("$$", "$").split("|")[1]
    for host, status in (("abc123", 0), ("other", 1)):
        text = json.dumps({"batchers": [{"id": "x", "host": host, "pid": 1}]})
        run = subprocess.run(["sh", "-c", line], input=text, text=True, env={**os.environ, "HOSTNAME": "abc123"})

        assert run.returncode == status


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_is_restricted(name: str) -> None:
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"].split(":")[0] not in ("0", "root")
    assert {"cpus", "memory", "pids"} <= service["deploy"]["resources"]["limits"].keys()
    assert "healthcheck" in service or "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "only the operator may expose a port to other machines"
    if "build" not in service and name != "batcher":
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]+", service["image"]), "a fixed version, not the latest"


def test_everything_that_a_container_refers_to_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        for secret in service.get("secrets", []):
            assert secret in COMPOSE["secrets"]
        for other in service.get("depends_on", {}):
            assert other in SERVICES
    for secret in COMPOSE["secrets"].values():
        ignored = (DEPLOY / ".gitignore").read_text().split()
        assert secret["file"].startswith("./secrets/") and "secrets/" in ignored


def test_the_containers_run_as_the_user_of_the_image() -> None:
    assert f"USER {SERVICES['server']['user']}" in (ROOT / "Dockerfile").read_text()


def test_every_setting_in_the_files_exists() -> None:
    known = set()
    sources = [
        *(ROOT / "batcher").rglob("*.py"),
        *(
            ROOT / f"{each}.py"
            for each in (
                *("provider_image/environment", "store/settings", "server/settings", "telegram_bot/settings"),
                "cli/logs",
            )
        ),
    ]
    for path in sources:
        known |= set(re.findall(r'"((?:MLG|YAGNA)_[A-Z_]+)"', path.read_text()))
    for path in (path for path in DEPLOY.rglob("*") if path.is_file()):
        for name in re.findall(r"\b(?:MLG|YAGNA)_[A-Z]+(?:_[A-Z]+)*", path.read_text()):
            assert name in known, f"{path}: {name}"


@pytest.mark.parametrize("executor", REGISTRY)
def test_containers_and_units_have_enough_time_to_stop(executor: str, tmp_path: Path) -> None:
    stop_seconds = load_executor(executor, make_context(tmp_path, tmp_path)).stop_seconds()
    needed = BatcherSettings.from_env({}).drain_seconds + BatcherTimings().final_write_seconds + stop_seconds

    assert float(SERVICES["batcher"]["stop_grace_period"].rstrip("s")) > needed
    for name in ("mlg-batcher", "mlg-batch"):
        assert float(unit(DEPLOY / "systemd" / f"{name}.service")["Service"]["TimeoutStopSec"][0]) > needed


# systemd


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Read a unit file: section -> name -> values."""
    sections: dict[str, dict[str, list[str]]] = {}
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            section.setdefault(name, []).append(value)
    return sections


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_a_command_that_exists_and_is_restricted(path: Path) -> None:
    service = unit(path)["Service"]
    # The bot has a user and a state of its own: it needs nothing of the server but its address.
    folder = "mlg-telegram" if path.stem == "mlg-telegram" else "mlg"

    check_command(service["ExecStart"][0].split())
    for name, value in (
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("StateDirectory", folder),
        ("KillMode", "mixed"),
    ):
        assert service[name] == [value]
    assert service["Environment"][0] == f"MLG_HOME=/var/lib/{folder}"
    assert service["User"] not in ([], ["root"])


def test_gftp_of_the_batcher_finds_the_socket_of_the_daemon_in_spite_of_private_tmp() -> None:
    daemon = unit(DEPLOY / "systemd" / "yagna.service")["Service"]
    (address,) = daemon["Environment"]

    assert f"#{address}\n" in (DEPLOY / "systemd" / "mlg.env").read_text()
    assert address.startswith(f"GSB_URL=unix:/run/{daemon['RuntimeDirectory'][0]}/")
    for name in ("mlg-batcher", "mlg-batch"):
        assert unit(DEPLOY / "systemd" / f"{name}.service")["Service"]["Group"] == daemon["Group"]


def test_only_the_timer_starts_a_single_run() -> None:
    assert (DEPLOY / "systemd" / "mlg-batch.service").exists()
    assert unit(DEPLOY / "systemd" / "mlg-batch.service")["Service"]["Type"] == ["oneshot"]
    assert "Install" not in unit(DEPLOY / "systemd" / "mlg-batch.service"), "only its timer starts it"


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    program = find_program("systemd-analyze", package="systemd")
    for path in (DEPLOY / "systemd").glob("*.*"):
        # The command has to exist on this machine.
        text = path.read_text().replace("/opt/mlg/bin/mlg", sys.executable)
        (tmp_path / path.name).write_text(text.replace("/usr/local/bin/yagna", sys.executable))
    paths = [str(path) for path in sorted(tmp_path.glob("*.service")) + sorted(tmp_path.glob("*.timer"))]

    run = subprocess.run(
        [program, "verify", "--man=no", *paths], capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )

    ours = [line for line in run.stderr.splitlines() if str(tmp_path) in line or "mlg" in line]
    assert not ours, ours


def test_a_server_may_have_the_threads_that_it_needs() -> None:
    unit = (DEPLOY / "systemd" / "mlg-server.service").read_text()
    tasks = re.search(r"^TasksMax=(\d+)$", unit, re.MULTILINE)
    needed = request_threads(ServerSettings.from_env({}))

    assert tasks is not None and int(tasks[1]) > 1.5 * needed
    assert SERVICES["server"]["deploy"]["resources"]["limits"]["pids"] > 1.5 * needed


# nginx


def braces(text: str) -> int:
    """Count the depth at the end, which must never be below zero."""
    depth = 0
    for sign in re.sub(r"#.*", "", text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    return depth


def test_the_proxy_accepts_what_the_server_accepts_and_does_not_buffer_events(client: FlaskClient) -> None:
    text = (DEPLOY / "nginx" / "mlg.conf").read_text()
    sizes = [int(size) * 1024**2 for size in re.findall(r"client_max_body_size (\d+)m;", text)]
    defaults = ServerSettings.from_env({})

    assert braces(text) == 0
    lines = [re.sub(r"\s*#.*", "", line).strip() for line in text.splitlines()]
    assert all(line == "" or line[-1] in ";{}" for line in lines)
    assert sizes[0] > defaults.max_image_bytes + 65536 and sizes[1] > defaults.max_batch_bytes
    held = re.search(r"proxy_read_timeout (\d+)s;", text)
    assert held is not None and float(held[1]) > defaults.max_hold_seconds
    assert "proxy_request_buffering on;" in text
    batches = re.search(r"location ~\* (\S+) \{[^}]*limit_conn batches \d;", text)
    assert batches is not None, "or anybody fills the proxy's disk"
    assert all(
        re.search(batches[1], path)
        for path in ("/requestPredictions/x", "/collections/x/images", "/train/x", "/ui/train/new/x")
    )
    assert not any(re.search(batches[1], path) for path in ("/requestPrediction/x", "/collections/x/images/id"))
    events = re.search(r"location ~ (\S+) \{[^}]*proxy_buffering off;", text)
    assert events is not None
    paths = [rule.rule for rule in client.application.url_map.iter_rules()]
    assert "/events" in paths and "/metrics" in paths
    for path in paths:
        is_stream = path.endswith("/events")
        assert bool(re.search(events[1], re.sub(r"<[^>]+>", "x", path))) is is_stream, path


def test_nginx_accepts_the_configuration(tmp_path: Path) -> None:
    program = find_program("nginx", package="nginx")
    site = (DEPLOY / "nginx" / "mlg.conf").read_text().replace("server server:5000", "server 127.0.0.1:5000")
    (tmp_path / "mlg.conf").write_text(site)
    # An unpacked nginx has no folders of its own.
    folders = [f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")]
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} "
        f"http {{ access_log off; {' '.join(folders)} include {tmp_path}/mlg.conf; }}"
    )

    run = subprocess.run(
        [program, "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )

    assert run.returncode == 0, run.stderr


# Prometheus and Grafana


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series that /metrics can have: name -> its labels."""
    settings = ServerSettings(home=tmp_path_factory.mktemp("home"))
    store = Store(settings)
    store.migrate()
    now = datetime.now(UTC)
    for image in (b"one", b"two", b"three"):
        store.requests.add(
            NewRequest(id=new_id(), service="classification", model="resnet50", created_at=now),
            store.images.stage(image),
        )
    claims = store.requests.claim(models=["resnet50"], limit=2, now=now, lease_ends_at=now, oldest_before=None)
    answer = Answer(claim=claims[0], output=[], digest="d" * 64, chunk_id="c", provider="p", seconds=0.1)
    store.requests.finish([answer], now=now)
    store.requests.fail(claims[1:], code="broken_image", reason="It broke.", now=now)
    store.batchers.heartbeat(
        BatcherRecord(
            id="b",
            host="h",
            pid=1,
            executor="golem",
            every_seconds=1,
            max_wait_seconds=1,
            capacity=1,
            started_at=now,
            seen_at=now,
            budget={"day": "1", "total": "1"},
        )
    )
    text = create_app(settings, store).test_client().get("/metrics").text
    store.close()
    found: dict[str, set[str]] = {"up": set()}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """List every expression of the rules and the dashboard, each with the name of its alert or panel."""
    for group in read_yaml("prometheus/alerts.yml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in json.loads((DEPLOY / "grafana" / "dashboards" / "mlg.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def check_expression(text: str, series: dict[str, set[str]]) -> set[str]:
    """Check the words and brackets of an expression. :return: the series that it uses."""
    token = re.compile(
        r'\s+|"(?:[^"\\]|\\.)*"|\d+(?:\.\d+)?[smhd]?|[a-zA-Z_:][\w:]*|=~|!~|!=|==|>=|<=|[-+*/%^<>={}()\[\],]'
    )
    named, stack, place, depth_of_labels = set(), [], 0, 0
    opened = {")": "(", "]": "[", "}": "{"}
    labels: set[str] = set()
    last = ""
    grouping: int | None = None
    while place < len(text):
        match = token.match(text, place)
        assert match is not None, f"{text[place : place + 20]!r} in {text}"
        word, place = match[0], match.end()
        if not word.strip():
            continue
        if word in "([{":
            if word == "(" and last in ("by", "on", "without", "ignoring"):
                grouping = len(stack)
            stack.append(word)
            depth_of_labels += word == "{"
        elif word in opened:
            assert stack and stack.pop() == opened[word], f"brackets of {text}"
            depth_of_labels -= word == "}"
            if grouping == len(stack):
                grouping = None
        elif re.match(r"[a-zA-Z_]", word):
            if depth_of_labels or grouping is not None:
                labels.add(word)
            elif word not in WORDS:
                assert word in series, f"{word} is not exposed: {text}"
                named.add(word)
        last = word
    assert not stack, f"brackets of {text}"
    assert named, text
    known = set().union(*(series[name] for name in named)) | PROMETHEUS_LABELS
    assert labels <= known, f"{labels - known} in {text}"
    return named


@pytest.mark.parametrize(("place", "text"), list(expressions()), ids=lambda value: value if len(value) < 40 else "")
def test_an_expression_uses_only_exposed_metrics(place: str, text: str, series: dict[str, set[str]]) -> None:
    check_expression(text, series)


@pytest.mark.parametrize("wrong", ["sum(mlg_batchers", "mlg_nothing", 'mlg_queue_waiting{colour="red"}', "mlg_hold]["])
def test_a_wrong_expression_is_detected(wrong: str, series: dict[str, set[str]]) -> None:
    with pytest.raises(AssertionError):
        check_expression(wrong, series)


def test_promtool_accepts_the_rules() -> None:
    program = find_program("promtool", package="prometheus")
    run = subprocess.run(
        [program, "check", "rules", str(DEPLOY / "prometheus" / "alerts.yml")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_metric_is_used_in_a_rule_or_panel(series: dict[str, set[str]]) -> None:
    used = set().union(*(check_expression(text, series) for _, text in expressions()))

    assert {name for name in series if not name.endswith(("_sum", "_count", "_bucket"))} - used == {
        "mlg_images_last_hour"
    }


def test_alerts_have_a_severity_a_summary_and_a_description() -> None:
    rules = [rule for group in read_yaml("prometheus/alerts.yml")["groups"] for rule in group["rules"]]

    assert len({rule["alert"] for rule in rules}) == len(rules) >= 5
    for rule in rules:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_prometheus_scrapes_the_server_and_has_its_rules_and_key() -> None:
    settings = read_yaml("prometheus/prometheus.yml")
    (job,) = settings["scrape_configs"]

    assert job["static_configs"][0]["targets"] == ["server:5000"]
    assert all((DEPLOY / "prometheus" / name).exists() for name in settings["rule_files"])
    assert job["authorization"]["credentials_file"] == "/run/secrets/prometheus_key"
    assert "prometheus_key" in SERVICES["prometheus"]["secrets"]


def test_grafana_finds_its_data_source_and_dashboard() -> None:
    (source,) = read_yaml("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    (provider,) = read_yaml("grafana/provisioning/dashboards/mlg.yml")["providers"]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "mlg.json").read_text())

    assert source["url"] == "http://prometheus:9090"
    assert any(volume.split(":")[1] == provider["options"]["path"] for volume in SERVICES["grafana"]["volumes"])
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
