"""What masked K/V costs beside plain projections: `python -m stamina_fast.bench.run --shape sd15`, or `stamina-fast bench`.

First, every arm's results are compared with the specification. An arm that fails is red and is not timed. Then all arms take
turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import stamina_fast as sf
from stamina_fast.errors import InputError
from stamina_fast.io.files import write_json
from stamina_fast.ops.triton import interpreted

from . import clock, machine
from .arms import BACKWARD, Arm, folds, products
from .problem import DTYPES, TOLERANCES, Case, build, judge, truth
from .shapes import SHAPES

HEADINGS = ("arm", "mode", "median", "quartiles", "× plain", "GB/s", "TFLOP/s", "kept MB", "peak MB")


def parse(
    shape: str, device: str | None, dtype: str, batch: int, rank: int, backends: list[str] | None
) -> tuple[Case, list[str]]:
    """The case and the backends to time. Default: all that run on the device, except Triton's interpreter."""
    for kind, value, known in (("shape", shape, SHAPES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{kind} must be one of {', '.join(known)}, got {value!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    status = sf.backends()
    for name in backends or ():
        if not status.get(name, (False, ""))[0]:
            raise InputError(f"backend {name!r} cannot run here: {status.get(name, (False, 'there is none of that name'))[1]}")
    if not backends:
        elsewhere = {"triton"} if interpreted() or not device.startswith("cuda") else {"cpu"}
        elsewhere |= {"cuda"} if dtype == "float32" else set()
        backends = [name for name, (available, _) in status.items() if available and name not in elsewhere]
    return Case(SHAPES[shape], batch, rank, DTYPES[dtype], device), backends


def gate(arms: list[Arm], problem) -> tuple[list[Arm], dict[str, dict], list[str]]:
    """(green arms, {arm: verdicts}, a line for every red one)."""
    green, verdicts, red, truths = [], {}, [], {}
    limit = TOLERANCES[problem.case.dtype]
    for arm in arms:
        if arm.kind not in truths:
            truths[arm.kind] = truth(problem, arm.kind)
        products = len(arm.products[0].grads) if arm.products else 1
        verdicts[arm.name] = judge(arm.outputs(), truths[arm.kind], problem.case.dtype, products)
        wrong = [
            f"{name} {v['most']:.1e} and {v['all']:.1e}" for name, v in verdicts[arm.name].items() if not v["green"]
        ]
        if wrong:
            red.append(f"RED, not timed: {arm.name}: {'; '.join(wrong)}, of {limit.most:.0e} and {limit.all:.0e} allowed")
        else:
            green.append(arm)
    return green, verdicts, red


def measure(case: Case, backends: list[str], compiled: bool, rounds: int, seconds: float) -> dict:
    """{"arms": {name: {mode: [milliseconds]}}, "facts": {name: …}, "red": [line], "notes": [line]} of one case."""
    problem = build(case)
    copies = clock.copies_needed(case, problem.nbytes())
    problems = [problem, *(problem.copy() for _ in range(copies - 1))]
    arms, notes = products(problems, backends, compiled)
    arms += folds(problems, backends)
    green, verdicts, red = gate(arms, problem)
    modes: Iterable[str] = (clock.CPU_MODE,)
    if case.device.startswith("cuda"):
        modes = [mode for mode in clock.GPU_MODES if copies > 1 or not mode.endswith("cold")]
        if copies == 1:
            notes.append(f"no cold times: {clock.MOST_COPIES} copies are less than three times the L2")
    result = {"arms": {arm.name: {} for arm in green}, "facts": {}, "red": red, "notes": notes}
    held = clock.memory([arm for arm in green if arm.what == "backward"], case.device)
    for arm in arms:
        facts = {"what": arm.what, "flop": case.flop(arm.what, arm.adapter), "bytes": case.bytes(arm.what, arm.adapter)}
        if arm.kind == "copy":
            facts |= {"flop": 0, "bytes": 2 * problem.weight.nbytes}
        if arm.name in held:
            facts |= dict(zip(("kept_bytes", "peak_bytes"), held[arm.name], strict=True))
        result["facts"][arm.name] = {**facts, "verdicts": verdicts[arm.name]}
    kinds = ("forward",), ("backward",), ("fold", "fold with master")
    for mode in modes:
        for kind in kinds:
            group = [arm for arm in green if arm.what in kind]
            times, refused = clock.time_arms(group, mode, rounds, seconds)
            for name, milliseconds in times.items():
                result["arms"][name][mode] = milliseconds
            notes += [f"{name}: no {mode}: {why}" for name, why in refused.items()]
    return result


def run(
    shape: str = "small", device: str | None = None, dtype: str = "float32", batch: int = 1, rank: int = 16, rounds: int = 15,
    backends: list[str] | None = None, output: Path | None = None, compiled: bool = False, seconds: float = 10.0,
) -> dict:
    """Check, time, print and return one case; `output` also writes it as JSON.

    `device` defaults to a GPU where there is one, `backends` to all that run on it. `compiled` adds torch.compile of the
    reference, which takes a minute or more to build. A mode takes at most about `seconds` for each of forward, forward +
    backward and fold, in fewer rounds where they do not fit. Raises InputError for an unknown shape, dtype or backend.
    """
    case, names = parse(shape, device, dtype, batch, rank, backends)
    asked = {"shape": shape, "dtype": dtype, "batch": batch, "rank": rank, "rounds": rounds}
    result = {
        "machine": {**machine.describe(case.device), **asked}, "roofs": clock.roofs(case),
        **measure(case, names, compiled, rounds, seconds),
    }
    show(result)
    if output is not None:
        write_json(output, result)
    return result


def rows(result: dict) -> list[tuple[str, ...]]:
    """The table: medians and quartiles in milliseconds, the ratio to the plain product (of the fold: to the copy)."""
    table, arms = [], result["arms"]
    for name, modes in arms.items():
        facts = result["facts"][name]
        base = {"forward": "one product", "backward": "one product" + BACKWARD}.get(facts["what"], "copy of W")
        for mode, times in modes.items():
            low, median, high = quartiles(times)
            unit = statistics.median(arms[base][mode]) if mode in arms.get(base, {}) else float("nan")
            rate = (f"{facts[key] / median / per:.3g}" for key, per in (("bytes", 1e6), ("flop", 1e9)))
            memory = (f"{facts[key] / 1e6:.3g}" if key in facts else "" for key in ("kept_bytes", "peak_bytes"))
            table.append((name, mode, f"{median:.4g}", f"{low:.4g} to {high:.4g}", f"{median / unit:.2f}", *rate, *memory))
    return table


def quartiles(times: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(times, n=4, method="inclusive")) if len(times) > 1 else (times[0],) * 3


def show(result: dict) -> None:
    """Print the table, then what was left out, then what was red."""
    facts, roofs = result["machine"], result["roofs"]
    case = f"{facts['shape']}, batch {facts['batch']}, rank {facts['rank']}, {facts['dtype']}"
    title = f"milliseconds of {case} on {facts['device']}; a fold's ratio is to the copy"
    rates = f"{roofs['copy_bytes_per_s'] / 1e9:.3g} GB/s copied, {roofs['gemm_flop_per_s'] / 1e12:.3g} TFLOP/s multiplied"
    caption = f"measured roofs: {rates}; torch {facts['torch']}, triton {facts['triton']}, {facts['threads']} threads"
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        # without rich: the same table in plain text
        lines = [HEADINGS, *rows(result)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print(title, *("  ".join(map(str.ljust, line, widths)) for line in lines), caption, sep="\n")
    else:
        table = Table(title=title, caption=caption, box=box.SIMPLE)
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", no_wrap=True)
        for row in rows(result):
            table.add_row(*row)
        # a log has no width, and no number may be cut short
        console = Console()
        console.width = max(console.width, 140)
        console.print(table)
    print(*result["notes"], *result["red"], sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    for name, default in (("batch", 1), ("rank", 16), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", action="append", dest="backends")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    sys.exit(1 if run(**vars(parser.parse_args()))["red"] else 0)


if __name__ == "__main__":
    main()
