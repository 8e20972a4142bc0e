"""The bot with the real library, on a fake Bot API and a server: photos, albums, restarts, faults."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from mlg_client import AsyncClient, Unreachable
from provider_image.errors import ConfigError
from store.clients.keys import KeyRecord, Scope, hash_key, make_key
from store.files import NewFile
from store.requests import Claim
from store.store import Store
from telegram_bot.settings import Secret
from telegram_bot.state import StateInUse
from tests.telegram_bot.conftest import USER, Bench, LocalServer
from tests.telegram_bot.fake_bot_api import TOKEN, FakeBotApi, Fault
from tests.timing import slowness, until

OTHER = 43
Benches = Callable[[], AbstractAsyncContextManager[Bench]]
Claims = Callable[[], list[Claim]]
Finish = Callable[..., None]


def png(color: str, size: tuple[int, int] = (96, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


async def shown(api: FakeBotApi, text: str, chat_id: int = USER) -> int:
    """Wait for a message with a text in it; return its number."""

    def find() -> int | None:
        found = [number for number, message in api.chats[chat_id].items() if text in message.text]
        return found[-1] if found else None

    number = await until(find)
    assert isinstance(number, int)
    return number


async def choose(api: FakeBotApi, *labels: str, chat_id: int = USER) -> int:
    """Press the buttons of the newest menu, one after the other; return its number."""

    def newest(label: str) -> int | None:
        for number in sorted(api.chats[chat_id], reverse=True):
            if any(shown_label.startswith(label) for shown_label, _ in api.chats[chat_id][number].buttons):
                return number
        return None

    number = 0
    for label in labels:
        number = await until(lambda label=label: newest(label))
        api.press(chat_id, number, label)
    return number


async def claimed(claim: Claims, count: int = 1) -> list[Claim]:
    """Claim so many requests as they arrive."""
    found: list[Claim] = []
    await until(lambda: found.extend(claim()) or len(found) >= count)
    assert len(found) == count
    return found


def add_key(store: Store, name: str, quota: int | None = None) -> str:
    id, key = make_key()
    scopes = frozenset({Scope.SUBMIT, Scope.READ})
    created_at = datetime.now(UTC)
    store.keys.add(
        KeyRecord(id=id, name=name, sha256=hash_key(key), scopes=scopes, images_per_day=quota, created_at=created_at)
    )
    return key


async def test_a_photo_is_answered_in_the_message_that_asked_for_the_model(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        sent = b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        finish(waiting)
        await until(lambda: "label 0" in b.api.chats[USER][number].text)

        assert len(b.api.chats[USER]) == 1
        answer = b.api.last(USER)
        assert answer.reply_to == sent
        # 20/210, as the fixture's output has it.
        assert answer.text.splitlines()[:4] == ["EfficientNet-Lite0", "", "label 0", "█░░░░░░░░░░░ 10 %"]
        assert [label for label, _ in answer.buttons] == ["Another model"]


async def test_an_answer_is_visible_within_a_second_of_being_recorded(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        factor, recorded_at = slowness(), time.time()
        finish(waiting)
        await until(lambda: "label 0" in b.api.chats[USER][number].text)

        assert b.api.last(USER).at - recorded_at < 1.0 * factor


async def test_an_album_is_one_batch_and_one_answer(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes, store: Store
) -> None:
    async with bench() as b, b.bot():
        for color in ("red", "green", "blue"):
            b.api.photo(USER, png(color), media_group_id="g1")
        number = await choose(b.api, "Classification")
        waiting = await claimed(claim, 3)
        finish(waiting[:1])
        finish(waiting[1:], [["n1", "wolf", 0.75]])
        await until(lambda: b.api.chats[USER][number].text.startswith("EfficientNet"))

        assert len(b.api.chats[USER]) == 1
        assert b.api.last(USER).text.splitlines()[2:] == ["1. label 0 10 %", "2. wolf 75 %", "3. wolf 75 %"]
        assert len(store.batches.list(limit=10)) == 1


async def test_an_image_answer_is_put_into_the_message(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    poster = png("navy")
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Posterise")
        waiting = await claimed(claim)
        finish(
            waiting,
            {"width": 96, "height": 64, "levels": 4},
            **{"poster.png": NewFile(data=poster, media_type="image/png")},
        )
        await until(lambda: b.api.chats[USER][number].file is not None)

        assert len(b.api.chats[USER]) == 1
        assert (b.api.last(USER).kind, b.api.last(USER).file) == ("photo", poster)
        assert b.api.last(USER).text.startswith("Sepia")


async def test_what_telegram_takes_for_no_photo_is_sent_as_a_file(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    poster = png("navy", (96, 2))
    async with bench() as b, b.bot():
        b.api.faults.append(Fault("editMessageMedia", 400, "Bad Request: PHOTO_INVALID_DIMENSIONS"))
        b.api.photo(USER, photo)
        await choose(b.api, "Posterise")
        finish(
            await claimed(claim),
            {"width": 96, "height": 2, "levels": 4},
            **{"poster.png": NewFile(data=poster, media_type="image/png")},
        )
        await until(lambda: b.api.last(USER).file is not None)

        assert (b.api.last(USER).kind, b.api.last(USER).file) == ("document", poster)


async def test_a_model_of_two_images_asks_for_the_style_once(
    bench: Benches, claim: Claims, finish: Finish, store: Store
) -> None:
    mixed = png("purple")
    async with bench() as b, b.bot():
        b.api.photo(USER, png("red"))
        number = await choose(b.api, "Blend")
        await until(lambda: "needs a style" in b.api.chats[USER][number].text)
        b.api.photo(USER, png("blue"))
        waiting = await claimed(claim)
        (style,) = [one.sha256 for name, one in store.requests.get(waiting[0].id).inputs.items() if name == "style"]
        finish(
            waiting,
            {"width": 96, "height": 64, "params": {"steps": 1}},
            image=NewFile(data=mixed, media_type="image/png"),
        )
        await until(lambda: b.api.chats[USER][number].file == mixed)
        b.api.photo(USER, png("green"))
        await choose(b.api, "Blend")
        again = await claimed(claim)

        assert store.requests.get(again[0].id).inputs["style"].sha256 == style


async def test_the_photos_of_an_album_get_one_style_and_each_its_image(
    bench: Benches, claim: Claims, finish: Finish, store: Store
) -> None:
    poster = png("navy")
    async with bench() as b, b.bot():
        b.api.photo(USER, png("red"), caption="/style")
        await shown(b.api, "This is your style")
        for color in ("green", "blue"):
            b.api.photo(USER, png(color), media_group_id="g1")
        number = await choose(b.api, "Blend")
        finish(
            await claimed(claim, 2),
            {"width": 96, "height": 64, "params": {"steps": 1}},
            image=NewFile(data=poster, media_type="image/png"),
        )
        await until(lambda: [message.file for message in b.api.chats[USER].values()].count(poster) == 2)

        assert b.api.chats[USER][number].file == poster
        assert len(b.api.chats[USER]) == 3
        assert len(store.batches.list(limit=10)) == 1


async def test_an_album_of_which_the_server_takes_a_part_shows_what_became_of_each(
    bench: Benches, claim: Claims, finish: Finish, store: Store, tmp_path: Path
) -> None:
    key = add_key(store, "alice", quota=1)
    poster = png("navy")
    async with bench() as b, b.bot(api_key=Secret(key)):
        b.api.photo(USER, png("red"), caption="/style")
        await shown(b.api, "This is your style")
        for color in ("green", "blue"):
            # So large that they are sent one after the other.
            b.api.document(USER, png(color), "image/png", 20_000_000, media_group_id="g1")
        await choose(b.api, "Blend")
        finish(
            await claimed(claim),
            {"width": 96, "height": 64, "params": {"steps": 1}},
            image=NewFile(data=poster, media_type="image/png"),
        )
        await until(lambda: [message for message in b.api.chats[USER].values() if message.file == poster])
        await shown(b.api, "The server cannot use it")

        assert len(b.api.chats[USER]) == 3


async def test_nothing_is_lost_and_nothing_shown_twice_when_the_bot_is_restarted(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b:
        async with b.bot():
            b.api.photo(USER, photo)
            number = await choose(b.api, "Classification")
            await until(lambda: "Queued" in b.api.chats[USER][number].text)
            waiting = await claimed(claim)
        finish(waiting)  # while no bot runs
        b.api.photo(USER, png("red"))
        async with b.bot():
            await until(lambda: "label 0" in b.api.chats[USER][number].text)
            await choose(b.api, "Classification")
            finish(await claimed(claim), [["n1", "wolf", 0.75]])
            await shown(b.api, "wolf")

        assert len(b.api.chats[USER]) == 2


async def test_an_edit_whose_success_was_not_heard_of_is_repeated_and_shows_once(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        fault = Fault("editMessageText", 502, "Bad Gateway", contains="label 0", takes_effect=True)
        b.api.faults.append(fault)
        finish(waiting)
        await until(lambda: fault.times == 0)
        calls = b.api.calls.count(("editMessageText", USER))
        await until(lambda: b.api.calls.count(("editMessageText", USER)) > calls)

        assert [text.count("label 0") for text in b.api.texts(USER)] == [1]


async def test_an_update_that_comes_twice_has_one_effect(bench: Benches, photo: bytes) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        b.api.pending.append(b.api.pending[0])
        await choose(b.api, "Classification")
        await shown(b.api, "Queued")
        b.api.message(USER, text="/status")
        await shown(b.api, "Answered: 0 of 1")

        assert len(b.api.chats[USER]) == 2


async def test_a_flood_limit_delays_one_chat_only(bench: Benches) -> None:
    async with bench() as b, b.bot():
        b.api.faults.append(Fault("sendMessage", 429, "Too Many Requests", chat_id=USER, retry_after=1))
        limited_at = time.time()
        b.api.message(USER, text="/help")
        b.api.message(OTHER, text="/help")
        await shown(b.api, "Send me a photo", OTHER)
        await shown(b.api, "Send me a photo", USER)

        assert b.api.last(OTHER).at < b.api.last(USER).at
        assert b.api.last(USER).at - limited_at >= 1.0
        assert b.api.calls.count(("sendMessage", USER)) == 2


async def test_a_user_who_blocks_the_bot_gets_nothing_more_and_the_request_is_cancelled(
    bench: Benches, photo: bytes, store: Store
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.last(USER).text)
        b.api.faults.append(Fault("*", 403, "Forbidden: bot was blocked by the user", chat_id=USER, times=1000))
        b.api.message(USER, text="/status")
        await until(lambda: [str(one.state) for one in store.requests.list(limit=10)] == ["cancelled"])
        b.api.faults.clear()
        calls = len(b.api.calls)
        b.api.message(USER, text="/help")
        await shown(b.api, "Send me a photo")

        assert [method for method, chat_id in b.api.calls[calls:] if chat_id == USER] == ["sendMessage"]


async def test_telegram_may_be_away_for_a_while(bench: Benches, claim: Claims, finish: Finish, photo: bytes) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        b.api.faults += [
            Fault("getUpdates", 500, "Internal"),
            Fault("editMessageText", 500, "Internal", times=2, contains="label 0"),
        ]
        finish(waiting)
        await until(lambda: "label 0" in b.api.chats[USER][number].text)

        assert len(b.api.chats[USER]) == 1


async def test_a_photo_waits_while_the_server_is_down(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes, local_server: LocalServer
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        await until(lambda: b.api.chats[USER] and b.api.last(USER).buttons)
        local_server.stop()
        number = await choose(b.api, "Classification")
        await until(lambda: "server does not answer" in b.api.chats[USER][number].text)
        local_server.start()
        finish(await claimed(claim))
        await until(lambda: "label 0" in b.api.chats[USER][number].text)

        assert len(b.api.chats[USER]) == 1


async def test_the_menu_follows_when_the_server_comes_late(
    bench: Benches, photo: bytes, local_server: LocalServer
) -> None:
    local_server.stop()
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await shown(b.api, "does not name its models")
        local_server.start()

        await until(lambda: b.api.chats[USER][number].buttons)


async def test_a_message_that_the_user_deleted_is_sent_again_with_the_answer(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        del b.api.chats[USER][number]
        finish(waiting)
        await shown(b.api, "label 0")

        assert len(b.api.chats[USER]) == 1


async def test_a_message_that_can_never_be_edited_is_sent_again_once_only(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        waiting = await claimed(claim)
        fault = Fault("editMessageText", 400, "Bad Request: message can't be edited", times=1000)
        b.api.faults.append(fault)
        finish(waiting)
        await until(lambda: fault.times <= 998)
        b.api.message(USER, text="/help")
        await shown(b.api, "Send me a photo")

        assert len(b.api.chats[USER]) == 3


async def test_the_bot_ends_when_its_token_is_revoked(bench: Benches) -> None:
    async with bench() as b:
        with pytest.raises(ConfigError, match="does not accept the token"):
            async with b.bot():
                b.api.accepts_token = False
                b.api.message(USER, text="/help")
                await until(lambda: b.task is not None and b.task.done())


async def test_a_refused_photo_says_why_and_does_not_count(bench: Benches) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, b"this is no image")
        await choose(b.api, "Classification")
        await shown(b.api, "The server cannot use it")
        b.api.message(USER, text="/status")
        status = await shown(b.api, "Left today")

        assert b.api.chats[USER][status].text == "Nothing is waiting.\n\nLeft today: 50."


async def test_cancelling_cancels_on_the_server(bench: Benches, photo: bytes, store: Store) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Queued" in b.api.chats[USER][number].text)
        b.api.message(USER, text="/cancel")
        await until(lambda: "Cancelled." in b.api.chats[USER][number].text)

        assert [str(one.state) for one in store.requests.list(limit=10)] == ["cancelled"]


async def test_cancelling_during_the_upload_leaves_nothing_on_the_server(
    bench: Benches, photo: bytes, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, losses = AsyncClient.submit, iter([True])

    async with bench() as b, b.bot():

        async def submit(client: AsyncClient, *arguments: Any, **options: Any) -> Any:
            request = await real.__get__(client, AsyncClient)(*arguments, **options)
            if next(losses, False):
                b.api.message(USER, text="/cancel")
                await shown(b.api, "Cancelling")
                raise Unreachable("The answer of the server was lost.")
            return request

        monkeypatch.setattr(AsyncClient, "submit", submit)
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        await until(lambda: "Cancelled." in b.api.chats[USER][number].text)

        assert [str(one.state) for one in store.requests.list(limit=10)] == ["cancelled"]


async def test_what_is_worked_on_cannot_be_cancelled_and_says_so(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes
) -> None:
    async with bench() as b, b.bot():
        b.api.photo(USER, photo)
        number = await choose(b.api, "Classification")
        waiting = await claimed(claim)
        await choose(b.api, "Cancel")
        await until(lambda: "worked on already" in b.api.chats[USER][number].text)
        finish(waiting)

        await until(lambda: "label 0" in b.api.chats[USER][number].text)


async def test_users_with_keys_have_the_servers_quota_and_the_others_the_bots(
    bench: Benches, tmp_path: Path, store: Store
) -> None:
    bots, own = add_key(store, "bot"), add_key(store, "alice", quota=1)
    users = tmp_path / "users.txt"
    users.write_text(f"# who may use it\n{USER} {own}\n{OTHER}\n")
    users.chmod(0o600)
    async with bench() as b:
        async with b.bot(api_key=Secret(bots), users_file=users, quota=1):
            b.api.photo(USER, png("red"))
            await choose(b.api, "Classification")
            await shown(b.api, "Queued")
            b.api.photo(USER, png("green"))
            await choose(b.api, "Classification")
            await shown(b.api, "The server takes no more photos today")
            b.api.photo(OTHER, png("red"))
            await choose(b.api, "Classification", chat_id=OTHER)
            await shown(b.api, "Queued", OTHER)
            b.api.photo(OTHER, png("green"))
            await choose(b.api, "Classification", chat_id=OTHER)
            await shown(b.api, "You may send 1 photos a day", OTHER)
            b.api.photo(44, png("red"))
            await shown(b.api, "your number is 44", 44)

        names = {key.id: key.name for key in store.keys.list()}
        assert sorted(names[one.key_id or ""] for one in store.requests.list(limit=10)) == ["alice", "bot"]


async def test_the_webhook_takes_updates_only_with_the_secret(bench: Benches, photo: bytes) -> None:
    async with bench() as b, b.bot(webhook="https://bot.example.org/hook", webhook_port=0) as ready:
        url = f"http://127.0.0.1:{ready.split()[1]}/hook"
        await until(lambda: b.api.webhook)
        update = b.api.update(
            message={
                "message_id": 1,
                "date": 1,
                "chat": {"id": USER, "type": "private"},
                "from": {"id": USER, "is_bot": False, "first_name": "A"},
                "text": "/help",
            }
        )
        secret = {"X-Telegram-Bot-Api-Secret-Token": b.api.webhook["secret_token"]}
        async with httpx.AsyncClient() as client:
            refused = await client.post(url, json=update)
            broken = await client.post(url, content=b"{", headers=secret)
            taken = await client.post(url, json=update, headers=secret)
        await shown(b.api, "Send me a photo")

        assert [one.status_code for one in (refused, broken, taken)] == [403, 400, 200]
        assert b.api.webhook["url"] == "https://bot.example.org/hook"
        assert "getUpdates" not in [method for method, _ in b.api.calls]


async def test_no_log_line_at_any_level_has_a_secret(
    bench: Benches, claim: Claims, finish: Finish, photo: bytes, caplog: pytest.LogCaptureFixture, store: Store
) -> None:
    key = add_key(store, "bot")
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "telegram", "telegram_bot"):
        caplog.set_level(logging.DEBUG, logger=name)
    async with bench() as b:
        async with b.bot(api_key=Secret(key)):
            b.api.faults += [Fault("getUpdates", 500, f"failed at /bot{TOKEN}/x"), Fault("sendMessage", 401, "no")]
            b.api.photo(USER, photo)
            await choose(b.api, "Classification")
            finish(await claimed(claim))
            await shown(b.api, "label 0")
        b.api.accepts_token = False
        with pytest.raises(ConfigError, match="does not accept the token") as refused:
            async with b.bot(api_key=Secret(key)):
                raise AssertionError("it must not start")

    formatter = logging.Formatter()
    lines = [formatter.format(record) for record in caplog.records]
    assert any("HTTP Request" in line and "[hidden]" in line for line in lines)
    for secret in (TOKEN, TOKEN.partition(":")[2], key):
        assert not [line for line in lines if secret in line]
        assert secret not in str(refused.value)


async def test_two_bots_do_not_share_a_state(bench: Benches) -> None:
    async with bench() as b, b.bot():
        with pytest.raises(StateInUse):
            async with b.bot():
                raise AssertionError("it must not start")


async def test_groups_are_not_served(bench: Benches) -> None:
    async with bench() as b, b.bot():
        b.api.message(-100, chat_type="group", text="/help")
        b.api.message(USER, text="/help")
        await shown(b.api, "Send me a photo")

        assert not b.api.chats[-100]
