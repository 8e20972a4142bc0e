"""What follows from an update of Telegram: a photo, a command, a button.

It only changes the state, in the transaction of its caller, so an update has all of its effects or none. It makes no
calls: `jobs.py` sends photos to the server, `publisher.py` shows messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import telegram

from telegram_bot.accounts import Accounts
from telegram_bot.catalogue import ModelMenu, image_inputs
from telegram_bot.state import (
    CHOOSING,
    COLLECTING,
    ENDED,
    SENDING,
    STYLING,
    WAITING,
    BotState,
    Chat,
    Content,
    Photo,
    PhotoJob,
)
from telegram_bot.texts import LANGUAGES, duration, known_language, say

#: Most bytes of a file that the Bot API lets a bot fetch.
MAX_FILE_BYTES = 20 * 1024 * 1024
#: Most jobs of one chat that have not ended.
MAX_OPEN_JOBS = 20
#: An album is complete when no photo has arrived for so long; its photos come as separate messages.
ALBUM_SECONDS = 1.0
#: How long a menu waits for a choice.
CHOICE_SECONDS = 86400.0
_MAX_NAME = 100
#: Telegram makes a JPEG of every photo, without a name.
_PHOTO_NAME = "photo.jpg"


def day_of(now: float) -> str:
    """Return the day of quotas (UTC)."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


class Conversation:
    """The chats of the bot.

    :param clock: returns the time in seconds since 1970.
    """

    def __init__(self, state: BotState, accounts: Accounts, clock: Callable[[], float]) -> None:
        self._state = state
        self._accounts = accounts
        self._clock = clock
        #: The server's models.
        self.menu = ModelMenu()
        self._commands: Mapping[str, Callable[[Chat, telegram.Message], None]] = {
            "start": self._welcome,
            "help": self._welcome,
            "models": self._ask_default_model,
            "style": self._ask_style,
            "status": self._status,
            "cancel": self._cancel,
            "language": self._ask_language,
        }

    def handle(self, update: telegram.Update) -> int | None:
        """Apply an update; one that was applied before changes nothing.

        :return: the chat in which something may have to be shown.
        """
        now = self._clock()
        if not self._state.add_update(update.update_id, now):
            return None
        if update.my_chat_member is not None:
            self._handle_membership(update.my_chat_member)
            return None
        query, message = update.callback_query, update.message
        source = message if query is None else query.message
        user = update.effective_user
        # A chat with one user has that user's number; groups and channels are not served.
        if source is None or user is None or source.chat.id != user.id:
            return None
        chat = self._state.see_chat(user.id, known_language(user.language_code), now)
        if not self._accounts.is_allowed(user.id):
            self._note(chat, "not_allowed", "not_allowed", id=user.id)
        elif query is not None:
            self._handle_button(chat, query)
        elif message is not None:
            self._handle_message(chat, message)
        return chat.id

    def set_menu(self, menu: ModelMenu) -> list[int]:
        """Take over the server's models. :return: the chats in which a menu that was missing is now shown."""
        was_empty, self.menu = not self.menu, menu
        jobs = self._state.choosing_jobs() if was_empty and menu else []
        with self._state.transaction():
            for job in jobs:
                self.begin(job)
        return [job.chat_id for job in jobs]

    # Messages

    def _handle_message(self, chat: Chat, message: telegram.Message) -> None:
        command = (message.text or message.caption or "").partition(" ")[0].partition("@")[0]
        photo = _photo_of(message)
        if photo is None:
            act = self._commands.get(command[1:]) if command.startswith("/") else None
            if act is None:
                self._note(chat, "send_photo", "send_photo")
            else:
                act(chat, message)
        elif photo.size_bytes > MAX_FILE_BYTES:
            self._note(chat, "too_large", "too_large", size=MAX_FILE_BYTES // 1024 // 1024)
        elif message.media_group_id is None and (chat.awaits_style or command == "/style"):
            self._save_style(chat, photo)
        else:
            self._add_photo(chat, message, photo)

    def _add_photo(self, chat: Chat, message: telegram.Message, photo: Photo) -> None:
        now, group = self._clock(), message.media_group_id
        album = None if group is None else self._state.album(chat.id, group)
        if album is not None:
            self._state.add_photo(album, photo)
            if album.state == CHOOSING:
                self.ask_model(album)
            else:
                self._state.set_job(album, due_at=now + ALBUM_SECONDS)
            return
        if len(self._state.open_jobs(chat.id)) >= MAX_OPEN_JOBS:
            self._note(chat, "too_many", "too_many")
            return
        is_album = group is not None
        job = self._state.add_job(
            chat.id,
            [photo],
            state=COLLECTING if is_album else CHOOSING,
            reply_to=message.message_id,
            media_group=group,
            due_at=now + (ALBUM_SECONDS if is_album else CHOICE_SECONDS),
            now=now,
        )
        if not is_album:
            self.begin(job)

    def begin(self, job: PhotoJob) -> None:
        """Send a job whose photos are complete, with the chat's model; or ask for one."""
        chat = self._chat(job)
        if chat.model is not None and self.menu.find(chat.model) is not None:
            self._choose(job, chat.model)
        else:
            self._state.set_job(job, state=CHOOSING, due_at=self._clock() + CHOICE_SECONDS)
            self.ask_model(job)

    def ask_model(self, job: PhotoJob, choice: str = "") -> None:
        """Show the menu of models. :param choice: the button of the menu that was pressed."""
        language, count = self._chat(job).language, len(self._state.photos(job))
        if not self.menu:
            self._show(job, Content(text=say(language, "no_models")))
            return
        name = "choose_many" if count > 1 else "choose_service" if self.menu.has_services() else "choose"
        buttons = self.menu.buttons(f"m{job.id}:", language, choice)
        buttons.append([(say(language, "button_cancel"), f"x{job.id}")])
        self._show(job, Content(text=say(language, name, count=count), buttons=buttons))

    def _choose(self, job: PhotoJob, name: str) -> None:
        """Send a job with a model, if the user may send so many photos."""
        model, chat, now = self.menu.find(name), self._chat(job), self._clock()
        if model is None:
            self.ask_model(job)
            return
        needs_style = len(image_inputs(model)) > 1
        if needs_style and chat.style_file is None:
            self._state.set_job(job, state=STYLING, model=name, due_at=now + CHOICE_SECONDS)
            self._state.set_chat(chat.id, awaits_style=1)
            self._show(job, Content(text=say(chat.language, "style_needed"), buttons=self._cancel_button(job, chat)))
            return
        count, quota = len(self._state.photos(job)), self._accounts.quota(chat.id)
        today = day_of(now)
        if quota is not None and self._state.used(chat.id, today) + count > quota:
            self._state.set_job(job, state=ENDED)
            self._show(job, Content(text=say(chat.language, "quota", count=quota), is_answer=True))
            return
        self._state.use(chat.id, today, count)
        style = chat.style_file if needs_style else None
        self._state.set_job(job, state=SENDING, model=name, style_file=style, due_at=now, tries=0, counted_on=today)
        self._show(job, Content(text=say(chat.language, "sending"), buttons=self._cancel_button(job, chat)))

    # Commands

    def _welcome(self, chat: Chat, message: telegram.Message) -> None:
        self._note(chat, "welcome", "welcome")

    def _ask_default_model(self, chat: Chat, message: telegram.Message) -> None:
        self._state.note(chat.id, "models", self._default_model_menu(chat), self._clock())

    def _default_model_menu(self, chat: Chat, choice: str = "") -> Content:
        if not self.menu:
            return Content(text=say(chat.language, "no_models"))
        buttons = [*self.menu.buttons("d:", chat.language, choice), [(say(chat.language, "button_ask"), "d:ask")]]
        return Content(text=say(chat.language, "model_question"), buttons=buttons)

    def _ask_style(self, chat: Chat, message: telegram.Message) -> None:
        self._state.set_chat(chat.id, awaits_style=1)
        if chat.style_file is None:
            self._note(chat, "style", "style_ask")
        else:
            buttons = [[(say(chat.language, "button_remove"), "r")]]
            content = Content(text=say(chat.language, "style_set"), buttons=buttons)
            self._state.note(chat.id, "style", content, self._clock())

    def _save_style(self, chat: Chat, photo: Photo) -> None:
        self._state.set_chat(chat.id, awaits_style=0, style_file=photo.file_id)
        self._note(chat, "style", "style_saved")
        for job in self._state.open_jobs(chat.id):
            if job.state == STYLING:
                self._choose(job, job.model or "")

    def _status(self, chat: Chat, message: telegram.Message) -> None:
        lines, now = [], self._clock()
        for number, job in enumerate(self._state.open_jobs(chat.id), start=1):
            photos = self._state.photos(job)
            done = sum(photo.answer is not None for photo in photos)
            what = {
                COLLECTING: say(chat.language, "status_choosing"),
                CHOOSING: say(chat.language, "status_choosing"),
                STYLING: say(chat.language, "style_needed"),
                SENDING: say(chat.language, "sending"),
                WAITING: say(chat.language, "answered_of", done=done, count=len(photos)),
            }[job.state]
            model = self.menu.find(job.model)
            title = f"{model.title if model else job.model}: " if job.model else ""
            lines.append(f"{number}. {title}{what} ({duration(now - job.created_at)})")
        lines = lines or [say(chat.language, "status_none")]
        quota = self._accounts.quota(chat.id)
        if quota is not None:
            left = max(0, quota - self._state.used(chat.id, day_of(now)))
            lines += ["", say(chat.language, "status_left", count=left)]
        self._state.note(chat.id, "status", Content(text="\n".join(lines)), now)

    def _cancel(self, chat: Chat, message: telegram.Message) -> None:
        answered = message.reply_to_message
        one = None if answered is None else self._state.job_of_message(chat.id, answered.message_id)
        jobs = self._state.open_jobs(chat.id) if answered is None else [] if one is None else [one]
        for job in jobs:
            self._cancel_job(job, chat)
        if chat.awaits_style:
            self._state.set_chat(chat.id, awaits_style=0)
        if not jobs:
            self._note(chat, "cancel", "cancel_none")

    def _cancel_job(self, job: PhotoJob, chat: Chat) -> None:
        self._state.cancel_job(job, self._clock())
        if job.state == STYLING:
            self._state.set_chat(chat.id, awaits_style=0)
        is_asked = job.state in (SENDING, WAITING)
        self._show(job, Content(text=say(chat.language, "cancelling" if is_asked else "cancelled")))

    def _ask_language(self, chat: Chat, message: telegram.Message) -> None:
        buttons = [[(name, f"l{code}")] for code, name in LANGUAGES.items()]
        content = Content(text=say(chat.language, "language_question"), buttons=buttons)
        self._state.note(chat.id, "language", content, self._clock())

    # Buttons

    def _handle_button(self, chat: Chat, query: telegram.CallbackQuery) -> None:
        data, message_id = query.data or "", query.message.message_id if query.message else 0
        head, _, choice = data.partition(":")
        if head == "d":
            self._press_default_model(chat, choice, message_id)
        elif data == "r":
            self._state.set_chat(chat.id, style_file=None, awaits_style=0)
            self._state.edit_note(chat.id, message_id, Content(text=say(chat.language, "style_removed")))
        elif data[:1] == "l" and data[1:] in LANGUAGES:
            self._state.set_chat(chat.id, language=data[1:])
            self._state.edit_note(chat.id, message_id, Content(text=say(data[1:], "language_set")))
        elif head[:1] in ("m", "x", "a") and head[1:].isdigit() and len(head) < 20:
            self._press_of_job(chat, head[0], int(head[1:]), choice)
        else:
            self._note(chat, "old_button", "old_button")

    def _press_default_model(self, chat: Chat, choice: str, message_id: int) -> None:
        model = self.menu.chosen(choice)
        if choice == "ask" or model is not None:
            self._state.set_chat(chat.id, model=model.name if model else None)
            said = (
                say(chat.language, "model_set", model=model.title) if model else say(chat.language, "model_each_time")
            )
            self._state.edit_note(chat.id, message_id, Content(text=said))
        else:
            self._state.edit_note(chat.id, message_id, self._default_model_menu(chat, choice))

    def _press_of_job(self, chat: Chat, action: str, job_id: int, choice: str) -> None:
        job = self._state.job(job_id)
        if job is None or job.chat_id != chat.id:
            self._note(chat, "old_button", "old_button")
        elif action == "a":
            self._repeat(job, chat)
        elif action == "x" and job.state != ENDED:
            self._cancel_job(job, chat)
        elif action == "m" and job.state in (CHOOSING, STYLING):
            # Else it was pressed twice, or in a message that was sent twice.
            model = self.menu.chosen(choice)
            if model is not None:
                self._choose(job, model.name)
            elif choice.startswith("m"):
                self._note(chat, "model_gone", "model_gone")
                self.ask_model(job)
            else:
                self.ask_model(job, choice)

    def _repeat(self, job: PhotoJob, chat: Chat) -> None:
        """Ask for a model for the photos of a job that has been answered."""
        if len(self._state.open_jobs(chat.id)) >= MAX_OPEN_JOBS:
            self._note(chat, "too_many", "too_many")
            return
        now = self._clock()
        again = self._state.add_job(
            chat.id,
            self._state.photos(job),
            state=CHOOSING,
            reply_to=job.reply_to,
            due_at=now + CHOICE_SECONDS,
            now=now,
        )
        self.ask_model(again)

    # Others

    def _handle_membership(self, change: telegram.ChatMemberUpdated) -> None:
        """Note that a user blocks the bot."""
        if change.new_chat_member.status == telegram.constants.ChatMemberStatus.BANNED:
            self._state.block_chat(change.chat.id, self._clock())

    def _chat(self, job: PhotoJob) -> Chat:
        chat = self._state.chat(job.chat_id)
        assert chat is not None
        return chat

    def _cancel_button(self, job: PhotoJob, chat: Chat) -> list[list[tuple[str, str]]]:
        return [[(say(chat.language, "button_cancel"), f"x{job.id}")]]

    def _note(self, chat: Chat, kind: str, name: str, **values: object) -> None:
        self._state.note(chat.id, kind, Content(text=say(chat.language, name, **values)), self._clock())

    def _show(self, job: PhotoJob, content: Content) -> None:
        self._state.show(job, content, self._clock())


def _photo_of(message: telegram.Message) -> Photo | None:
    """Return the largest size of a message's photo, or its file if that is an image; None if there is neither."""
    if message.photo:
        largest = max(message.photo, key=lambda size: size.width * size.height)
        return Photo(file_id=largest.file_id, name=_PHOTO_NAME, size_bytes=largest.file_size or 0)
    document = message.document
    if document is not None and (document.mime_type or "").startswith("image/"):
        name = (document.file_name or _PHOTO_NAME)[-_MAX_NAME:]
        return Photo(file_id=document.file_id, name=name, size_bytes=document.file_size or 0)
    return None
