"""The CPU backend: csrc/cpu behind torch operators. Tensors are allocated here and filled there.

Threads and SIMD, nothing of size N × k beside the weight; the same bits for any number of threads. The logits and the noise
are the same on every instruction set, so masks and folds are too; of the rest, the last bits differ where bf16 is multiplied in
pairs, and of the penalties and dc, which are summed lane by lane.
"""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from .reference import compute_dtype

_FACTORS = "Tensor a, Tensor b, Tensor? p, Tensor? q, Tensor? gate_bias, int[] sizes, Tensor? seed, Tensor? step"
_library = torch.library.Library("stamina_fast", "FRAGMENT")
_library.define(
    f"cpu_forward(Tensor x, Tensor weight, {_FACTORS}, Tensor? past, Tensor(a!) y, Tensor(b!)? penalties, "
    "str instructions) -> ()"
)
_library.define(
    f"cpu_backward(Tensor grad, Tensor x, Tensor weight, {_FACTORS}, float tau, Tensor? past, float d_sparsity, "
    "float d_forgetting, Tensor(a!)? dx, Tensor(b!)? da, Tensor(c!)? db, Tensor(d!)? dp, Tensor(e!)? dq, Tensor(f!)? dc, "
    "str instructions) -> ()"
)
_library.define(
    "cpu_fold_(Tensor(a!) weight, Tensor before, Tensor[] a, Tensor[] b, Tensor[] p, Tensor[] q, Tensor[] gate_bias, "
    "int[] sizes, Tensor(b!)? master, str instructions) -> ()"
)
_library.define("cpu_instruction_sets() -> str")


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
    """What this build has and this machine can run, best first."""
    return tuple(torch.ops.stamina_fast.cpu_instruction_sets().split())


def _factors(dtype, a, b, p, q, gate_bias) -> tuple[Tensor | None, ...]:
    """The factors as the library takes them: contiguous, rounded to the weight's dtype; the bias in fp32 (fp64 for fp64)."""
    a, b, p, q = (None if t is None else t.to(dtype).contiguous() for t in (a, b, p, q))
    return a, b, p, q, None if gate_bias is None else gate_bias.to(compute_dtype(dtype)).contiguous()


def _past(past: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if past is None else past.to(compute_dtype(dtype)).contiguous()


def forward(x, weight, a, b, p, q, gate_bias, sizes, seed, step, *, instructions: str | None = None) -> Tensor:
    """Y = X (W + M ⊙ A B)ᵀ as [T, N] in x's dtype, for checked arguments.

    x [T, k] and weight [N, k] of one dtype and any strides, a [N, r], b [G, r, k], p [N, s], q [G, s, k], gate_bias [G];
    sizes: rows of the G projections; seed and step: 0-dim int64 tensors, or None. instructions: of `instruction_sets()`.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    if y.numel():
        _forward(x, weight, (a, b, p, q, gate_bias), sizes, seed, step, None, y, None, instructions)
    return y


def forward_penalties(
    x, weight, a, b, p, q, gate_bias, sizes, seed, step, past, *, instructions: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, sparsity, forgetting) from one M ⊙ A B; past [N, k] or None. Without tokens, weight may be expanded from a scalar."""
    y, sums = x.new_empty(x.shape[0], weight.shape[0]), x.new_zeros(2, dtype=torch.float64)
    if y.numel() or weight.numel():
        _forward(x, weight, (a, b, p, q, gate_bias), sizes, seed, step, past, y, sums, instructions)
    exact = compute_dtype(x.dtype)
    return y, (sums[0] / max(1, weight.numel())).to(exact) * (p is not None), sums[1].to(exact)


def _forward(x, weight, factors, sizes, seed, step, past, y, sums, instructions) -> None:
    torch.ops.stamina_fast.cpu_forward(
        x, weight, *_factors(x.dtype, *factors), list(sizes), seed, step, _past(past, x.dtype), y, sums,
        instructions or instruction_sets()[0],
    )  # fmt: skip


def backward(
    grad, x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, need_x, need_factors, past=None, d_sparsity=None,
    d_forgetting=None, *, instructions: str | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, da, db, dp, dq, dc) in fp32 (fp64 for fp64), None where not needed or without a factor; grad [T, N], x [T, k]."""
    exact = compute_dtype(x.dtype)

    def room(like: Tensor | None, needed: bool) -> Tensor | None:
        return torch.empty(like.shape, dtype=exact, device=like.device) if needed and like is not None else None

    results = room(x, need_x), *(room(t, need_factors) for t in (a, b, p, q, gate_bias))
    if need_x or need_factors:
        pull = (0.0 if d is None else float(d) for d in (d_sparsity, d_forgetting))
        torch.ops.stamina_fast.cpu_backward(
            grad, x, weight, *_factors(x.dtype, a, b, p, q, gate_bias), list(sizes), seed, step, float(tau),
            _past(None if d_forgetting is None else past, x.dtype), *pull, *results, instructions or instruction_sets()[0],
        )  # fmt: skip
    return results


def fold_(weight, a, b, p, q, gate_bias, sizes, master, *, instructions: str | None = None) -> None:
    """Fold M ⊙ A B with the deterministic gate into weight [N, k] in place, through the master [N, k] where given."""
    rebuild_(weight, weight if master is None else master, [(a, b, p, q, gate_bias)], sizes, master, instructions=instructions)


def rebuild_(weight, before, tasks, sizes, master, *, instructions: str | None = None) -> None:
    """weight = `before` + the M ⊙ A B of all tasks (a, b, p, q, gate_bias), summed in their order and rounded once."""
    none = weight.new_empty(0)
    packed = [[none if t is None else t for t in _factors(weight.dtype, *task)] for task in tasks]
    columns = [list(column) for column in zip(*packed, strict=True)] or [[]] * 5
    torch.ops.stamina_fast.cpu_fold_(weight, before, *columns, list(sizes), master, instructions or instruction_sets()[0])
