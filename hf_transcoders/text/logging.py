"""Loggers whose messages are safe to print."""

import functools
import logging

from .printable import printable


class _PrintableMessages(logging.LoggerAdapter):
    """Escapes what a terminal might act on: messages name dictionaries, files and models of strangers."""

    def process(self, msg, kwargs):
        return printable(msg), kwargs

    @functools.lru_cache(None)  # noqa: B019
    def warning_once(self, message: str) -> None:
        """Warn, but not again with the same message."""
        self.warning(message)


def get_logger(name: str) -> logging.LoggerAdapter:
    """The logger of a module, whose messages are one line each."""
    return _PrintableMessages(logging.getLogger(name), {})
