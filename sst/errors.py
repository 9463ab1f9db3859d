"""Bad input ends in one sentence: the file, the value found, the values allowed, the fix."""

import os
import sys
import time
import warnings

PATIENCE = 3  # seconds that other processes than the first wait before they say what is wrong


class InputError(ValueError):
    """The user's input cannot be used; `str(error)` is the whole message, to be shown without a traceback."""


class InputWarning(UserWarning):
    """The user's input can be used, but it may not mean what they think."""


def run_program(main, program):
    """Call `main()`. An InputError ends the process with status 1 and "program: what is wrong" on stderr.

    Ctrl-C ends it with status 130 and one line.
    """
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *place: (
        f"{program}: {message}\n" if category is InputWarning else plain(message, category, *place))
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(PATIENCE)  # the first process says the same, and torchrun then ends this one
        sys.exit(f"{program}: {error}")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
