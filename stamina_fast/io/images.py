"""Read and write pictures. Their size is checked before they are decoded."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from .files import clear_errors, sha256, write_bytes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# EPS is left out, since reading it runs another program
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# picture formats that cannot be read: refused, since leaving them out would go unnoticed
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".psd", ".svg")
MAX_PIXELS = 64_000_000
MIN_SIDE = 16
END_OF_JPEG = b"\xff\xd9"


def list_images(folder: Path) -> list[Path]:
    """The picture files directly in a folder, by name; hidden files are left out."""
    with clear_errors("read the folder", folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if others := [name for name in names if name.lower().endswith(OTHERS)]:
        raise InputError(f"{str(Path(folder, others[0]))!r} cannot be read as a picture; save it as JPEG or PNG, or remove it")
    return [Path(folder, name) for name in names if name.lower().endswith(SUFFIXES)]


def check_image(path: Path) -> str:
    """Check a picture as far as that needs no decoding; return the SHA-256 of its file.

    Checked are the format, the size, the checksums inside a PNG, and the end of a JPEG, which a broken download lacks. Damage
    that only decoding shows is left to `load_image`. Raises InputError, which names the file, as `open_image` does.
    """
    with _reading(path) as file:
        data = file.read()
    with _named(path):
        header = io.BytesIO(data)
        image = _open(header, path)
        start = header.tell()
        image.verify()
        if image.format == "JPEG" and data.find(END_OF_JPEG, start) < 0:
            raise ValueError("the file is truncated")
    return sha256(data)


def open_image(path: Path) -> Image.Image:
    """Decode a picture to 8-bit RGB, turned upright by its EXIF data, with transparent parts white.

    Raises InputError, which names the file, unless it is a picture of at least MIN_SIDE pixels a side and at most MAX_PIXELS
    in all.
    """
    with _reading(path) as file, _named(path):
        image = _open(file, path)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is not a file; give the path of a picture")
    with clear_errors("read", path), open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an InputError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{str(path)!r} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    # a decoder may raise any exception for a malicious file
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {str(path)!r} as a picture: {reason}; save it again as JPEG or PNG") from error


def _open(file: BinaryIO, path: Path) -> Image.Image:
    """A picture of an allowed format and size, of which only the header is read."""
    image = Image.open(file, formats=FORMATS)
    _check_size(image, path)
    return image


def _check_size(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{str(path)!r} has {width} x {height} pixels, more than {MAX_PIXELS:,}; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{str(path)!r} has {width} x {height} pixels, fewer than {MIN_SIDE} on a side; give a larger picture")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no fixed range")
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def load_image(path: Path) -> Tensor:
    """A picture file as uint8 [3, H, W]. Raises InputError as `open_image` does."""
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)


def as_floats(image: Tensor) -> Tensor:
    """Pixels as float32 in [-1, 1]: uint8 is rescaled, floats are in that range already."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float()


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as an 8-bit RGB picture; exactly the inverse of `as_floats`."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def crop(image: Tensor, size: int | tuple[int, int], share: float = 1.0, position: tuple[float, float] = (0.5, 0.5),
         flip: bool = False) -> tuple[Tensor, Tensor]:
    """Cut a part out of a picture and resize it; return the part and its frame.

    image      [3, H, W], uint8 or floats in [-1, 1]; only the part is converted to floats
    size       (h, w) of the result, or the side of a square
    share      each side of the part, as a share of the largest part of that aspect ratio
    position   where the part lies, from (0, 0) top left to (1, 1) bottom right
    flip       whether the part is mirrored

    Returns the part, float32 [3, h, w] in [-1, 1], and its frame, float32 [4]: height and width of the whole picture after the
    resizing, then top and left of the part in it, in pixels.
    """
    height, width = image.shape[1:]
    h, w = (size, size) if isinstance(size, int) else size
    rows, columns = (max(1, round(side * share)) for side in (min(height, width * h / w), min(width, height * w / h)))
    top, left = round((height - rows) * position[0]), round((width - columns) * position[1])
    part = as_floats(image[None, :, top : top + rows, left : left + columns])
    if (rows, columns) != (h, w):
        part = F.interpolate(part, (h, w), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    down, across = h / rows, w / columns
    frame = torch.tensor([height * down, width * across, top * down, left * across]).round()
    return (part.flip(-1) if flip else part)[0], frame


def write_image(path: Path, image: Image.Image | Tensor) -> str:
    """Write a picture, or [3, H, W] in [-1, 1], as PNG, atomically; returns the file's SHA-256."""
    data = io.BytesIO()
    (to_picture(image) if isinstance(image, Tensor) else image).save(data, "PNG")
    return write_bytes(path, data.getvalue())
