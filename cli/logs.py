"""Logging set-up of the commands that keep running: one event per line on stderr, its ids at the end.

Called once by `serve`, `batch`, `up` and `devnet`. Other modules only call `logging.getLogger(__name__)` and pass ids
in `extra`.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

from provider_image.environment import Environment
from provider_image.errors import ConfigError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
#: Attributes that every record has; all others come from `extra`.
_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class OneLineFormatter(logging.Formatter):
    """`2026-11-20T12:00:00.123Z INFO batcher.cycle chunk answered chunk_id=1a2b items=16`"""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record on one line, with escapes for line breaks, as in tracebacks, and all that is not printable.

        A record may quote a provider or a client, whose control characters the terminal would obey.
        """
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        extra = "".join(f" {name}={value}" for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES)
        line = f"{moment} {record.levelname} {record.name} {record.getMessage()}{extra}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in line)


def configure_logging(level: str | None = None) -> None:
    """Write events of this level and above to stderr.

    :param level: None reads MLG_LOG_LEVEL. Defaults to INFO.
    :raises ConfigError: there is no such level.
    """
    chosen = (level or Environment(os.environ).text("MLG_LOG_LEVEL", "INFO")).upper()
    if chosen not in LEVELS:
        raise ConfigError(f"MLG_LOG_LEVEL={chosen!r} is not a log level. Use one of: {', '.join(LEVELS)}.")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=chosen, handlers=[handler], force=True)
    # It logs every run of a job, several per second; errors are logged by the jobs themselves.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    for noisy_logger in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(noisy_logger).setLevel(max(logging.WARNING, logging.getLevelName(chosen)))
