"""Pictures in and out, with a limit on their size that holds before anything is decoded."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import InputError
from .files import clear_errors, write_bytes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# no format that runs another program, as EPS does
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# pictures all the same, which would otherwise be left out without a word
OTHERS = (".heic", ".heif", ".avif", ".jxl", ".psd", ".svg")
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


def list_images(folder: Path) -> list[Path]:
    """The picture files directly in a folder, by name; hidden files are left out."""
    with clear_errors("read the folder", folder):
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if others := [name for name in names if name.lower().endswith(OTHERS)]:
        raise InputError(f"{str(Path(folder, others[0]))!r} cannot be read as a picture; save it as JPEG or PNG, or remove it")
    return [Path(folder, name) for name in names if name.lower().endswith(SUFFIXES)]


def open_image(path: Path, draft: int | None = None) -> Image.Image:
    """A picture as it is meant to be seen: decoded, upright (EXIF), 8-bit RGB, transparent parts white.

    draft: decode no finer than needed for this many pixels a side, where the format can. Raises InputError, which names the
    file, for anything that is not a picture of at least MIN_SIDE pixels a side and at most MAX_PIXELS in all.
    """
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is not a file; give the path of a picture")
    with clear_errors("read", path), open(path, "rb") as file:
        return _decode(file, path, draft)


def _decode(file: BinaryIO, path: Path, draft: int | None) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            _check_size(image, path)
            if draft is not None:
                image.draft("RGB", (draft, draft))
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"{str(path)!r} has more than {MAX_PIXELS:,} pixels; make it smaller") from error
    # a decoder may raise anything at all on a file made to harm it
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"cannot read {str(path)!r} as a picture: {reason}; save it again as JPEG or PNG") from error


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
    """A picture file as float32 [3, H, W] in [-1, 1]. Raises InputError as `open_image` does."""
    return to_tensor(open_image(path))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] as an 8-bit RGB picture; the inverse of `to_tensor` to the bit."""
    pixels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def square(image: Tensor, size: int, position: tuple[float, float] = (0.5, 0.5), flip: bool = False) -> Tensor:
    """The largest square of a picture [3, H, W], resized to [3, size, size], mirrored if `flip`.

    position: where along the longer side it lies, from (0, 0) top left to (1, 1) bottom right; the middle by default.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = round((height - side) * position[0]), round((width - side) * position[1])
    cut = image[None, :, top : top + side, left : left + side].float()
    if side != size:
        cut = F.interpolate(cut, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    return (cut.flip(-1) if flip else cut)[0]


def write_image(path: Path, image: Image.Image | Tensor) -> str:
    """Write a picture, or [3, H, W] in [-1, 1], as PNG, atomically; returns the file's SHA-256."""
    data = io.BytesIO()
    (to_picture(image) if isinstance(image, Tensor) else image).save(data, "PNG")
    return write_bytes(path, data.getvalue())
