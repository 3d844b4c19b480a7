"""The Triton backend: the launchers of kernels/ behind the protocol of backends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .backend import NO_PENALTIES, Backend, Factors, PenaltyGradients
from .noise import GateNoise


@cache
def load() -> tuple[ModuleType | None, str]:
    """(triton, its version), or (None, why it runs nothing here)."""
    try:
        triton = import_module("triton")
    except ImportError as error:
        return None, f"triton cannot be imported ({error}); install triton >= 3.6 (Linux)"
    if triton.knobs.runtime.interpret:
        return triton, f"triton {triton.__version__}, interpreter on the CPU: slow, for tests; bf16 is refused"
    if not torch.cuda.is_available():
        return None, "triton needs a GPU; TRITON_INTERPRET=1 runs it in the interpreter"
    return triton, f"triton {triton.__version__}"


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on tensors of the CPU."""
    triton, _ = load()
    return triton is not None and triton.knobs.runtime.interpret


class Triton(Backend):
    """Triton kernels. package: the dotted name under which the modules of kernels/ are imported."""

    name = "triton"

    def __init__(self, package: str = "stamina_fast.kernels"):
        self.package = package

    def missing(self) -> str:
        triton, said = load()
        return "" if triton else said

    def summary(self) -> str:
        return load()[1]

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        wanted = "cpu" if interpreted() else "cuda"
        if device.type != wanted:
            return f"{self.summary()}; it runs {wanted} tensors here, got {device.type}"
        if interpreted() and dtype == torch.bfloat16:
            return "the interpreter computes bf16 wrongly without a word; use float32 or float16"
        if not interpreted() and dtype == torch.float64:
            return "float64 runs on the reference backend only"
        return ""

    def _kernel(self, name: str) -> ModuleType:
        # a kernel module imports Triton, which is there on Linux alone
        return import_module(f"{self.package}.{name}")

    def forward(self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None) -> Tensor:
        return self._kernel("masked_linear").forward(x, weight, factors, sizes, noise)

    def forward_penalties(
        self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = self.forward(x, weight, factors, sizes, noise)
        return y, *self._kernel("penalties").forward(weight.dtype, factors, sizes, noise, past)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None,
        tau: Tensor, need_x: bool = True, need_factors: bool = True, penalties: PenaltyGradients = NO_PENALTIES,
    ) -> tuple[Tensor | None, Factors]:  # fmt: skip
        dx = self._kernel("masked_linear").backward_input(grad, weight, factors, sizes, noise) if need_x else None
        if not need_factors:
            return dx, Factors(None, None)
        return dx, Factors(*self._kernel("factors").backward_factors(grad, x, factors, sizes, noise, tau, *penalties))

    def fold_(self, weight: Tensor, factors: Factors, sizes: tuple[int, ...], master: Tensor | None) -> None:
        self._kernel("fold").fold_(weight, factors, sizes, master)

    def rebuild_(
        self, weight: Tensor, before: Tensor, tasks: Sequence[Factors], sizes: tuple[int, ...], master: Tensor | None
    ) -> None:
        self._kernel("rebuild").rebuild_(weight, before, tasks, sizes, master)
