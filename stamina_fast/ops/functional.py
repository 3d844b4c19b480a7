"""The public operators: checked arguments, autocast, then the torch operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import library, reference
from .backend import Factors
from .noise import GateNoise

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(name: str, tensor: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != wanted:
        got = list(tensor.shape)
        hint = f"; pass {name}.T" if len(got) == 2 and got[::-1] == list(wanted) else ""
        raise ValueError(f"{name} must be {meaning} = {list(wanted)}, got {got}{hint}")


def _check_sizes(n: int, sizes) -> tuple[int, ...]:
    sizes = (n,) if sizes is None else tuple(int(s) for s in sizes)
    if any(s < 0 for s in sizes) or sum(sizes) != n:
        raise ValueError(f"sizes must be the rows of each projection, summing to N = {n}, got {sizes} with sum {sum(sizes)}")
    return sizes


def _check_factors(n: int, k: int, sizes, factors: Factors, device: torch.device) -> tuple[int, ...]:
    """Check shapes, dtypes and devices of the factors against [N, k]; the rows of each projection."""
    a, b, p, q, gate_bias = factors
    sizes = _check_sizes(n, sizes)
    groups = len(sizes)
    if (p is None) != (q is None):
        raise ValueError("p and q go together: pass both, or neither for a mask of ones")
    if p is None and gate_bias is not None:
        raise ValueError("gate_bias needs p and q: without them the mask is all ones")
    for name, tensor in factors._asdict().items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; pass {name}.float()")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}; pass {name}.to({str(device)!r})")
    for left_name, left, right_name, right in (("a", a, "b", b), ("p", p, "q", q)):
        if left is None:
            continue
        letter = "r" if left_name == "a" else "s"
        if left.ndim != 2:
            raise ValueError(f"{left_name} must be [N, {letter}] with N = {n}, got {list(left.shape)}")
        rank = left.shape[1]
        _shape(left_name, left, (n, rank), f"[N, {letter}]")
        _shape(right_name, right, (groups, rank, k), f"[G, {letter}, k]")
    if gate_bias is not None:
        _shape("gate_bias", gate_bias, (groups,), "[G]")
    return sizes


def _tau(tau: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(tau, Tensor):
        if tau.ndim != 0 or not tau.is_floating_point():
            raise ValueError(f"tau must be a float or a 0-dim floating tensor, got {tau.dtype} of shape {list(tau.shape)}")
        return tau.detach()
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    return torch.full((), tau, dtype=reference.compute_dtype(dtype), device=device)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None = None,
    q: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    sizes: tuple[int, ...] | None = None,
    noise: GateNoise | None = None,
    tau: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Y = X (W + M ⊙ (A B))ᵀ with M = [P Q + c + noise > 0]: G projections with masked low-rank residuals, one operation.

    x [..., k] and weight [N, k] share a floating dtype, which y [..., N] has too. a [N, r], b [G, r, k], p [N, s],
    q [G, s, k], gate_bias [G] may be in that dtype or wider; a gradient has its input's dtype. `sizes` are the rows of
    each of the G projections, in order, summing to N (default: one projection of N rows).

    p None: M = 1, plain low-rank adaptation, and the noise is ignored. noise None: M = [L > 0]. Otherwise the mask is
    sampled from the counter-based stream of (seed, step, row, column). The gradient of the mask is straight-through:
    dM/dL = s(1 - s)/tau with s = sigmoid(z/tau); tau changes nothing in the forward. Differentiable once in x and the
    factors; weight is frozen. Under autocast x and weight are cast, the factors are not.

    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where `backend` cannot run them.

    >>> import torch, stamina_fast as sf
    >>> x, weight = torch.ones(1, 3), torch.ones(4, 3)
    >>> a, b = torch.ones(4, 1), torch.full((1, 1, 3), 0.5)    # A B = 0.5 everywhere
    >>> p, q = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), torch.ones(1, 1, 3)    # open in the first two rows
    >>> sf.masked_linear(x, weight, a, b, p, q)
    tensor([[4.5000, 4.5000, 3.0000, 3.0000]])
    """
    arguments = _prepare(x, weight, Factors(a, b, p, q, gate_bias), sizes, noise, tau)
    return library.masked_linear(*arguments, backend or "")


def masked_linear_penalties(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None = None,
    q: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    sizes: tuple[int, ...] | None = None,
    noise: GateNoise | None = None,
    tau: float | Tensor = 1.0,
    past: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, sparsity, forgetting): `masked_linear` and `gate_penalties` of the same residual, with one backward for all three.

    Arguments as there; the factors are rounded to the dtype in which x and weight meet, which autocast may lower.
    """
    arguments = _prepare(x, weight, Factors(a, b, p, q, gate_bias), sizes, noise, tau)
    return library.masked_linear_penalties(*arguments, _check_past(past, weight), backend or "")


def _prepare(x: Tensor, weight: Tensor, factors: Factors, sizes, noise: GateNoise | None, tau: float | Tensor) -> tuple:
    """The checked and autocast arguments of `masked_linear`, as the torch operators take them."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [N, k], got {list(weight.shape)}")
    k = weight.shape[1]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be [..., k] with k = {k}, got {list(x.shape)}")
    if torch.is_grad_enabled() and weight.requires_grad:
        raise ValueError("weight is frozen but requires a gradient; call weight.requires_grad_(False)")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        low = torch.get_autocast_dtype(x.device.type)
        x, weight = (t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, weight))
    if x.dtype != weight.dtype or x.dtype not in FLOATS:
        raise TypeError(f"x and weight must share a floating dtype, got {x.dtype} and {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x and weight must be on one device, got {x.device} and {weight.device}")
    return _complete(x, weight, factors, sizes, noise, tau)


def _complete(x: Tensor, weight: Tensor, factors: Factors, sizes, noise: GateNoise | None, tau: float | Tensor) -> tuple:
    sizes = _check_factors(*weight.shape, sizes, factors, x.device)
    seed, step = noise.tensors(x.device) if noise is not None and factors.p is not None else (None, None)
    return x, weight.detach(), *factors, sizes, seed, step, _tau(tau, x.device, x.dtype)


def _check_past(past: Tensor | None, weight: Tensor) -> Tensor | None:
    if past is None:
        return None
    _shape("past", past, tuple(weight.shape), "[N, k]")
    if not past.is_floating_point() or past.device != weight.device:
        raise ValueError(f"past must be floating point on {weight.device}, got {past.dtype} on {past.device}")
    return past.detach()


def gate_uniforms(noise: GateNoise, sizes: tuple[int, ...], k: int) -> Tensor:
    """The uniforms u in (0, 1) that every backend uses, float64 `[N, k]` with N = sum(sizes); see `stamina_fast.ops.noise`."""
    return reference.gate_uniforms(noise, tuple(sizes), k)


def gate_mask(
    p: Tensor,
    q: Tensor,
    gate_bias: Tensor | None = None,
    *,
    sizes: tuple[int, ...] | None = None,
    noise: GateNoise | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """M = [P Q + c + noise > 0] as bool `[N, k]`, from p [N, s], q [G, s, k], gate_bias [G].

    `dtype` is that of the weight which the mask will meet (default: of p): P and Q are rounded to it first.
    """
    if p.ndim != 2 or q.ndim != 3:
        raise ValueError(f"p must be [N, s] and q [G, s, k], got {list(p.shape)} and {list(q.shape)}")
    sizes = _check_factors(p.shape[0], q.shape[2], sizes, Factors(None, None, p, q, gate_bias), p.device)
    return reference.gate_mask(p, q, gate_bias, sizes=sizes, noise=noise, dtype=dtype)


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Whether the address ranges of two tensors meet."""
    if not one.numel() or not two.numel() or one.device != two.device:
        return False

    def span(t: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()

    (start_one, end_one), (start_two, end_two) = span(one), span(two)
    return start_one < end_two and start_two < end_one


@torch.no_grad()
def fold_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None = None,
    q: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    sizes: tuple[int, ...] | None = None,
    master: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """W += [P Q + c > 0] ⊙ (A B) in place; returns weight. Shapes as in `masked_linear`; the gate is deterministic.

    The sum is taken in fp32 (fp64 for fp64) and rounded once. With `master`, an fp32 copy of the weight [N, k], the sum
    is kept there and weight = round(master): a thousand small folds lose nothing. Entries outside the mask keep their bits.

    Raises ValueError where master or a factor overlaps weight in memory, or weight overlaps itself.

    >>> import torch, stamina_fast as sf
    >>> weight = torch.ones(2, 3)
    >>> a, b = torch.ones(2, 1), torch.full((1, 1, 3), 0.5)    # A B = 0.5 everywhere
    >>> p, q = torch.tensor([[1.0], [-1.0]]), torch.ones(1, 1, 3)    # open in the first row
    >>> sf.fold_(weight, a, b, p, q)
    tensor([[1.5000, 1.5000, 1.5000],
            [1.0000, 1.0000, 1.0000]])
    """
    factors = Factors(a, b, p, q, gate_bias)
    sizes = _check_written(weight, master, sizes, [factors])
    detached = [None if t is None else t.detach() for t in factors]
    library.fold_(weight.detach(), *detached, sizes, None if master is None else master.detach(), backend or "")
    return weight


@torch.no_grad()
def rebuild_(
    weight: Tensor,
    base: Tensor,
    tasks: Sequence[Mapping[str, Tensor | None]],
    *,
    sizes: tuple[int, ...] | None = None,
    master: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """W = W_0 + Σ_t [P_t Q_t + c_t > 0] ⊙ (A_t B_t) in place, in one pass over the weight; returns weight.

    weight and base (W_0) are [N, k] of one dtype. Each task is the factors of a fold by name: a and b, and p, q and
    gate_bias where it has a mask; shapes as in `masked_linear`, ranks may differ between tasks. The sum is taken in fp32
    (fp64 for fp64) in the order of `tasks` and rounded once; `master`, an fp32 [N, k], receives it unrounded. The bits are
    those of a `fold_` for each task, through a master that starts as base.

    Raises ValueError where weight or master overlaps another argument, or itself, and for factors that do not fit.
    """
    for i, task in enumerate(tasks):
        if not {"a", "b"} <= set(task) <= set(Factors._fields):
            raise ValueError(f"task {i} must have a and b, and may have p, q and gate_bias, got {sorted(task)}")
    tasks = [Factors(**task) for task in tasks]
    sizes = _check_written(weight, master, sizes, tasks, {"base": base})
    _shape("base", base, tuple(weight.shape), "[N, k]")
    if base.dtype != weight.dtype or base.device != weight.device:
        raise ValueError(f"base must be {weight.dtype} on {weight.device}, got {base.dtype} on {base.device}")
    detached = [[None if t is None else t.detach() for t in task] for task in tasks]
    columns = [list(column) for column in zip(*detached, strict=True)] or [[]] * len(Factors._fields)
    kept = None if master is None else master.detach()
    library.rebuild_(weight.detach(), base.detach(), *columns, sizes, kept, backend or "")
    return weight


def _check_written(
    weight: Tensor, master: Tensor | None, sizes, tasks: Sequence[Factors], others: Mapping[str, Tensor] | None = None
) -> tuple[int, ...]:
    """Check what an in-place operator writes against what it reads (factors of tasks, other tensors); the rows."""
    if weight.ndim != 2 or weight.dtype not in FLOATS:
        raise ValueError(f"weight must be a floating [N, k], got {weight.dtype} {list(weight.shape)}")
    n, k = weight.shape
    for factors in tasks:
        _check_factors(n, k, sizes, factors, weight.device)
    sizes = _check_sizes(n, sizes)
    if master is not None:
        _shape("master", master, (n, k), "[N, k]")
        wanted = reference.compute_dtype(weight.dtype)
        if master.dtype != wanted or master.device != weight.device:
            raise ValueError(f"master must be {wanted} on {weight.device}, got {master.dtype} on {master.device}")
    if torch.compiler.is_compiling():
        return sizes
    written = {name: t for name, t in (("weight", weight), ("master", master)) if t is not None}
    read = [{"master": master}, *(factors._asdict() for factors in tasks), others or {}]
    for name, tensor in (item for tensors in read for item in tensors.items()):
        for target, into in written.items():
            if tensor is not None and name != target and _overlap(into, tensor):
                raise ValueError(f"{name} overlaps {target} in memory; pass {name}.clone()")
    for name, tensor in written.items():
        if any(st == 0 and size > 1 for size, st in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(f"{name} is expanded: several entries share memory; pass {name}.contiguous()")
    return sizes


def gate_penalties(
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    gate_bias: Tensor | None,
    *,
    sizes: tuple[int, ...] | None = None,
    noise: GateNoise | None = None,
    past: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tau: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """(sparsity, forgetting), 0-dim and differentiable in the factors.

    sparsity = mean of sigmoid(P Q + c), the expected density of the mask (0 without a mask).
    forgetting = Σ (S ⊙ M ⊙ (A B))² with the sampled M and S = `past`, the fp32 `[N, k]` difference master - W_0 (C-LoRA,
    Eq. 3); 0 where `past` is None. `dtype`: that of the weight, to which the factors are rounded first (default: of a).
    """
    if a.ndim != 2 or b.ndim != 3:
        raise ValueError(f"a must be [N, r] and b [G, r, k], got {list(a.shape)} and {list(b.shape)}")
    # no tokens, which autocast would not leave in this dtype, and a weight of a single element in memory
    none = a.new_empty(0, b.shape[2], dtype=dtype)
    weight = none.new_empty(()).expand(a.shape[0], b.shape[2])
    arguments = _complete(none, weight, Factors(a, b, p, q, gate_bias), sizes, noise, tau)
    return library.masked_linear_penalties(*arguments, _check_past(past, weight), "")[1:]
