"""Random arguments for the operators and for the kernels below them, and the distances that tests speak of."""

import pytest
import torch
import torch.nn.functional as F

from stamina_fast.ops import dispatch, reference
from stamina_fast.ops.backend import NO_PENALTIES, Factors, PenaltyGradients
from stamina_fast.ops.noise import GateNoise

SIZES = (5, 0, 7, 4)
N, K, RANK, GATE = 16, 40, 3, 2


def case(dtype=torch.float32, n=N, k=K, sizes=SIZES, rank=RANK, gate=GATE, seed=0, tokens=(2, 6), scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    x, weight = normal(*tokens, k), normal(n, k, scale=k**-0.5)
    factors = {
        "a": normal(n, rank, scale=scale * rank**-0.5),
        "b": normal(len(sizes), rank, k, scale=k**-0.5),
        "p": normal(n, gate),
        "q": normal(len(sizes), gate, k),
        "gate_bias": normal(len(sizes)),
    }
    return x, weight, factors


def need(backend, device="cpu"):
    """Skip the test where this backend cannot run tensors of the device, with its reason."""
    try:
        dispatch.choose(backend, torch.device(device), torch.float32)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradients(function, x, weight, factors, grad=None, **options):
    inputs = [t.detach().clone().requires_grad_() for t in (x, *factors.values())]
    y = function(inputs[0], weight, **dict(zip(factors, inputs[1:], strict=True)), **options)
    grad = torch.ones_like(y) if grad is None else grad
    return y, torch.autograd.grad(y, inputs, grad)


def eager(x, weight, a, b, p, q, gate_bias, *, sizes, noise):
    """What one would write in the tensors' own dtype, with the mask that was agreed on."""
    mask = reference.gate_mask(p, q, gate_bias, sizes=sizes, noise=noise).to(x.dtype)
    delta = mask * torch.cat([part @ b[g] for g, part in enumerate(a.split(sizes))])
    return F.linear(x, weight) + F.linear(x, delta)


# ---- backends, called as the operators call them ----------------------------------------------------------------

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a seed and a step that need all 64 bits
NOISE = GateNoise(0x1234567_89ABCDEF, (5 << 32) + 7)
# tolerances of a relative Frobenius error
CLOSE = {torch.float16: 2e-6, torch.bfloat16: 2e-6, torch.float32: 2e-6, torch.float64: 1e-13}
# what `run` returns, the last two only with penalties
NAMES = ("y", "dx", "da", "db", "dp", "dq", "dc", "sparsity", "forgetting")
# gradients of the two penalties
PULL = (0.7, 0.03)


def problem(tokens, k, sizes, r, s, dtype, gate=True, bias=True, seed=0):
    """Random arguments: (grad, x, weight, a, b, p, q, gate_bias), factors in fp32 (fp64 for fp64)."""
    generator = torch.Generator().manual_seed(seed)
    rows, wide = sum(sizes), reference.compute_dtype(dtype)

    def draw(*shape, as_dtype=wide):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, as_dtype)

    grad, x, weight = draw(tokens, rows, as_dtype=dtype), draw(tokens, k, as_dtype=dtype), draw(rows, k, as_dtype=dtype)
    a, b = draw(rows, r), draw(len(sizes), r, k)
    p, q = (draw(rows, s), draw(len(sizes), s, k)) if gate else (None, None)
    return grad, x, weight, a, b, p, q, draw(len(sizes)) if gate and bias else None


def drawn(shape, dtype=torch.float32, **options):
    """`problem` of tokens, k, sizes, r and s, and a past of its own."""
    arguments = problem(*shape, dtype, **options)
    generator = torch.Generator().manual_seed(5)
    past = torch.randn(sum(shape[2]), shape[1], generator=generator, dtype=torch.float64)
    return arguments, past.to(DEVICE, reference.compute_dtype(dtype))


def prepared(p, noise):
    """The noise as a backend takes it."""
    return None if p is None or noise is None else noise.on(DEVICE)


def run(backend, grad, x, weight, a, b, p, q, gate_bias, sizes, noise=NOISE, tau=0.7, past=None):
    """(y, dx, da, db, dp, dq, dc) of a backend; with `past` [N, k] also the penalties."""
    wide, factors, noise = reference.compute_dtype(x.dtype), Factors(a, b, p, q, gate_bias), prepared(p, noise)
    if past is None:
        y, *both = (backend.forward(x, weight, factors, sizes, noise),)
        penalties = NO_PENALTIES
    else:
        y, *both = backend.forward_penalties(x, weight, factors, sizes, noise, past)
        penalties = PenaltyGradients(past, *(torch.tensor(g, dtype=wide, device=DEVICE) for g in PULL))
    tau = torch.tensor(tau, dtype=wide, device=DEVICE)
    dx, gradients = backend.backward(grad, x, weight, factors, sizes, noise, tau, penalties=penalties)
    return y, dx.to(x.dtype), *gradients, *both


def specified(grad, x, weight, a, b, p, q, gate_bias, sizes, noise=NOISE, tau=0.7, past=None):
    """y and dx of the reference in the same dtype; the rest in float64 from the rounded arguments.

    In fp32 the reference's 1 - s loses digits where s is near 1, which the kernels do not.
    """
    dtype, options = weight.dtype, {"sizes": sizes, "noise": noise, "tau": tau}
    bias = torch.zeros(len(sizes), device=DEVICE) if gate_bias is None and p is not None else gate_bias
    y = reference.masked_linear(x, weight, a, b, p, q, bias, **options)
    dx = reference.masked_linear_backward(grad, x, weight, a, b, p, q, bias, **options)[0]
    rounded = [None if t is None else t.to(dtype).double() for t in (grad, x, weight, a, b, p, q)]
    rounded.append(None if bias is None else bias.double())
    if past is None:
        return y, dx, *reference.masked_linear_backward(*rounded, **options)[1:]
    pull = dict(zip(("past", "d_sparsity", "d_forgetting"), (past.double(), *PULL), strict=True))
    exact = reference.masked_linear_backward(*rounded, **options, **pull)
    return y, dx, *exact[1:], *reference.gate_penalties(*rounded[3:], sizes=sizes, noise=noise, past=past.double())


def magnitudes(grad, x, weight, a, b, p, q, gate_bias, sizes, noise=NOISE, tau=0.7, past=None):
    """What `specified` would be if no term of a sum had a sign, in float64: y, dx and the gradients, None without a gate.

    Where terms of both signs meet, a sum keeps the digits of its terms, not its own.
    """
    signed = [None if t is None else t.to(weight.dtype).double() for t in (p, q)]
    grad, x, weight, a, b, p, q = (
        None if t is None else t.to(weight.dtype).double().abs() for t in (grad, x, weight, a, b, p, q)
    )
    product = delta = reference.low_rank(a, b, sizes)
    d_weight = grad.T @ x
    if p is not None:
        bias = None if gate_bias is None else gate_bias.double()
        z = reference.noisy_logits(*signed, bias, sizes, torch.float64, noise)
        delta = (z > 0) * product
    if past is not None:
        d_weight += 2 * PULL[1] * past.double().square() * delta
    made = x @ (weight + delta).T, grad @ (weight + delta)
    if p is None:
        return *made, *reference._factor_gradients(d_weight, a, b, sizes), None, None, None
    d_logits = d_weight * product * reference.slope(z, tau)
    if past is not None:
        d_logits += PULL[0] / max(1, z.numel()) * reference.slope(reference.logits(*signed, bias, sizes, torch.float64), 1.0)
    d_bias = torch.stack([part.sum() for part in d_logits.split(sizes)])
    left, right = (reference._factor_gradients(d, *f, sizes) for d, f in (((z > 0) * d_weight, (a, b)), (d_logits, (p, q))))
    return *made, *left, *right, d_bias


def assert_close(got, wanted, dtype, names=NAMES):
    for name, one, other in zip(names[: len(wanted)], got, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is None:
            continue
        assert one.shape == other.shape, name
        # y and dx were rounded to the dtype: a sum in another order may move them by one unit there
        ulp = torch.finfo(one.dtype).eps if name in ("y", "dx") else 0.0
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-300)
        assert error <= CLOSE[dtype] + ulp / 8, (name, float(error))
        assert one.dtype == (dtype if name in ("y", "dx") else reference.compute_dtype(dtype)), name


def strided(tensor, kind):
    """The same values behind other strides: "transposed", or with "gaps" of NaN."""
    if tensor is None:
        return None
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"), dtype=tensor.dtype, device=DEVICE)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


def everything(backend, arguments, sizes, penalised=True, noise=NOISE):
    """All that a backend makes: `run`, with penalties or without, a fold alone and with a master, a rebuild."""
    weight, factors = arguments[2], Factors(*arguments[3:])
    alone, folded, rebuilt = weight.clone(), weight.clone(), weight.clone()
    master, kept = (weight.to(reference.compute_dtype(weight.dtype), copy=True) for _ in range(2))
    made = run(backend, *arguments, sizes, noise, past=weight if penalised else None)
    backend.fold_(alone, factors, sizes, None)
    backend.fold_(folded, factors, sizes, master)
    # tasks of different kinds take a launch each
    backend.rebuild_(rebuilt, weight, [factors, Factors(*factors[:2])], sizes, kept)
    return *(t for t in made if t is not None), alone, folded, master, rebuilt, kept


def masks(backend, sizes, k, p, q, gate_bias, noise, dtype=torch.float16):
    """The mask as the forward, dx and the factors' gradients apply it, read off with A B = 1, W = 0 and unit inputs."""
    rows, groups = sum(sizes), len(sizes)
    zero = torch.zeros(rows, k, dtype=dtype, device=DEVICE)
    a, b = torch.ones(rows, 1, device=DEVICE), torch.ones(groups, 1, k, device=DEVICE)
    factors, noise, tau = Factors(a, b, p, q, gate_bias), prepared(p, noise), torch.ones((), device=DEVICE)
    forward = backend.forward(torch.eye(k, dtype=dtype, device=DEVICE), zero, factors, sizes, noise).T
    unit = torch.eye(rows, dtype=dtype, device=DEVICE)
    backward, _ = backend.backward(unit, zero, zero, factors, sizes, noise, tau, need_factors=False)
    # dW = 1 and B = the unit matrix make dA = M
    ones = torch.ones(1, max(rows, k), dtype=dtype, device=DEVICE)
    whole = Factors(a.expand(rows, k), torch.eye(k, device=DEVICE).expand(groups, k, k), p, q, gate_bias)
    _, through = backend.backward(ones[:, :rows], ones[:, :k], zero, whole, sizes, noise, tau, need_x=False)
    return [m.float() for m in (forward, backward, through.a)]
