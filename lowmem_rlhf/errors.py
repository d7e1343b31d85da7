"""The two ways a command ends badly; both print one clear message and no traceback."""


class LowmemError(Exception):
    """Base of the errors that are shown to the user as they are."""

    exit_code = 1
    known_to_all = False  # every process of the run has it
    said_elsewhere = False  # another process of the run tells the user


class UserError(LowmemError):
    """The user's input is wrong. The message says what was got, what is allowed and what to do. Exit code 2."""

    exit_code = 2


class OfflineError(UserError):
    """What the user named lies on the Hub, which cannot be reached, and not on this disk."""


class RunError(LowmemError):
    """A run that had begun failed; a note says what is kept of it. Exit code 1."""

    exit_code = 1


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def with_notes(text: str, error: BaseException) -> str:
    """Return a text with an error's notes, which say what is kept."""
    return "; ".join([text, *getattr(error, "__notes__", ())])
