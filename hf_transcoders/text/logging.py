"""Loggers whose messages are safe to print."""

import logging

from .printable import printable


class _PrintableMessages(logging.LoggerAdapter):
    """Escapes what a terminal might act on: messages name dictionaries, files and models of strangers."""

    def process(self, msg, kwargs):
        return printable(msg), kwargs


def get_logger(name: str) -> logging.LoggerAdapter:
    """The logger of a module, whose messages are one line each."""
    return _PrintableMessages(logging.getLogger(name), {})
