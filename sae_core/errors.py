"""Errors that a user can mend: one sentence that says what was expected and what came."""


class UserError(ValueError):
    """Bad input. The command line prints the message and exits with code 2, without a traceback."""


class CorruptFileError(UserError):
    """A file on disk is truncated or altered; the message names the file."""


class MissingExtraError(UserError):
    """An optional dependency is absent; the message names the extra that installs it."""
