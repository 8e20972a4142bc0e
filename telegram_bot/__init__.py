"""A Telegram bot that classifies and changes photos: a client of a server's HTTP API, through `mlg_client` alone.

Everything that must survive the end of the process is in one SQLite file (`state.py`). An update of Telegram is
confirmed after it has been stored; images are sent to the server under a key that makes a repetition harmless; answers
are edited into a message that is there already, which may be repeated too. So the process can be killed at any time.

    receiver.py -> conversation.py -> state.py <- jobs.py, watcher.py <- mlg_client
                                      state.py <- publisher.py -> Telegram

`mlg telegram` (`cli/clients/telegram.py`) starts it.
"""
