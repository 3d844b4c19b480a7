"""Every kernel once on small shapes: `compute-sanitizer --tool memcheck python -m stamina_fast.bench.sanitize`.

The shapes are irregular on purpose: projections and columns that fill no tile, an empty projection, ranks below and above those
of one dot.
"""

from __future__ import annotations

import torch

import stamina_fast as sf
from stamina_fast.ops import functional

from .problem import Case, build
from .shapes import Shape

# with its ranks
SHAPES = ((Shape("ragged", (7, 70, 0, 3), 40, tokens=5), 3), (Shape("two spans", (33, 64), 300, tokens=17), 17))

DTYPES = {"triton": (torch.bfloat16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}


def visit(case: Case, backend: str) -> None:
    """Forward and backward with the sampled mask and without any, with penalties too; folds and rebuild."""
    problem = build(case)
    x = problem.x.requires_grad_()
    factors = {name: factor.requires_grad_() for name, factor in problem.factors().items()}
    plain = {name: factors[name] for name in ("a", "b")}
    for noise, chosen in ((problem.noise, factors), (None, plain)):
        y = sf.masked_linear(x, problem.weight, **chosen, sizes=problem.sizes, noise=noise, tau=problem.tau, backend=backend)
        torch.autograd.grad(y, [x, *chosen.values()], problem.grad)
    past = torch.ones_like(problem.weight)
    whole = functional.masked_linear_penalties(
        x, problem.weight, **factors, sizes=problem.sizes, noise=problem.noise, tau=problem.tau, past=past, backend=backend
    )
    torch.autograd.grad(sum(result.float().sum() for result in whole), [x, *factors.values()])
    detached = {name: factor.detach() for name, factor in factors.items()}
    for master in (None, problem.weight.to(torch.float32, copy=True)):
        sf.fold_(problem.weight.clone(), **detached, sizes=problem.sizes, master=master, backend=backend)
    sf.rebuild_(problem.weight.clone(), problem.weight, [detached, detached], sizes=problem.sizes, backend=backend)


def main() -> None:
    backends = [name for name in DTYPES if sf.backends()[name][0]]
    for backend in backends:
        for dtype in DTYPES[backend]:
            for shape, rank in SHAPES:
                visit(Case(shape, rank=rank, dtype=dtype, device="cuda"), backend)
    torch.cuda.synchronize()
    print(f"visited every kernel of {' and '.join(backends)}: {sf.launches()}")


if __name__ == "__main__":
    main()
