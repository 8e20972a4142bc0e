"""The views of the HTTP API: each module has a subclass of `Views`, which `server/app.py` names."""
