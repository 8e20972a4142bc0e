"""What follows from updates, without a network: menus, albums, limits, commands, languages, and buttons of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import telegram

from mlg_client import Model
from telegram_bot.accounts import Accounts
from telegram_bot.catalogue import PAGE_SIZE, ModelMenu
from telegram_bot.conversation import ALBUM_SECONDS, MAX_FILE_BYTES, MAX_OPEN_JOBS, Conversation, day_of
from telegram_bot.jobs import JobRunner
from telegram_bot.settings import TelegramSettings, Users
from telegram_bot.state import CHOOSING, COLLECTING, ENDED, SENDING, STYLING, WAITING, BotState, Content, Photo
from telegram_bot.texts import LANGUAGES, SENTENCES
from tests.telegram_bot.fake_bot_api import TOKEN
from tests.timing import until

USER, OTHER = 42, 43


def model(name: str, service: str = "classification", *inputs: str, **more: Any) -> Model:
    raw = {"inputs": {one: {"kind": "image", "is_optional": False} for one in inputs or ("image",)}, **more}
    return Model(name=name, title=name.title(), service=service, is_installed=True, raw=raw)


MENU = ModelMenu([model("lite"), model("resnet"), model("paint", "style_transfer", "image", "style")])


class Chats:
    """A conversation, its state, and a clock that stands still."""

    def __init__(self, state: BotState, tmp_path: Path) -> None:
        self.state = state
        self.now = 1_795_000_000.0
        settings = TelegramSettings(home=tmp_path, quota=3)
        accounts = Accounts(settings, Users(keys={}, is_open=True))
        self.conversation = Conversation(state, accounts, lambda: self.now)
        self.conversation.set_menu(MENU)
        self._number = 0

    def _next(self) -> int:
        self._number += 1
        return self._number

    def send(self, user: int = USER, language: str = "en", **content: Any) -> int:
        number = self._next()
        message = {
            "message_id": number,
            "date": 1,
            "chat": {"id": user, "type": "private"},
            "from": {"id": user, "is_bot": False, "first_name": "A", "language_code": language},
            **content,
        }
        self.apply(message=message)
        return number

    def photo(self, user: int = USER, **content: Any) -> int:
        sizes = [
            {
                "file_id": f"{side}-{self._number}",
                "file_unique_id": "u",
                "width": side,
                "height": side,
                "file_size": side,
            }
            for side in (90, 800, 320)
        ]
        return self.send(user, photo=sizes, **content)

    def press(self, data: str, user: int = USER, message_id: int = 0) -> None:
        self.apply(
            callback_query={
                "id": "1",
                "from": {"id": user, "is_bot": False, "first_name": "A"},
                "chat_instance": "1",
                "message": {"message_id": message_id, "date": 1, "chat": {"id": user, "type": "private"}},
                "data": data,
            }
        )

    def apply(self, **content: Any) -> None:
        update = telegram.Update.de_json({"update_id": self._next(), **content}, None)
        with self.state.transaction():
            self.conversation.handle(update)

    def shown(self, user: int = USER) -> Content:
        """Publish all messages of a chat, and return the last one."""
        last = None
        while (message := self.state.next_message(user)) is not None:
            last = message.content
            self.state.set_sent(message, message.message_id or 10_000 + message.id)
            self.state.set_shown(message)
        assert last is not None
        return last

    def labels(self, content: Content) -> list[str]:
        return [label for row in content.buttons for label, _ in row]

    def choose(self, label: str, message_id: int = 0) -> Content:
        """Press a button of what is shown, and return what is shown then."""
        content = self.shown()
        data = next(data for row in content.buttons for shown, data in row if shown.startswith(label))
        self.press(data, message_id=message_id)
        return content


@pytest.fixture
def state(tmp_path: Path) -> Iterator[BotState]:
    with contextlib.closing(BotState(tmp_path / "bot" / "telegram.sqlite3")) as state:
        yield state


@pytest.fixture
def chats(state: BotState, tmp_path: Path) -> Chats:
    return Chats(state, tmp_path)


def test_a_photo_gets_a_menu_of_services_then_of_models(chats: Chats) -> None:
    chats.photo()
    services = chats.choose("Classification")
    models = chats.choose("Resnet")
    (job,) = chats.state.open_jobs(USER)

    assert chats.labels(services) == ["Classification (2)", "Style transfer: Paint", "Cancel"]
    assert chats.labels(models) == ["Lite", "Resnet", "Back", "Cancel"]
    assert (job.state, job.model) == (SENDING, "resnet")
    assert [photo.file_id[:4] for photo in chats.state.photos(job)] == ["800-"]


def test_the_services_come_back(chats: Chats) -> None:
    chats.photo()
    chats.choose("Classification")
    chats.choose("Back")

    assert chats.labels(chats.shown())[0] == "Classification (2)"


def test_a_long_menu_has_pages(chats: Chats) -> None:
    chats.conversation.set_menu(ModelMenu([model(f"m{number:02d}") for number in range(20)]))
    chats.photo()
    first = chats.choose("▶")
    second = chats.choose("▶")
    third = chats.shown()

    pages = [[label for label in chats.labels(page) if label.startswith("M")] for page in (first, second, third)]
    assert [label for page in pages for label in page] == [f"M{number:02d}" for number in range(20)]
    assert all(len(page) <= PAGE_SIZE for page in pages)
    assert (chats.labels(first)[-2:], chats.labels(third)[-2:]) == (["▶", "Cancel"], ["◀", "Cancel"])


def test_buttons_fit_into_what_telegram_takes(chats: Chats) -> None:
    chats.conversation.set_menu(ModelMenu([model("x" * 200, "s" * 200), model("y" * 200, "s" * 200), model("z")]))
    chats.photo()
    services = chats.choose("Ssss")
    models = chats.shown()

    # 64 bytes, says the Bot API of `callback_data`.
    assert all(len(data.encode()) <= 64 for shown in (services, models) for row in shown.buttons for _, data in row)


def test_models_that_are_not_installed_or_take_no_image_or_faces_are_not_in_the_menu(chats: Chats) -> None:
    absent = Model(name="absent", title="Absent", service="classification", is_installed=False)
    chats.conversation.set_menu(
        ModelMenu(
            [
                model("lite"),
                absent,
                model("rent", "table", inputs={"row": {"kind": "row"}}),
                model("face_quality", "face_quality", takes_faces=True),
            ]
        )
    )
    chats.photo()

    assert chats.labels(chats.shown()) == ["Lite", "Cancel"]


def test_a_model_that_is_gone_when_it_is_chosen_gives_a_new_menu(chats: Chats) -> None:
    chats.photo()
    chats.choose("Classification")
    shown = chats.shown()
    chats.conversation.set_menu(ModelMenu([model("lite")]))
    chats.press(shown.buttons[1][0][1])
    (job,) = chats.state.open_jobs(USER)

    assert job.state == CHOOSING


def test_an_album_is_one_job_that_begins_when_no_photo_came_for_a_while(chats: Chats) -> None:
    first = chats.photo(media_group_id="g")
    chats.photo(media_group_id="g")
    (job,) = chats.state.due_jobs(chats.now + ALBUM_SECONDS, 10)
    not_yet = chats.state.due_jobs(chats.now + ALBUM_SECONDS / 2, 10)
    chats.conversation.begin(job)
    chats.photo(media_group_id="g")

    assert (job.state, job.reply_to, not_yet) == (COLLECTING, first, [])
    assert len(chats.state.photos(job)) == 3
    assert "Photos: 3" in chats.shown().text


def test_the_model_for_all_photos_is_not_asked_for(chats: Chats) -> None:
    chats.send(text="/models")
    chats.choose("Classification", message_id=10_001)
    chats.choose("Lite", message_id=10_001)
    chats.photo()
    (job,) = chats.state.open_jobs(USER)

    assert (job.state, job.model) == (SENDING, "lite")


def test_the_default_model_menu_answers_in_its_own_message(chats: Chats) -> None:
    chats.send(text="/models@mlg_bot")
    asked = chats.shown()
    message = chats.state.next_message(USER)
    chats.press("d:ask", message_id=10_001)

    assert message is None
    assert chats.labels(asked)[-1] == "Ask each time"
    assert chats.shown().text == "From now on I ask for each photo."


def test_a_style_is_asked_for_once_and_kept(chats: Chats) -> None:
    chats.photo()
    chats.choose("Style transfer")
    (job,) = chats.state.open_jobs(USER)
    waiting = job.state
    chats.photo()
    (job,) = chats.state.open_jobs(USER)
    chats.send(text="/style")
    asked = chats.shown()
    chats.press("r")
    chat = chats.state.chat(USER)

    assert (waiting, job.state) == (STYLING, SENDING)
    assert job.style_file == "800-3"
    assert chats.labels(asked) == ["Remove the style"]
    assert chat is not None and (chat.style_file, chat.awaits_style) == (None, False)


def test_a_caption_sets_the_style(chats: Chats) -> None:
    chats.photo(caption="/style")
    chat = chats.state.chat(USER)

    assert chat is not None and chat.style_file == "800-0"
    assert chats.state.open_jobs(USER) == []


def test_the_quota_of_a_day_counts_the_photos_of_albums(chats: Chats) -> None:
    for _ in range(2):
        chats.photo(media_group_id="g")
    (job,) = chats.state.open_jobs(USER)
    chats.conversation.begin(job)
    chats.choose("Classification")
    chats.choose("Lite")
    for _ in range(2):
        chats.photo(media_group_id="h")
    second = chats.state.open_jobs(USER)[-1]
    chats.conversation.begin(second)
    chats.choose("Classification")
    chats.choose("Lite")
    refused = chats.shown().text
    chats.now += 86400
    chats.photo()
    chats.choose("Classification")
    chats.choose("Lite")

    assert "You may send 3 photos a day" in refused
    assert [one.state for one in chats.state.open_jobs(USER)] == [SENDING, SENDING]


async def test_photos_that_were_not_sent_are_given_back_to_the_day_that_counted_them(
    chats: Chats, tmp_path: Path
) -> None:
    before = day_of(chats.now)
    for _ in range(2):
        chats.photo()
        chats.choose("Classification")
        chats.choose("Lite")
        chats.now += 86400
    first, second = chats.state.open_jobs(USER)
    chats.state.set_job(second, due_at=chats.now + 500)
    chats.press(f"x{first.id}")
    accounts = Accounts(TelegramSettings(home=tmp_path), Users(keys={}, is_open=True))
    runner = JobRunner(
        chats.state,
        telegram.Bot(TOKEN),
        accounts,
        chats.conversation,
        lambda: chats.now,
        on_change=lambda chat_id: None,
        on_request=lambda account, id: None,
    )

    task = asyncio.create_task(runner.run())
    await until(lambda: len(chats.state.open_jobs(USER)) == 1)
    task.cancel()
    await asyncio.wait((task,))

    assert [chats.state.used(USER, day_of(chats.now - back * 86400)) for back in (1, 2)] == [1, 0]
    assert before == day_of(chats.now - 2 * 86400)


def test_a_chat_may_have_so_many_open_jobs_only(chats: Chats) -> None:
    for _ in range(MAX_OPEN_JOBS + 5):
        chats.photo()

    assert len(chats.state.open_jobs(USER)) == MAX_OPEN_JOBS
    assert "Too much is waiting" in chats.shown().text


def test_commands_that_come_faster_than_they_are_answered_are_answered_once(chats: Chats) -> None:
    for _ in range(50):
        chats.send(text="/status")
        chats.send(text="what?")
    texts = []
    while (message := chats.state.next_message(USER)) is not None:
        texts.append(message.content.text)
        chats.state.set_sent(message, message.id)
        chats.state.set_shown(message)

    assert len(texts) == 2


def test_a_note_that_changes_while_it_is_sent_is_edited_afterwards(chats: Chats) -> None:
    chats.send(text="/status")
    message = chats.state.next_message(USER)
    assert message is not None
    chats.photo()
    chats.send(text="/status")
    chats.state.set_sent(message, 7)
    chats.state.set_shown(message)
    following = []
    while (later := chats.state.next_message(USER)) is not None:
        following.append((later.message_id, later.content.text))
        chats.state.set_sent(later, later.message_id or 8)
        chats.state.set_shown(later)

    assert [text for number, text in following if number == 7] == ["1. waits for your choice (1 s)\n\nLeft today: 3."]


def test_messages_are_shown_in_the_order_in_which_they_changed(chats: Chats, state: BotState) -> None:
    for _ in range(3):
        chats.photo()
    chats.shown()
    first, second, third = state.open_jobs(USER)
    for job in (third, first, second):
        state.show(job, Content(text=f"answer {job.id}", is_answer=True), chats.now)
    state.show(third, Content(text="answer, changed", is_answer=True), chats.now)
    texts = []
    while (message := state.next_message(USER)) is not None:
        texts.append(message.content.text)
        state.set_shown(message)

    assert texts == ["answer, changed", f"answer {first.id}", f"answer {second.id}"]


@pytest.mark.parametrize(
    "data", ["m1:p0", "x1", "a1", "m999:p0", "zzz", "", "l", "lxx", "d:m000", "m:::", "x" + "9" * 60]
)
def test_buttons_of_another_chat_and_made_up_ones_change_nothing(chats: Chats, data: str) -> None:
    chats.photo()
    before = chats.state.open_jobs(USER)
    chats.press(data, user=OTHER)

    assert chats.state.open_jobs(USER) == before
    assert chats.state.open_jobs(OTHER) == []


def test_a_button_that_is_pressed_twice_acts_once(chats: Chats) -> None:
    chats.photo()
    chats.choose("Classification")
    shown = chats.shown()
    for _ in range(2):
        chats.press(shown.buttons[0][0][1])

    assert chats.state.used(USER, "2026-11-18") == 1


def test_cancelling_reaches_the_job_that_is_replied_to(chats: Chats) -> None:
    numbers = [chats.photo(), chats.photo()]
    reply = {"message_id": numbers[0], "date": 1, "chat": {"id": USER, "type": "private"}}
    chats.send(text="/cancel", reply_to_message=reply)
    left = [job.reply_to for job in chats.state.open_jobs(USER)]
    chats.send(text="/cancel")

    assert left == [numbers[1]]
    assert chats.state.open_jobs(USER) == []


def test_a_cancelled_job_that_the_server_has_is_due_at_once(chats: Chats) -> None:
    chats.photo()
    (job,) = chats.state.open_jobs(USER)
    chats.state.set_job(job, state=WAITING, due_at=chats.now + 500)
    chats.press(f"x{job.id}")
    (due,) = chats.state.due_jobs(chats.now, 10)

    assert (due.id, due.is_cancelled) == (job.id, True)


def test_another_model_uses_the_same_photos(chats: Chats) -> None:
    chats.photo()
    (job,) = chats.state.open_jobs(USER)
    chats.state.set_job(job, state=ENDED)
    chats.press(f"a{job.id}")
    (again,) = chats.state.open_jobs(USER)

    assert again.key != job.key
    assert [one.file_id for one in chats.state.photos(again)] == [one.file_id for one in chats.state.photos(job)]


def test_files_are_taken_if_they_are_images_that_can_be_fetched(chats: Chats) -> None:
    document = {"file_id": "d", "file_unique_id": "d", "mime_type": "image/png", "file_name": "a.png"}
    chats.send(document={**document, "file_size": MAX_FILE_BYTES + 1})
    too_large = chats.shown().text
    chats.send(document={**document, "mime_type": "application/pdf", "file_size": 10})
    other = chats.shown().text
    chats.send(document={**document, "file_size": 10})
    (job,) = chats.state.open_jobs(USER)

    assert "at most 20 MB" in too_large
    assert "only use photos" in other
    assert [photo.name for photo in chats.state.photos(job)] == ["a.png"]


def test_the_language_is_that_of_the_user_until_another_is_chosen(chats: Chats) -> None:
    chats.send(text="/language", language="de-AT")
    asked = chats.shown()
    chats.press("les", message_id=10_001)
    answered = chats.shown()
    chats.send(text="/help", language="de-AT")

    assert asked.text == "Welche Sprache?"
    assert chats.labels(asked) == list(LANGUAGES.values())
    assert answered.text == "Ahora hablo español."
    assert chats.shown().text.startswith("Envíame una foto")


def test_a_user_who_blocks_the_bot_gets_nothing_until_writing_again(chats: Chats) -> None:
    chats.photo()
    user = {"id": USER, "is_bot": False, "first_name": "A"}
    member = {"user": {"id": 1, "is_bot": True, "first_name": "bot"}, "status": "member"}
    chats.apply(
        my_chat_member={
            "chat": {"id": USER, "type": "private"},
            "from": user,
            "date": 1,
            "old_chat_member": member,
            "new_chat_member": {**member, "status": "kicked", "until_date": 0},
        }
    )
    blocked = chats.state.chat(USER)
    silent = chats.state.next_message(USER) is None
    chats.send(text="/help")
    back = chats.state.chat(USER)

    assert silent and chats.state.open_jobs(USER) == []
    assert blocked is not None and blocked.is_blocked
    assert back is not None and not back.is_blocked
    assert chats.shown().text.startswith("Send me a photo")


def test_old_rows_are_deleted_and_open_ones_stay(chats: Chats) -> None:
    chats.photo()
    chats.photo()
    ended, waiting = chats.state.open_jobs(USER)
    chats.state.set_job(ended, state=ENDED)
    chats.send(text="/help")
    chats.shown()
    chats.state.purge(chats.now + 8 * 86400, "2026-12-01")

    assert chats.state.job(ended.id) is None
    assert chats.state.photos(ended) == []
    assert chats.state.open_jobs(USER) == [waiting]
    assert chats.state.next_update() is None


def test_a_request_of_an_album_finds_its_photo(state: BotState) -> None:
    photos = [Photo(file_id=name, name=name, size_bytes=1) for name in "abc"]
    job = state.add_job(USER, photos, state=WAITING, reply_to=1, due_at=0.0, now=0.0)
    for position in range(3):
        state.set_photo(job, position, request_id=f"r{position}", answer=None)
    state.set_photo(job, 2, request_id="r2", answer={"status": "done"})

    assert [photo.name for _, photo in state.jobs_of_request("r1")] == ["b"]
    assert state.jobs_of_request("r2") == []
    assert list(state.waiting_requests()) == [(USER, "r0"), (USER, "r1")]


def test_every_language_has_every_sentence_with_the_same_values() -> None:
    import string

    def values(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english = SENTENCES["en"]
    for language in LANGUAGES:
        assert SENTENCES[language].keys() == english.keys()
        for name, text in SENTENCES[language].items():
            assert values(text) == values(english[name]), (language, name)
            assert language == "en" or text != english[name], (language, name)
