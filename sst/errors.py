"""Bad input ends in one sentence: the file, the value found, the values allowed, the fix."""

import sys


class InputError(ValueError):
    """The user's input cannot be used; `str(error)` is the whole message, to be shown without a traceback."""


def run_program(main, program):
    """Call `main()`. An InputError ends the process with status 1 and "program: what is wrong" on stderr."""
    try:
        main()
    except InputError as error:
        sys.exit(f"{program}: {error}")
