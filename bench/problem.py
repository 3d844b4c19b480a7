"""One case of the bench: its random arguments, what each arm must compute from them, and how close it must come.

A and B are drawn so large that the residual is as large as W. An error in the residual then cannot hide behind W: a mask that
is shifted, or of another step, changes every output by more than a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import stamina_fast as sf

from .shapes import Shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FACTORS = ("a", "b", "p", "q", "gate_bias")
# the truth is float64 up to this many weights, float32 above, where float64 would not fit a GPU
FLOAT64_UP_TO = 1 << 26
SAMPLE = 1 << 20


@dataclass(frozen=True)
class Tolerance:
    """Allowed errors. `most`: of nine entries in ten, relative to the root mean square. `all`: of Frobenius norms."""

    most: float
    all: float


# fp32: another order of sums passes, TF32 products (1e-4 and more) fail. `all` has room for the mask entries next to the
# threshold that another order of the logits' sum, or another exp, flips: some 1e-7 of them. Half: one unit of the dtype
TOLERANCES = {
    torch.float32: Tolerance(1e-4, 2e-3),
    torch.float16: Tolerance(1e-3, 2e-3),
    torch.bfloat16: Tolerance(8e-3, 8e-3),
}


@dataclass(frozen=True)
class Case:
    """What is measured: `batch` prompts on the stack of `shape`, ranks r = s = `rank`, x and W in `dtype` on `device`."""

    shape: Shape
    batch: int = 1
    rank: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return self.batch * self.shape.tokens

    @property
    def weights(self) -> int:
        return self.shape.rows * self.shape.k

    def flop(self, what: str, adapter: bool = True) -> int:
        """Floating-point operations of "forward", "backward" (the forward included) or a fold, without the gate's own."""
        product, ranks = 2 * self.tokens, 4 * self.rank if adapter else 0
        per_weight = {"forward": product + ranks, "backward": 3 * product + 4 * ranks}.get(what, ranks)
        return per_weight * self.weights

    def bytes(self, what: str, adapter: bool = True) -> int:
        """The fewest bytes to read and write: W once forward and once backward, x, y and their gradients, the factors."""
        item, shape = self.dtype.itemsize, self.shape
        factors = 4 * 2 * self.rank * (shape.rows + len(shape.sizes) * shape.k)
        ends = self.tokens * (shape.rows + shape.k) * item
        forward = self.weights * item + ends + (factors if adapter else 0)
        # the backward reads W, G and x and writes dx. It also reads the factors and writes their gradients, or writes dW
        more = 2 * factors if adapter else self.weights * item
        backward = forward + self.weights * item + ends + self.tokens * shape.k * item + more
        fold = 2 * self.weights * item + factors
        # through a master: fp32 read and written, and the weight written
        through = (8 + item) * self.weights + factors
        return {"forward": forward, "backward": backward, "fold": fold, "fold with master": through}[what]


@dataclass(frozen=True)
class Problem:
    """Arguments of `masked_linear` and a cotangent: x [T, k], weight [N, k], grad [T, N] in the case's dtype, factors fp32."""

    case: Case
    x: Tensor
    weight: Tensor
    grad: Tensor
    a: Tensor
    b: Tensor
    p: Tensor
    q: Tensor
    gate_bias: Tensor
    noise: sf.GateNoise
    tau: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.case.shape.sizes

    def factors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in FACTORS}

    def copy(self) -> Problem:
        """The same values in other memory."""
        names = ("x", "weight", "grad", *FACTORS)
        return replace(self, **{name: getattr(self, name).detach().clone() for name in names})

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in ("x", "weight", "grad", *FACTORS))


def build(case: Case) -> Problem:
    """Random arguments, the same for every run of a case. Seed and step are on the device, as a captured step has them."""
    device = torch.device(case.device)
    # a generator on the device: a GPU draws the 340 million weights of SDXL quickly
    generator = torch.Generator(device).manual_seed(0)
    groups, rows, k, rank = len(case.shape.sizes), case.shape.rows, case.shape.k, case.rank

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)

    return Problem(
        case,
        x=normal(case.tokens, k, dtype=case.dtype), weight=normal(rows, k, scale=k**-0.5, dtype=case.dtype),
        grad=normal(case.tokens, rows, dtype=case.dtype),
        a=normal(rows, rank, scale=rank**-0.5), b=normal(groups, rank, k, scale=k**-0.5),
        p=normal(rows, rank), q=normal(groups, rank, k, scale=rank**-0.5), gate_bias=normal(groups),
        noise=sf.GateNoise(*(torch.tensor(v, dtype=torch.int64, device=device) for v in (0x1234567_89ABCDEF, (5 << 32) + 7))),
        tau=torch.tensor(0.7, device=device),
    )


def truth(problem: Problem, kind: str) -> dict[str, Tensor]:
    """What an arm of this kind must return, computed by the specification in float64 (float32: see FLOAT64_UP_TO).

    "plain": y, dx, dw of x Wᵀ. "lora": y, dx, da, db without mask. "masked": y and all gradients. "fold": the folded weight;
    "copy": the weight as it was.
    """
    exact = torch.float64 if problem.case.weights <= FLOAT64_UP_TO else torch.float32
    low = problem.case.dtype
    x, weight, grad = (t.to(exact) for t in (problem.x, problem.weight, problem.grad))
    factors = {name: t.to(low).to(exact) for name, t in problem.factors().items()}
    factors["gate_bias"] = problem.gate_bias.to(exact)
    if kind == "plain":
        with sf.reference.full_precision(x.device):
            return {"y": x @ weight.T, "dx": grad @ weight, "dw": grad.T @ x}
    if kind == "copy":
        return {"weight": weight}
    if kind == "fold":
        return {"weight": sf.reference.fold_(weight.clone(), **factors, sizes=problem.sizes)}
    if kind == "lora":
        factors = {name: factors[name] for name in ("a", "b")}
    options = {**factors, "sizes": problem.sizes, "noise": problem.noise, "tau": problem.tau}
    with torch.no_grad():
        y = sf.reference.masked_linear(x, weight, **options)
    dx, *others = sf.reference.masked_linear_backward(grad, x, weight, **options)
    named = {name: d for name, d in zip(("da", "db", "dp", "dq", "dc"), others, strict=True) if d is not None}
    return {"y": y, "dx": dx, **named}


@torch.no_grad()
def errors(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(ninth decile of |got - wanted| by the root mean square of wanted, Frobenius norm by Frobenius norm)."""
    difference = (got.to(wanted.dtype) - wanted).flatten()
    norm = wanted.norm().clamp(min=1e-30)
    some = difference[:: max(1, difference.numel() // SAMPLE)].abs().double().sort().values
    decile = some[min(len(some) - 1, int(0.9 * len(some)))]
    return float(decile / (norm / wanted.numel() ** 0.5)), float(difference.norm() / norm)


def judge(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype, products: int = 1) -> dict[str, dict]:
    """{output: {"most": …, "all": …, "green": bool}} for every output in `got`; NaN is red.

    Autograd adds the dx of several products in their dtype and rounds each time, so √products times the error is allowed.
    """
    limit, verdicts = TOLERANCES[dtype], {}
    for name, tensor in got.items():
        most, whole = errors(tensor.reshape(wanted[name].shape), wanted[name])
        more = products**0.5 if name == "dx" else 1
        verdicts[name] = {"most": most, "all": whole, "green": most <= more * limit.most and whole <= more * limit.all}
    return verdicts
