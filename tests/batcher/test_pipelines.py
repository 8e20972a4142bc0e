"""Requests to pipelines go on: steps follow from answers, once; failures, limits, cancelling, deleting, retention."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from provider_image.models.artefact import installed_digest
from server.status.dashboard import Dashboard
from server.status.queue_stats import QueueStats
from store.batches import BatchRecord
from store.clients.keys import KeyRecord, Scope, make_key
from store.database import Database, Transaction
from store.errors import NotRemovable, NotRetryable, StoreUnavailable, UnknownRequest
from store.pipelines import pipelines
from store.pipelines.definition import MAX_ITEMS
from store.pipelines.pipelines import ReadyRun
from store.pipelines.runs import PipelineRun
from store.requests import Answer, Blame, NewItem, NewRequest, RequestRecord, answer_known
from store.settings import HomeSettings
from store.states import RequestState
from store.store import Store
from tests.pipelines import NOW, SPOTS, PipelineBench, pipeline_models, spot
from tests.stores import open_store

FIND, CUT, EMBED = "spot_finder", "scissors", "efficientnet_lite0_embedding"
AN_HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    with pipeline_models(folder):
        yield folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store(HomeSettings(home=tmp_path / "home"))
    yield made
    made.close()


@pytest.fixture
def bench(store: Store, models: Path) -> PipelineBench:
    return PipelineBench(store, models)


def test_a_request_goes_through_all_steps(bench: PipelineBench) -> None:
    id = bench.send(name="a.jpg").id
    bench.go_on()

    assert bench.step(FIND, {"spots": [spot(left=7), spot(left=8, score=0.2), spot(left=9)]}) == 1
    assert bench.statuses(id) == {"find": ["done"], "cut": ["queued"] * 3}
    assert bench.step(CUT, {"width": 2}, image=b"part") == 3
    assert bench.statuses(id)["embed"] == ["queued", "skipped", "queued"]
    assert not bench.is_done(id)
    assert bench.step(EMBED, {"dimensions": 3}) == 2

    found = bench.get(id)
    assert found.state is RequestState.DONE
    assert found.output == {"done": 6, "skipped": 1}
    assert [child.params for child in bench.children(id, "cut")] == [
        {"left": left, "angle": 3.0, "mode": "fast"} for left in (7, 8, 9)
    ]
    parts = [child.files["image"].sha256 for child in bench.children(id, "cut")]
    embedded = bench.children(id, "embed")
    assert [child.image_sha256 for child in embedded] == [parts[0], parts[2]]
    assert {child.name for child in embedded} == {"a.jpg"}
    assert found.run is not None
    assert found.run.outcomes["embed", 1].reason == "Its condition is not true: each.score >= 0.6"


def test_steps_are_due_when_their_request_is(bench: PipelineBench, store: Store) -> None:
    bench.send()
    bench.go_on()

    claims = store.requests.claim(
        models=[FIND], limit=9, now=NOW, lease_ends_at=NOW + AN_HOUR, oldest_before=NOW - timedelta(seconds=3)
    )

    assert len(claims) == 1


def test_a_request_itself_is_never_claimed(bench: PipelineBench) -> None:
    bench.send()

    assert bench.claim("dots") == []


def test_every_growth_is_a_change(bench: PipelineBench, store: Store) -> None:
    request = bench.send()
    bench.go_on()
    before = store.changes.latest()

    bench.step(FIND, {"spots": [spot(score=0.1)]})

    numbers = [change.number for change in store.changes.list(before)]
    assert numbers.count(request.number) == 1
    bench.step(CUT, {"width": 2}, image=b"part")
    # The part, the step that is skipped, and the end.
    changes = [change for change in store.changes.list(before) if change.number == request.number]
    assert [change.state for change in changes] == [RequestState.QUEUED] * 3 + [RequestState.DONE]


def test_a_step_that_fails_leaves_its_error_and_the_rest_goes_on(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot(), spot()]})
    first, second, third = bench.claim(CUT)

    bench.fail([second])
    bench.answer([first, third], {"width": 1}, image=b"x")
    bench.go_on()
    bench.step(EMBED, {"dimensions": 3})

    assert bench.is_done(id)
    assert bench.statuses(id) == {
        "find": ["done"],
        "cut": ["done", "failed", "done"],
        "embed": ["done", "skipped", "done"],
    }
    run = bench.get(id).run
    assert run is not None and run.outcomes["embed", 1].reason == "The step cut failed."


def test_a_request_none_of_whose_steps_has_an_answer_fails(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()

    bench.fail(bench.claim(FIND))
    bench.go_on()

    found = bench.get(id)
    assert (found.state, found.code, found.reason) == (
        RequestState.FAILED,
        "broken_image",
        "Step find: It is broken.",
    )
    assert bench.statuses(id) == {"find": ["failed"], "cut": ["skipped"], "embed": ["skipped"]}


def test_a_failed_request_is_retried_with_its_steps(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    bench.fail(bench.claim(FIND))
    bench.go_on()

    store.requests.retry(id, now=NOW)
    bench.go_on()
    bench.step(FIND, {"spots": [spot()]})
    bench.step(CUT, {"width": 1}, image=b"x")
    bench.step(EMBED, {"dimensions": 3})

    assert bench.is_done(id)
    assert bench.statuses(id) == {"find": ["done"], "cut": ["done"], "embed": ["done"]}


def test_an_empty_list_ends_the_request(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()

    bench.step(FIND, {"spots": []})

    assert bench.is_done(id)
    assert bench.get(id).output == {"done": 1}


@pytest.mark.parametrize("output", [{"spots": 3}, {"other": []}, [], {"spots": [{"score": 1}]}])
def test_an_answer_without_what_a_step_needs_fails_that_step(bench: PipelineBench, output: object) -> None:
    id = bench.send().id
    bench.go_on()

    bench.step(FIND, output)

    assert bench.is_done(id)
    assert bench.statuses(id)["cut"] == ["failed"]


def test_a_value_out_of_range_fails_that_item_only(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()

    bench.step(FIND, {"spots": [spot(left=5000), spot()]})
    bench.step(CUT, {"width": 1}, image=b"x")

    run = bench.get(id).run
    assert run is not None
    assert run.outcomes["cut", 0].reason == "left takes a number from 0 to 1000."
    assert bench.statuses(id)["embed"] == ["skipped", "queued"]


def test_a_list_that_is_too_long_is_cut_and_says_so(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()

    bench.step(FIND, {"spots": [spot(left=n) for n in range(MAX_ITEMS + 5)]})

    run = bench.get(id).run
    assert run is not None
    assert len(bench.children(id, "cut")) == MAX_ITEMS
    assert run.outcomes["cut", MAX_ITEMS].code == "too_many_items"


def test_two_batchers_add_each_step_once(bench: PipelineBench, store: Store, models: Path) -> None:
    id = bench.send().id
    advances = [bench.runner._prepare(bench.get(id), NOW, []) for _ in range(2)]

    for advance in advances:
        store.pipelines.advance([advance], now=NOW)
    bench.go_on()

    assert bench.statuses(id) == {"find": ["queued"]}
    assert len(store.requests.list()) == 2


def test_a_batcher_that_is_killed_after_any_commit_loses_and_doubles_nothing(
    bench: PipelineBench, store: Store, models: Path, tmp_path: Path
) -> None:
    spots = [spot(left=n, score=n / 100) for n in range(60)]

    def run(kill_after: int) -> tuple[int, dict[str, list[str]]]:
        """Answer everything; the process of the runner dies after so many of its commits, and another goes on."""
        commits = itertools.count(1)
        id = bench.send(image=b"photo %d" % kill_after).id
        write = Database.write

        def write_until_killed(self: Database, function: object) -> object:
            if next(commits) > kill_after:
                raise StoreUnavailable("killed")
            return write(self, function)  # type: ignore[arg-type]

        steps = iter([(FIND, {"spots": spots}), (CUT, {"width": 1}), (EMBED, {"dimensions": 1})])
        is_killed = False
        while not bench.is_done(id):
            if not is_killed:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Database, "write", write_until_killed)
                    try:
                        while bench.runner.run_ready():
                            pass
                    except StoreUnavailable:
                        is_killed = True
            bench.go_on()
            found = next(steps, None)
            if found is None:
                break
            model, output = found
            bench.answer(bench.claim(model), output, **({"image": b"x"} if model == CUT else {}))
            if is_killed:
                bench.go_on()
        bench.go_on()
        return next(commits) - 1, bench.statuses(id)

    total, expected = run(10_000)

    assert expected == {
        "find": ["done"],
        "cut": ["done"] * 60,
        "embed": ["skipped"] * 60,
    }
    assert total >= 4
    for kill_after in range(total):
        assert run(kill_after)[1] == expected, kill_after


def test_cancelling_a_request_cancels_its_steps(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot()]})
    claimed = bench.claim(CUT, limit=1)

    cancelled = store.requests.cancel(id, now=NOW)
    bench.answer(claimed, {"width": 1}, image=b"x")
    bench.go_on()

    assert cancelled.state is RequestState.CANCELLED
    assert "queued" not in itertools.chain(*bench.statuses(id).values())
    assert "embed" not in bench.statuses(id)


def test_a_step_that_is_queued_again_after_its_request_has_ended_is_cancelled(
    bench: PipelineBench, store: Store
) -> None:
    id = bench.send().id
    bench.go_on()
    claims = bench.claim(FIND)
    store.requests.cancel(id, now=NOW)
    bench.go_on()

    store.requests.release(claims, blame=Blame.NOBODY, code="stopped", reason="The batcher was stopped.", now=NOW)
    bench.go_on()

    assert bench.statuses(id) == {"find": ["cancelled"]}


def test_a_request_without_an_answer_expires_with_its_steps(bench: PipelineBench, store: Store) -> None:
    id = bench.send(deadline_at=NOW + timedelta(seconds=1)).id
    bench.go_on()

    store.requests.expire(NOW + timedelta(seconds=2))
    bench.go_on()

    assert bench.get(id).status == "expired"
    assert bench.statuses(id) == {"find": ["expired"]}


def test_a_request_ends_with_what_it_has_when_its_deadline_passes(bench: PipelineBench, store: Store) -> None:
    id = bench.send(deadline_at=NOW + timedelta(seconds=1)).id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot(), spot()]})
    bench.answer(bench.claim(CUT, limit=1), {"width": 1}, image=b"x")
    under_way = bench.claim(CUT, limit=1)
    bench.now = NOW + timedelta(seconds=2)

    store.requests.expire(bench.now)
    bench.go_on()
    before = bench.get(id)
    bench.answer(under_way, {"width": 1}, image=b"y")
    bench.go_on()

    found = bench.get(id)
    assert (before.status, found.status) == ("queued", "done")
    assert bench.statuses(id) == {
        "find": ["done"],
        "cut": ["done", "done", "expired"],
        "embed": ["skipped", "skipped", "skipped"],
    }
    assert found.run is not None
    assert found.run.outcomes["embed", 1].reason == "The deadline of the request passed before it began."
    assert found.output == {"done": 3, "expired": 1, "skipped": 3}


def test_deleting_a_request_deletes_its_steps_and_their_files(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot()]})
    (first, second) = bench.claim(CUT)
    bench.answer([first], {"width": 1}, image=b"x")
    store.requests.cancel(id, now=NOW)

    store.requests.remove(id)

    # One step is still with a worker.
    assert [request.id for request in store.requests.list()] == [second.id]
    bench.answer([second], {"width": 1}, image=b"y")
    bench.go_on()
    assert store.requests.list() == []
    assert list(store.images.list_digests()) == []
    with store.database.read() as connection:
        for table in ("pipeline_runs", "pipeline_outcomes"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0


def test_a_step_is_neither_deleted_nor_retried_alone(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    bench.fail(bench.claim(FIND))
    (child,) = bench.children(id, "find")

    with pytest.raises(NotRemovable, match=id):
        store.requests.remove(child.id)
    with pytest.raises(NotRetryable, match=id):
        store.requests.retry(child.id, now=NOW)


def test_retention_deletes_a_request_with_its_steps_and_not_before(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot()]})
    later = NOW + AN_HOUR

    store.retention.purge(images_before=later, results_before=later, now=later)

    assert bench.statuses(id) == {"find": ["done"], "cut": ["queued"]}
    bench.step(CUT, {"width": 1}, image=b"x")
    bench.step(EMBED, {"dimensions": 1})
    assert bench.is_done(id)
    store.retention.purge(images_before=later, results_before=later, now=later)
    bench.go_on()
    assert store.requests.list() == []
    assert list(store.images.list_digests()) == []


@pytest.mark.parametrize("keep_seconds", [None, 60.0])
def test_a_step_whose_image_is_a_member_outlives_the_operators_retention_only(
    store: Store, models: Path, keep_seconds: float | None
) -> None:
    bench = PipelineBench(store, models, SPOTS + 'collection = "dots"\n')
    id = bench.send(labels={"day": "1"}, keep_seconds=keep_seconds).id
    bench.go_on()
    bench.step(FIND, {"spots": [spot()]})
    bench.step(CUT, {"width": 1}, image=b"x")
    (embed,) = bench.claim(EMBED)
    collection = store.collections.find("dots", key_id=None)
    with store.database.read() as connection:
        number = connection.execute("SELECT number FROM requests WHERE id = ?", (embed.id,)).fetchone()[0]
    # As if the answer had a vector.
    bench.answer([embed], {"dimensions": 1})
    store.database.execute("UPDATE requests SET collections = 1 WHERE number = ?", (number,))
    bench.go_on()
    assert bench.is_done(id)
    (member,) = store.collections.members(collection)
    assert (member.id, member.labels) == (embed.id, {"day": "1"})
    later = NOW + AN_HOUR

    store.retention.purge(images_before=later, results_before=later, now=later)
    bench.go_on()

    if keep_seconds is None:
        (kept,) = store.requests.list()
        assert (kept.id, kept.parent) == (embed.id, None)
        store.requests.remove(kept.id)
    assert store.requests.list() == []
    assert store.collections.members(collection) == []


def test_a_key_pays_for_each_step_and_what_its_quota_refuses_is_said(bench: PipelineBench, store: Store) -> None:
    key_id, _ = make_key()
    store.keys.add(
        KeyRecord(
            id=key_id, name="k", sha256="0" * 64, scopes=frozenset({Scope.SUBMIT}), images_per_day=4, created_at=NOW
        )
    )
    id = bench.send(key_id=key_id).id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot(), spot()]})

    bench.step(CUT, {"width": 1}, image=b"x")

    # One for the request, one for `find`, two for `cut`.
    assert store.keys.images_used(key_id, now=NOW) == 4
    assert bench.statuses(id) == {
        "find": ["done"],
        "cut": ["done", "done", "failed"],
        "embed": ["failed", "failed", "skipped"],
    }
    run = bench.get(id).run
    assert run is not None and run.outcomes["cut", 2].code == "quota_reached"
    assert {child.key_id for child in run.children.values()} == {key_id}
    assert bench.is_done(id)


def add_batch(bench: PipelineBench, count: int = 3) -> None:
    store = bench.store
    batch = BatchRecord(id="b", service="pipeline", model="dots", created_at=NOW)
    new = [
        (
            NewRequest(
                id=f"b-{n}",
                service="pipeline",
                model="dots",
                created_at=NOW,
                batch_id="b",
                client_id=str(n),
                pipeline=bench.pipeline.to_text(),
            ),
            store.images.stage(b"photo %d" % n),
        )
        for n in range(count)
    ]
    store.batches.add(batch, new, [])


def test_a_batch_of_requests_ends_with_their_steps(bench: PipelineBench, store: Store) -> None:
    add_batch(bench)
    bench.go_on()
    assert store.batches.progress("b").queued == 3

    assert bench.step(FIND, {"spots": []}) == 3

    assert store.batches.progress("b").done == 3
    # Without a batcher.
    store.batches.remove("b")
    assert store.requests.list() == []
    assert list(store.images.list_digests()) == []


def test_cancelling_a_batch_cancels_the_steps_of_its_requests(bench: PipelineBench, store: Store) -> None:
    add_batch(bench)
    bench.go_on()

    assert store.batches.cancel("b", now=NOW) == 3

    assert {bench.get(f"b-{n}").state for n in range(3)} == {RequestState.CANCELLED}
    assert [bench.statuses(f"b-{n}") for n in range(3)] == [{"find": ["cancelled"]}] * 3


def test_a_request_that_was_retried_meanwhile_is_not_settled(bench: PipelineBench, store: Store) -> None:
    id = bench.send().id
    bench.go_on()
    store.requests.cancel(id, now=NOW)
    store.requests.retry(id, now=NOW)

    # By a batcher that read before that it was cancelled.
    store.requests.settle_children([id], now=NOW)
    bench.go_on()
    bench.step(FIND, {"spots": []})

    assert bench.is_done(id)


def test_equal_images_reuse_the_answers_of_steps(store: Store, models: Path) -> None:
    bench = PipelineBench(store, models)
    bench.send()
    bench.go_on()
    (claim,) = bench.claim(FIND)
    digest = installed_digest(models, FIND)
    assert digest is not None
    store.requests.finish(
        [Answer(claim=claim, output={"spots": []}, digest=digest, chunk_id="c", provider="p", seconds=0.1)], now=NOW
    )

    second = bench.send().id
    bench.go_on()

    assert bench.is_done(second)
    assert bench.children(second, "find")[0].is_cached


def test_a_text_in_an_answer_is_the_input_of_a_step(store: Store, models: Path) -> None:
    text = """
        [steps.find]
        model = "spot_finder"
        [steps.read]
        model = "reader"
        for_each = "find.spots"
        text = "each.caption"
    """
    bench = PipelineBench(store, models, text)
    id = bench.send().id
    bench.go_on()

    bench.step(FIND, {"spots": [{"caption": "a \u00fcber spot"}, {"caption": ["no text"]}, {"caption": "two"}]})

    first, second = bench.children(id, "read")
    assert store.images.read(first.image_sha256).decode() == "a \u00fcber spot"
    assert (first.position, second.position) == (0, 2)
    run = bench.get(id).run
    assert run is not None
    assert "takes: text" in run.outcomes["read", 1].reason
    assert not list((store.images.folder / "tmp").iterdir())
    store.requests.cancel(id, now=NOW)
    store.requests.remove(id)
    assert list(store.images.list_digests()) == []


def test_deleting_one_request_touches_no_other(bench: PipelineBench, store: Store) -> None:
    first, second = bench.send(b"one").id, bench.send(b"two").id
    bench.go_on()
    bench.step(FIND, {"spots": []})

    store.requests.remove(first)

    assert bench.statuses(second) == {"find": ["done"]}
    with pytest.raises(UnknownRequest):
        bench.get(first)


@pytest.mark.parametrize("fails_always", [False, True])
def test_one_pipeline_that_cannot_go_on_does_not_stop_another(
    store: Store, models: Path, monkeypatch: pytest.MonkeyPatch, fails_always: bool
) -> None:
    text = """
        [steps.find]
        model = "spot_finder"
        [steps.read]
        model = "reader"
        for_each = "find.spots"
        text = "each.caption"
    """
    bench = PipelineBench(store, models, text)
    first, second = bench.send(b"one").id, bench.send(b"two").id
    bench.go_on()
    for number, claim in enumerate(bench.claim(FIND)):
        bench.answer([claim], {"spots": [{"caption": f"of {number}"}]})
    calls = itertools.count()

    def fail(transaction: Transaction, items: Iterable[tuple[int, NewItem]], *, now: datetime) -> list[RequestRecord]:
        found = list(items)
        # The commit of both, then that of the second.
        if next(calls) == 0 or (fails_always and found[0][1][0].parent == second):
            raise RuntimeError("broken")
        return answer_known(transaction, found, now=now)

    monkeypatch.setattr("store.pipelines.pipelines.answer_known", fail)
    bench.go_on()

    assert bench.statuses(first)["read"] == ["queued"]
    (child,) = bench.children(first, "read")
    assert store.images.read(child.image_sha256) == b"of 0"
    found = bench.get(second)
    assert (found.state, found.code) == (
        (RequestState.FAILED, "pipeline_failed") if fails_always else (RequestState.QUEUED, None)
    )
    assert not list((store.images.folder / "tmp").iterdir())


def test_an_empty_file_is_no_input(bench: PipelineBench) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot()]})

    bench.answer(bench.claim(CUT), {"width": 1}, image=b"")
    bench.go_on()

    run = bench.get(id).run
    assert run is not None
    assert run.outcomes["embed", 0].reason == "The input image is empty."
    assert bench.is_done(id)


def test_a_request_that_fails_as_a_whole_leaves_no_open_step(
    bench: PipelineBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = bench.send().id
    bench.go_on()
    bench.step(FIND, {"spots": [spot(), spot()]})
    first, _ = bench.claim(CUT)
    bench.fail([first])

    def fail(parent: RequestRecord, run: PipelineRun) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("batcher.pipelines.plan", fail)
    bench.store.requests.release_expired(NOW + AN_HOUR)
    bench.go_on()

    assert bench.get(id).code == "pipeline_failed"
    assert bench.statuses(id)["cut"] == ["failed", "cancelled"]


def test_many_that_have_ended_do_not_hold_up_others(bench: PipelineBench, store: Store) -> None:
    ended = [bench.send(b"%d" % number).id for number in range(4)]
    bench.go_on()
    for id in ended[:2]:
        store.requests.cancel(id, now=NOW)
    live = bench.send(b"live").id

    found = store.pipelines.list_ready(now=NOW, limit=1)

    assert [(one.id, one.is_ended) for one in found] == [(live, False), (ended[0], True)]


def test_a_single_run_counts_the_waiting_steps_of_requests_from_before(bench: PipelineBench, store: Store) -> None:
    earlier = bench.send(b"one")
    bench.send(b"two")
    bench.go_on()

    assert store.pipelines.waiting_models(["dots"], earlier.number) == {FIND: 1}
    assert store.pipelines.waiting_models(["dots"], earlier.number + 1) == {FIND: 2}


def test_results_of_pipelines_are_read_a_few_at_a_time(bench: PipelineBench, store: Store) -> None:
    add_batch(bench, 12)
    store.batches.cancel("b", now=NOW)

    first = store.batches.results("b")
    rest = store.batches.results("b", after=first[-1][0])

    assert (len(first), len(rest)) == (10, 2)


def test_the_items_of_a_batch_are_read_without_their_steps(bench: PipelineBench, store: Store) -> None:
    add_batch(bench)
    bench.go_on()

    items = store.batches.items("b")
    last = store.batches.last_unfinished("b", store.batches.progress("b"))

    assert [(one.run.has_steps, one.run.children) for one in items if one.run is not None] == [(False, {})] * 3
    assert last is not None and last.run is not None and list(last.run.children) == [("find", 0)]


def test_what_goes_on_is_found_without_reading_what_waits(bench: PipelineBench, store: Store) -> None:
    """By the number of SQLite's instructions, which no other work on the machine changes."""
    counts = []
    for number in (10, 200):
        for _ in range(number):
            bench.send()
        steps: list[None] = []
        with store.database.read() as connection:  # the calls use it again
            connection.set_progress_handler(lambda steps=steps: steps.append(None), 10)
        store.pipelines.list_ready(now=NOW, limit=1)
        store.stats.count_accepted_before([NOW - AN_HOUR])
        counts.append(len(steps))
    with store.database.read() as connection:
        connection.set_progress_handler(None, 0)

    assert 0 < counts[1] < counts[0] + 50, counts


def test_waiting_steps_are_counted_without_reading_all_requests(bench: PipelineBench, store: Store) -> None:
    with store.database.read() as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {pipelines._WAITING_MODELS}", ("[]", 9))]

    assert any("COVERING INDEX requests_queued (model=?" in line for line in plan), plan
    assert not any("requests USING INTEGER PRIMARY KEY (rowid<?)" in line for line in plan), plan


def test_the_steps_of_a_request_are_not_counted_as_sent(bench: PipelineBench, store: Store) -> None:
    counts = []

    def count() -> None:
        backlog = store.requests.backlog()
        counts.append((sum(one.waiting for one in backlog), sum(one.waiting_sent for one in backlog)))
        is_open = "parent IS NOT NULL AND state IN ('queued', 'claimed')"
        kept, found = store.database.row(
            f"SELECT (SELECT sum(steps) FROM open_requests), (SELECT count(*) FROM requests WHERE {is_open})"
        )
        assert kept == found

    id = bench.send().id
    count()
    bench.go_on()
    count()
    claims = bench.claim(FIND)
    count()
    bench.answer(claims, {"spots": [spot(), spot()]})
    bench.go_on()
    count()
    bench.fail(bench.claim(CUT))
    bench.go_on()
    store.requests.cancel(bench.send(b"another").id, now=NOW)
    bench.go_on()
    count()
    store.requests.remove(id)
    count()

    assert counts == [(1, 1), (2, 1), (1, 1), (3, 1), (0, 0), (0, 0)]
    store.database.execute("UPDATE open_requests SET steps = 7")
    store.requests.correct_open()
    count()


def test_the_runs_and_steps_of_an_earlier_version_are_found_and_counted(bench: PipelineBench, store: Store) -> None:
    def figures() -> tuple[list[ReadyRun], dict[str, tuple[int, int]], list[int]]:
        ready = store.pipelines.list_ready(now=NOW, limit=1)
        backlog = {one.model: (one.waiting, one.waiting_sent) for one in store.requests.backlog()}
        return ready, backlog, store.stats.count_accepted_before([NOW - AN_HOUR, NOW + AN_HOUR])

    _, ended, _ = (bench.send(name.encode()).id for name in ("answered", "ended", "under way"))
    bench.go_on()
    claims = bench.claim(FIND, limit=2)
    store.requests.cancel(ended, now=NOW)
    bench.answer(claims, {"spots": []})
    before = ready, backlog, accepted = figures()
    for statement in (
        "DROP INDEX requests_open_steps",
        "ALTER TABLE open_requests DROP COLUMN steps",
        "DROP INDEX totals_pipelines",
        "DROP INDEX pipeline_runs_number",
        "DROP INDEX pipeline_runs_ready",
        "ALTER TABLE pipeline_runs DROP COLUMN earlier",
        "ALTER TABLE pipeline_runs DROP COLUMN batch_id",
        "ALTER TABLE pipeline_runs DROP COLUMN is_ended",
        "CREATE INDEX pipeline_runs_ready ON pipeline_runs (number) WHERE changed != advanced",
        "DELETE FROM migrations WHERE name IN ('m030_open_steps', 'm031_pipeline_runs')",
    ):
        store.database.execute(statement)

    assert store.migrate() == ["m030_open_steps", "m031_pipeline_runs"]

    assert figures() == before
    assert [one.is_ended for one in ready] == [False, True]
    assert backlog == {"dots": (2, 2), FIND: (1, 0)}
    assert accepted == [0, 3]


def test_operators_figures_count_the_steps_and_not_the_request(bench: PipelineBench, store: Store) -> None:
    dashboard = Dashboard(store, QueueStats(store), lambda: bench.now)
    bench.send()
    bench.send(b"another")
    bench.go_on()
    queue = dashboard.queue()
    bench.fail(bench.claim(FIND, limit=1))
    bench.step(FIND, {"spots": []})

    assert [(row["model"], row["waiting"]) for row in queue] == [(FIND, 2)]
    assert store.stats.count_accepted() == 2
    assert store.stats.count_accepted_before([NOW - AN_HOUR, NOW - timedelta(seconds=1), NOW + AN_HOUR]) == [0, 0, 2]
    assert {(total.model, total.outcome): total.count for total in store.stats.list_totals()} == {
        (FIND, "done"): 1,
        (FIND, "failed"): 1,
    }
    assert [failure.model for failure in store.stats.list_failures(limit=9)] == [FIND]
