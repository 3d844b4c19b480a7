"""Maximum mean discrepancy between two sets of features: an unbiased estimate with a Gaussian kernel, and its bootstrap.

    MMD²(X, Y) = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)
    k(x, y) = exp(-|x - y|² / (2 h²))                                  (Gretton et al. 2012, Lemma 6)
"""

from __future__ import annotations

import torch

from ..errors import InputError


def _features(x: torch.Tensor, name: str) -> torch.Tensor:
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"{name} must be features [n, d] of at least two images, got {list(x.shape)}; give more images")
    return x.double()


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x_i - y_j|² as float64 `[n, m]`, of features `[n, d]` and `[m, d]`; by differences, so that equal rows give 0."""
    return torch.stack([(y - row).square().sum(1) for row in x])


def kernel(x: torch.Tensor, y: torch.Tensor, bandwidth: float) -> torch.Tensor:
    """k(x_i, y_j) as float64 `[n, m]`."""
    if not bandwidth > 0:
        raise InputError(f"the bandwidth must be above 0, got {bandwidth}; are the images all the same?")
    return squared_distances(x, y).mul_(-0.5 / bandwidth**2).exp_()


def median_distance(x: torch.Tensor) -> float:
    """The median of |x_i - x_j| over all pairs i < j of features `[n, d]`."""
    x = _features(x, "x")
    i, j = torch.triu_indices(len(x), len(x), 1)
    return squared_distances(x, x)[i, j].median().sqrt().item()


def mmd2(x: torch.Tensor, y: torch.Tensor, bandwidth: float, paired: bool = False) -> float:
    """The unbiased MMD² of features `[n, d]` and `[m, d]`. For two samples of one distribution it is about 0, or below.

    paired: x_i and y_i come from the same noise, so k(x_i, y_i) is too large. These pairs are left out. The estimate stays
    unbiased, and is 0 for x = y.
    """
    x, y = _features(x, "x"), _features(y, "y")
    n, m = len(x), len(y)
    if paired and n != m:
        raise InputError(f"paired features must be as many, got {n} and {m}; draw both from the same noise")
    within_x = (kernel(x, x, bandwidth).sum() - n) / (n * (n - 1))
    within_y = (kernel(y, y, bandwidth).sum() - m) / (m * (m - 1))
    between = kernel(x, y, bandwidth)
    across = (between.sum() - between.trace()) / (n * (n - 1)) if paired else between.mean()
    return (within_x + within_y - 2 * across).item()


def resamples(count: int, draws: int, seed: int) -> torch.Tensor:
    """How often each of `count` images is drawn, with replacement, in each of `draws` bootstrap samples: `[draws, count]`."""
    picks = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, picks, torch.ones(draws, count, dtype=torch.float64))


def bootstrap(x: torch.Tensor, y: torch.Tensor, bandwidth: float, times_x: torch.Tensor, times_y: torch.Tensor) -> torch.Tensor:
    """MMD² of resampled images, `[draws]`; `times_x` `[draws, n]` and `times_y` `[draws, m]` come from `resamples`.

    Two copies of one image say nothing about the distribution and would raise the within terms. These pairs are left out,
    as `mmd2` leaves out i = j.
    """
    x, y = _features(x, "x"), _features(y, "y")

    def within(z, times):
        k = kernel(z, z, bandwidth).fill_diagonal_(0)
        # a sample of one image only has no pair: 1, the kernel's value for equal images
        pairs = times.sum(1).square() - times.square().sum(1)
        return torch.where(pairs > 0, ((times @ k) * times).sum(1) / pairs.clamp(min=1), 1.0)

    across = ((times_x @ kernel(x, y, bandwidth)) * times_y).sum(1) / (times_x.sum(1) * times_y.sum(1))
    return within(x, times_x) + within(y, times_y) - 2 * across


def interval(values: torch.Tensor, level: float = 0.95) -> list[float]:
    """The central interval that holds `level` of the values `[draws]`."""
    return torch.quantile(values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)).tolist()
