"""The noise of the sampled gate: a counter-based stream, written down once.

Philox 4x32 with seven rounds. The 192 bits of key and counter hold (seed, step, row, group) without overlap, so no two
elements of a run ever share a draw:

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (group, row, step & 0xffffffff, step >> 32)

One call gives four 32-bit words, which are eight 16-bit halves: columns c, c + 32, ..., c + 224 of a 256-wide span share a
call, so that a thread which owns those columns needs no shuffle:

    group = (column // 256) * 32 + column % 32          j = (column % 256) // 32
    h     = (word[j // 2] >> (16 * (j % 2))) & 0xffff   u = (h + 1/2) / 65536

u lies strictly inside (0, 1) and is exact in fp32. The logistic noise is ln u - ln(1 - u).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 7
# columns whose noise is made together, and the calls that make it; csrc/core and kernels/ state the same numbers
SPAN, LANES = 256, 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _count(value: int | Tensor, name: str) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.ndim != 0:
            raise ValueError(f"{name} must be an int or a 0-dim int64 tensor, got {value.dtype} of shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or a 0-dim int64 tensor, got {type(value).__name__}")
    elif not 0 <= value < 1 << 63:
        raise ValueError(f"{name} must be in [0, 2**63), got {value}")
    return value


@dataclass(frozen=True)
class GateNoise:
    """The noise of one step: the uniforms are a pure function of (seed, step, row of the stack, column).

    `seed`, `step`: ints in [0, 2**63), or 0-dim int64 tensors on the device, which a captured CUDA graph can advance.
    Values inside tensors are not checked, since that would read the device.
    """

    seed: int | Tensor
    step: int | Tensor

    def __post_init__(self):
        _count(self.seed, "seed")
        _count(self.step, "step")

    def on(self, device: torch.device) -> GateNoise:
        """The same noise with both numbers as 0-dim tensors on `device`, as backends take it, without reading the device."""
        return GateNoise(*self.tensors(device))

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(seed, step) as 0-dim int64 tensors on `device`, without reading the device."""
        return tuple(
            v.to(device) if isinstance(v, Tensor) else torch.full((), v, dtype=torch.int64, device=device)
            for v in (self.seed, self.step)
        )


def seed_and_step(noise: GateNoise | None) -> tuple[Tensor | None, Tensor | None]:
    """What the compiled operators take of noise that is `on` a device; None for the deterministic gate."""
    return (None, None) if noise is None else (noise.seed, noise.step)


def _high(a: Tensor, m: int) -> Tensor:
    """The upper 32 bits of a * m for 32-bit values held in int64, where the full product would overflow the sign."""
    low = (a & 0xFFFF) * m
    return ((a >> 16) * m + (low >> 16)) >> 16


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...], rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox 4x32: four words from a counter of four and a key of two, all int64 tensors that hold 32-bit values.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011. Shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _high(c0, _MULTIPLIERS[0]), (c0 * _MULTIPLIERS[0]) & _MASK
        high1, low1 = _high(c2, _MULTIPLIERS[1]), (c2 * _MULTIPLIERS[1]) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def halves(noise: GateNoise, rows: int, k: int, device: torch.device) -> Tensor:
    """The 16-bit draws h of every element, int64 `[rows, k]`."""
    seed, step = noise.tensors(device)
    spans = -(-k // SPAN)
    group = torch.arange(spans * LANES, device=device)
    row = torch.arange(rows, device=device).unsqueeze(1)
    words = philox((group, row, step & _MASK, (step >> 32) & _MASK), (seed & _MASK, (seed >> 32) & _MASK))
    eight = [(w.expand(rows, -1).view(rows, spans, 1, LANES) >> shift) & 0xFFFF for w in words for shift in (0, 16)]
    return torch.cat(eight, 2).reshape(rows, spans * SPAN)[:, :k]


def uniforms(noise: GateNoise, rows: int, k: int, device: torch.device, dtype=torch.float64) -> Tensor:
    """u = (h + 1/2) / 65536 as `[rows, k]`; exact in fp32 and fp64."""
    return (halves(noise, rows, k, device).to(dtype) + 0.5) / 65536
