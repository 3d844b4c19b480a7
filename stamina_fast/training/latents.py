"""A concept's pictures as latents: several crops of each are encoded once, and each step samples from their posteriors."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from ..io.files import make_folder, read_tensors, sha256, write_tensors
from ..io.images import crop
from ..seeds import derive_seed
from .ranks import digest

TENSORS = ("mean", "deviation", "picture", "frames")


@dataclass(frozen=True)
class LatentBank:
    """The latents of n variants of a concept's pictures.

    mean, deviation   [n, c, h, w] fp32, of the posterior q(z | picture), not yet scaled
    picture           [n] int64: which picture a variant shows
    frames            [n, 4] fp32: see `images.crop`
    scale, shift      the VAE's: the U-Net sees (z - shift) * scale
    """

    mean: Tensor
    deviation: Tensor
    picture: Tensor
    frames: Tensor
    scale: float
    shift: float

    def __len__(self) -> int:
        return len(self.mean)

    def __add__(self, other: LatentBank) -> LatentBank:
        """The variants of both banks. Those of `other` come last, and its pictures are numbered after this one's."""
        after = dataclasses.replace(other, picture=other.picture + int(self.picture.max()) + 1)
        joined = {name: torch.cat([getattr(self, name), getattr(after, name)]) for name in TENSORS}
        return dataclasses.replace(self, **joined)

    def draw(self, index: Tensor, noise: Tensor) -> Tensor:
        """Latents [batch, c, h, w] of the variants `index` [batch] int64, z = mean + deviation * noise, scaled."""
        return (self.mean[index] + self.deviation[index] * noise - self.shift) * self.scale


def variants(images: list[Tensor], size: int | tuple[int, int], count: int, least: float, flip: bool, seed: int):
    """Crop each picture `count` times (`images.crop`): first the largest part in the middle, then random parts.

    least: the least side of a random part, as a share of the largest one.

    Returns parts [n, 3, h, w] in [-1, 1], the picture that each shows [n] int64, and their frames [n, 4].
    """
    parts, picture, frames = [], [], []
    for i, image in enumerate(images):
        for j in range(count):
            draw = torch.Generator().manual_seed(derive_seed(seed, i, j))
            share, y, x, mirror = torch.rand(4, generator=draw).tolist()
            # squared so that areas, not sides, are uniform
            share = 1.0 if j == 0 else math.sqrt(least**2 + (1 - least**2) * share)
            part, frame = crop(image, size, share, (0.5, 0.5) if j == 0 else (y, x), flip and j > 0 and mirror < 0.5)
            parts.append(part)
            picture.append(i)
            frames.append(frame)
    return torch.stack(parts), torch.tensor(picture), torch.stack(frames)


@contextlib.contextmanager
def vae_in_fp32(vae):
    """Hold the VAE in fp32 within the block: that of Stable Diffusion XL overflows in half precision."""
    before = next(vae.parameters()).dtype
    # plain Module.to, since that of diffusers warns about modules that must stay in fp32
    try:
        yield torch.nn.Module.to(vae, torch.float32)
    finally:
        torch.nn.Module.to(vae, before)


@torch.no_grad()
def encode(vae, parts: Tensor, picture: Tensor, frames: Tensor, batch: int) -> LatentBank:
    """Encode variants, `batch` at a time. parts [n, 3, height, width] in [-1, 1]; picture, frames: as in `LatentBank`."""
    device = next(vae.parameters()).device
    with vae_in_fp32(vae):
        posteriors = [vae.encode(part.to(device)).latent_dist for part in parts.split(batch)]
    shift = vae.config.get("shift_factor", None)
    return LatentBank(
        mean=torch.cat([p.mean for p in posteriors]), deviation=torch.cat([p.std for p in posteriors]),
        picture=picture.to(device), frames=frames.to(device), scale=vae.config.scaling_factor, shift=shift or 0.0,
    )


def cached(folder: Path, key: tuple, vae, make: Callable[[], LatentBank], write: bool = True) -> LatentBank:
    """The bank that `make` encodes, read from `folder` if it is there. The bits are the same.

    key    plain values on which the bank depends: digests of pictures and VAE, and how the pictures are cut
    write  whether to store a new bank

    Raises FileError for a file that is damaged.
    """
    device = next(vae.parameters()).device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    # another version of torch, or another machine, may round otherwise
    name = sha256(repr((key, torch.__version__, device.type, machine)).encode())
    path = Path(folder) / f"{name}.safetensors"
    if path.is_file():
        tensors = read_tensors(path)
        stored = bytes(tensors.pop("sha256", torch.zeros(0, dtype=torch.uint8)).tolist()).hex()
        if set(tensors) != set(TENSORS) or digest(sorted(tensors.items())) != stored:
            raise FileError(f"{str(path)!r} is damaged: its latents are not those that were stored; remove it")
        shift = vae.config.get("shift_factor", None) or 0.0
        return LatentBank(**{n: t.to(device) for n, t in tensors.items()}, scale=vae.config.scaling_factor, shift=shift)
    bank = make()
    if write:
        tensors = {name: getattr(bank, name).cpu() for name in TENSORS}
        stored = torch.tensor(list(bytes.fromhex(digest(sorted(tensors.items())))), dtype=torch.uint8)
        make_folder(path.parent)
        write_tensors(path, tensors | {"sha256": stored})
    return bank
