"""Errors and warnings that a user can put right. Every message is one line: what was given, what is wanted, what to do."""

from __future__ import annotations


class StaminaError(Exception):
    """The base of all errors that the command line prints as one line, without a traceback."""


class InputError(StaminaError, ValueError):
    """A value, name, prompt or picture that cannot be used."""


class StaminaWarning(UserWarning):
    """Something that works, but hardly as it is meant to. The command line prints it as one line."""


class FileError(StaminaError, OSError):
    """A file or folder that is missing, damaged, full or not permitted."""
