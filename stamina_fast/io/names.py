"""Turn names that people choose into folder names, tokens, and paths inside a given folder."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError

LONGEST = 48
# device files on one system, whatever their ending
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _allowed(text: str, pattern: str) -> str:
    return re.sub(pattern, "-", unicodedata.normalize("NFKC", text))[:LONGEST].strip("-._ ")


def check_name(name: str) -> str:
    """Return `name` if it fits a concept: printable text on one line. Raises InputError otherwise."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"a concept's name must be printable text on one line, got {name!r}; give it another name")
    return name


def safe_name(name: str) -> str:
    """A folder name for a concept: ASCII letters, digits, '-', '_' and '.', with a short hash where it differs."""
    kept = _allowed(check_name(name), r"[^A-Za-z0-9._-]+")
    return kept if kept == name and not _RESERVED.fullmatch(kept) else f"{kept or 'concept'}-{_short_hash(name)}"


def token_for(name: str) -> str:
    """The token of a concept: 'My cat' gives '<my-cat>'. Lower case, as CLIP's tokenizers make all text."""
    plain = re.sub(r"\s+", "-", check_name(name).strip()).lower()
    kept = _allowed(plain, r"[^a-z0-9._-]+")
    return f"<{kept}>" if kept == plain else f"<{kept or 'concept'}-{_short_hash(name)}>"


def same(text: str) -> str:
    """A form that is equal for two names which a person or a file system would take for the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_distinct(what: str, texts: Iterable[str]) -> None:
    """Raise InputError for two names or tokens that differ only in case, spaces or the Unicode form of their letters."""
    seen: dict[str, str] = {}
    for text in texts:
        if (first := seen.get(same(text))) is not None:
            raise InputError(f"each {what} must differ, got {first!r} and {text!r}; rename one of them")
        seen[same(text)] = text


def inside(root: Path, *parts: str) -> Path:
    """`root / parts`, resolved; raises InputError if that lies outside `root`, through '..', a link or an absolute path."""
    root = Path(root).resolve()
    try:
        path = root.joinpath(*parts).resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise InputError(f"{'/'.join(parts)!r} is not a path: {error}; use a plain name") from error
    if not path.is_relative_to(root):
        raise InputError(f"{'/'.join(parts)!r} lies outside {str(root)!r}; use a name inside it")
    return path
