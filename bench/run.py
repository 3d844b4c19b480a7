"""What masked K/V costs beside plain projections: `python -m bench.run --shape sd15`, or `stamina-fast bench`.

Every arm runs once a round, in an order shuffled anew each round, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import stamina_fast as sf
from stamina_fast.errors import InputError

from .shapes import SHAPES, Shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build(shape: Shape, *, batch: int, rank: int, dtype: torch.dtype, device: str) -> dict:
    """Random arguments of `masked_linear`: x [batch * tokens, k], weight [N, k], factors fp32 that record gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size, generator=generator)).to(device)

    groups, rows, k = len(shape.sizes), shape.rows, shape.k
    factors = {
        "a": normal(rows, rank, scale=1e-2), "b": normal(groups, rank, k, scale=1e-2),
        "p": normal(rows, rank), "q": normal(groups, rank, k, scale=rank**-0.5), "gate_bias": normal(groups),
    }
    for factor in factors.values():
        factor.requires_grad_()
    x = normal(batch * shape.tokens, k).to(dtype).requires_grad_()
    return {"x": x, "weight": normal(rows, k, scale=k**-0.5).to(dtype), "sizes": shape.sizes, **factors}


def build_arms(arguments: dict, backends: list[str]) -> dict[str, Callable[[], None]]:
    """Named calls to time. Each computes K/V of the whole stack; those marked +backward also every gradient asked for."""
    x, weight, sizes = arguments["x"], arguments["weight"], arguments["sizes"]
    factors = {name: arguments[name] for name in ("a", "b", "p", "q", "gate_bias")}
    grad = torch.ones(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    noise = sf.GateNoise(0, 1)
    folded = weight.clone()

    def separate() -> torch.Tensor:
        return torch.cat([x @ part.T for part in weight.split(sizes)], dim=-1)

    def stacked() -> torch.Tensor:
        return x @ weight.T

    def forward(compute: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            compute()

    def backward(compute: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> None:
        torch.autograd.grad(compute(), inputs, grad)

    arms = {
        "separate projections": lambda: forward(separate),
        "one product": lambda: forward(stacked),
        "one product +backward (x)": lambda: backward(stacked, [x]),
    }
    for name in backends:

        def masked(name: str = name) -> torch.Tensor:
            return sf.masked_linear(x, weight, *factors.values(), sizes=sizes, noise=noise, backend=name)

        arms[f"masked_linear/{name}"] = lambda masked=masked: forward(masked)
        arms[f"masked_linear/{name} +backward (x, factors)"] = lambda masked=masked: backward(masked, [x, *factors.values()])
        arms[f"fold_/{name}"] = lambda name=name: sf.fold_(folded, *factors.values(), sizes=sizes, backend=name)
    return arms


def time_arms(arms: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of every arm in every round, after one round that does not count."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    order, times = list(arms), {name: [] for name in arms}
    shuffle = random.Random(0).shuffle
    for turn in range(rounds + 1):
        shuffle(order)
        for name in order:
            wait()
            start = time.perf_counter()
            arms[name]()
            wait()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def run(
    shape: str = "small", device: str | None = None, dtype: str = "float32", batch: int = 1, rank: int = 16, rounds: int = 7,
    backends: list[str] | None = None, output: Path | None = None,
) -> dict:
    """Time, print and return `{"machine": …, "arms": {name: [milliseconds]}}`; `output` also writes it as JSON.

    `device` defaults to a GPU where there is one, `backends` to all that run on it. Raises InputError for an unknown
    shape, dtype or backend.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for kind, value, known in (("shape", shape, SHAPES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{kind} must be one of {', '.join(known)}, got {value!r}")
    status = sf.backends()
    backends = backends or [name for name, (available, _) in status.items() if available]
    for name in backends:
        if not status.get(name, (False, ""))[0]:
            raise InputError(f"backend {name!r} cannot run here: {status.get(name, (False, 'there is none of that name'))[1]}")
    arguments = build(SHAPES[shape], batch=batch, rank=rank, dtype=DTYPES[dtype], device=device)
    times = time_arms(build_arms(arguments, backends), rounds, device)
    machine = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "shape": shape, "dtype": dtype, "batch": batch, "rank": rank, "rounds": rounds,
    }
    result = {"machine": machine, "arms": times}
    show(result)
    if output is not None:
        partial = output.with_name(f"{output.name}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(output)
    return result


def show(result: dict) -> None:
    table = Table(caption=", ".join(f"{key} {value}" for key, value in result["machine"].items()), title="milliseconds")
    for heading in ("arm", "median", "fastest", "slowest", "× one product"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    unit = statistics.median(result["arms"]["one product"])
    for name, times in result["arms"].items():
        median = statistics.median(times)
        table.add_row(name, *(f"{t:.2f}" for t in (median, min(times), max(times))), f"{median / unit:.1f}")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    for name, default in (("batch", 1), ("rank", 16), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", action="append", dest="backends")
    parser.add_argument("--output", type=Path)
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
