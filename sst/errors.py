"""Bad input ends in one sentence: the file, the value found, the values allowed, the fix."""

import sys
import warnings


class InputError(ValueError):
    """The user's input cannot be used; `str(error)` is the whole message, to be shown without a traceback."""


class InputWarning(UserWarning):
    """The user's input can be used, but it may not mean what they think."""


def run_program(main, program):
    """Call `main()`. An InputError ends the process with status 1 and "program: what is wrong" on stderr."""
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *place: (
        f"{program}: {message}\n" if category is InputWarning else plain(message, category, *place))
    try:
        main()
    except InputError as error:
        sys.exit(f"{program}: {error}")
