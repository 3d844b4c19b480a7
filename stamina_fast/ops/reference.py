"""The specification: every operator in plain torch, for any floating dtype. Tests, benchmarks and the fallback use it.

    L = P Q + c                    logits, rank s              P [N, s]  Q [G, s, k]  c [G]
    z = L + ln u - ln(1 - u)       sampled gate; z = L without noise
    M = [z > 0]                    hard, forward               dM/dL := s(1 - s)/tau with s = sigmoid(z/tau), backward
    Y = X (W + M ⊙ (A B))ᵀ         X [..., k]  W [N, k]  A [N, r]  B [G, r, k]  Y [..., N]

Row n belongs to one of G projections, whose rows stand in order; `sizes` holds their counts. Everything is computed in
fp32 (fp64 for fp64) after A, B, P and Q were rounded to the weight's dtype; the residual M ⊙ AB is rounded to the
weight's dtype before it meets X, products accumulate in fp32, and Y is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .backend import NO_PENALTIES, Backend, Factors, PenaltyGradients
from .noise import GateNoise, uniforms as draw_uniforms


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def full_precision(device: torch.device):
    """fp32 products without TF32, without bf16, and outside autocast, whatever the surroundings ask for."""
    if device.type == "meta":
        yield
        return
    matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


class _Round(torch.autograd.Function):
    """Round to a narrower dtype and come back; the gradient passes unrounded."""

    @staticmethod
    def forward(ctx, value, dtype):
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gate(torch.autograd.Function):
    """M = [z > 0], with the straight-through slope."""

    @staticmethod
    def forward(ctx, z, tau):
        ctx.save_for_backward(z)
        ctx.tau = tau
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad * slope(ctx.saved_tensors[0], ctx.tau), None


def slope(z: Tensor, tau: float | Tensor) -> Tensor:
    """dM/dL := s(1 - s)/tau with s = sigmoid(z/tau); 1 - s is a sigmoid too, which keeps its digits where s is near 1."""
    return torch.sigmoid(z / tau) * torch.sigmoid(-z / tau) / tau


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return _Round.apply(factor.to(compute_dtype(dtype)), dtype)


def low_rank(left: Tensor, right: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """left [N, r] times right [G, r, k], projection by projection: `[N, k]`."""
    return torch.cat([part @ right[g] for g, part in enumerate(left.split(sizes))])


def logits(p: Tensor, q: Tensor, gate_bias: Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """L = P Q + c, fp32 (fp64 for fp64), `[N, k]`; P and Q are rounded to `dtype` first."""
    product = low_rank(_rounded(p, dtype), _rounded(q, dtype), sizes)
    if gate_bias is None:
        return product
    bias = gate_bias.to(product.dtype)
    return product + torch.cat([bias[g].expand(n) for g, n in enumerate(sizes)]).unsqueeze(1)


def noisy_logits(p, q, gate_bias, sizes, dtype, noise=None, uniforms=None) -> Tensor:
    """z = L + ln u - ln(1 - u), or L where there is neither noise nor uniforms, `[N, k]`."""
    return _add_noise(logits(p, q, gate_bias, sizes, dtype), noise, uniforms)


def _add_noise(plain: Tensor, noise: GateNoise | None, uniforms: Tensor | None) -> Tensor:
    if uniforms is None and noise is not None:
        uniforms = draw_uniforms(noise, plain.shape[0], plain.shape[1], plain.device, plain.dtype)
    if uniforms is None:
        return plain
    u = uniforms.to(plain.dtype)
    return plain + (torch.log(u) - torch.log(1 - u))


def gate(p, q, gate_bias, sizes, dtype, noise=None, uniforms=None, tau=1.0) -> Tensor:
    """M in {0, 1}, `[N, k]`, with the straight-through slope s(1 - s)/tau."""
    z = noisy_logits(p, q, gate_bias, sizes, dtype, noise, uniforms)
    return _Gate.apply(z, tau)


def residual(a, b, p, q, gate_bias, sizes, dtype, noise=None, uniforms=None, tau=1.0) -> Tensor:
    """M ⊙ (A B), fp32 (fp64 for fp64), `[N, k]`."""
    product = low_rank(_rounded(a, dtype), _rounded(b, dtype), sizes)
    if p is None:
        return product
    return gate(p, q, gate_bias, sizes, dtype, noise, uniforms, tau) * product


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
    uniforms: Tensor | None = None,
    tau: float | Tensor = 1.0,
) -> Tensor:
    """Y = X (W + M ⊙ (A B))ᵀ as in `stamina_fast.masked_linear`; `uniforms` `[N, k]` takes the place of the noise stream."""
    sizes = sizes or (weight.shape[0],)
    with full_precision(x.device):
        return _product(x, weight, residual(a, b, p, q, gate_bias, sizes, weight.dtype, noise, uniforms, tau))


def _product(x: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    exact = compute_dtype(weight.dtype)
    wide = x.to(exact)
    y = wide @ weight.detach().to(exact).T + wide @ _Round.apply(delta, weight.dtype).T
    return y.to(x.dtype)


@torch.no_grad()
def masked_linear_penalties(
    x, weight, a, b, p=None, q=None, gate_bias=None, *, sizes=None, noise=None, uniforms=None, past=None
) -> tuple[Tensor, Tensor, Tensor]:
    """(Y, sparsity, forgetting): `masked_linear` and `gate_penalties` from one L and one M ⊙ AB, without autograd."""
    sizes = sizes or (weight.shape[0],)
    with full_precision(x.device):
        delta = low_rank(_rounded(a, weight.dtype), _rounded(b, weight.dtype), sizes)
        sparsity, forgetting = delta.new_zeros(()), delta.new_zeros(())
        if p is not None:
            plain = logits(p, q, gate_bias, sizes, weight.dtype)
            sparsity = _mean(torch.sigmoid(plain))
            delta = (_add_noise(plain, noise, uniforms) > 0).to(delta.dtype) * delta
        if past is not None:
            forgetting = (past.to(delta.dtype) * delta).square().sum()
        return _product(x, weight, delta), sparsity, forgetting


@torch.no_grad()
def masked_linear_backward(
    grad, x, weight, a, b, p=None, q=None, gate_bias=None, *, sizes=None, noise=None, uniforms=None, tau=1.0,
    past=None, d_sparsity=None, d_forgetting=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `masked_linear` written out, G = `grad` `[..., N]`; (dx, da, db, dp, dq, dc), each in its input's dtype.

    dx = G (W + M ⊙ AB)   dW = Gᵀ X   dΔ = M ⊙ dW   dA = dΔ Bᵀ   dB = Aᵀ dΔ
    dL = dW ⊙ AB ⊙ s(1 - s)/tau       dP = dL Qᵀ    dQ = Pᵀ dL   dc = Σ dL

    With the 0-dim gradients of the penalties, S = `past` and σ = sigmoid:
    dW gains 2 d_forgetting S² ⊙ M ⊙ AB, and dL gains d_sparsity σ(L)(1 - σ(L)) / (N k); dx does not change.
    """
    sizes = sizes or (weight.shape[0],)
    with full_precision(x.device):
        exact = compute_dtype(weight.dtype)
        wide_a, wide_b = _rounded(a, weight.dtype), _rounded(b, weight.dtype)
        product = low_rank(wide_a, wide_b, sizes)
        tokens = x.shape[:-1].numel()
        g = grad.reshape(tokens, weight.shape[0]).to(exact)
        d_weight = g.T @ x.reshape(tokens, weight.shape[1]).to(exact)
        mask = None
        if p is not None:
            plain = logits(p, q, gate_bias, sizes, weight.dtype)
            z = _add_noise(plain, noise, uniforms)
            mask = (z > 0).to(exact)
        delta = product if mask is None else mask * product
        dx = (g @ weight.to(exact) + g @ delta.to(weight.dtype).to(exact)).view(x.shape).to(x.dtype)
        if past is not None and d_forgetting is not None:
            d_weight += past.to(exact).square().mul_(delta).mul_(2 * d_forgetting)
        d_delta = d_weight if mask is None else mask * d_weight
        da, db = _factor_gradients(d_delta, wide_a, wide_b, sizes)
        if mask is None:
            return dx, da.to(a.dtype), db.to(b.dtype), None, None, None
        d_logits = d_weight * product * slope(z, tau)
        if d_sparsity is not None:
            d_logits += slope(plain, 1.0).mul_(d_sparsity / max(1, plain.numel()))
        dp, dq = _factor_gradients(d_logits, _rounded(p, weight.dtype), _rounded(q, weight.dtype), sizes)
        dc = None if gate_bias is None else torch.stack([part.sum() for part in d_logits.split(sizes)]).to(gate_bias.dtype)
        return dx, da.to(a.dtype), db.to(b.dtype), dp.to(p.dtype), dq.to(q.dtype), dc


def _factor_gradients(d_product: Tensor, left: Tensor, right: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The gradients of left [N, r] and right [G, r, k] from that of their product [N, k]."""
    parts = d_product.split(sizes)
    d_left = torch.cat([part @ right[g].T for g, part in enumerate(parts)])
    d_right = torch.stack([l.T @ part for l, part in zip(left.split(sizes), parts, strict=True)])
    return d_left, d_right


def gate_uniforms(noise: GateNoise, sizes: tuple[int, ...], k: int) -> Tensor:
    """The uniforms of every backend, float64 `[N, k]`."""
    device = next((v.device for v in (noise.seed, noise.step) if isinstance(v, Tensor)), torch.device("cpu"))
    return draw_uniforms(noise, sum(sizes), k, device)


@torch.no_grad()
def gate_mask(p, q, gate_bias=None, *, sizes=None, noise=None, dtype=None) -> Tensor:
    """M as bool `[N, k]`; `dtype` is that of the weight which the mask will meet (default: of p)."""
    sizes = sizes or (p.shape[0],)
    with full_precision(p.device):
        return gate(p, q, gate_bias, sizes, dtype or p.dtype, noise) > 0.5


@torch.no_grad()
def fold_(weight, a, b, p=None, q=None, gate_bias=None, *, sizes=None, master=None) -> Tensor:
    """W += [L > 0] ⊙ (A B) in place, summed in fp32 (fp64 for fp64) or in `master`, rounded once into `weight`."""
    return _add_residuals(weight, weight if master is None else master, [(a, b, p, q, gate_bias)], sizes, master)


@torch.no_grad()
def rebuild_(weight, base, tasks, *, sizes=None, master=None) -> Tensor:
    """W = W_0 + Σ_t [L_t > 0] ⊙ (A_t B_t), summed in this order in fp32 (fp64 for fp64), kept in `master`, rounded once.

    `tasks`: tuples (a, b, p, q, gate_bias).
    """
    return _add_residuals(weight, base, tasks, sizes, master)


def _add_residuals(weight: Tensor, before: Tensor, tasks, sizes: tuple[int, ...] | None, master: Tensor | None) -> Tensor:
    sizes = sizes or (weight.shape[0],)
    with full_precision(weight.device):
        total = before.to(compute_dtype(weight.dtype))
        for factors in tasks:
            delta = residual(*factors, sizes, weight.dtype)
            # an entry outside the mask must not change at all, not even from -0.0 to 0.0
            total = torch.where(delta != 0, total + delta, total)
        if master is not None:
            master.copy_(total)
        weight.copy_(total)
    return weight


def _mean(entries: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return entries.sum() / max(1, entries.numel())


def gate_penalties(a, b, p, q, gate_bias, *, sizes=None, noise=None, past=None, dtype=None, tau=1.0) -> tuple[Tensor, Tensor]:
    """(sparsity, forgetting), both 0-dim: mean of sigmoid(L), and Σ (S ⊙ M ⊙ AB)² with S = `past` (0 where None)."""
    sizes = sizes or (a.shape[0],)
    dtype = dtype or a.dtype
    with full_precision(a.device):
        exact = compute_dtype(dtype)
        zero = torch.zeros((), dtype=exact, device=a.device)
        sparsity = zero if p is None else _mean(torch.sigmoid(logits(p, q, gate_bias, sizes, dtype)))
        if past is None:
            return sparsity, zero
        delta = residual(a, b, p, q, gate_bias, sizes, dtype, noise, tau=tau)
        return sparsity, (past.to(exact) * delta).square().sum()


class Reference(Backend):
    """The specification as a backend, for any floating dtype on any device."""

    name = "reference"

    def summary(self) -> str:
        return "plain torch, anywhere"

    def forward(self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None) -> Tensor:
        return masked_linear(x, weight, *factors, sizes=sizes, noise=noise)

    def forward_penalties(
        self, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None, past: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return masked_linear_penalties(x, weight, *factors, sizes=sizes, noise=noise, past=past)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, sizes: tuple[int, ...], noise: GateNoise | None,
        tau: Tensor, need_x: bool = True, need_factors: bool = True, penalties: PenaltyGradients = NO_PENALTIES,
    ) -> tuple[Tensor | None, Factors]:  # fmt: skip
        dx, *gradients = masked_linear_backward(
            grad, x, weight, *factors, sizes=sizes, noise=noise, tau=tau, **penalties._asdict()
        )
        return dx, Factors(*gradients)

    def rebuild_(
        self, weight: Tensor, before: Tensor, tasks: Sequence[Factors], sizes: tuple[int, ...], master: Tensor | None
    ) -> None:
        rebuild_(weight, before, tasks, sizes=sizes, master=master)
