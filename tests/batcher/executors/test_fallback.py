"""The fallback executor: which member gets a job, and when it goes to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batcher.errors import NoProvider
from batcher.executors import Job, Outcome, load_executor
from batcher.executors.fallback import FallbackExecutor
from provider_image.errors import ConfigError, WorkerDied
from tests.contexts import make_context


class Member:
    """An executor whose behaviour a test sets."""

    def __init__(self, name: str, *, is_remote: bool = False) -> None:
        self.name = name
        self.is_remote = is_remote
        self.is_trusted = not is_remote
        self.reason: str | None = None
        self.outcome = Outcome(provider=name, seconds=0.1)
        #: Awaited before it begins.
        self.before_answer: Callable[[], Any] | None = None
        #: Awaited after it has begun.
        self.work: Callable[[], Any] | None = None
        self.received: list[str] = []
        self.cancelled: list[str] = []
        self.is_started = False

    async def start(self) -> None:
        self.is_started = True

    def has_quick_transfers(self, model: str) -> bool:
        return not self.is_remote

    def capacity(self, model: str) -> int:
        return 4

    def workers(self) -> int:
        return 2

    def unavailable_reason(self, model: str) -> str | None:
        return self.reason

    def stop_seconds(self) -> float:
        return 3.0 if self.is_remote else 1.0

    async def run(self, job: Job) -> Outcome:
        self.received.append(job.chunk_id)
        try:
            if self.before_answer is not None:
                await self.before_answer()
            if job.on_start is not None:
                job.on_start()
            if self.work is not None:
                await self.work()
        except asyncio.CancelledError:
            self.cancelled.append(job.chunk_id)
            raise
        return self.outcome

    async def close(self) -> None:
        self.is_started = False


@pytest.fixture
def golem() -> Member:
    return Member("golem", is_remote=True)


@pytest.fixture
def local() -> Member:
    return Member("local")


def run(
    golem: Member, local: Member, tmp_path: Path, *, fallback_seconds: float = 60, is_last_try: bool = False
) -> Outcome:
    fallback = FallbackExecutor([golem, local], {"MLG_FALLBACK_SECONDS": str(fallback_seconds)})
    job = Job(
        chunk_id="job",
        model="vgg16",
        items=1,
        chunk=tmp_path / "chunk.zip",
        results=tmp_path / "results.zip",
        timeout_seconds=9,
        is_last_try=is_last_try,
    )
    return asyncio.run(asyncio.wait_for(fallback.run(job), 300))


def test_the_first_member_gets_a_job_while_it_is_available(golem: Member, local: Member, tmp_path: Path) -> None:
    outcome = run(golem, local, tmp_path)

    assert (outcome.provider, local.received) == ("golem", [])


def test_a_job_goes_to_the_next_member_immediately_if_the_first_is_unavailable(
    golem: Member, local: Member, tmp_path: Path
) -> None:
    golem.reason = "The budget of the day is used up."

    outcome = run(golem, local, tmp_path)

    assert (outcome.provider, golem.received) == ("local", [])


def test_a_job_that_has_not_begun_in_time_goes_to_the_next_member(golem: Member, local: Member, tmp_path: Path) -> None:
    golem.before_answer = asyncio.Event().wait

    outcome = run(golem, local, tmp_path, fallback_seconds=0.05)

    assert (outcome.provider, golem.cancelled) == ("local", ["job"])


def test_a_job_that_has_begun_stays_with_its_member_however_long_it_takes(
    golem: Member, local: Member, tmp_path: Path
) -> None:
    golem.work = lambda: asyncio.sleep(0.3)

    outcome = run(golem, local, tmp_path, fallback_seconds=0.01)

    assert (outcome.provider, local.received) == ("golem", [])


def test_a_job_released_for_lack_of_providers_goes_to_the_next_member(
    golem: Member, local: Member, tmp_path: Path
) -> None:
    golem.outcome = Outcome(provider=None, seconds=0, error=NoProvider(), is_blameless=True)

    assert run(golem, local, tmp_path).provider == "local"


def test_a_failed_job_does_not_go_to_the_next_member(golem: Member, local: Member, tmp_path: Path) -> None:
    golem.outcome = Outcome(provider="golem", seconds=0, error=WorkerDied())

    outcome = run(golem, local, tmp_path)

    assert isinstance(outcome.error, WorkerDied)
    assert local.received == []


def test_the_last_try_of_an_item_is_not_left_to_strangers(golem: Member, local: Member, tmp_path: Path) -> None:
    outcome = run(golem, local, tmp_path, is_last_try=True)
    local.is_trusted = False
    without_any = run(golem, local, tmp_path, is_last_try=True)

    assert (outcome.provider, without_any.provider) == ("local", "golem")


def test_it_is_unavailable_only_if_all_members_are(golem: Member, local: Member) -> None:
    fallback = FallbackExecutor([golem, local], {})
    golem.reason = "No budget."
    one = fallback.unavailable_reason("vgg16")
    local.reason = "No capacity."

    assert (one, fallback.unavailable_reason("vgg16")) == (None, "No budget. No capacity.")
    assert (fallback.name, fallback.is_remote, fallback.is_trusted) == ("golem,local", True, False)
    assert (fallback.workers(), fallback.capacity("vgg16"), fallback.stop_seconds()) == (4, 4, 3.0)


def test_if_one_member_cannot_start_the_others_are_closed(golem: Member, local: Member) -> None:
    async def fail() -> None:
        raise ConfigError("No key.")

    local.start = fail  # type: ignore[method-assign]

    with pytest.raises(ConfigError, match="No key"):
        asyncio.run(FallbackExecutor([golem, local], {}).start())
    assert not golem.is_started


def test_executors_are_separated_by_commas_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    context = make_context(tmp_path / "work", tmp_path / "models")

    assert load_executor("golem, local", context).name == "golem,local"
    with pytest.raises(ConfigError, match="no executor 'ray'"):
        load_executor("golem,ray", context)


@pytest.mark.parametrize(
    ("names", "variable"),
    [("local", "MLG_WORKERS"), ("golem", "MLG_BUDGET_DAY"), ("local,golem", "MLG_FALLBACK_SECONDS")],
)
def test_an_executor_reads_its_own_settings_and_names_a_variable_that_it_cannot_use(
    names: str, variable: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=variable):
        load_executor(names, make_context(tmp_path / "work", tmp_path / "models", **{variable: "much"}))
