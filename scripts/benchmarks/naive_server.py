"""The simplest possible server, for comparison: Flask's own, the image in the row, one commit per request."""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
import uuid

from flask import Flask, request


def main() -> None:
    """Serve on a port with a database file: `naive_server PORT FILE`."""
    port, database = int(sys.argv[1]), sys.argv[2]
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
