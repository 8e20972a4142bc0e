"""Logging of the commands that keep running: one event a line on stderr, ids at its end.

Called once by `commands.py`. Modules only use `logging.getLogger(__name__)` and put ids into `extra`.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

from provider_image.environment import Environment
from provider_image.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: What every record has; the rest came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class OneLineFormatter(logging.Formatter):
    """`2026-11-20T12:00:00.123Z INFO batcher.cycle chunk answered chunk_id=1a2b items=16`"""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; line ends inside it, as in tracebacks, are shown as `\\n`."""
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        extra = "".join(f" {name}={value}" for name, value in vars(record).items() if name not in _STANDARD)
        line = f"{moment} {record.levelname} {record.name} {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line.replace("\r", "\\r").replace("\n", "\\n")


def configure_logging(level: str | None = None) -> None:
    """Send events of this level and above to stderr.

    :param level: MLG_LOG_LEVEL when None. Defaults to INFO.
    :raises ConfigError: there is no such level.
    """
    chosen = (level or Environment(os.environ).text("MLG_LOG_LEVEL", "INFO")).upper()
    if chosen not in LEVELS:
        raise ConfigError(f"MLG_LOG_LEVEL={chosen!r} is no level. It takes one of: {', '.join(LEVELS)}.")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=chosen, handlers=[handler], force=True)
    # A look every few milliseconds is no event; its own errors come from the jobs themselves.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    for noisy_logger in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(noisy_logger).setLevel(max(logging.WARNING, logging.getLevelName(chosen)))
