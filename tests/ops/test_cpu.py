"""What the compiled CPU backend alone has: its error, its sums, threads, instruction sets, memory, any shape, the choice.

What it shares with every backend is in test_backends.py.
"""

from functools import partial
from itertools import accumulate

import cases
import pytest
import torch
from cases import NOISE, assert_close, eager, everything, masks, problem, relative, specified
from checks import same
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.profiler import ProfilerActivity, profile

import stamina_fast as sf
from stamina_fast.errors import InputError
from stamina_fast.ops import cpu, reference
from stamina_fast.ops.backend import Factors
from stamina_fast.threads import threads

pytestmark = [
    pytest.mark.skipif(bool(cpu.load()), reason=cpu.load() or "-"),
    pytest.mark.skipif(cases.DEVICE.type != "cpu", reason="the shared cases are made on the GPU here"),
]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LOW = (torch.float32, torch.bfloat16, torch.float16)
SETS = ("avx512_bf16", "avx512", "avx2", "generic")


def backend_of(instructions):
    """The backend on one instruction set."""
    if instructions not in cpu.instruction_sets():
        pytest.skip(f"this machine has {' '.join(cpu.instruction_sets())}")
    return cpu.Cpu(instructions)


@pytest.fixture(params=SETS)
def only(request):
    return backend_of(request.param)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_error_is_at_most_that_of_the_eager_code(only, dtype):
    """In two spans and in three, beside W and without it, where the residual's own error shows."""
    sizes = (64, 128)
    for k, share in ((320, 1), (320, 0), (768, 1), (768, 0)):
        x, weight, factors = cases.case(dtype, 192, k, sizes, 16, 8, tokens=(77,))
        weight *= share
        y = only.forward(x, weight, Factors(**factors), sizes, NOISE.on("cpu"))
        exact = {name: t.double() for name, t in factors.items()}
        truth = reference.masked_linear(x.double(), weight.double(), **exact, sizes=sizes, noise=NOISE)
        plain = eager(x, weight, **factors, sizes=sizes, noise=NOISE)
        assert relative(y, truth) <= 1.05 * relative(plain, truth)
        ulp = torch.finfo(dtype).eps * truth.abs()
        assert ((y.double() - truth).abs() - ulp).max() <= 2 * (plain.double() - truth).abs().max()


def test_a_small_sum_keeps_the_digits_of_its_terms(only):
    """dc is a thousandth of what it sums."""
    arguments = problem(80, 273, (1,), 1, 5, torch.float32, seed=97)
    options = {"noise": None, "tau": 0.3, "past": arguments[2]}
    made, wanted = (call(*arguments, (1,), **options)[6].item() for call in (partial(cases.run, only), specified))
    terms = cases.magnitudes(*arguments, (1,), **options)[6].item()
    assert abs(made - wanted) <= torch.finfo(torch.float32).eps / 32 * terms


@pytest.mark.parametrize("signs", ["both", "one"])
def test_sums_over_a_whole_projection(only, signs):
    """A million terms, of both signs or of one, lose no more than a few do."""
    sizes, k = (1280,), 768
    arguments = problem(2, k, sizes, 4, 4, torch.float32)
    if signs == "one":
        arguments = tuple(t.abs() for t in arguments)
    made, wanted = (call(*arguments, sizes, noise=None, past=arguments[2]) for call in (partial(cases.run, only), specified))
    # a sum of all is exact but for its own rounding
    limits = {name: 0.6 if name in ("dc", "sparsity", "forgetting") else 4 for name in cases.NAMES[2:]}
    for name, got, want in zip(limits, made[2:], wanted[2:], strict=True):
        assert relative(got, want) <= limits[name] * torch.finfo(torch.float32).eps, name


# ---- bits ----------------------------------------------------------------------------------------------------------


def test_threads_change_no_bit(only):
    sizes = (300, 0, 270)
    for dtype in DTYPES:
        arguments, made = problem(33, 140, sizes, 5, 3, dtype), []
        for count in (1, 2, 3, 5):
            with threads(count):
                made.append(everything(only, arguments, sizes))
        assert all(same(made[0], other) for other in made[1:])


@pytest.mark.parametrize(("r", "s"), [(5, 3), (67, 130)])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_instruction_sets_agree(dtype, r, s):
    """Bit for bit on the mask, and on a fold by itself, into a master and of many tasks; products within a rounding."""
    sizes, k = (33, 70), 270
    arguments = problem(9, k, sizes, r, s, dtype)
    sets = [cpu.Cpu(name) for name in cpu.instruction_sets()]
    if len(sets) == 1:
        pytest.skip("this machine has but one")
    gates = [masks(one, sizes, k, *arguments[5:], NOISE, dtype) for one in sets]
    assert all(same(gates[0], other) for other in gates[1:])
    made = [everything(one, arguments, sizes) for one in sets]
    assert all(same(made[0][-5:], other[-5:]) for other in made[1:])
    for other in made[1:]:
        assert_close(made[0][:9], [t.double() for t in other[:9]], dtype)


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_repeats_on_threads_change_no_bit(only, count):
    sizes = (40, 33)
    arguments = problem(9, 70, sizes, 3, 2, torch.bfloat16)
    with threads(3):
        first = everything(only, arguments, sizes)
        assert all(same(first, everything(only, arguments, sizes)) for _ in range(count))


def test_cpp_makes_nothing_of_the_weights_size(only):
    """The most that torch's allocator gives at any one time, in forward, backward with penalties and fold.

    In bf16, where what the C++ code takes for itself is wider than the arguments.
    """
    sizes, k = (2048, 1024, 1024), 1024
    arguments = problem(4, k, sizes, 2, 2, torch.bfloat16)
    past = torch.ones(4096, k)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cases.run(only, *arguments, sizes, past=past)
        only.fold_(arguments[2], Factors(*arguments[3:]), sizes, past)
    events = profiler.profiler.kineto_results.events()
    moves = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = max(accumulate(nbytes for _, nbytes in moves))
    # a left factor widened is 32 KiB, and the results are not more
    assert 4 * 4096 * arguments[2].element_size() <= most <= 4096 * k


# ---- any input -----------------------------------------------------------------------------------------------------


EDGES = st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17, 33, 65])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    instructions=st.sampled_from(cpu.instruction_sets() if not cpu.load() else ["none"]), dtype=st.sampled_from(DTYPES),
    tokens=st.sampled_from([0, 1, 2, 7, 80, 81]), k=st.sampled_from([0, 1, 15, 16, 17, 255, 256, 257, 273]),
    sizes=st.lists(EDGES, min_size=1, max_size=3), r=EDGES, s=st.sampled_from([0, 1, 2, 5]), gate=st.booleans(),
    noise=st.sampled_from([None, NOISE]), tau=st.sampled_from([1.0, 0.3]), seed=st.integers(0, 99),
)
def test_any_shape(instructions, dtype, tokens, k, sizes, r, s, gate, noise, tau, seed):
    """Within a few roundings of the result and of the terms that cancel in it."""
    arguments, sizes = problem(tokens, k, tuple(sizes), r, s, dtype, gate=gate, seed=seed), tuple(sizes)
    past = arguments[2].to(reference.compute_dtype(dtype))
    made = cases.run(backend_of(instructions), *arguments, sizes, noise, tau, past)
    wanted = specified(*arguments, sizes, noise, tau, past)
    if gate and past.numel():
        # a logit too near 0 for fp32 and fp64 to agree
        p, q = (t.to(dtype).double() for t in arguments[5:7])
        if (reference.noisy_logits(p, q, arguments[7].double(), sizes, torch.float64, noise).abs() < 1e-4).any():
            return
    # the penalties are sums of one sign
    terms = *cases.magnitudes(*arguments, sizes, noise, tau, past), *wanted[-2:]
    rounding = 4 * torch.finfo(reference.compute_dtype(dtype)).eps
    for name, got, want, size in zip(cases.NAMES, made, wanted, terms, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.shape == want.shape
            assert got.isfinite().all()
            limit = cases.CLOSE[dtype] * 4 + (torch.finfo(dtype).eps / 4 if name in ("y", "dx") else 0)
            error = (got.double() - want.double()).norm()
            assert error <= limit * want.double().norm() + rounding * size.norm() + 1e-6, (name, float(error))


def test_other_dtypes_of_factors_and_past(backend):
    """Factors wider or narrower than the weight are rounded to it; gradients come back in theirs."""
    _, x, weight, *factors = problem(5, 40, (7, 5), 3, 2, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [t.to(dtype).requires_grad_() for t in factors]
        y = sf.masked_linear(x, weight, *leaves, sizes=(7, 5), noise=NOISE)
        rounded = [t.detach().float() for t in leaves]
        torch.testing.assert_close(y, reference.masked_linear(x, weight, *rounded, sizes=(7, 5), noise=NOISE))
        assert {g.dtype for g in torch.autograd.grad(y.sum(), leaves)} == {dtype}
    past = torch.randn(12, 40)
    for other in (past.double(), past.T.contiguous().T, torch.ones(()).expand(12, 40)):
        made = sf.gate_penalties(*factors, sizes=(7, 5), noise=NOISE, past=other)
        wanted = reference.gate_penalties(*factors, sizes=(7, 5), noise=NOISE, past=other)
        torch.testing.assert_close(made, wanted)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_it_is_the_default_on_a_cpu():
    for dtype in DTYPES:
        x, weight, factors = cases.case(dtype)
        before = sf.launches().get("masked_linear/cpu", 0)
        sf.masked_linear(x, weight, **factors, sizes=cases.SIZES)
        assert sf.launches()["masked_linear/cpu"] == before + 1
    available, reason = sf.backends()["cpu"]
    assert available
    assert reason.endswith("generic")


def test_the_instruction_set_can_be_lowered(monkeypatch):
    here = tuple(torch.ops.stamina_fast.cpu_instruction_sets().split())
    for i, name in enumerate(here):
        monkeypatch.setenv("STAMINA_CPU_ISA", name)
        assert cpu.instruction_sets.__wrapped__() == here[i:]
    monkeypatch.setenv("STAMINA_CPU_ISA", "sse2")
    with pytest.raises(InputError, match=r"STAMINA_CPU_ISA must be one of .*generic on this machine, got 'sse2'; unset it"):
        cpu.instruction_sets.__wrapped__()


def test_unknown_instructions_are_refused():
    _, x, weight, *factors = problem(1, 4, (3,), 1, 1, torch.float32)
    with pytest.raises(ValueError, match=r"instructions must be one of .*generic, got sse"):
        cpu.Cpu("sse").forward(x, weight, Factors(*factors), (3,), None)
