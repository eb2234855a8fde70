"""Loggers whose messages are safe to print."""

import functools
import logging

from .printable import printable


class _PrintableMessages(logging.LoggerAdapter):
    """Escapes control characters, since messages may contain names from untrusted files."""

    def process(self, msg, kwargs):
        return printable(msg), kwargs

    @functools.lru_cache(None)  # noqa: B019
    def warning_once(self, message: str) -> None:
        """Log a warning unless the same message was logged before."""
        self.warning(message)


def get_logger(name: str) -> _PrintableMessages:
    """Return the logger of a module, which writes each message on one line."""
    return _PrintableMessages(logging.getLogger(name), {})
