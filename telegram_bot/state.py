"""What the bot keeps in its SQLite file: chats, jobs with their photos, messages, the photos that users sent today.

A job is one photo, or an album, with the model that was chosen for it. A message is one that the bot sends or edits:
its `content` is what the user shall see, and `version` counts the changes of that; it is published when `shown_version`
is equal. Updates of Telegram that were handled are kept by id, so that one that is delivered twice has no effect.

All methods run in one thread and take milliseconds. One process at a time may use the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from provider_image.errors import ConfigError, MlgError

_VERSION = 2
_SCHEMA = """
CREATE TABLE updates (id INTEGER PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE chats (
    id INTEGER PRIMARY KEY,
    language TEXT NOT NULL,
    model TEXT,
    style_file TEXT,
    awaits_style INTEGER NOT NULL DEFAULT 0,
    is_blocked INTEGER NOT NULL DEFAULT 0,
    seen_at REAL NOT NULL
);
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    chat_id INTEGER NOT NULL,
    state TEXT NOT NULL,
    key TEXT NOT NULL,
    reply_to INTEGER NOT NULL,
    media_group TEXT,
    model TEXT,
    style_file TEXT,
    is_cancelled INTEGER NOT NULL DEFAULT 0,
    tries INTEGER NOT NULL DEFAULT 0,
    due_at REAL NOT NULL,
    created_at REAL NOT NULL
);
CREATE INDEX jobs_due ON jobs (due_at) WHERE state <> 'ended';
CREATE INDEX jobs_of_chat ON jobs (chat_id, id) WHERE state <> 'ended';
CREATE INDEX jobs_created ON jobs (created_at);
CREATE TABLE photos (
    job_id INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    file_id TEXT NOT NULL,
    name TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    request_id TEXT,
    answer TEXT,
    PRIMARY KEY (job_id, position)
) WITHOUT ROWID;
CREATE INDEX photos_of_request ON photos (request_id) WHERE request_id IS NOT NULL;
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    chat_id INTEGER NOT NULL,
    job_id INTEGER REFERENCES jobs (id) ON DELETE CASCADE,
    kind TEXT NOT NULL,
    reply_to INTEGER,
    content TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1,
    shown_version INTEGER NOT NULL DEFAULT 0,
    place INTEGER NOT NULL,
    message_id INTEGER,
    created_at REAL NOT NULL
);
CREATE INDEX messages_to_publish ON messages (chat_id, place) WHERE version > shown_version;
CREATE INDEX messages_of_chat ON messages (chat_id, place);
CREATE UNIQUE INDEX messages_of_job ON messages (job_id, kind) WHERE job_id IS NOT NULL;
CREATE INDEX messages_created ON messages (created_at);
CREATE TABLE usage (
    user_id INTEGER NOT NULL,
    day TEXT NOT NULL,
    photos INTEGER NOT NULL,
    PRIMARY KEY (user_id, day)
) WITHOUT ROWID;
"""

#: What version 2 added.
_SCHEMA_2 = """
ALTER TABLE jobs ADD COLUMN counted_on TEXT;
ALTER TABLE jobs ADD COLUMN is_begun INTEGER NOT NULL DEFAULT 0;
"""

#: States of a job. `collecting` is an album whose photos still arrive; `styling` waits for the photo with the style.
COLLECTING, CHOOSING, STYLING, SENDING, WAITING, ENDED = (
    "collecting",
    "choosing",
    "styling",
    "sending",
    "waiting",
    "ended",
)
#: How long ended jobs and their messages are kept, chats that were not heard of, and ids of updates: Telegram
#: delivers an update for a day, and begins with other ids after a week of silence.
_KEEP_JOBS_SECONDS, _KEEP_CHATS_SECONDS, _KEEP_UPDATES_SECONDS = 7 * 86400.0, 365 * 86400.0, 2 * 86400.0
#: Most notes that wait to be sent to one chat; a further one replaces the last one.
_MAX_NOTES = 10


class StateInUse(MlgError):
    """Another `mlg telegram` runs with this home. Stop it first: two would fetch each other's updates."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A private chat; its id is the number of the user."""

    id: int
    language: str
    #: The model for all photos; None asks each time.
    model: str | None
    #: Telegram's id of the photo with the style.
    style_file: str | None
    #: Whether the next photo is a style.
    awaits_style: bool
    is_blocked: bool

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> Self:
        """Create the record from a row."""
        return cls(
            **{name: row[name] for name in ("id", "language", "model", "style_file")},
            awaits_style=bool(row["awaits_style"]),
            is_blocked=bool(row["is_blocked"]),
        )


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo of a job."""

    #: Telegram's id of the file.
    file_id: str
    name: str
    size_bytes: int
    position: int = 0
    #: The request on the server; None until it has accepted the photo.
    request_id: str | None = None
    #: `status`, `preds`, `reason`, `code`, `files` as the server reported them; None while there is no answer.
    answer: Mapping[str, Any] | None = None

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> Self:
        """Create the record from a row."""
        names = ("file_id", "name", "size_bytes", "position", "request_id")
        answer = None if row["answer"] is None else json.loads(row["answer"])
        return cls(**{name: row[name] for name in names}, answer=answer)


@dataclass(frozen=True, kw_only=True)
class PhotoJob:
    """A photo or an album, and what shall be done with it."""

    id: int
    chat_id: int
    state: str
    #: Idempotency key of its upload.
    key: str
    #: Message with the (first) photo.
    reply_to: int
    model: str | None
    style_file: str | None
    is_cancelled: bool
    #: Whether its upload has begun, so that the server may have some of it.
    is_begun: bool
    #: Attempts of the current step that failed.
    tries: int
    created_at: float
    #: The day on which its photos were counted.
    counted_on: str | None

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> Self:
        """Create the record from a row."""
        names = (
            "id",
            "chat_id",
            "state",
            "key",
            "reply_to",
            "model",
            "style_file",
            "tries",
            "created_at",
            "counted_on",
        )
        return cls(
            **{name: row[name] for name in names},
            is_cancelled=bool(row["is_cancelled"]),
            is_begun=bool(row["is_begun"]),
        )


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a message shows."""

    text: str
    #: Rows of (label, data) of the buttons under it.
    buttons: Sequence[Sequence[tuple[str, str]]] = ()
    #: The request and the name of its file that is shown above the text, and the file's media type.
    file: tuple[str, str, str] | None = None
    #: Whether it is an answer, which is only ever edited into a message, so that it cannot appear twice.
    is_answer: bool = False

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps([self.text, self.buttons, self.file, self.is_answer], ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Content:
        """Read what `to_json` wrote."""
        shown, buttons, file, is_answer = json.loads(text)
        rows = [[(label, data) for label, data in row] for row in buttons]
        return cls(text=shown, buttons=rows, file=None if file is None else tuple(file), is_answer=is_answer)


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that has to be sent or edited."""

    id: int
    chat_id: int
    reply_to: int | None
    content: Content = field(repr=False)
    version: int
    #: Telegram's number of it; None until it has been sent.
    message_id: int | None

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> Self:
        """Create the record from a row."""
        names = ("id", "chat_id", "reply_to", "version", "message_id")
        return cls(**{name: row[name] for name in names}, content=Content.from_json(row["content"]))


class BotState:
    """The bot's SQLite file.

    :raises StateInUse: another process has it open.
    :raises ConfigError: it cannot be opened, or a newer version has written it.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"{path} cannot be opened: {error.strerror}.") from error
        try:
            # Of the kind that SQLite does not use itself.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StateInUse() from error
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigError(f"{path} is not a state of the bot, or is damaged: {error}.") from error
        except ConfigError:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON", "cache_size = -4096"):
            self._db.execute(f"PRAGMA {pragma}")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise ConfigError(f"{path} was written by a newer version of mlg. Update this installation.")
        if version < _VERSION:
            steps = f"{'' if version else _SCHEMA}{_SCHEMA_2}"
            self._db.executescript(f"BEGIN;{steps}PRAGMA user_version = {_VERSION};COMMIT;")

    def close(self) -> None:
        """Close the file."""
        self._db.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def transaction(self, *, flush: bool = False) -> Iterator[None]:
        """Make all changes inside of the `with` statement, or none; may be nested.

        :param flush: they are on the disk at the end. Else a power failure may undo the last changes, as if the process
            had ended before them; what follows from that is harmless except for updates, which come only once.
        """
        if self._db.in_transaction:
            yield
            return
        self._db.execute(f"PRAGMA synchronous = {'FULL' if flush else 'NORMAL'}")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo the changes inside of the `with` statement alone if it fails; inside of a transaction."""
        self._db.execute("SAVEPOINT part")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK TO part")
            raise
        finally:
            self._db.execute("RELEASE part")

    # Updates

    def add_update(self, id: int, now: float) -> bool:
        """Remember an update. :return: False if it is known already."""
        return bool(self._db.execute("INSERT OR IGNORE INTO updates VALUES (?, ?)", (id, now)).rowcount)

    def next_update(self) -> int | None:
        """Return the id from which on updates are not known; None if any may come."""
        (latest,) = self._db.execute("SELECT max(id) FROM updates").fetchone()
        return None if latest is None else int(latest) + 1

    # Chats

    def chat(self, id: int) -> Chat | None:
        """Return a chat; None if it is unknown."""
        row = self._db.execute("SELECT * FROM chats WHERE id = ?", (id,)).fetchone()
        return None if row is None else Chat.from_row(row)

    def see_chat(self, id: int, language: str, now: float) -> Chat:
        """Return the chat of an update; the language is that of a new one. A user who writes does not block."""
        self._db.execute(
            "INSERT INTO chats (id, language, seen_at) VALUES (?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at, is_blocked = 0",
            (id, language, now),
        )
        chat = self.chat(id)
        assert chat is not None
        return chat

    def set_chat(self, id: int, **values: Any) -> None:
        """Change `language`, `model`, `style_file` or `awaits_style` of a chat."""
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE chats SET {names} WHERE id = ?", (*values.values(), id))

    def block_chat(self, id: int, now: float) -> None:
        """Send a chat nothing more, and end its jobs: those that the server has are cancelled."""
        with self.transaction():
            self.set_chat(id, is_blocked=1)
            self._db.execute("UPDATE messages SET shown_version = version WHERE chat_id = ?", (id,))
            for job in self.open_jobs(id):
                self.cancel_job(job, now)

    # Jobs

    def add_job(
        self,
        chat_id: int,
        photos: Sequence[Photo],
        *,
        state: str,
        reply_to: int,
        due_at: float,
        now: float,
        media_group: str | None = None,
        model: str | None = None,
    ) -> PhotoJob:
        """Add a job."""
        with self.transaction():
            id = self._db.execute(
                "INSERT INTO jobs (chat_id, state, key, reply_to, media_group, model, due_at, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (chat_id, state, secrets.token_hex(16), reply_to, media_group, model, due_at, now),
            ).lastrowid
            job = self.job(id or 0)
            assert job is not None
            for photo in photos:
                self.add_photo(job, photo)
        return job

    def add_photo(self, job: PhotoJob, photo: Photo) -> int:
        """Add a photo to a job that has not been sent. :return: how many it has."""
        (count,) = self._db.execute("SELECT count(*) FROM photos WHERE job_id = ?", (job.id,)).fetchone()
        self._db.execute(
            "INSERT INTO photos (job_id, position, file_id, name, size_bytes) VALUES (?, ?, ?, ?, ?)",
            (job.id, count, photo.file_id, photo.name, photo.size_bytes),
        )
        return int(count) + 1

    def job(self, id: int) -> PhotoJob | None:
        """Return a job; None if there is none."""
        row = self._db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return None if row is None else PhotoJob.from_row(row)

    def album(self, chat_id: int, media_group: str) -> PhotoJob | None:
        """Return the job of an album to which a photo can still be added."""
        row = self._db.execute(
            "SELECT * FROM jobs WHERE chat_id = ? AND state <> 'ended' AND media_group = ? AND state IN (?, ?)"
            " ORDER BY id DESC",
            (chat_id, media_group, COLLECTING, CHOOSING),
        ).fetchone()
        return None if row is None else PhotoJob.from_row(row)

    def job_of_message(self, chat_id: int, message_id: int) -> PhotoJob | None:
        """Return the job whose photo or answer a message is."""
        row = self._db.execute(
            "SELECT * FROM jobs WHERE chat_id = ?1 AND state <> 'ended' AND (reply_to = ?2"
            " OR id IN (SELECT job_id FROM messages WHERE chat_id = ?1 AND message_id = ?2))",
            (chat_id, message_id),
        ).fetchone()
        return None if row is None else PhotoJob.from_row(row)

    def open_jobs(self, chat_id: int) -> list[PhotoJob]:
        """List the jobs of a chat that have not ended, oldest first."""
        rows = self._db.execute("SELECT * FROM jobs WHERE chat_id = ? AND state <> 'ended' ORDER BY id", (chat_id,))
        return [PhotoJob.from_row(row) for row in rows]

    def due_jobs(self, now: float, limit: int) -> list[PhotoJob]:
        """List jobs of which a step is due, the longest due first."""
        rows = self._db.execute(
            "SELECT * FROM jobs WHERE state <> 'ended' AND due_at <= ? ORDER BY due_at LIMIT ?", (now, limit)
        )
        return [PhotoJob.from_row(row) for row in rows]

    def next_due_at(self) -> float | None:
        """Return when the next step of any job is due."""
        (due_at,) = self._db.execute("SELECT min(due_at) FROM jobs WHERE state <> 'ended'").fetchone()
        return None if due_at is None else float(due_at)

    def count_waiting(self) -> int:
        """Count the jobs whose answers are waited for."""
        (count,) = self._db.execute(
            "SELECT count(*) FROM jobs WHERE state <> 'ended' AND state = ?", (WAITING,)
        ).fetchone()
        return int(count)

    def choosing_jobs(self) -> list[PhotoJob]:
        """List the jobs that wait for a choice."""
        rows = self._db.execute("SELECT * FROM jobs WHERE state <> 'ended' AND state = ?", (CHOOSING,))
        return [PhotoJob.from_row(row) for row in rows]

    def photos(self, job: PhotoJob) -> list[Photo]:
        """List the photos of a job."""
        rows = self._db.execute("SELECT * FROM photos WHERE job_id = ? ORDER BY position", (job.id,))
        return [Photo.from_row(row) for row in rows]

    def set_job(self, job: PhotoJob, **values: Any) -> None:
        """Change columns of a job."""
        names = ", ".join(f"{name} = ?" for name in values)
        self._db.execute(f"UPDATE jobs SET {names} WHERE id = ?", (*values.values(), job.id))

    def cancel_job(self, job: PhotoJob, now: float) -> None:
        """Cancel a job: at once if the server cannot know it, else the server is asked next."""
        if job.state in (SENDING, WAITING):
            self.set_job(job, is_cancelled=1, due_at=now)
        else:
            self.set_job(job, state=ENDED)

    def set_photo(
        self, job: PhotoJob, position: int, *, request_id: str | None, answer: Mapping[str, Any] | None
    ) -> None:
        """Record what the server said of a photo."""
        self._db.execute(
            "UPDATE photos SET request_id = ?, answer = ? WHERE job_id = ? AND position = ?",
            (request_id, None if answer is None else json.dumps(answer), job.id, position),
        )

    def jobs_of_request(self, request_id: str) -> list[tuple[PhotoJob, Photo]]:
        """List the photos that wait for the answer of a request, with their jobs."""
        rows = self._db.execute(
            "SELECT job_id, position FROM photos WHERE request_id = ? AND answer IS NULL", (request_id,)
        ).fetchall()
        found = []
        for job_id, position in rows:
            job = self.job(job_id)
            if job is not None and job.state == WAITING:
                found.append((job, self.photos(job)[position]))
        return found

    def waiting_requests(self) -> Iterator[tuple[int, str]]:
        """Iterate over (chat, request) of all answers that are waited for."""
        rows = self._db.execute(
            "SELECT jobs.chat_id, photos.request_id FROM jobs JOIN photos ON photos.job_id = jobs.id"
            " WHERE jobs.state <> 'ended' AND jobs.state = 'waiting'"
            " AND photos.request_id IS NOT NULL AND photos.answer IS NULL ORDER BY jobs.id"
        ).fetchall()
        return ((chat_id, request_id) for chat_id, request_id in rows)

    # Messages

    def show(self, job: PhotoJob, content: Content, now: float, *, kind: str = "answer") -> bool:
        """Set what a message of a job shows, which a chat that is blocked never does. :return: whether it changes."""
        shown = content.to_json()
        row = self._db.execute(
            "SELECT id, content FROM messages WHERE job_id = ? AND kind = ?", (job.id, kind)
        ).fetchone()
        if row is not None and row["content"] == shown:
            return False
        if row is None:
            self._db.execute(
                "INSERT INTO messages (chat_id, job_id, kind, reply_to, content, place, created_at)"
                " VALUES (?, ?, ?, ?, ?, (SELECT coalesce(max(place), 0) + 1 FROM messages WHERE chat_id = ?1), ?)",
                (job.chat_id, job.id, kind, job.reply_to, shown, now),
            )
        else:
            # One that waits keeps its place, so that many changes do not delay it.
            self._db.execute(
                "UPDATE messages SET content = ?1, version = version + 1, place = CASE WHEN version > shown_version"
                " THEN place ELSE (SELECT max(place) + 1 FROM messages WHERE chat_id = ?2) END WHERE id = ?3",
                (shown, job.chat_id, row["id"]),
            )
        self._db.execute(
            "UPDATE messages SET shown_version = version WHERE chat_id = ?1"
            " AND (SELECT is_blocked FROM chats WHERE id = ?1)",
            (job.chat_id,),
        )
        return True

    def note(self, chat_id: int, kind: str, content: Content, now: float) -> None:
        """Send a message that belongs to no job. It replaces one of its kind, or the last of many, that is unsent."""
        unsent = "SELECT id FROM messages WHERE chat_id = ? AND job_id IS NULL AND message_id IS NULL AND version > "
        rows = self._db.execute(unsent + "shown_version ORDER BY kind = ? DESC, place DESC", (chat_id, kind)).fetchall()
        if rows:
            first = self._db.execute("SELECT kind FROM messages WHERE id = ?", (rows[0]["id"],)).fetchone()["kind"]
            if first == kind or len(rows) >= _MAX_NOTES:
                self._db.execute(
                    "UPDATE messages SET kind = ?, content = ?, version = version + 1 WHERE id = ?",
                    (kind, content.to_json(), rows[0]["id"]),
                )
                return
        self._db.execute(
            "INSERT INTO messages (chat_id, kind, content, place, created_at)"
            " VALUES (?, ?, ?, (SELECT coalesce(max(place), 0) + 1 FROM messages WHERE chat_id = ?1), ?)",
            (chat_id, kind, content.to_json(), now),
        )

    def edit_note(self, chat_id: int, message_id: int, content: Content) -> None:
        """Change a message that belongs to no job, if it is one of this chat."""
        self._db.execute(
            "UPDATE messages SET content = ?, version = version + 1"
            " WHERE chat_id = ? AND message_id = ? AND job_id IS NULL",
            (content.to_json(), chat_id, message_id),
        )

    def chats_to_publish(self) -> list[int]:
        """List the chats that have messages to send or edit."""
        rows = self._db.execute("SELECT DISTINCT chat_id FROM messages WHERE version > shown_version")
        return [chat_id for (chat_id,) in rows]

    def next_message(self, chat_id: int) -> Message | None:
        """Return the next message of a chat to send or edit."""
        row = self._db.execute(
            "SELECT * FROM messages WHERE chat_id = ? AND version > shown_version ORDER BY place, id LIMIT 1",
            (chat_id,),
        ).fetchone()
        return None if row is None else Message.from_row(row)

    def set_sent(self, message: Message, message_id: int | None) -> None:
        """Record the number that Telegram gave a message; None if it is gone and has to be sent again."""
        self._db.execute("UPDATE messages SET message_id = ? WHERE id = ?", (message_id, message.id))

    def set_shown(self, message: Message) -> None:
        """Record that the user sees the message as it was read."""
        self._db.execute(
            "UPDATE messages SET shown_version = max(shown_version, ?) WHERE id = ?", (message.version, message.id)
        )

    def replace_content(self, message: Message, content: Content) -> None:
        """Change what a message shows, unless it has changed meanwhile."""
        self._db.execute(
            "UPDATE messages SET content = ?, version = version + 1 WHERE id = ? AND version = ?",
            (content.to_json(), message.id, message.version),
        )

    # Quotas

    def used(self, user_id: int, day: str) -> int:
        """Count the photos that a user has sent on a day."""
        row = self._db.execute("SELECT photos FROM usage WHERE user_id = ? AND day = ?", (user_id, day)).fetchone()
        return 0 if row is None else int(row["photos"])

    def use(self, user_id: int, day: str, photos: int) -> None:
        """Count photos; a negative number gives some back."""
        self._db.execute(
            "INSERT INTO usage VALUES (?, ?, max(?, 0))"
            " ON CONFLICT (user_id, day) DO UPDATE SET photos = max(photos + ?3, 0)",
            (user_id, day, photos),
        )

    # Retention

    def purge(self, now: float, today: str) -> None:
        """Delete what is not needed any more."""
        with self.transaction():
            self._db.execute("DELETE FROM updates WHERE at < ?", (now - _KEEP_UPDATES_SECONDS,))
            self._db.execute("DELETE FROM usage WHERE day < ?", (today,))
            self._db.execute("DELETE FROM jobs WHERE state = 'ended' AND created_at < ?", (now - _KEEP_JOBS_SECONDS,))
            self._db.execute(
                "DELETE FROM messages WHERE job_id IS NULL AND version = shown_version AND created_at < ?",
                (now - _KEEP_JOBS_SECONDS,),
            )
            self._db.execute("DELETE FROM chats WHERE seen_at < ?", (now - _KEEP_CHATS_SECONDS,))
