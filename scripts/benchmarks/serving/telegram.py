"""`mlg telegram` with many chats: its memory, and how long after an answer is recorded a user sees it.

Some chats send a photo each to a fake Bot API on this machine and press the first button; the bot sends the photos to
`mlg serve`. The others did so before the bot was started, which is written into its state and into the server's store.
No batcher runs: the benchmark records the answers in the store itself, first one by one, then all.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
from PIL import Image

from provider_image.compiler import ensure_installed
from scripts.benchmarks.support.measuring import print_table, work_folder
from scripts.benchmarks.support.processes import mlg, serving_home
from store import new_id
from store.requests import Answer, Claim, NewRequest
from store.settings import HomeSettings
from store.store import Store
from telegram_bot.state import WAITING, BotState, Content, Photo
from tests.telegram_bot.fake_bot_api import TOKEN, FakeBotApi, Shown

MODEL = "efficientnet_lite0"
OUTPUT = [[f"n{n:08d}", f"label_{n}", round((20 - n) / 210, 6)] for n in range(20)]
_POLL_SECONDS, _PAUSE_SECONDS = 0.05, 0.2


class _Chats(FakeBotApi):
    """Users who press the first button of each menu, and see answers."""

    def __init__(self) -> None:
        super().__init__()
        #: When each answer became visible.
        self.answered_at: list[float] = []
        #: When the last photo was sent to the server, by the clock of performance.
        self.sent_at = 0.0

    def _sendMessage(self, fields: object) -> object:
        message = super()._sendMessage(fields)
        self.press(message["chat"]["id"], message["message_id"], "")
        return message

    def _editMessageText(self, fields: object) -> object:
        message = super()._editMessageText(fields)
        if "Queued" in self.last(message["chat"]["id"]).text:
            self.sent_at = time.perf_counter()
        if "label 0" in self.last(message["chat"]["id"]).text:
            self.answered_at.append(time.time())
        return message


@click.command()
@click.option("--chats", default=10_000, show_default=True, help="Number of chats.")
@click.option("--sent", default=500, show_default=True, help="Those that send their photo while the bot runs.")
@click.option("--single", default=100, show_default=True, help="Answers that are recorded one by one.")
def main(chats: int, sent: int, single: int) -> None:
    """Measure the Telegram bot."""
    with work_folder() as folder:
        asyncio.run(_measure(folder, chats, min(sent, chats), single))


async def _measure(folder: Path, chats: int, sent: int, single: int) -> None:
    settings = HomeSettings(home=folder / "home")
    ensure_installed(settings.models, MODEL)
    api = _Chats()
    with closing(Store(settings)) as store, serving_home(folder, settings.home) as base:
        store.migrate()
        _add_waiting(folder, store, api, range(sent + 1, chats + 1))
        async with api.running():
            bot = await _start_bot(folder, base, api.base)
            try:
                idle, cpu = _memory_megabytes(bot.pid), _processor_seconds(bot.pid)
                began = time.perf_counter()
                for chat in range(1, sent + 1):
                    api.photo(chat, _photo(chat))
                claims: list[Claim] = []
                while len(claims) < chats:
                    claims += await asyncio.to_thread(_claim, store)
                    await asyncio.sleep(_POLL_SECONDS)
                await _settle(api)
                sent_seconds = api.sent_at - began
                cpu_sent = _processor_seconds(bot.pid) - cpu
                delays = [await _delay(api, store, [claim]) for claim in claims[:single]]
                cpu = _processor_seconds(bot.pid)
                answered_seconds = await _delay(api, store, claims[single:])
                cpu_answered = _processor_seconds(bot.pid) - cpu
                used, peak = _memory_megabytes(bot.pid), _memory_megabytes(bot.pid, "VmHWM")
            finally:
                bot.terminate()
                await bot.wait()
    delays.sort()
    rows: Sequence[tuple[str, str, str]] = (
        ("memory at the start, MB", f"{idle:.0f}", ""),
        ("processor time of the bot for a photo that was sent, ms", f"{1000 * cpu_sent / sent:.0f}", ""),
        (f"... for an answer of {chats - single:,} at once, ms", f"{1000 * cpu_answered / (chats - single):.0f}", ""),
        (f"memory with {chats:,} chats, at the end; most, MB", f"{used:.0f}; {peak:.0f}", "200"),
        (
            f"from recorded to visible, {single} one by one: median, 90 %, longest, s",
            f"{statistics.median(delays):.3f}, {delays[len(delays) * 9 // 10]:.3f}, {delays[-1]:.3f}",
            "1",
        ),
        ("photos sent and menus answered, a second", f"{sent / sent_seconds:.1f}", ""),
        (
            f"{chats - single:,} answers recorded at once: visible, a second",
            f"{(chats - single) / answered_seconds:.0f}",
            "",
        ),
    )
    print_table("Telegram bot", ("what", "seen", "target"), rows)


def _add_waiting(folder: Path, store: Store, api: FakeBotApi, chats: Sequence[int]) -> None:
    """Let chats wait for the answers to photos that the bot sent earlier."""
    now, requests = datetime.now(UTC), {chat: new_id() for chat in chats}

    def add(chat: int) -> None:
        new = NewRequest(id=requests[chat], service="classification", model=MODEL, is_fresh=True, created_at=now)
        store.requests.add(new, store.images.stage(_photo(chat)))

    with ThreadPoolExecutor(32) as pool:  # which share commits
        list(pool.map(add, chats))
    content = Content(text="Queued.")
    with closing(BotState(folder / "bot" / "telegram.sqlite3")) as state, state.transaction():
        for chat in chats:
            state.see_chat(chat, "en", now.timestamp())
            photo = Photo(file_id=f"file-{chat}", name="photo.jpg", size_bytes=1000)
            due_at, at = now.timestamp() + 600.0, now.timestamp()
            job = state.add_job(chat, [photo], state=WAITING, reply_to=chat, due_at=due_at, now=at, model=MODEL)
            state.set_photo(job, 0, request_id=requests[chat], answer=None)
            state.show(job, content, now.timestamp())
            message = state.next_message(chat)
            assert message is not None
            state.set_sent(message, chat)
            state.set_shown(message)
            api.chats[chat][chat] = Shown(content.text)


async def _start_bot(folder: Path, base: str, api: str) -> asyncio.subprocess.Process:
    reader, writer = os.pipe()
    with (folder / "bot.log").open("wb") as log:
        bot = await asyncio.create_subprocess_exec(
            *mlg("telegram", "--home", str(folder / "bot"), "--ready-fd", str(writer)),
            stdout=log,
            stderr=log,
            pass_fds=(writer,),
            env={
                **os.environ,
                "MLG_URL": base,
                "MLG_TELEGRAM_API": api,
                "MLG_TELEGRAM_TOKEN": TOKEN,
                "MLG_TELEGRAM_RATE": "10000",
                "MLG_LOG_LEVEL": "WARNING",
            },
        )
    os.close(writer)
    with os.fdopen(reader) as ready:
        if not await asyncio.to_thread(ready.readline):
            sys.exit((folder / "bot.log").read_text())
    return bot


def _photo(number: int) -> bytes:
    """Make a small photo that is like no other."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, number // 65536)).save(file, "PNG")
    return file.getvalue()


def _claim(store: Store) -> list[Claim]:
    now = datetime.now(UTC)
    ends_at = now + timedelta(hours=1)
    return store.requests.claim(models=[MODEL], limit=1000, now=now, lease_ends_at=ends_at, oldest_before=None)


async def _settle(api: FakeBotApi) -> None:
    """Wait until the bot has nothing to do but wait."""
    calls = -1
    while calls != len(api.calls):
        calls = len(api.calls)
        await asyncio.sleep(2.0)


async def _delay(api: _Chats, store: Store, claims: Sequence[Claim]) -> float:
    """Record answers. :return: seconds until all of them were visible."""
    await asyncio.sleep(_PAUSE_SECONDS)
    expected, began = len(api.answered_at) + len(claims), time.time()
    for start in range(0, len(claims), 16):
        answers = [
            Answer(claim=claim, output=OUTPUT, digest="d" * 64, chunk_id="c", provider="local", seconds=0.01)
            for claim in claims[start : start + 16]
        ]
        await asyncio.to_thread(store.requests.finish, answers, now=datetime.now(UTC))
        if len(claims) == 1:
            began = time.time()
    while len(api.answered_at) < expected:
        await asyncio.sleep(0.005)
    return api.answered_at[-1] - began


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_megabytes(pid: int, what: str = "VmRSS") -> float:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
