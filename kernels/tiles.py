"""How a kernel is divided and launched: its configuration, and what the launchers share."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from stamina_fast.kernels.philox import LANES, SPAN


@dataclass(frozen=True)
class Config:
    """How a kernel is divided: rows and tokens of a tile, warps, stages, precision of fp32 products, and columns.

    parts: pieces of a span, computed by different programs or one after another. width: columns of a sub-tile, 32 (every lane
    of the noise) or 16. Two parts of 16 lanes share no noise word. Of more parts, each computes all words of its lanes.
    """

    block_n: int
    block_t: int
    num_warps: int
    precision: str
    parts: int = 1
    width: int = LANES.value
    num_stages: int = 1

    def __post_init__(self):
        for name in ("block_n", "block_t"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {value}")
        if self.width not in (16, 32):
            raise ValueError(f"width must be 16 or 32 columns, got {self.width}")
        if self.parts not in (self.groups, 2 * self.groups, 4 * self.groups):
            raise ValueError(f"parts must be 1, 2 or 4 for each of {self.groups} groups of lanes, got {self.parts}")

    @property
    def groups(self) -> int:
        """Groups of lanes that a span is divided into."""
        return LANES.value // self.width

    @property
    def columns(self) -> int:
        """Columns of a part."""
        return SPAN.value // self.parts

    def parts_of(self, k: int) -> int:
        """Parts of k columns, as `stamina_fast.kernels.philox.part_count`."""
        return -(-k // (self.columns * self.groups)) * self.groups

    def constants(self, k: int) -> dict:
        """The compile-time constants of a kernel over k columns. SUBTILES: the sub-tiles of a part that k columns can fill."""
        subtiles = -(-min(k, self.columns * self.groups) // LANES.value)
        return {"BLOCK_N": self.block_n, "SUBTILES": subtiles, "PARTS": self.parts, "WIDTH": self.width}

    def launch(self) -> dict:
        """Launch options. `stamina_fast.kernels.philox` says why fp fusion is off."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}


# on Blackwell, Triton before 3.8 gives each dot of a kernel tensor memory of its own, more than there is
SHARES_TENSOR_MEMORY = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)


# {kernel: (tokens of a tile, parts of a span, columns of a sub-tile)}: the largest that compile without spills, by the compile
# report. WIDE: for r or s above 16. LARGE: Hopper and Blackwell's data-centre parts, whose tensor cores take operands from
# memory. SMALL: all others, which need more registers.
LARGE = {
    "forward": (128, 1, 32), "input": (64, 2, 16), "fold": (16, 1, 32), "factors": (32, 2, 32),
    "gate factors": (32, 2, 32), "tau factors": (16, 2, 32), "penalty factors": (16, 4, 16),
    "penalty gate factors": (16, 4, 16), "tau penalty factors": (16, 4, 16), "penalties": (16, 2, 16),
}  # fmt: skip
LARGE_WIDE = LARGE | {
    "forward": (128, 2, 16), "factors": (32, 4, 16), "gate factors": (32, 4, 16), "tau factors": (16, 4, 16),
    "penalty factors": (16, 8, 16), "penalty gate factors": (16, 8, 16), "tau penalty factors": (16, 8, 16),
}  # fmt: skip
SMALL = {
    "forward": (64, 2, 16), "input": (64, 4, 16), "fold": (16, 1, 32), "factors": (32, 4, 16),
    "gate factors": (64, 4, 16), "tau factors": (16, 4, 16), "penalty factors": (16, 4, 16),
    "penalty gate factors": (16, 4, 16), "tau penalty factors": (16, 4, 16), "penalties": (16, 2, 16),
}  # fmt: skip
SMALL_WIDE = SMALL | {
    "forward": (64, 4, 16), "input": (128, 8, 16), "factors": (16, 4, 16),
    "penalty factors": (16, 8, 16), "penalty gate factors": (16, 8, 16),
    "tau penalty factors": (16, 8, 16), "penalties": (16, 4, 16),
}  # fmt: skip


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


@cache
def capability(device: torch.device) -> int:
    """80, 90, 100, ... for an NVIDIA GPU; 0 for any other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, tokens: int, rank: int, dtype: torch.dtype, gpu: int) -> Config:
    """One safe configuration for `kernel`, a name in `LARGE`, on a GPU of this `capability`. Unknown GPUs take the small tiles.

    rank: the larger of r and s.

    The rows of a tile depend only on dtype and GPU, so that all kernels compute the logits by the same row tiles. fp32 and fp64
    have no exact tensor-core products and take small tiles. An fp32 gradient times a half-precision factor is exact as two TF32
    or three bf16 products on NVIDIA's tensor cores; elsewhere it is a plain fp32 dot. The interpreter's time is per operation,
    so it takes large tiles.
    """
    tokens = 1 << max(4, (tokens - 1).bit_length())
    if interpreted():
        return Config(block_n=64, block_t=min(256, tokens), num_warps=4, precision="ieee")
    if dtype.itemsize > 2:
        return Config(block_n=16, block_t=16, num_warps=8, precision="ieee")
    precision = "ieee" if not gpu else "split" if dtype == torch.bfloat16 else "tf32"
    if gpu // 10 in (10, 11) and not SHARES_TENSOR_MEMORY:
        # two warps, too few for the instructions that need tensor memory; more rows would spill
        return Config(block_n=32, block_t=16, num_warps=2, precision=precision, parts=8 if rank > 16 else 4, width=16)
    large = gpu // 10 in (9, 10, 11)
    tables = (LARGE_WIDE if large else SMALL_WIDE) if rank > 16 else (LARGE if large else SMALL)
    block_t, parts, width = tables[kernel]
    return Config(64, min(block_t, tokens), num_warps=4, precision=precision, parts=parts, width=width)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def largest_rank(a: Tensor, p: Tensor | None) -> int:
    """The larger of r and s, from A [N, r] and P [N, s]."""
    return max(a.shape[1], 0 if p is None else p.shape[1])


def contiguous(*factors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The factors as the kernels index them. They are small, and rounded to the weight's dtype when they are loaded."""
    return tuple(None if factor is None else factor.contiguous() for factor in factors)


def seed_and_step(noise) -> tuple[Tensor | None, Tensor | None]:
    """The two tensors that a kernel reads the noise from; None for the deterministic gate."""
    return (None, None) if noise is None else (noise.seed, noise.step)


def on_device(tensor: Tensor):
    """Make the tensor's device the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
