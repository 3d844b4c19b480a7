"""The torch operators: schema, fake and autograd. A backend's implementation is chosen inside, when the call runs.

Optional results are empty tensors, since an operator returns what its schema says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .noise import GateNoise


def _noise(seed: Tensor | None, step: Tensor | None) -> GateNoise | None:
    return None if seed is None else GateNoise(seed, step)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


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
        from .kernels import masked_linear as kernel

        y = kernel.forward(_flat(x), weight, a, b, p, q, gate_bias, rows, seed, step)
        return y.view(*x.shape[:-1], weight.shape[0])
    return reference.masked_linear(x, weight, a, b, p, q, gate_bias, sizes=rows, noise=_noise(seed, step), tau=tau)


@masked_linear.register_fake
def _(x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = dispatch.choose(backend, x.device, x.dtype)
    dispatch.count("masked_linear_backward", chosen)
    rows = tuple(sizes)
    inputs = (x, a, b, p, q, gate_bias)
    if chosen == "triton":
        from .kernels import factors, masked_linear as kernel

        flat = _flat(grad)
        dx = kernel.backward_input(flat, weight, a, b, p, q, gate_bias, rows, seed, step).view(x.shape) if need_x else None
        d_factors = (None,) * 5
        if need_factors:
            d_factors = factors.backward_factors(flat, _flat(x), a, b, p, q, gate_bias, rows, seed, step, tau)
        results = (dx, *d_factors)
    else:
        results = reference.masked_linear_backward(
            grad, x, weight, a, b, p, q, gate_bias, sizes=rows, noise=_noise(seed, step), tau=tau
        )
    needed = (need_x, *(need_factors and t is not None for t in inputs[1:]))
    return tuple(
        r.to(t.dtype) if need else x.new_empty(0) for r, t, need in zip(results, inputs, needed, strict=True)
    )


@masked_linear_backward.register_fake
def _(grad, x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, need_x, need_factors, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    return dx, *(t.new_empty(t.shape) if need_factors and t is not None else x.new_empty(0) for t in (a, b, p, q, gate_bias))


def _setup_context(ctx, inputs, output):
    x, weight, a, b, p, q, gate_bias, sizes, seed, step, tau, backend = inputs
    ctx.save_for_backward(x, weight, a, b, p, q, gate_bias, seed, step, tau)
    ctx.sizes, ctx.backend = sizes, backend


def _backward(ctx, grad):
    x, weight, a, b, p, q, gate_bias, seed, step, tau = ctx.saved_tensors
    need_x, need_factors = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:7])
    gradients = masked_linear_backward(
        grad, x, weight, a, b, p, q, gate_bias, ctx.sizes, seed, step, tau, need_x, need_factors, ctx.backend
    )
    dx, *factors = (g if need else None for g, need in zip(gradients, (need_x, *ctx.needs_input_grad[2:7]), strict=True))
    return dx, None, *factors, None, None, None, None, None


masked_linear.register_autograd(_backward, setup_context=_setup_context)


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
        from .kernels import fold

        fold.fold_(weight, a, b, p, q, gate_bias, rows, master)
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
        from .kernels import rebuild

        rebuild.rebuild_(weight, base, tasks, rows, master)
    else:
        reference.rebuild_(weight, base, tasks, sizes=rows, master=master)


@rebuild_.register_fake
def _(weight, base, a, b, p, q, gate_bias, sizes, master, backend):
    return None
