"""The CPU backend: csrc/cpu behind torch operators. Tensors are allocated here and filled there.

Threads and SIMD, nothing of size N × k beside the weight; the same bits for any number of threads. The logits and the noise
are the same on every instruction set, so masks and folds are too; of the rest, the last bits differ where bf16 is multiplied in
pairs, and of the penalties and dc, which are summed lane by lane.

STAMINA_CPU_ISA, read once, lowers the instruction set on purpose: calls take generic, avx2, avx512 or avx512_bf16 at most.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .backend import NO_PENALTIES, Backend, Factors, PenaltyGradients
from .noise import GateNoise, seed_and_step
from .reference import compute_dtype

_STACK = "Tensor a, Tensor b, Tensor? p, Tensor? q, Tensor? gate_bias, int[] sizes, Tensor? seed, Tensor? step"
_library = torch.library.Library("stamina_fast", "FRAGMENT")
_library.define(
    f"cpu_forward(Tensor x, Tensor weight, {_STACK}, Tensor? past, Tensor(a!) y, Tensor(b!)? penalties, "
    "str instructions) -> ()"
)
_library.define(
    f"cpu_backward(Tensor grad, Tensor x, Tensor weight, {_STACK}, float tau, Tensor? past, float d_sparsity, "
    "float d_forgetting, Tensor(a!)? dx, Tensor(b!)? da, Tensor(c!)? db, Tensor(d!)? dp, Tensor(e!)? dq, Tensor(f!)? dc, "
    "str instructions) -> ()"
)
_library.define(
    "cpu_fold_(Tensor(a!) weight, Tensor before, Tensor[] a, Tensor[] b, Tensor[] p, Tensor[] q, Tensor[] gate_bias, "
    "int[] sizes, Tensor(b!)? master, str instructions) -> ()"
)
_library.define("cpu_instruction_sets() -> str")
_library.define("cpu_stream() -> str")


def _missing() -> str:
    """Why the compiled part was not built, as the build left it, or as it would be here; and the remedy."""
    reason = Path(__file__).parents[1] / "_C_cpu.reason"
    if reason.exists():
        said = reason.read_text().strip()
    elif shutil.which("cmake") is None:
        said = "no cmake is found; pip install cmake ninja"
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        said = "no C++ compiler is found; install one (Debian: g++)"
    else:
        said = "it was not built when this was installed; pip's output with --verbose says why"
    return f"{said}, then install again with --no-build-isolation"


@cache
def load() -> str:
    """Load the compiled library; why it cannot be, or an empty string."""
    found = find_spec("stamina_fast._C_cpu")
    if found is None:
        return f"the compiled part is missing: {_missing()} (README, Install)"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"{Path(found.origin).name} cannot be loaded: {error}; it was built for another torch or machine: reinstall"
    return ""


@cache
def instruction_sets() -> tuple[str, ...]:
    """What this build has and this machine can run, best first, from STAMINA_CPU_ISA on where that is set.

    Raises InputError where STAMINA_CPU_ISA names none of them.
    """
    here = tuple(torch.ops.stamina_fast.cpu_instruction_sets().split())
    most = os.environ.get("STAMINA_CPU_ISA") or here[0]
    if most not in here:
        wanted = f"one of {', '.join(here)} on this machine"
        raise InputError(f"STAMINA_CPU_ISA must be {wanted}, got {most!r}; unset it for {here[0]}")
    return here[here.index(most) :]


def _rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    """The factors as the library takes them: contiguous, rounded to the weight's dtype; the bias in fp32 (fp64 for fp64)."""
    *four, gate_bias = factors
    four = (None if t is None else t.to(dtype).contiguous() for t in four)
    return Factors(*four, None if gate_bias is None else gate_bias.to(compute_dtype(dtype)).contiguous())


def _past(past: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if past is None else past.to(compute_dtype(dtype)).contiguous()


def _stack(factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, dtype: torch.dtype) -> tuple:
    """The arguments of the library that say what the residual is."""
    return *_rounded(factors, dtype), sizes, *seed_and_step(noise)


class Cpu(Backend):
    """The compiled CPU operators. instructions: one of `instruction_sets()`, by default the best."""

    name = "cpu"

    def __init__(self, instructions: str | None = None):
        self._instructions = instructions

    @property
    def instructions(self) -> str:
        return self._instructions or instruction_sets()[0]

    def missing(self) -> str:
        return load()

    def summary(self) -> str:
        return f"threads, {' or '.join(instruction_sets())}"

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str:
        return "" if device.type == "cpu" else f"it runs cpu tensors, got {device.type}"

    def forward(self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None) -> Tensor:
        y = x.new_empty(x.shape[0], weight.shape[0])
        if y.numel():
            self._forward(x, weight, _stack(factors, sizes, noise, x.dtype), None, y, None)
        return y

    def forward_penalties(
        self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, sums = x.new_empty(x.shape[0], weight.shape[0]), x.new_zeros(2, dtype=torch.float64)
        if y.numel() or weight.numel():
            self._forward(x, weight, _stack(factors, sizes, noise, x.dtype), past, y, sums)
        exact = compute_dtype(x.dtype)
        return y, (sums[0] / max(1, weight.numel())).to(exact) * (factors.p is not None), sums[1].to(exact)

    def _forward(self, x: Tensor, weight: Tensor, stack: tuple, past: Tensor | None, y: Tensor, sums: Tensor | None) -> None:
        torch.ops.stamina_fast.cpu_forward(x, weight, *stack, _past(past, x.dtype), y, sums, self.instructions)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None,
        tau: Tensor, need_x: bool = True, need_factors: bool = True, penalties: PenaltyGradients = NO_PENALTIES,
    ) -> tuple[Tensor | None, Factors]:  # fmt: skip
        exact = compute_dtype(x.dtype)

        def room(like: Tensor | None, needed: bool) -> Tensor | None:
            return torch.empty(like.shape, dtype=exact, device=like.device) if needed and like is not None else None

        dx, gradients = room(x, need_x), Factors(*(room(factor, need_factors) for factor in factors))
        if need_x or need_factors:
            past, *pull = penalties
            past = _past(None if penalties.d_forgetting is None else past, x.dtype)
            pull = (0.0 if d is None else float(d) for d in pull)
            torch.ops.stamina_fast.cpu_backward(
                grad, x, weight, *_stack(factors, sizes, noise, x.dtype), float(tau), past, *pull, dx, *gradients,
                self.instructions,
            )  # fmt: skip
        return dx, gradients

    def rebuild_(
        self, weight: Tensor, before: Tensor, tasks: Sequence[Factors], sizes: tuple[int, ...], master: Tensor | None
    ) -> None:
        none = weight.new_empty(0)
        packed = [[none if t is None else t for t in _rounded(task, weight.dtype)] for task in tasks]
        columns = [list(column) for column in zip(*packed, strict=True)] or [[]] * 5
        torch.ops.stamina_fast.cpu_fold_(weight, before, *columns, sizes, master, self.instructions)
