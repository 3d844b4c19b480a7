"""What a backend is: five operators on checked arguments, and why it cannot run where it cannot.

A new backend is a subclass of `Backend` in a module of its own, and a line in the table of `dispatch`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .noise import GateNoise


class Factors(NamedTuple):
    """The factors of G projections' residual M ⊙ (A B) with M = [P Q + c > 0], or a value for each, such as its gradient.

    a [N, r]  b [G, r, k]  p [N, s]  q [G, s, k]  gate_bias [G]; p and q are None for M = 1, gate_bias is None for c = 0.
    """

    a: Tensor | None
    b: Tensor | None
    p: Tensor | None = None
    q: Tensor | None = None
    gate_bias: Tensor | None = None


class PenaltyGradients(NamedTuple):
    """The 0-dim gradients of sparsity and forgetting, and S = `past` [N, k], which forgetting needs. None: no such gradient."""

    past: Tensor | None = None
    d_sparsity: Tensor | None = None
    d_forgetting: Tensor | None = None


NO_PENALTIES = PenaltyGradients()


class Backend(ABC):
    """The operators on one kind of machine.

    Arguments come checked, on one device: x [T, k], grad [T, N] and weight [N, k] share a floating dtype and have any strides.
    `sizes` are the rows of each projection, in order. `noise` holds 0-dim int64 tensors on the device; None is the
    deterministic gate, and the only choice without p. A, B, P and Q are rounded to the weight's dtype first. Sums are fp32
    (fp64 for fp64).
    """

    name: ClassVar[str]

    def missing(self) -> str:
        """Why this backend runs nothing here, with the remedy; empty where it runs."""
        return ""

    @abstractmethod
    def summary(self) -> str:
        """What it runs on, in a few words."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run tensors of this device and dtype; empty where it can."""
        return ""

    @abstractmethod
    def forward(self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None) -> Tensor:
        """Y = X (W + M ⊙ (A B))ᵀ as a new [T, N] in x's dtype."""

    @abstractmethod
    def forward_penalties(
        self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(Y, sparsity, forgetting), the penalties 0-dim in the dtype of sums.

        sparsity = mean of sigmoid(P Q + c), 0 without p. forgetting = Σ (S ⊙ M ⊙ A B)² with S = `past` [N, k], 0 without it.
        T may be 0, and weight is then expanded from one element.
        """

    @abstractmethod
    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None,
        tau: Tensor, need_x: bool = True, need_factors: bool = True, penalties: PenaltyGradients = NO_PENALTIES,
    ) -> tuple[Tensor | None, Factors]:  # fmt: skip
        """(dX [T, k], the gradients of the factors), as `reference.masked_linear_backward` writes them out.

        Each has the shape of its input, and the dtype of its input or of sums. Where it is not needed it may be None, or
        anything at all. tau: 0-dim, on the device.
        """

    def fold_(self, weight: Tensor, factors: Factors, sizes: tuple[int, ...], master: Tensor | None) -> None:
        """weight += [P Q + c > 0] ⊙ (A B) in place: summed in `master` (fp32, fp64 for fp64) where given, and rounded once."""
        self.rebuild_(weight, weight if master is None else master, [factors], sizes, master)

    @abstractmethod
    def rebuild_(
        self, weight: Tensor, before: Tensor, tasks: Sequence[Factors], sizes: tuple[int, ...], master: Tensor | None
    ) -> None:
        """weight = before + Σ_t [P_t Q_t + c_t > 0] ⊙ (A_t B_t), summed in this order, kept in `master`, rounded once.

        `before` is of the weight's dtype or of the master's, and may be either of them. With a master, weight = round(master).
        An entry outside the mask keeps its bits, also those of -0.0.
        """
