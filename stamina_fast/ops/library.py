"""The torch operators: schema, fake and autograd. A backend's implementation is chosen inside, when the call runs.

Optional results are empty tensors, since an operator returns what its schema says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, cuda, dispatch, reference
from .noise import GateNoise

# backends compiled from csrc/, with the same functions
COMPILED = {"cpu": cpu, "cuda": cuda}


def _noise(seed: Tensor | None, step: Tensor | None) -> GateNoise | None:
    return None if seed is None else GateNoise(seed, step)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """A fresh [T, n] as [..., n]. No view: what an operator returns as one may not be written in place."""
    return flat.resize_(*like.shape[:-1], flat.shape[-1])


@torch.library.custom_op("stamina_fast::masked_linear", mutates_args=())
def masked_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    gate_bias: Tensor | None,
    sizes: list[int],
    seed: Tensor | None,
    step: Tensor | None,
    tau: Tensor,
    backend: str,
) -> Tensor:
    chosen = dispatch.choose(backend, x.device, x.dtype)
    dispatch.count("masked_linear", chosen)
    rows = tuple(sizes)
    if chosen == "triton":
        return _triton_forward(x, weight, a, b, p, q, gate_bias, rows, seed, step)
    if chosen in COMPILED:
        return _shaped(COMPILED[chosen].forward(_flat(x), weight, a, b, p, q, gate_bias, rows, seed, step), x)
    return reference.masked_linear(x, weight, a, b, p, q, gate_bias, sizes=rows, noise=_noise(seed, step), tau=tau)


def _triton_forward(x: Tensor, weight: Tensor, *others) -> Tensor:
    from ..kernels import masked_linear as kernel

    return _shaped(kernel.forward(_flat(x), weight, *others), x)


@masked_linear.register_fake
def _(x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("stamina_fast::masked_linear_penalties", mutates_args=())
def masked_linear_penalties(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    gate_bias: Tensor | None,
    sizes: list[int],
    seed: Tensor | None,
    step: Tensor | None,
    tau: Tensor,
    past: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, sparsity, forgetting): `masked_linear` with the penalties on its residual, S = `past` [N, k].

        sparsity = mean of sigmoid(L)          forgetting = Σ (S ⊙ D)²  with D = M ⊙ A B

    Both share the backward of Y: dW = Gᵀ X + 2 g_f S² ⊙ D takes the place of Gᵀ X in every gradient of a factor, and dL gains
    g_s / (N k) σ(L) (1 - σ(L)); g_s and g_f are the penalties' 0-dim gradients. They do not change dX. Nothing of size N k is
    kept for it but the arguments. Without tokens only the penalties are made, and a weight expanded from a scalar will do.
    """
    chosen = dispatch.choose(backend, x.device, x.dtype)
    dispatch.count("gate_penalties", chosen)
    if x.numel():
        dispatch.count("masked_linear", chosen)
    rows = tuple(sizes)
    if chosen == "triton":
        from ..kernels import penalties

        y = _triton_forward(x, weight, a, b, p, q, gate_bias, rows, seed, step)
        return y, *penalties.forward(weight.dtype, a, b, p, q, gate_bias, rows, seed, step, past)
    if chosen in COMPILED:
        y, *both = COMPILED[chosen].forward_penalties(_flat(x), weight, a, b, p, q, gate_bias, rows, seed, step, past)
        return _shaped(y, x), *both
    return reference.masked_linear_penalties(
        x, weight, a, b, p, q, gate_bias, sizes=rows, noise=_noise(seed, step), past=past
    )


@masked_linear_penalties.register_fake
def _(x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, past, backend):
    scalars = (x.new_empty((), dtype=reference.compute_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(*x.shape[:-1], weight.shape[0]), *scalars


@torch.library.custom_op("stamina_fast::masked_linear_backward", mutates_args=())
def masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    gate_bias: Tensor | None,
    sizes: list[int],
    seed: Tensor | None,
    step: Tensor | None,
    tau: Tensor,
    need_x: bool,
    need_factors: bool,
    backend: str,
    past: Tensor | None = None,
    d_sparsity: Tensor | None = None,
    d_forgetting: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, da, db, dp, dq, dc), each in its input's dtype; d_sparsity, and d_forgetting with past, may be None."""
    chosen = dispatch.choose(backend, x.device, x.dtype)
    dispatch.count("masked_linear_backward", chosen)
    rows = tuple(sizes)
    inputs, penalties = (x, a, b, p, q, gate_bias), (past, d_sparsity, d_forgetting)
    if chosen == "triton":
        from ..kernels import factors, masked_linear as kernel

        flat = _flat(grad)
        dx = kernel.backward_input(flat, weight, a, b, p, q, gate_bias, rows, seed, step) if need_x else None
        d_factors = (None,) * 5
        if need_factors:
            d_factors = factors.backward_factors(flat, _flat(x), a, b, p, q, gate_bias, rows, seed, step, tau, *penalties)
        results = (dx if dx is None else _shaped(dx, x), *d_factors)
    elif chosen in COMPILED:
        dx, *d_factors = COMPILED[chosen].backward(
            _flat(grad), _flat(x), weight, a, b, p, q, gate_bias, rows, seed, step, tau, need_x, need_factors, *penalties
        )
        results = (dx if dx is None else _shaped(dx, x), *d_factors)
    else:
        results = reference.masked_linear_backward(
            grad, x, weight, a, b, p, q, gate_bias, sizes=rows, noise=_noise(seed, step), tau=tau,
            past=past, d_sparsity=d_sparsity, d_forgetting=d_forgetting,
        )  # fmt: skip
    needed = (need_x, *(need_factors and t is not None for t in inputs[1:]))
    return tuple(
        r.to(t.dtype) if need else x.new_empty(0) for r, t, need in zip(results, inputs, needed, strict=True)
    )


@masked_linear_backward.register_fake
def _(grad, x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, need_x, need_factors, backend, *penalties):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return dx, *(t.new_empty(t.shape) if need_factors and t is not None else x.new_empty(0) for t in (a, b, p, q, gate_bias))


def _setup_context(ctx, inputs, output):
    x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, *past, backend = inputs
    ctx.save_for_backward(x, weight, a, b, p, q, gate_bias, seed, step, tau, *past)
    ctx.sizes, ctx.backend = sizes, backend
    # a result without a gradient arrives as None: no zeros for y, no pass over S
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, d_sparsity=None, d_forgetting=None):
    x, weight, a, b, p, q, gate_bias, seed, step, tau, *rest = ctx.saved_tensors
    past = rest[0] if rest else None
    if past is None or d_forgetting is None:
        past = d_forgetting = None
    if p is None:
        d_sparsity = None
    needed = (ctx.needs_input_grad[0] and grad is not None, *ctx.needs_input_grad[2:7])
    if grad is None:
        # penalties alone: a product of no tokens
        grad, x = x.new_empty(0, weight.shape[0]), x.new_empty(0, weight.shape[1])
    gradients = masked_linear_backward(
        grad, x, weight, a, b, p, q, gate_bias, ctx.sizes, seed, step, tau, needed[0], any(needed[1:]), ctx.backend,
        past, d_sparsity, d_forgetting,
    )  # fmt: skip
    dx, *factors = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return dx, None, *factors, *[None] * (len(ctx.needs_input_grad) - 7)


masked_linear.register_autograd(_backward, setup_context=_setup_context)
masked_linear_penalties.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("stamina_fast::fold_", mutates_args=("weight", "master"))
def fold_(
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    p: Tensor | None,
    q: Tensor | None,
    gate_bias: Tensor | None,
    sizes: list[int],
    master: Tensor | None,
    backend: str,
) -> None:
    chosen = dispatch.choose(backend, weight.device, weight.dtype)
    dispatch.count("fold_", chosen)
    rows = tuple(sizes)
    if chosen == "triton":
        from ..kernels import fold

        fold.fold_(weight, a, b, p, q, gate_bias, rows, master)
    elif chosen in COMPILED:
        COMPILED[chosen].fold_(weight, a, b, p, q, gate_bias, rows, master)
    else:
        reference.fold_(weight, a, b, p, q, gate_bias, sizes=rows, master=master)


@fold_.register_fake
def _(weight, a, b, p, q, gate_bias, sizes, master, backend):
    return None


@torch.library.custom_op("stamina_fast::rebuild_", mutates_args=("weight", "master"))
def rebuild_(
    weight: Tensor,
    base: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    p: list[Tensor | None],
    q: list[Tensor | None],
    gate_bias: list[Tensor | None],
    sizes: list[int],
    master: Tensor | None,
    backend: str,
) -> None:
    chosen = dispatch.choose(backend, weight.device, weight.dtype)
    dispatch.count("rebuild_", chosen)
    tasks = list(zip(a, b, p, q, gate_bias, strict=True))
    rows = tuple(sizes)
    if chosen == "triton":
        from ..kernels import rebuild

        rebuild.rebuild_(weight, base, tasks, rows, master)
    elif chosen in COMPILED:
        COMPILED[chosen].rebuild_(weight, base, tasks, rows, master)
    else:
        reference.rebuild_(weight, base, tasks, sizes=rows, master=master)


@rebuild_.register_fake
def _(weight, base, a, b, p, q, gate_bias, sizes, master, backend):
    return None
