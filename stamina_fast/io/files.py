"""Files that are written whole or not at all, and readers that say in one line what is wrong with a file.

A write goes to a hidden file beside the target: write, fsync, rename over the target, fsync the folder. If it is
interrupted, the old file is still there.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import yaml
from torch import Tensor

from ..errors import FileError, InputError, StaminaError

PARTIAL = ".partial"
_REMEDY = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of your quota and run again",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give the path of a file",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written to",
}


@contextlib.contextmanager
def clear_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a one-line FileError: what could not be done to which path, why, and what to do."""
    try:
        yield
    except StaminaError:
        raise
    except OSError as error:
        reason, remedy = error.strerror or str(error), _REMEDY.get(error.errno, "check the disk")
        raise FileError(f"cannot {doing} {str(path)!r}: {reason}; {remedy}") from error
    except safetensors.SafetensorError as error:
        # safetensors raises this for a full disk
        raise FileError(f"cannot {doing} {str(path)!r}: {error}; check the disk") from error
    except ValueError as error:
        # such as a NUL in the path
        raise FileError(f"cannot {doing} {str(path)!r}: {error}; check the path") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, on POSIX; other systems cannot open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content. It is no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents, durably. One that exists is left as it is."""
    with clear_errors("create the folder", folder):
        if not folder.is_dir():
            make_folder(folder.parent)
            folder.mkdir(exist_ok=True)
            sync_folder(folder.parent)
    return folder


@contextlib.contextmanager
def new_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a folder to fill. It becomes `path`, durably, when the block ends, and is removed if the block raises.

    `path` must not exist or must be empty. With `replace` an older folder stays until the new one is complete.
    Raises FileError, also for an OSError in the block.
    """
    path = Path(path).absolute()
    partial, old = (path.with_name(f".{path.name}{end}") for end in (PARTIAL, f".old{PARTIAL}"))
    with clear_errors("write the folder", path):
        if not replace and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileError(f"{str(path)!r} is there already; choose another folder")
        remove(partial)
        remove(old)
        try:
            make_folder(partial)
            yield partial
            for inner in partial.rglob("*"):
                if inner.is_dir():
                    sync_folder(inner)
                else:
                    with open(inner, "rb+") as file:
                        os.fsync(file.fileno())
            sync_folder(partial)
            if path.exists():
                os.replace(path, old)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                os.replace(old, path)
            raise
        sync_folder(path.parent)
        remove(old)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file atomically and durably, and return the SHA-256 of `data`. After a FileError the old file is still there."""
    path = Path(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    with clear_errors("write", path):
        try:
            partial.unlink(missing_ok=True)
            handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            try:
                left = memoryview(data)
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    return sha256(data)


def read_bytes(path: Path, expected: str | None = None) -> bytes:
    """The bytes of a file, checked against their SHA-256 if it is given."""
    with clear_errors("read", path):
        data = Path(path).read_bytes()
    if expected is not None and (found := sha256(data)) != expected:
        raise FileError(f"{str(path)!r} is damaged: its SHA-256 begins {found[:12]}, recorded is {expected[:12]}; "
                        "restore it from a copy")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} occurs twice")
    return made


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError, also for a key that occurs twice or text nested too deeply."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, value: Any) -> str:
    """Write indented JSON and return its SHA-256. NaN and infinity, which JSON cannot hold, raise InputError."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        return write_bytes(path, (text + "\n").encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"cannot write {str(path)!r} as JSON: {error}; give finite numbers, text, lists and dicts") from error


def read_json(path: Path, expected: str | None = None) -> Any:
    """Read JSON, checked against a SHA-256 if it is given."""
    data = read_bytes(path, expected)
    try:
        return parse_json(data)
    except ValueError as error:
        raise FileError(f"{str(path)!r} is not valid JSON: {error}; correct it or restore it from a copy") from error


def yaml_bytes(value: Any) -> bytes:
    """Plain values as YAML, in the order given; objects are refused."""
    try:
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode()
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"not fit for YAML: {reason}; give numbers, text, lists and dicts") from error


def read_yaml(path: Path, expected: str | None = None) -> Any:
    """Read YAML of plain values, checked against a SHA-256 if it is given."""
    data = read_bytes(path, expected)
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{str(path)!r} is not valid YAML: {reason}; correct it or restore it from a copy") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors of any device as safetensors, and return the file's SHA-256."""
    for name in tensors:
        if reason := _bad_name(name):
            raise InputError(f"cannot write {str(path)!r}: the tensor name {name!r} {reason}; use plain dotted names")
    # copies, because the format refuses tensors that overlap in memory
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return write_bytes(path, safetensors.torch.save(plain))


def read_tensors(path: Path, expected: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, checked against a SHA-256 if it is given.

    Raises FileError for a damaged file, and for two things that safetensors accepts: a name that occurs twice, and one that
    is a path out of its folder.
    """
    data = read_bytes(path, expected)
    try:
        _check_header(data)
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{str(path)!r} is not a sound safetensors file: {reason}; restore it from a copy") from error


def _check_header(data: bytes) -> None:
    """Check the header: its length in 8 bytes, little endian, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError(f"{len(data)} bytes cannot hold its header")
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    for name in header:
        if reason := _bad_name(name):
            raise ValueError(f"the tensor name {name!r} {reason}")


def _bad_name(name: str) -> str | None:
    if not name or not name.isprintable():
        return "is empty or not printable"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        return "is a path out of its folder"
    return None
