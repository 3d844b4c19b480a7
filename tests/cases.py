"""Random arguments for the operators, and the distance that tests speak of."""

import torch

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


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()
