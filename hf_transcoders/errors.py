"""The one exception type for mistakes a user can mend."""


class TranscoderError(ValueError):
    """A mistake the caller can mend.

    The message is one sentence that says what is wrong and what to do about it; the command line prints it without a
    traceback. It derives from `ValueError`, so code that guards ordinary Hugging Face calls catches it too.
    """
