"""Where log records go: one line per event on stderr, as JSON or as text."""

import logging
import sys
from collections.abc import Mapping

from runtime.log import JsonFormatter
from runtime.settings import ProcessSettings


class TextFormatter(logging.Formatter):
    """``12:34:56 decode-0/2 warning decode.loop: request preempted blocks=4``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, object] = getattr(record, "fields", {})
        line = (
            f"{self.formatTime(record, '%H:%M:%S')} {self._process} {record.levelname.lower()} "
            f"{record.name}: {record.getMessage()}"
        )
        line += "".join(f" {name}={value}" for name, value in fields.items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(settings: ProcessSettings, process: str) -> None:
    """Send all records of this process to stderr. Called once, by the command."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        (JsonFormatter if settings.log_format == "json" else TextFormatter)(process)
    )
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
