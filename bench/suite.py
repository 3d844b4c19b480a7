"""Many cases one after another, within a time: `python -m stamina_fast.bench.suite cpu --output FOLDER --minutes 2`.

Each case writes its own JSON as soon as it is done; the plots come last. `--resume` skips the cases that the same code has
already measured in FOLDER.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import machine
from .run import run


@dataclass(frozen=True)
class Step:
    """One call of `run`, and how long it may take: it does not start with less time left."""

    shape: str
    batch: int = 1
    rank: int = 16
    dtype: str = "bfloat16"
    compiled: bool = False
    rounds: int = 15
    seconds: float = 0.6
    expected: float = 20.0

    @property
    def name(self) -> str:
        return f"{self.shape}-b{self.batch}-r{self.rank}-{self.dtype}{'-compiled' if self.compiled else ''}"


BATCHES = (1, 2, 4, 8, 16)
PLANS = {
    # the compiled reference comes last, since it takes longest to build
    "cpu": (
        Step("small", dtype="float32", seconds=3, expected=12), Step("small", batch=8, dtype="float32", seconds=3, expected=12),
        Step("sd15", dtype="float32", rounds=11, seconds=20, expected=80),
        Step("sd15", dtype="bfloat16", rounds=11, seconds=20, expected=80),
        Step("small", dtype="float32", compiled=True, seconds=3, expected=40),
    ),
    "sd15": tuple(Step("sd15", batch) for batch in BATCHES),
    "sd21": tuple(Step("sd21", batch) for batch in BATCHES),
    "sdxl": tuple(Step("sdxl", batch, expected=30) for batch in BATCHES),
    "ranks": (
        *(Step("sd15", rank=rank) for rank in (4, 8, 32, 64)), *(Step("sdxl", rank=rank, expected=30) for rank in (4, 64)),
    ),
    "dtypes": (
        Step("sd15", dtype="float16"), Step("sd15", dtype="float32"), Step("small", dtype="bfloat16"),
        Step("small", dtype="float32"),
    ),
    "compiled": tuple(Step("sd15", batch, compiled=True, expected=120) for batch in (1, 4)),
}


def done_before(path: Path) -> bool:
    """Whether `path` holds a green result of the same code."""
    if not path.is_file():
        return False
    result = json.loads(path.read_text())
    return result["machine"]["source"] == machine.source_hash() and not result["red"]


def suite(plan: str, output: Path, device: str | None, minutes: float, resume: bool) -> bool:
    """Run a plan and write to `output`. Returns whether every case ran and none was red."""
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    complete = True
    for step in PLANS[plan]:
        path = output / f"{step.name}.json"
        if resume and done_before(path):
            print(f"{step.name}: measured before")
            continue
        if end - time.monotonic() < step.expected:
            print(f"{step.name}: not run, it would pass the {minutes:g} minutes; give more with --minutes")
            complete = False
            continue
        options = asdict(step)
        del options["expected"]
        try:
            complete &= not run(**options, device=device, output=path)["red"]
        except Exception:
            # a case that fails, perhaps out of memory, must not stop the others
            traceback.print_exc()
            print(f"{step.name}: failed, see above")
            complete = False
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.compiler.reset()
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no plots, matplotlib is not installed; elsewhere: python -m stamina_fast.bench.plots {output}")
    else:
        from .plots import draw

        print(*draw(output), sep="\n")
    return complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--resume", action="store_true")
    sys.exit(0 if suite(**vars(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
