"""Feeds of events: their times, and polling."""

from __future__ import annotations

import asyncio
from datetime import timedelta

from devnet.timing import EventFeed, format_time, parse_time, utc_now


def test_times_of_events_strictly_increase_also_after_those_of_a_restart() -> None:
    feed = EventFeed()
    future = format_time(utc_now() + timedelta(hours=1))
    feed[:] = [{"eventDate": future}]

    for number in range(5):
        feed.add(number=number)

    times = [event["eventDate"] for event in feed]
    assert times[0] == future
    assert times == sorted(set(times))


async def test_a_poll_returns_the_first_events_after_a_time() -> None:
    feed = EventFeed()
    for number in range(6):
        feed.add(number=number)
    after = parse_time(feed[1]["eventDate"])

    found = await feed.poll(after, 0, 2)

    assert found == [feed[2], feed[3]]


async def test_a_poll_waits_for_the_next_event() -> None:
    feed = EventFeed()
    feed.add(number=0)
    polling = asyncio.create_task(feed.poll(parse_time(feed[0]["eventDate"]), 60, 10))
    await asyncio.sleep(0)

    feed.add(number=1)

    assert [event["number"] for event in await polling] == [1]
