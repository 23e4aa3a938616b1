"""The one exception for what a user can mend."""


class UserError(ValueError):
    """What the user gave is wrong or missing.

    The message is one sentence that says what was wrong and what to do. The command-line
    programs print it on stderr without a traceback and exit with code 2.
    """
