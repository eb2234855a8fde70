"""The one exception type for mistakes a user can mend."""


class TranscoderError(ValueError):
    """A mistake the caller can mend.

    The message is one sentence that says what is wrong and what to do about it; the command line prints it without a
    traceback. It derives from `ValueError`, so code that guards ordinary Hugging Face calls catches it too.
    """


class OSTranscoderError(TranscoderError, OSError):
    """A file that could not be found or written. Also an `OSError`, so that code that goes on without the file still can."""

    def __str__(self):
        # `OSError` would have a number before the sentence.
        return str(self.args[0])
