"""What a command prints besides its own words: nothing of diffusers and transformers, and our warnings as one line each."""

from __future__ import annotations

import warnings

from .errors import StaminaWarning


def quiet() -> None:
    """Hide progress bars and warnings of diffusers and transformers, and print our own warnings as one line each."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers|transformers")
    warnings.filterwarnings("always", category=StaminaWarning)
    warnings.formatwarning = one_line


def one_line(message, category, *where, usual=warnings.formatwarning) -> str:
    """A warning as the command line prints it: ours without the place in the code that gave it."""
    return f"stamina-fast: {message}\n" if issubclass(category, StaminaWarning) else usual(message, category, *where)
