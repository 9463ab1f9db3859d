"""Bad input ends in one sentence: the file, the value found, the values allowed, the fix."""


class InputError(ValueError):
    """The user's input cannot be used; `str(error)` is the whole message, meant to be shown without a traceback."""
