"""The simplest possible server, for comparison: Flask's own, the image in the row, one commit per request."""

from __future__ import annotations

import logging
import sqlite3
import threading
import uuid

import click
from flask import Flask, request


@click.command()
@click.argument("database")
@click.option("--port", type=int, required=True)
def main(database: str, port: int) -> None:
    """Serve with a new database file."""
    connection = sqlite3.connect(database, check_same_thread=False)
    connection.execute("CREATE TABLE requests (id TEXT NOT NULL, model TEXT NOT NULL, image BLOB NOT NULL, preds TEXT)")
    lock = threading.Lock()
    app = Flask(__name__)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)

    @app.post("/requestPrediction/<model>")
    def request_prediction(model: str) -> dict[str, object]:
        image = request.files["image"].read() if request.files else request.get_data()
        id = uuid.uuid4().hex
        with lock:
            connection.execute("INSERT INTO requests VALUES (?, ?, ?, NULL)", (id, model, image))
            connection.commit()
        return {"success": True, "req_id": id}

    app.run(port=port, threaded=True)


if __name__ == "__main__":
    main()
