"""Tables of row tiles that never cross projections, for the launchers of Triton and of csrc/cuda. They need torch alone.

Each table is cached, so that a captured CUDA graph finds it in place.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
from torch import Tensor


def _table(rows: list[tuple[int, ...]], columns: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, columns)


@lru_cache(maxsize=512)
def row_tiles(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """Tiles of at most `block` rows, none across two projections: int64 [tiles, 3] of (first row, end of rows, projection)."""
    tiles, start = [], 0
    for group, size in enumerate(sizes):
        stop = start + size
        tiles += [(row, min(row + block, stop), group) for row in range(start, stop, block)]
        start = stop
    return _table(tiles, 3, device)


@lru_cache(maxsize=512)
def tile_ranges(sizes: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """The tiles of each projection in `row_tiles`: int64 [G, 2] of (first tile, end of tiles)."""
    ranges, first = [], 0
    for size in sizes:
        ranges.append((first, first - -size // block))
        first = ranges[-1][1]
    return _table(ranges, 2, device)


@lru_cache(maxsize=512)
def tile_chunks(sizes: tuple[int, ...], block: int, most: int, device: torch.device) -> Tensor:
    """Chunks of at most `most` tiles of one projection in `row_tiles`: int64 [chunks, 2] of (first tile, end of tiles).

    Their order is that of `row_tiles` of `most * block` rows. So `tile_ranges` of that size has the chunks of each projection.
    """
    ranges = tile_ranges(sizes, block, torch.device("cpu")).tolist()
    return _table([(tile, min(tile + most, end)) for first, end in ranges for tile in range(first, end, most)], 2, device)


def row_step(sizes: tuple[int, ...]) -> int:
    """The largest power of two up to 16 that divides every size, and so the first and the end row of every tile.

    A kernel that knows this divisor reads and writes several neighbouring rows at a time.
    """
    return gcd(16, *sizes)
