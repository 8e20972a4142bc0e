"""The views of the HTTP API: each module has `register(app, context)`, which `server/app.py` calls."""
