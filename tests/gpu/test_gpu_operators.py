"""The operators on a real GPU, through the public functions: every backend that runs there, in every dtype."""

import pytest
import torch

import stamina_fast as sf

NOISE = (0x1234567_89ABCDEF, (5 << 32) + 7)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IDS = ["bf16", "fp16", "fp32"]
NAMES = ("a", "b", "p", "q", "gate_bias")
# tokens, k, sizes, r, s: all ones; odd sizes and an empty projection; a second span; ranks above those of one dot
RAGGED = (5, 40, (7, 70, 0, 3), 3, 5)
WIDE = (77, 768, (320, 640), 16, 16)
SHAPES = [(1, 1, (1,), 1, 1), RAGGED, (17, 259, (2, 33), 2, 1), WIDE, (154, 512, (128, 33, 300), 64, 4),
          (170, 72, (40,), 8, 8)]
# compiling takes most of the time, so the tests below share one shape and one pair of ranks
ONE = (77, 512, (64, 128), 16, 16)
# relative Frobenius errors: residual and result are rounded to the dtype, the gradients of the factors are fp32 sums
OUTPUT = {torch.bfloat16: 6e-3, torch.float16: 8e-4, torch.float32: 2e-6}
FACTOR = 1e-5


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    available, reason = sf.backends()[request.param]
    if not available:
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "cuda" and request.node.callspec.params.get("dtype") == torch.float32:
        pytest.skip("cuda: it takes bfloat16 and float16")
    return request.param


def problem(tokens, k, sizes, r, s, dtype, device, seed=0, scale=1.0):
    """(grad, x, weight, factors); A B is as large as W, so that W hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(sizes), len(sizes)

    def draw(*shape, scale=1.0, dtype=torch.float32):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    shapes = {"a": (rows, r), "b": (groups, r, k), "p": (rows, s), "q": (groups, s, k), "gate_bias": (groups,)}
    scales = {"a": scale * max(1, r) ** -0.5, "b": k**-0.5, "q": max(1, s) ** -0.5}
    factors = {name: draw(*shape, scale=scales.get(name, 1.0)) for name, shape in shapes.items()}
    return draw(tokens, rows, dtype=dtype), draw(tokens, k, dtype=dtype), draw(rows, k, scale=k**-0.5, dtype=dtype), factors


def noise(device):
    return sf.GateNoise(*(torch.tensor(v, dtype=torch.int64, device=device) for v in NOISE))


def everything(backend, grad, x, weight, factors, **options):
    """(y, dx, da, db, dp, dq, dc) through autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *factors.values())]
    y = sf.masked_linear(leaves[0], weight, **dict(zip(factors, leaves[1:], strict=True)), **options, backend=backend)
    return y, *torch.autograd.grad(y, leaves, grad)


def exact(grad, x, weight, factors, sizes, noise, tau):
    """The same in float64, from the arguments as the weight's dtype rounds them."""
    low = weight.dtype
    wide = {name: (t if name == "gate_bias" else t.to(low)).double() for name, t in factors.items()}
    options = {**wide, "sizes": sizes, "noise": noise, "tau": tau}
    y = sf.reference.masked_linear(x.double(), weight.double(), **options)
    return y, *sf.reference.masked_linear_backward(grad.double(), x.double(), weight.double(), **options)


def next_to_threshold(weight, factors, sizes, noise):
    """How many logits lie next to the threshold, where another order of sums may flip a mask entry."""
    low = {name: factors[name].to(weight.dtype).double() for name in ("p", "q")}
    z = sf.reference.noisy_logits(low["p"], low["q"], factors["gate_bias"].double(), sizes, torch.float64, noise)
    return int((z.abs() < 1e-5).sum())


def error(got, wanted):
    got, wanted = got.detach().double(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


@pytest.mark.parametrize("with_weight", [True, False], ids=["W", "W=0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(("shape", "sampled"), [*((shape, True) for shape in SHAPES), (RAGGED, False)], ids=str)
def test_equals_the_specification(shape, dtype, sampled, with_weight, backend, device):
    grad, x, weight, factors = problem(*shape, dtype, device)
    weight = weight if with_weight else torch.zeros_like(weight)
    chosen = noise(device) if sampled else None
    near = next_to_threshold(weight, factors, shape[2], chosen)
    before = sf.launches().get(f"masked_linear/{backend}", 0)
    got = everything(backend, grad, x, weight, factors, sizes=shape[2], noise=chosen, tau=0.7)
    assert sf.launches()[f"masked_linear/{backend}"] == before + 1
    wanted = exact(grad, x, weight, factors, shape[2], chosen, 0.7)
    # each entry next to the threshold may weigh as much as one of the rows * k
    flips = (2 * near / weight.numel()) ** 0.5
    for name, one, other in zip(("y", "dx", "da", "db", "dp", "dq", "dc"), got, wanted, strict=True):
        assert one.isfinite().all(), name
        limit = OUTPUT[dtype] if name in ("y", "dx") else FACTOR
        assert error(one, other) <= limit + flips, (name, error(one, other))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_no_worse_than_eager(dtype, backend, device):
    """Frobenius error at most 1.05 times that of the reference in the same dtype."""
    grad, x, weight, factors = problem(*WIDE, dtype, device)
    options = {"sizes": WIDE[2], "noise": noise(device), "tau": 0.7}
    wanted = exact(grad, x, weight, factors, *options.values())
    ours, eager = (everything(name, grad, x, weight, factors, **options) for name in (backend, "reference"))
    for index in range(2):
        assert error(ours[index], wanted[index]) <= 1.05 * error(eager[index], wanted[index]) + 1e-6


@pytest.mark.parametrize("with_master", [False, True], ids=["alone", "master"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("shape", [RAGGED, WIDE], ids=str)
def test_fold(shape, dtype, with_master, backend, device):
    _, _, weight, factors = problem(*shape, dtype, device)
    master = weight.float() + 1e-4 if with_master else None
    expected = weight.clone(), None if master is None else master.clone()
    before = (weight if master is None else master).clone()
    sf.reference.fold_(expected[0], **factors, sizes=shape[2], master=expected[1])
    sf.fold_(weight, **factors, sizes=shape[2], master=master, backend=backend)
    total, wanted = (weight, expected[0]) if master is None else (master, expected[1])
    near = next_to_threshold(weight, factors, shape[2], None)
    different = (total.float() - wanted.float()).abs() > 2 * torch.finfo(total.dtype).eps * (wanted.float().abs() + 1e-3)
    assert int(different.sum()) <= near
    closed = ~sf.gate_mask(factors["p"], factors["q"], factors["gate_bias"], sizes=shape[2], dtype=dtype)
    assert int((total[closed] != before[closed]).sum()) <= near
    if master is not None:
        assert torch.equal(weight, master.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_one_mask_everywhere(dtype, backend, device):
    """With A B = 1, W = 0 and unit inputs, the forward, dx, dA and the fold all show the mask, and it is the same."""
    sizes, k = (33, 70), 300
    rows = sum(sizes)
    *_, factors = problem(1, k, sizes, 1, 4, dtype, device)
    factors["a"] = torch.ones(rows, 1, device=device)
    factors["b"] = torch.ones(2, 1, k, device=device)
    zero = torch.zeros(rows, k, dtype=dtype, device=device)
    for chosen in (noise(device), None):
        options = {"sizes": sizes, "noise": chosen, "backend": backend}
        x = torch.eye(k, dtype=dtype, device=device)
        forward = sf.masked_linear(x, zero, **factors, **options).T.float()
        x = torch.zeros(rows, k, dtype=dtype, device=device, requires_grad=True)
        y = sf.masked_linear(x, zero, **factors, **options)
        (through_x,) = torch.autograd.grad(y, x, torch.eye(rows, dtype=dtype, device=device))
        # dW = 1 and B = the unit matrix make dA = M
        a = torch.ones(rows, k, device=device, requires_grad=True)
        unit = torch.eye(k, device=device).repeat(2, 1, 1)
        ones = torch.ones(1, k, dtype=dtype, device=device)
        y = sf.masked_linear(ones, zero, a, unit, *(factors[name] for name in ("p", "q", "gate_bias")), **options)
        (through_a,) = torch.autograd.grad(y, a, torch.ones_like(y))
        masks = [through_x.float(), through_a]
        if chosen is None:
            masks.append(sf.fold_(zero.clone(), **factors, sizes=sizes, backend=backend).float())
        for mask in masks:
            assert torch.equal(forward, mask)
        assert 0.2 < forward.mean() < 0.8


def mask_of_forward(backend, dtype, device, sizes, k, chosen, p, q, gate_bias):
    """M as the forward applies it, read off with A B = 1, W = 0 and unit inputs."""
    rows = sum(sizes)
    a, b = torch.ones(rows, 1, device=device), torch.ones(len(sizes), 1, k, device=device)
    zero = torch.zeros(rows, k, dtype=dtype, device=device)
    unit = torch.eye(k, dtype=dtype, device=device)
    return sf.masked_linear(unit, zero, a, b, p, q, gate_bias, sizes=sizes, noise=chosen, backend=backend).T > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_the_stream_is_the_one(dtype, backend, device):
    """Where L = 0 the mask is [u > 1/2], to the bit."""
    sizes, k = (33, 70), 600
    p, q = torch.zeros(103, 1, device=device), torch.zeros(2, 1, k, device=device)
    mask = mask_of_forward(backend, dtype, device, sizes, k, noise(device), p, q, None)
    assert torch.equal(mask, sf.gate_uniforms(noise(device), sizes, k) > 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_masks_equal_away_from_the_threshold(dtype, backend, device):
    """Every backend's mask is that of float64 wherever |z| >= 1e-5."""
    sizes, k = (33, 70), 600
    *_, factors = problem(1, k, sizes, 1, 16, dtype, device)
    gate = [factors[name] for name in ("p", "q", "gate_bias")]
    rounded = gate[0].to(dtype).double(), gate[1].to(dtype).double(), gate[2].double()
    for chosen in (noise(device), None):
        z = sf.reference.noisy_logits(*rounded, sizes, torch.float64, chosen)
        mask = mask_of_forward(backend, dtype, device, sizes, k, chosen, *gate)
        assert torch.equal(mask[z.abs() >= 1e-5], z[z.abs() >= 1e-5] > 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_the_same_bits_every_time(dtype, backend, device):
    """1,000 repeats of forward, backward and fold."""
    grad, x, weight, factors = problem(*ONE, dtype, device)
    options = {"sizes": ONE[2], "noise": noise(device), "tau": 0.7}
    first = everything(backend, grad, x, weight, factors, **options)
    folded = sf.fold_(weight.clone(), **factors, sizes=ONE[2], backend=backend)
    changed = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(1000):
        again = (*everything(backend, grad, x, weight, factors, **options),
                 sf.fold_(weight.clone(), **factors, sizes=ONE[2], backend=backend))
        for one, other in zip(again, (*first, folded), strict=True):
            changed += (one != other).sum()
    assert int(changed) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_a_captured_step_advances_its_noise(dtype, backend, device):
    """Forward and backward in one CUDA graph: after a change of seed or step, a replay gives the bits of an eager call."""
    grad, x, weight, factors = problem(*ONE, dtype, device)
    moving = noise(device)
    options = {"sizes": ONE[2], "noise": moving, "tau": torch.tensor(0.7, device=device)}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(backend, grad, x, weight, factors, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(backend, grad, x, weight, factors, **options)
    seen = []
    for seed, step in (NOISE, (NOISE[0], NOISE[1] + 1), (NOISE[0] + 1, 0)):
        moving.seed.fill_(seed)
        moving.step.fill_(step)
        graph.replay()
        seen.append([t.clone() for t in captured])
        eager = everything(backend, grad, x, weight, factors, **{**options, "noise": sf.GateNoise(seed, step)})
        for one, other in zip(seen[-1], eager, strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][0], seen[2][0])


def test_nothing_of_the_weights_size_is_kept(backend, device):
    """What the allocator holds while a graph is alive, beyond y: less than one bit an element."""
    grad, x, weight, factors = problem(77, 1024, (1280, 1280), 16, 16, torch.bfloat16, device)
    everything(backend, grad, x, weight, factors, sizes=(1280, 1280), noise=noise(device))
    leaves = [t.requires_grad_() for t in (x, *factors.values())]
    before = torch.cuda.memory_allocated()
    y = sf.masked_linear(*leaves[:1], weight, *leaves[1:], sizes=(1280, 1280), noise=sf.GateNoise(1, 2), backend=backend)
    assert torch.cuda.memory_allocated() - before - y.nbytes <= weight.numel() // 8


def needs(gigabytes, device):
    free, _ = torch.cuda.mem_get_info(device)
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, {free / 2**30:.0f} GiB are free")


def test_offsets_past_two_to_the_31(backend, device):
    """A weight of 2^31 + 2^21 entries: rows at the far end come out right, forward, dx, dA and fold."""
    needs(20, device)
    k, rows = 2048, (1 << 20) + 1024
    weight = torch.zeros(rows, k, dtype=torch.bfloat16, device=device)
    far = weight[-64:].normal_()
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(16, k, generator=generator, device=device).bfloat16().requires_grad_()
    a = torch.zeros(rows, 1, device=device)
    a[-64:] = 1
    a.requires_grad_()
    b = torch.randn(1, 1, k, generator=generator, device=device) / k**0.5
    y = sf.masked_linear(x, weight, a, b, backend=backend)
    delta = a[-64:].detach().bfloat16().double() @ b[0].bfloat16().double()
    effective = far.double() + delta.bfloat16().double()
    assert error(y[:, -64:], x.double() @ effective.T) < 4e-3
    assert not y[:, :-64].any()
    grad = torch.zeros_like(y)
    grad[:, -64:] = torch.randn(16, 64, generator=generator, device=device).bfloat16()
    dx, da = torch.autograd.grad(y, (x, a), grad)
    assert error(dx, grad[:, -64:].double() @ effective) < 4e-3
    assert error(da[-64:], grad[:, -64:].double().T @ x.double() @ b[0].bfloat16().double().T) < 1e-5
    assert not da[:-64].any()
    expected = (far.float() + delta.float()).bfloat16()
    sf.fold_(weight, a.detach(), b, backend=backend)
    assert torch.equal(weight[-64:], expected)
    assert not weight[:-64].any()


def test_outputs_past_two_to_the_31(backend, device):
    """y of 2^31 + 2^21 entries: rows of x at the far end come out right, forward and dx."""
    needs(24, device)
    tokens, k, rows = (1 << 16) + 64, 32, 1 << 15
    weight = torch.randn(rows, k, device=device).bfloat16()
    x = torch.zeros(tokens, k, dtype=torch.bfloat16, device=device)
    x[-16:].normal_()
    a, b = torch.zeros(rows, 1, device=device), torch.zeros(1, 1, k, device=device)
    x.requires_grad_()
    y = sf.masked_linear(x, weight, a, b, backend=backend)
    assert error(y[-16:], x[-16:].double() @ weight.double().T) < 4e-3
    assert not y[0].any()
    assert not y[-17].any()
    grad = torch.zeros_like(y)
    grad[-1] = 1
    (dx,) = torch.autograd.grad(y, x, grad)
    assert error(dx[-1], weight.double().sum(0)) < 4e-3
    assert not dx[:-1].any()
