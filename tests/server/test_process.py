"""The server process: how it takes signals. `tests/cli/test_serve.py` runs whole servers."""

from __future__ import annotations

import threading

from server.process import _GranianServer
from tests.timing import DEADLINE_SECONDS


def test_a_signal_that_interrupts_the_one_before_stops_the_server() -> None:
    server = _GranianServer.__new__(_GranianServer)
    server.interrupt_signal, server.main_loop_interrupt = False, threading.Event()

    def be_interrupted() -> None:
        with server.main_loop_interrupt._cond:  # as it is when the event is being set or waited for
            server.signal_handler_interrupt()
            server.signal_handler_interrupt()

    thread = threading.Thread(target=be_interrupted, daemon=True)
    thread.start()
    thread.join(DEADLINE_SECONDS)

    assert not thread.is_alive()
    assert server.main_loop_interrupt.wait(DEADLINE_SECONDS)
    assert server.interrupt_signal
