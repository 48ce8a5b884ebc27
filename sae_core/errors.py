"""Errors that a user can mend: one sentence that says what was expected and what came."""


class UserError(ValueError):
    """Bad input. The command line prints the message and exits with code 2, without a traceback."""


class CorruptFileError(UserError):
    """A file on disk is truncated or altered; the message names the file."""


class MissingExtraError(UserError):
    """An optional dependency is absent; the message names the extra that installs it."""


def reason(error: Exception) -> str:
    """What an error says, on one line and at most 200 characters; its class where that is vague.

    A decoding error's own representation would hold the whole undecodable file.
    """
    text = str(error) if isinstance(error, UnicodeDecodeError) else repr(error)
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."
