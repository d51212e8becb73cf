"""The two errors that reach a user as one line."""


class UsageError(Exception):
    """What the user asked for cannot be: one line that names the flag, what was given and what is
    allowed. Exit code 2."""


class WorkError(Exception):
    """The work failed on the way, in one line. Exit code 1."""


class WriteError(WorkError):
    """A file could not be written: the work itself did not fail."""
