"""The one exception for what a user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user gave is wrong or missing.

    The message is one sentence that says what was wrong and what to do. The command-line
    programs print it on stderr without a traceback and exit with code 2.
    """


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like a mistyped word, to name in an error."""
    return difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0)[0]


def unknown(what: str, word: str, choices: Iterable[str]) -> UserError:
    """The error for a word that is none of the choices, which are called `what`."""
    choices = list(choices)
    return UserError(
        f"there is no {what} {word!r}; did you mean {nearest(word, choices)!r}? "
        f"(choices: {', '.join(choices)})"
    )
