"""The torch operators: schema, fake and autograd. A backend is chosen inside, when the call runs.

Optional results are empty tensors, since an operator returns what its schema says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .backend import Factors, PenaltyGradients
from .noise import GateNoise


def _noise(p: Tensor | None, seed: Tensor | None, step: Tensor | None) -> GateNoise | None:
    """The noise of the gate; None where there is no gate, or none is wanted."""
    return None if p is None or seed is None else GateNoise(seed, step)


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
    running = dispatch.running("masked_linear", backend, x.device, x.dtype)
    y = running.forward(_flat(x), weight, Factors(a, b, p, q, gate_bias), tuple(sizes), _noise(p, seed, step))
    return _shaped(y, x)


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
    running = dispatch.running("gate_penalties", backend, x.device, x.dtype)
    if x.numel():
        dispatch.count("masked_linear", running.name)
    factors, noise = Factors(a, b, p, q, gate_bias), _noise(p, seed, step)
    y, *both = running.forward_penalties(_flat(x), weight, factors, tuple(sizes), noise, past)
    return _shaped(y, x), *both


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
    running = dispatch.running("masked_linear_backward", backend, x.device, x.dtype)
    factors, noise = Factors(a, b, p, q, gate_bias), _noise(p, seed, step)
    dx, gradients = running.backward(
        _flat(grad), _flat(x), weight, factors, tuple(sizes), noise, tau, need_x, need_factors,
        PenaltyGradients(past, d_sparsity, d_forgetting),
    )  # fmt: skip
    results = (_shaped(dx, x) if need_x else None, *gradients)
    needed = (need_x, *(need_factors and factor is not None for factor in factors))
    inputs = zip(results, (x, *factors), needed, strict=True)
    return tuple(result.to(given.dtype) if need else x.new_empty(0) for result, given, need in inputs)


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
    running = dispatch.running("fold_", backend, weight.device, weight.dtype)
    running.fold_(weight, Factors(a, b, p, q, gate_bias), tuple(sizes), master)


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
    running = dispatch.running("rebuild_", backend, weight.device, weight.dtype)
    tasks = [Factors(*task) for task in zip(a, b, p, q, gate_bias, strict=True)]
    running.rebuild_(weight, base, tasks, tuple(sizes), master)


@rebuild_.register_fake
def _(weight, base, a, b, p, q, gate_bias, sizes, master, backend):
    return None
