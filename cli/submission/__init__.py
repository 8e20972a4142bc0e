"""`mlg submit`: the command in `submit.py`, the files that it sends in `files.py`, what was sent in `journal.py`."""
