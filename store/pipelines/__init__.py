"""Pipelines: how they are written (`definition.py`, `folder.py`), and the requests to them (`runs.py`)."""
