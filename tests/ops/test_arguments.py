"""Any input works or says why: shapes, strides, offsets, dtypes, aliases, against the specification in float64."""

import os
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import stamina_fast as sf
from stamina_fast.ops import cpu

# `make test-long` asks for 20000
CASES = int(os.environ.get("STAMINA_CASES", "250"))
many = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
EDGES = st.sampled_from([0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33])


def laid_out(tensor, layout):
    """The same values with other strides or another offset."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided" and tensor.ndim:
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)[..., 0]
    if layout == "offset":
        flat = torch.full((tensor.numel() + 3,), float("nan"), dtype=tensor.dtype)
        flat[3:] = tensor.reshape(-1)
        return flat[3:].view(tensor.shape)
    return tensor


@st.composite
def calls(draw):
    sizes = tuple(draw(st.lists(EDGES, min_size=1, max_size=3)))
    n, k, rank, gate = sum(sizes), draw(st.sampled_from([0, 1, 3, 16, 31, 32, 33, 257])), draw(EDGES), draw(EDGES)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    tokens = draw(st.sampled_from([(), (1,), (0,), (5,), (2, 3), (2, 0, 3)]))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "offset"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    wide = draw(st.booleans())

    def make(*shape, factor=False):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        values = values.to(torch.promote_types(dtype, torch.float32)) if factor and wide else values
        return laid_out(values, layout)

    factors = {"a": make(n, rank, factor=True), "b": make(len(sizes), rank, k, factor=True)}
    if draw(st.booleans()):
        factors |= {"p": make(n, gate, factor=True), "q": make(len(sizes), gate, k, factor=True)}
        if draw(st.booleans()):
            factors["gate_bias"] = make(len(sizes), factor=True)
    noise = draw(st.sampled_from([None, sf.GateNoise(1, 2), sf.GateNoise(2**63 - 1, 2**40)]))
    return make(*tokens, k), make(n, k), factors, sizes, noise


def in_double(x, weight, factors):
    """The float64 inputs that the low-precision call stands for: factors rounded to the weight's dtype."""
    return x.double(), weight.double(), {name: f.to(weight.dtype).double() for name, f in factors.items()}


def bound(dtype, k, rank, x, weight, factors):
    """A loose rounding bound for one output, from the magnitudes that enter it."""
    largest = lambda t: t.abs().max().item() if t.numel() else 0.0  # noqa: E731
    row = largest(weight) + rank * largest(factors["a"]) * largest(factors["b"])
    return 8 * torch.finfo(dtype).eps * (1 + k * largest(x) * row)


def undecided(weight, factors, sizes, noise):
    """Whether a logit lies so near 0 that fp32 and fp64 may disagree about the mask."""
    if "p" not in factors or not weight.numel():
        return False
    gate = {name: factors[name].to(weight.dtype).double() for name in ("p", "q")}
    bias = factors.get("gate_bias")
    z = sf.reference.noisy_logits(gate["p"], gate["q"], None if bias is None else bias.double(), sizes, torch.float64, noise)
    return bool((z.abs() < 1e-4).any())


@pytest.mark.usefixtures("backend")
@many
@given(calls())
def test_masked_linear(call):
    x, weight, factors, sizes, noise = call
    leaves = [t.detach().requires_grad_() for t in (x, *factors.values())]
    y = sf.masked_linear(leaves[0], weight, **dict(zip(factors, leaves[1:], strict=True)), sizes=sizes, noise=noise)
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in leaves]
    y = y.detach()
    assert y.shape == (*x.shape[:-1], sum(sizes))
    assert y.dtype == x.dtype
    if undecided(weight, factors, sizes, noise):
        return
    wide_x, wide_weight, wide_factors = in_double(x, weight, factors)
    truth = sf.reference.masked_linear(wide_x, wide_weight, **wide_factors, sizes=sizes, noise=noise)
    if y.numel():
        rank = factors["a"].shape[1]
        assert (y.double() - truth).abs().max() <= bound(x.dtype, x.shape[-1], rank, x, weight, factors)


@pytest.mark.usefixtures("backend")
@many
@given(calls())
def test_fold(call):
    _, weight, factors, sizes, _ = call
    folded = weight.clone()
    assert sf.fold_(folded, **factors, sizes=sizes) is folded
    if undecided(weight, factors, sizes, None):
        return
    _, wide_weight, wide_factors = in_double(weight[:, :0], weight, factors)
    truth = sf.reference.fold_(wide_weight.clone(), **wide_factors, sizes=sizes)
    if weight.numel():
        rank = factors["a"].shape[1]
        one = torch.ones(1, dtype=torch.float64)
        assert (folded.double() - truth).abs().max() <= bound(weight.dtype, 1, rank, one, weight, factors)
        assert torch.equal(folded[truth == wide_weight], weight[truth == wide_weight])


BAD = {
    "x of the wrong width": (dict(x=torch.zeros(2, 3)), r"x must be \[..., k\] with k = 4, got \[2, 3\]"),
    "x without dimensions": (dict(x=torch.zeros(())), r"x must be"),
    "weight transposed": (dict(weight=torch.zeros(4)), r"weight must be \[N, k\]"),
    "dtypes apart": (dict(x=torch.zeros(2, 4).half()), r"x and weight must share"),
    "integers": (dict(a=torch.zeros(3, 2, dtype=torch.int64)), r"a must be floating point, got torch.int64"),
    "sizes": (dict(sizes=(1, 1)), r"summing to N = 3, got \(1, 1\)"),
    "negative sizes": (dict(sizes=(4, -1)), r"summing to N = 3"),
    "b without groups": (dict(b=torch.zeros(2, 4)), r"b must be \[G, r, k\] = \[1, 2, 4\], got \[2, 4\]"),
    "a transposed": (dict(a=torch.zeros(2, 3)), r"a must be \[N, r\] = \[3, 3\], got \[2, 3\]"),
    "p alone": (dict(p=torch.zeros(3, 2)), r"p and q go together"),
    "bias alone": (dict(gate_bias=torch.zeros(1)), r"gate_bias needs p and q"),
    "bias of the wrong length": (
        dict(p=torch.zeros(3, 1), q=torch.zeros(1, 1, 4), gate_bias=torch.zeros(2)), r"gate_bias must be \[G\] = \[1\]",
    ),
    "tau": (dict(tau=0.0), r"tau must be positive, got 0.0"),
    "tau of a shape": (dict(tau=torch.ones(2)), r"tau must be a float or a 0-dim"),
    "device": (dict(a=torch.zeros(3, 2, device="meta")), r"a must be on cpu, got meta"),
    "backend": (dict(backend="fast"), r"backend must be one of reference, cpu, triton, cuda, got 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_say_what_is_wanted(name):
    change, message = BAD[name]
    good = dict(x=torch.zeros(2, 4), weight=torch.zeros(3, 4), a=torch.zeros(3, 2), b=torch.zeros(1, 2, 4))
    sf.masked_linear(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        sf.masked_linear(**good | change)


def test_the_mask_names_its_own_arguments():
    with pytest.raises(ValueError, match=r"^q must be \[G, s, k\] = \[1, 2, 4\], got \[1, 3, 4\]"):
        sf.gate_mask(torch.zeros(5, 2), torch.zeros(1, 3, 4))


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "load", lambda: "no C++ compiler (of any kind)")
    for backend in ("cpu", "cuda"):
        available, reason = sf.backends()[backend]
        assert not available
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run this call: {re.escape(reason)}"):
            sf.masked_linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(1, 2, 4), backend=backend)
    before = sf.launches().get("masked_linear/reference", 0)
    sf.masked_linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(1, 2, 4))
    assert sf.launches()["masked_linear/reference"] == before + 1


def test_the_environment_chooses_a_backend(monkeypatch):
    monkeypatch.setenv("STAMINA_BACKEND", "nothing")
    with pytest.raises(ValueError, match="got 'nothing'"):
        sf.masked_linear(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(3, 2), torch.zeros(1, 2, 4))
