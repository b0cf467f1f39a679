"""The one exception that a user is meant to read.

In: a sentence that says what failed, what was found, what was expected and what to do next.
Out: the command line prints it on one line and exits with status 2 (1 for `NotBetterError`); a server maps it to a
4xx reply.
Not covered: bugs. Anything that is not a `UserError` keeps its traceback.
"""


class UserError(ValueError):
    """Bad input that a user can mend: a recipe key, a file, an artifact that does not fit."""


class ArtifactError(UserError):
    """An artifact is missing, damaged, or does not belong with another one."""


class NotBetterError(UserError):
    """What was trained is worse than what it would replace, and was not published; the command exits with status 1."""
