"""What a user can put right: every message is one line that says what was given, what is wanted and what to do."""

from __future__ import annotations


class StaminaError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""


class InputError(StaminaError, ValueError):
    """A value, name, prompt or picture that cannot be used."""


class FileError(StaminaError, OSError):
    """A file or folder that is missing, damaged, full or not permitted."""
