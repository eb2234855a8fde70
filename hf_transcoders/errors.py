"""The exception type for errors that users can fix."""


class TranscoderError(ValueError):
    """An error that the caller can fix.

    The message is one sentence that says what is wrong and how to fix it; the command line prints it without a traceback.
    It is a `ValueError`, so code that handles errors of Hugging Face libraries handles it too.
    """


class OSTranscoderError(TranscoderError, OSError):
    """A file could not be found or written. Also an `OSError`, for code that handles missing files."""

    def __str__(self):
        # The text of an `OSError` begins with its number.
        return str(self.args[0])
