"""The store: everything that the server and the batcher share.

    POST                claim                finish
    ----> queued -----------------> claimed ----------> done
            ^  |                     |   |
            |  | cancel              |   | fail, or release after the last attempt
            |  v                     |   v
            | cancelled              |  failed
            +------------------------+
              release, or the lease ended

`retry` puts a failed or cancelled request back to queued. Each module is one noun with its records, statements and
rules; `store.py` composes them: `store.requests.add(...)`, `store.keys.revoke(...)`. The store knows nothing of HTTP or
of the command line.

Guarantees, tested in `tests/contracts/`:

- `requests.add` returns only when the image and the row would survive a power cut.
- A claim is one statement. Two batchers never hold the same request.
- A claim carries a fencing token. `finish`, `fail`, `release` and `renew` change a request only while it is claimed
  under that token; for any other they do nothing, and their result tells it.
- All methods may be called from any thread.
"""

from __future__ import annotations

import secrets
import time


def new_id() -> str:
    """Make a request id: 32 hex digits, the first 12 the time in milliseconds, the other 80 bits random.

    With the time first, the index of a large table grows in order of arrival, which keeps inserts fast.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
