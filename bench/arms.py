"""The arms: each way to compute K/V of a whole U-Net that the bench compares, and each way to fold.

A `Product` computes the outputs of all projections. Without gradients it is an arm of the forward. With gradients, and then
differentiated, it is an arm of forward + backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stamina_fast as sf

from .problem import Problem

BACKWARD = " +backward"


@dataclass(frozen=True)
class Product:
    """`compute` returns one output [T, N], or one a projection. `leaves` names what is differentiated, in one or more parts."""

    compute: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: dict[str, list[Tensor]]
    grads: list[Tensor]

    def forward(self) -> dict[str, list[Tensor]]:
        with torch.no_grad():
            y = self.compute()
        return {"y": list(y) if isinstance(y, tuple) else [y]}

    def backward(self) -> dict[str, list[Tensor]]:
        y = self.compute()
        y = list(y) if isinstance(y, tuple) else [y]
        gradients = iter(torch.autograd.grad(y, [leaf for part in self.leaves.values() for leaf in part], self.grads))
        return {"y": y, **{name: [next(gradients) for _ in parts] for name, parts in self.leaves.items()}}


@dataclass(frozen=True)
class Arm:
    """One row of the table. `calls` do the same work, each in other memory. `kind` names the truth that checks them."""

    name: str
    what: str
    kind: str
    calls: list[Callable[[], dict[str, list[Tensor]]]]
    products: list[Product]
    adapter: bool = True
    # runs once before the outputs of calls[0] are compared
    reset: Callable[[], None] | None = None

    def outputs(self) -> dict[str, Tensor]:
        """The outputs of the first call, parts joined along their rows (the outputs of projections along their columns)."""
        if self.reset is not None:
            self.reset()
        return {name: torch.cat(parts, -1 if name == "y" else 0) for name, parts in self.calls[0]().items()}


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def one_product(problem: Problem) -> Product:
    x, weight = leaf(problem.x), leaf(problem.weight)
    return Product(lambda: F.linear(x, weight), {"dx": [x], "dw": [weight]}, [problem.grad])


def separate(problem: Problem) -> Product:
    x = leaf(problem.x)
    weights = [leaf(part.clone()) for part in problem.weight.split(problem.sizes)]
    grads = [part.contiguous() for part in problem.grad.split(problem.sizes, -1)]
    return Product(lambda: tuple(F.linear(x, weight) for weight in weights), {"dx": [x], "dw": weights}, grads)


def masked(problem: Problem, function: Callable[..., Tensor]) -> Product:
    """`function` is `masked_linear` of some backend, or of the reference, compiled or not."""
    x, factors = leaf(problem.x), {name: leaf(factor) for name, factor in problem.factors().items()}
    options = {"sizes": problem.sizes, "noise": problem.noise, "tau": problem.tau}
    leaves = {"dx": [x], **{f"d{'c' if name == 'gate_bias' else name}": [factor] for name, factor in factors.items()}}
    return Product(lambda: function(x, problem.weight, **factors, **options), leaves, [problem.grad])


def peft_lora(problem: Problem) -> Product:
    """PEFT's LoRA on every projection as its users run it: adapters in fp32, A B without mask. Raises ImportError."""
    from peft import LoraConfig, get_peft_model

    rank = problem.case.rank
    plain = nn.ModuleDict()
    for index, part in enumerate(problem.weight.split(problem.sizes)):
        plain[f"projection{index}"] = nn.Linear(part.shape[1], part.shape[0], bias=False, device="meta")
        plain[f"projection{index}"].weight = nn.Parameter(part.clone(), requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(plain))
    layers = list(get_peft_model(plain, config).base_model.model.values())
    x, rows = leaf(problem.x), problem.a.split(problem.sizes)
    left, right = ([getattr(layer, half)["default"].weight for layer in layers] for half in ("lora_B", "lora_A"))
    with torch.no_grad():
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            a.copy_(rows[index].to(problem.case.dtype))
            b.copy_(problem.b[index].to(problem.case.dtype))
    grads = [part.contiguous() for part in problem.grad.split(problem.sizes, -1)]
    return Product(lambda: tuple(layer(x) for layer in layers), {"dx": [x], "da": left, "db": right}, grads)


def of_backend(name: str) -> Callable[..., Tensor]:
    def function(*arguments, **options):
        return sf.masked_linear(*arguments, **options, backend=name)

    return function


def products(problems: list[Problem], backends: list[str], compiled: bool) -> tuple[list[Arm], list[str]]:
    """(arms of the forward and of forward + backward, a line for every arm that is left out)."""
    ways = {
        "one product": ("plain", one_product),
        "separate projections": ("plain", separate),
        "eager reference": ("masked", lambda problem: masked(problem, sf.reference.masked_linear)),
    }
    left_out = []
    if compiled:
        # one compilation for all copies
        function = torch.compile(sf.reference.masked_linear, dynamic=False)
        ways["compiled reference"] = ("masked", lambda problem: masked(problem, function))
    try:
        import peft  # noqa: F401

        ways["PEFT LoRA, no mask"] = ("lora", peft_lora)
    except ImportError as error:
        left_out.append(f"PEFT LoRA is left out: {error}; pip install peft")
    for name in backends:
        ways[f"masked_linear/{name}"] = ("masked", lambda problem, name=name: masked(problem, of_backend(name)))
    arms = []
    for name, (kind, make) in ways.items():
        made = [make(problem) for problem in problems]
        arms.append(Arm(name, "forward", kind, [product.forward for product in made], made, kind != "plain"))
        arms.append(Arm(name + BACKWARD, "backward", kind, [product.backward for product in made], made, kind != "plain"))
    return arms, left_out


def folds(problems: list[Problem], backends: list[str]) -> list[Arm]:
    """The copy of W, and the fold by the reference and every backend, alone and through an fp32 master.

    They write to copies of the weight, so that the weight of the products stays unchanged.
    """
    weights = [problem.weight.clone() for problem in problems]
    masters = [problem.weight.to(torch.float32, copy=True) for problem in problems]

    def restore() -> None:
        weights[0].copy_(problems[0].weight)
        masters[0].copy_(problems[0].weight)

    def arm(name: str, what: str, kind: str, do: Callable[[int], Tensor]) -> Arm:
        calls = [lambda index=index: {"weight": [do(index)]} for index in range(len(problems))]
        return Arm(name, what, kind, calls, [], adapter=kind == "fold", reset=restore)

    def folding(fold: Callable[..., Tensor], with_master: bool, **options) -> Callable[[int], Tensor]:
        def do(index: int) -> Tensor:
            master = {"master": masters[index]} if with_master else {}
            return fold(weights[index], **problems[index].factors(), sizes=problems[index].sizes, **master, **options)

        return do

    ways = [("eager reference fold", sf.reference.fold_, {})]
    ways += [(f"fold_/{name}", sf.fold_, {"backend": name}) for name in backends]
    arms = [arm("copy of W", "fold", "copy", lambda index: weights[index].copy_(problems[index].weight))]
    for name, fold, options in ways:
        arms.append(arm(name, "fold", "fold", folding(fold, False, **options)))
        arms.append(arm(f"{name} +master", "fold with master", "fold", folding(fold, True, **options)))
    return arms
