"""The steps of jobs that talk to the server: send photos, cancel, estimate, record answers.

A step that fails because the server or Telegram does not answer is tried again later; the photo stays where Telegram
keeps it. An upload has the job's idempotency key, so that a repetition after a crash finds the first one's requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import telegram

from mlg_client import ClientError, Model, Refused, Request
from mlg_client.errors import FATAL
from telegram_bot.accounts import Accounts
from telegram_bot.catalogue import image_inputs
from telegram_bot.conversation import MAX_FILE_BYTES, Conversation, day_of
from telegram_bot.publisher import flood_seconds
from telegram_bot.rendering import MAX_TEXT, album_text, answer_text, file_of, progress_text, shorten, values_text
from telegram_bot.state import (
    CHOOSING,
    COLLECTING,
    ENDED,
    SENDING,
    STYLING,
    WAITING,
    BotState,
    Content,
    Photo,
    PhotoJob,
)
from telegram_bot.texts import say

log = logging.getLogger(__name__)

#: Steps that run at once, of all chats and of one; due jobs that are looked at for them; bytes of photos in memory.
_AT_ONCE, _AT_ONCE_IN_CHAT, _LOOK_AHEAD, _MEMORY_BYTES = 8, 2, 64, 64 * 1024 * 1024
#: Larger albums are sent in parts.
_MAX_PART_BYTES = 32 * 1024 * 1024
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS, _GIVE_UP_SECONDS = 1.0, 60.0, 86400.0
#: Interval between two looks at the time that a waiting job still takes, and how many of them a second at most.
_REFRESH_SECONDS, _MAX_REFRESH_SECONDS, _MAX_REFRESHES_PER_SECOND = 10.0, 300.0, 10
#: ... of a job whose progress the server reports.
_PROGRESS_SECONDS = 4.0
#: Characters of JSON that are kept of an answer; a longer one is kept as the text that a chat shows of it.
_MAX_PREDS = 20_000
#: Most bytes of a file that a bot may send.
_MAX_SHOWN_BYTES = 50 * 1000 * 1000


class _FileGone(Exception):
    """Telegram does not give a photo any more."""


def _as_refused(error: ClientError | _FileGone) -> Refused:
    if isinstance(error, ClientError):
        return Refused(error.reason, code=error.code, status=error.status)
    return Refused("Telegram does not give the photo any more.", code="file_lost", status=404)


class JobRunner:
    """Runs the steps of all jobs as they become due.

    :param on_change: called with the chat in which something has to be shown.
    :param on_request: called with the account and the id of a request that has to be watched.
    """

    def __init__(
        self,
        state: BotState,
        bot: telegram.Bot,
        accounts: Accounts,
        conversation: Conversation,
        clock: Callable[[], float],
        *,
        on_change: Callable[[int], None],
        on_request: Callable[[int, str], None],
    ) -> None:
        self._state = state
        self._bot = bot
        self._accounts = accounts
        self._conversation = conversation
        self._clock = clock
        self._on_change = on_change
        self._on_request = on_request
        self._wakeup = asyncio.Event()
        #: By job: its chat, and the task.
        self._running: dict[int, tuple[int, asyncio.Task[None]]] = {}
        self._memory = _Bytes(_MEMORY_BYTES)

    def wake(self) -> None:
        """Look for due steps now."""
        self._wakeup.set()

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            while True:
                self._wakeup.clear()
                now = self._clock()
                for job in self._state.due_jobs(now, _LOOK_AHEAD):
                    in_chat = sum(chat_id == job.chat_id for chat_id, _ in self._running.values())
                    has_slot = len(self._running) < _AT_ONCE and in_chat < _AT_ONCE_IN_CHAT
                    if has_slot and job.id not in self._running:
                        self._running[job.id] = (job.chat_id, asyncio.create_task(self._run_step(job)))
                due_at = self._state.next_due_at()
                # What is due already and does not fit waits for a step to end, which wakes this.
                pause = 60.0 if due_at is None else due_at - now if due_at > now else 5.0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(60.0, pause)):
                        await self._wakeup.wait()
        finally:
            tasks = [task for _, task in self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run_step(self, due: PhotoJob) -> None:
        job = self._current(due)
        try:
            if job.state == ENDED:
                return
            if job.state == COLLECTING:
                with self._state.transaction():
                    self._conversation.begin(job)
            elif job.state in (CHOOSING, STYLING):
                self._end(job, "expired")
            elif job.is_cancelled and not (job.state == SENDING and job.is_begun):
                await self._cancel(job)
            elif job.state == SENDING:
                await self._send(job)
            else:
                await self._refresh(job)
        except Exception:
            # One job must not stop the others; it is tried again.
            log.exception("a step of a job failed", extra={"job": job.id})
            self._postpone(job)
        finally:
            del self._running[job.id]
            self._on_change(job.chat_id)
            self.wake()

    # Sending

    async def _send(self, job: PhotoJob) -> None:
        """Send the photos of a job, and postpone it if server or Telegram do not answer."""
        model = self._conversation.menu.find(job.model)
        if model is None and not self._conversation.menu:
            self._postpone(job, "server_down")
            return
        if model is None:
            self._give_back(job)
            self._end(job, "model_gone")
            return
        photos = self._state.photos(job)
        try:
            outcomes = await self._upload(job, model, photos)
        except _FileGone:
            self._give_back(job)
            self._end(job, "file_lost")
        except telegram.error.RetryAfter as error:
            self._postpone(job, seconds=flood_seconds(error))
        except telegram.error.TelegramError as error:
            log.warning("Telegram does not give a photo: %s", error, extra={"job": job.id})
            self._postpone(job)
        except ClientError as error:
            if _is_final(error):
                self._give_back(job)
                self._end(job, "server_quota" if error.code == "quota_reached" else "refused", reason=error.reason)
            else:
                log.warning("the server takes no photo: %s", error.reason, extra={"job": job.id, "code": error.code})
                self._postpone(job, "server_down")
        else:
            self._record_sent(job, photos, outcomes)

    async def _upload(self, job: PhotoJob, model: Model, photos: Sequence[Photo]) -> list[Request | Refused]:
        """Fetch the photos from Telegram and send them. :return: for each its request or its refusal."""
        inputs, outcomes = image_inputs(model), list[Request | Refused]()
        style_bytes = MAX_FILE_BYTES if len(inputs) > 1 else 0
        for part in _parts(photos):
            async with self._memory.hold(style_bytes + sum(map(_size_bytes, part))):
                try:
                    shared = {name: await self._fetch(job.style_file or "") for name in inputs[1:]}
                    outcomes += await self._upload_part(job, model, part, inputs[0], shared)
                except (ClientError, _FileGone) as error:
                    # What the server has accepted is answered, or cancelled there, although it does not get the rest.
                    is_last = isinstance(error, _FileGone) or _is_final(error)
                    if not is_last or not any(isinstance(outcome, Request) for outcome in outcomes):
                        raise
                    outcomes += [_as_refused(error)] * len(part)
        return outcomes

    async def _upload_part(
        self, job: PhotoJob, model: Model, photos: Sequence[Photo], input: str, shared: Mapping[str, bytes]
    ) -> list[Request | Refused]:
        """Send photos that are together in memory: one as a request, several as a batch.

        :param shared: the further inputs, the same for all.
        """
        client, labels = self._accounts.client(job.chat_id), {"source": "telegram"}
        images = [await self._fetch(photo.file_id) for photo in photos]
        names, key = [f"{photo.position + 1}-{photo.name}" for photo in photos], f"{job.key}-{photos[0].position}"
        # From now on it is sent to its end also when it is cancelled, to learn what is to be cancelled on the server.
        self._state.set_job(job, is_begun=1)
        if len(photos) == 1:
            image = {input: images[0], **shared} if shared else images[0]
            return [await client.submit(image, model.name, name=photos[0].name, labels=labels, idempotency_key=key)]
        batch = await client.submit_many(
            images, model.name, names=names, inputs=shared, labels=labels, idempotency_key=key
        )
        return list(batch.outcomes)

    async def _fetch(self, file_id: str) -> bytes:
        """Fetch a file from Telegram. :raises _FileGone: :raises telegram.error.TelegramError: try again later."""
        try:
            file = await self._bot.get_file(file_id)
        except telegram.error.BadRequest as error:
            raise _FileGone() from error
        try:
            return bytes(await file.download_as_bytearray())
        except telegram.error.InvalidToken as error:
            # What the library makes of 404: the address of a file is valid for an hour only.
            raise telegram.error.NetworkError("the file's address is not valid any more") from error

    def _record_sent(self, job: PhotoJob, photos: Sequence[Photo], outcomes: Sequence[Request | Refused]) -> None:
        now = self._clock()
        with self._state.transaction():
            for photo, outcome in zip(photos, outcomes, strict=True):
                if isinstance(outcome, Request):
                    answer = _kept(outcome) if outcome.is_read else None
                    self._state.set_photo(job, photo.position, request_id=outcome.id, answer=answer)
                else:
                    refusal = {"status": "refused", "reason": outcome.reason, "code": outcome.code}
                    self._state.set_photo(job, photo.position, request_id=None, answer=refusal)
            self._state.set_job(job, state=WAITING, due_at=now, tries=0)
            self._show_progress(job, None)
        for outcome in outcomes:
            if isinstance(outcome, Request) and not outcome.is_read:
                self._on_request(self._accounts.account(job.chat_id), outcome.id)

    # Waiting

    async def _refresh(self, job: PhotoJob) -> None:
        """Show how long a job still takes."""
        open_photos = [photo for photo in self._state.photos(job) if photo.answer is None and photo.request_id]
        found: Request | None = None
        try:
            if open_photos:
                found = await self._accounts.client(job.chat_id).read(open_photos[-1].request_id or "")
                if found.is_final:
                    self.record(found)
        except ClientError as error:
            # The watcher finds out what has become of it.
            log.info("a waiting request cannot be read: %s", error.reason, extra={"job": job.id, "code": error.code})
        with self._state.transaction():
            self._show_progress(job, found)
            load = self._state.count_waiting() / _MAX_REFRESHES_PER_SECOND
            now = self._clock()
            pause = max(_REFRESH_SECONDS, min(_MAX_REFRESH_SECONDS, (now - job.created_at) / 4))
            if found is not None and "progress" in found.raw:
                pause = _PROGRESS_SECONDS
            pause = max(pause, load)
            self._state.set_job(job, due_at=now if self._current(job).is_cancelled else now + pause)

    async def _cancel(self, job: PhotoJob) -> None:
        """Cancel what the server has not begun; a job that it never got is cancelled here."""
        if job.state == SENDING:
            self._give_back(job)
            self._end(job, "cancelled")
            return
        too_late = False
        for photo in self._state.photos(job):
            if photo.request_id is None or photo.answer is not None:
                continue
            try:
                self.record(await self._accounts.client(job.chat_id).cancel(photo.request_id))
            except Refused as error:
                too_late = too_late or error.code == "not_cancellable"
            except ClientError as error:
                log.warning("a request cannot be cancelled now: %s", error.reason, extra={"job": job.id})
                self._postpone(job)
                return
        self._state.set_job(job, is_cancelled=0, due_at=self._clock() + _REFRESH_SECONDS)
        if too_late and self._current(job).state == WAITING:
            self._show(job, Content(text=self._say(job, "too_late")))

    def record(self, request: Request) -> None:
        """Record the answer of a request that is final, and show it with those of the rest of its job."""
        for job, photo in self._state.jobs_of_request(request.id):
            with self._state.transaction():
                self._state.set_photo(job, photo.position, request_id=request.id, answer=_kept(request))
                self._show_progress(job, None)
            self._on_change(job.chat_id)

    def _show_progress(self, job: PhotoJob, found: Request | None) -> None:
        """Show the answers of a job if it has all of them, else how far it is.

        :param found: a request of the job that was just read.
        """
        job = self._current(job)
        photos, language = self._state.photos(job), self._language(job)
        model = self._conversation.menu.find(job.model)
        title = model.title if model is not None else job.model or ""
        done = [photo for photo in photos if photo.answer is not None]
        buttons = [[(say(language, "button_cancel"), f"x{job.id}")]]
        if len(done) < len(photos):
            text = progress_text(found, language, done=len(done), count=len(photos))
            if not job.is_cancelled:
                self._show(job, Content(text=text, buttons=buttons))
            return
        self._state.set_job(job, state=ENDED)
        buttons = [[(say(language, "button_again"), f"a{job.id}")]]
        files = [_shown_file(photo) for photo in photos]
        if len(photos) > 1 and not any(files):
            text = shorten(album_text(photos, language, title), MAX_TEXT)
            self._show(job, Content(text=text, buttons=buttons, is_answer=True))
            return
        for photo, file in zip(photos, files, strict=True):
            text = shorten(answer_text(photo.answer or {}, language, title), MAX_TEXT)
            content = Content(text=text, buttons=buttons if photo is photos[-1] else (), file=file, is_answer=True)
            kind = "answer" if photo.position == 0 else f"answer {photo.position}"
            self._state.show(job, content, self._clock(), kind=kind)

    # Endings

    def _end(self, job: PhotoJob, sentence: str, **values: object) -> None:
        """End a job with a sentence in place of an answer."""
        if self._current(job).is_cancelled:
            sentence, values = "cancelled", {}
        with self._state.transaction():
            self._state.set_job(job, state=ENDED)
            self._show(job, Content(text=self._say(job, sentence, **values), is_answer=True))

    def _postpone(self, job: PhotoJob, sentence: str | None = None, *, seconds: float = 0.0) -> None:
        """Try the step of a job again later, for at most a day."""
        now, job = self._clock(), self._current(job)
        if now - job.created_at > _GIVE_UP_SECONDS and job.state == SENDING:
            self._give_back(job)
            self._end(job, "gave_up")
            return
        pause = min(_MAX_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(job.tries, 16))
        with self._state.transaction():
            self._state.set_job(job, tries=job.tries + 1, due_at=now + max(pause, seconds))
            if sentence is not None and not job.is_cancelled:
                buttons = [[(self._say(job, "button_cancel"), f"x{job.id}")]]
                self._show(job, Content(text=self._say(job, sentence), buttons=buttons))

    def _give_back(self, job: PhotoJob) -> None:
        """Do not count the photos of a job that the server did not take."""
        day = job.counted_on or day_of(self._clock())
        self._state.use(job.chat_id, day, -len(self._state.photos(job)))

    def _show(self, job: PhotoJob, content: Content) -> None:
        self._state.show(job, content, self._clock())

    def _say(self, job: PhotoJob, sentence: str, **values: object) -> str:
        return say(self._language(job), sentence, **values)

    def _current(self, job: PhotoJob) -> PhotoJob:
        """Read a job again: it may have changed during a call."""
        current = self._state.job(job.id)
        assert current is not None  # only ended ones are deleted, after days
        return current

    def _language(self, job: PhotoJob) -> str:
        chat = self._state.chat(job.chat_id)
        assert chat is not None
        return chat.language


class _Bytes:
    """An amount of memory that is shared: who needs more than is free waits."""

    def __init__(self, capacity: int) -> None:
        self._capacity = self._free = capacity
        self._changed = asyncio.Condition()

    def hold(self, size_bytes: int) -> _Held:
        """Hold memory inside of the `async with` statement."""
        return _Held(self, min(size_bytes, self._capacity))

    async def take(self, size_bytes: int) -> None:
        """Wait for memory and take it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size_bytes)
            self._free -= size_bytes

    async def give(self, size_bytes: int) -> None:
        """Give memory back."""
        async with self._changed:
            self._free += size_bytes
            self._changed.notify_all()


class _Held:
    def __init__(self, memory: _Bytes, size_bytes: int) -> None:
        self._memory, self._size_bytes = memory, size_bytes

    async def __aenter__(self) -> None:
        await self._memory.take(self._size_bytes)

    async def __aexit__(self, *error: object) -> None:
        await self._memory.give(self._size_bytes)


def _size_bytes(photo: Photo) -> int:
    return photo.size_bytes or MAX_FILE_BYTES


def _parts(photos: Sequence[Photo]) -> list[list[Photo]]:
    """Divide the photos of an album into parts that are sent one after the other."""
    parts: list[list[Photo]] = []
    for photo in photos:
        if not parts or sum(map(_size_bytes, parts[-1])) + _size_bytes(photo) > _MAX_PART_BYTES:
            parts.append([])
        parts[-1].append(photo)
    return parts


def _is_final(error: ClientError) -> bool:
    """Tell whether it does not help to send a photo again."""
    return isinstance(error, Refused) or error.code in FATAL


def _kept(request: Request) -> dict[str, Any]:
    """Return what a chat needs of an answer."""
    preds = request.preds
    if len(json.dumps(preds)) > _MAX_PREDS:
        preds = shorten(values_text(preds), MAX_TEXT)
    kept = {"preds": preds, "reason": request.reason, "code": request.code, "unknown": request.raw.get("unknown")}
    given = {name: value for name, value in kept.items() if value is not None}
    sizes = {name: int(one.get("bytes") or 0) for name, one in (request.raw.get("files") or {}).items()}
    files = {name: kind for name, kind in request.files.items() if sizes.get(name, 0) <= _MAX_SHOWN_BYTES}
    return {"status": request.status, "files": files, **given}


def _shown_file(photo: Photo) -> tuple[str, str, str] | None:
    """Return the request, the name and the media type of the file that an answer shows."""
    files: Mapping[str, str] = (photo.answer or {}).get("files") or {}
    found = file_of(files)
    return None if found is None or photo.request_id is None else (photo.request_id, *found)
