"""A whole training step beside diffusers' own: `python -m stamina_fast.bench.step --model sd15`.

All arms train on the same concept and pictures, with the same batch, resolution and dtype:

    custom-diffusion, lora  the loops of diffusers' scripts, rebuilt with their defaults from what diffusers and peft ship, but
                            without their data loader, accelerate and progress bar; `--diffusers-examples` also runs the scripts
    reference, ours         our step with the eager reference, and as it runs by default
    frozen                  the same step with plain frozen projections: the least that a step can take

Weights are random, in the real configuration.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from pathlib import Path

import torch

from stamina_fast.errors import InputError
from stamina_fast.io.files import write_json
from stamina_fast.ops import dispatch

from .. import clock, machine
from ..problem import DTYPES
from ..run import quartiles
from . import measure
from .arms import Arm, Case, Lesson, Ours, lesson
from .loops import CustomDiffusion, Lora
from .memory import levers
from .models import MODELS, build, counted, networks, sharing
from .phases import PHASES
from .plots import draw
from .scripts import run_scripts

ARMS = ("custom-diffusion", "lora", "reference", "ours", "frozen")
HEADINGS = ("arm", "ms a step", "quartiles", "× frozen", "images/s", "launches", "peak GB", "s a concept")


def parse(
    model: str, pixels: int | None, batch: int, dtype: str, device: str, checkpointing: bool, steps: int, choices: dict,
) -> Case:
    for kind, value, known in (("model", model, MODELS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise InputError(f"{kind} must be one of {', '.join(known)}, got {value!r}")
    if dtype == "float16":
        raise InputError("dtype must be float32 or bfloat16, got float16, whose gradients underflow; pass bfloat16")
    if choices.get("attention") == "measured":
        raise InputError("attention must be named here, got 'measured', which `train` resolves; pass one of its kernels")
    # a picture of full size takes a CPU minutes
    pixels = pixels or (MODELS[model].pixels if device.startswith("cuda") else 64)
    return Case(model, MODELS[model], pixels, batch, DTYPES[dtype], device, steps, checkpointing, choices)


def backends_of(case: Case, asked: list[str] | None) -> list[str]:
    """The backends that run our step: those asked for, else the default; if that is the reference, all others."""
    device = torch.device(case.device)
    if asked:
        return [dispatch.choose(name, device, case.dtype) for name in asked]
    default = dispatch.choose(None, device, case.dtype)
    if default != "reference":
        return [default]
    found = []
    for name in ("triton", "cuda"):
        try:
            found.append(dispatch.choose(name, device, case.dtype))
        except RuntimeError:
            continue
    return found


def arms_of(case: Case, base, taught, names: list[str], backends: list[str]) -> tuple[list[Arm], list[str]]:
    """(the arms, a line for each one left out)."""
    found, notes = [], []
    captured = case.device.startswith("cuda")
    for name in names:
        if name == "custom-diffusion":
            if case.model.double:
                notes.append("custom-diffusion is left out: diffusers has no such script for a model of two text encoders")
                continue
            found.append(CustomDiffusion(case, taught, sharing(base)))
        elif name == "lora":
            if machine.version("peft") is None:
                notes.append("lora is left out: peft is not installed; pip install peft")
                continue
            found.append(Lora(case, taught, sharing(base)))
        elif name == "reference":
            found.append(Ours(case, taught, sharing(base), name, "reference"))
        elif name == "frozen":
            found.append(Ours(case, taught, sharing(base), name, None, captured))
        else:
            if not backends:
                notes.append("ours is left out: no compiled backend runs here; stamina-fast doctor says why")
            for backend in backends:
                title = name if len(backends) == 1 else f"{name}/{backend}"
                found.append(Ours(case, taught, sharing(base), title, backend, captured))
                if captured:
                    found.append(Ours(case, taught, sharing(base), f"{title}, uncaptured", backend))
    return found, notes


def measured(
    case: Case, base, taught: Lesson, names: list[str], backends: list[str], rounds: int, seconds: float,
) -> dict:
    """Everything but the machine: {"arms": {name: facts}, "ratios", "profile", "red", "notes", ...}."""
    common = measure.storages(networks(base))
    arms, notes = arms_of(case, base, taught, names, backends)
    facts = {arm.name: {} for arm in arms}
    held = {}
    for arm in arms:
        found = facts[arm.name]
        held[arm.name], _ = measure.grown(lambda arm=arm, found=found: found.update(measure.begin(arm)), case.device)
        print(f"{arm.name}: ready", flush=True)
    red = measure.judge(arms, facts)
    green = [arm for arm in arms if not any(line.startswith(f"{arm.name} ") for line in red)]
    print(f"{len(green)} arms take turns", flush=True)
    times = clock.take_turns({arm.name: measure.sample(arm) for arm in green}, rounds, seconds)
    phases = measure.phases(green)
    for arm in green:
        found = facts[arm.name]
        step_s = statistics.median(times[arm.name]) / 1e3
        found |= {"note": arm.note, "times_ms": times[arm.name], "phases_ms": phases[arm.name], "look_s": measure.look(arm)}
        found |= {"launches": measure.launches(arm), "memory": measure.memory(arm, held[arm.name], common)}
        encoding = taught.encoding if isinstance(arm, Ours) else 0.0
        looks = case.steps / case.options.read_every * found["look_s"]
        found |= {
            "encoding_s": encoding, "images_per_s": case.batch / step_s,
            "concept_s": found["start_s"] + encoding + case.steps * step_s + looks,
        }
        print(f"{arm.name}: measured", flush=True)
    fastest = best(facts)
    result = {
        "arms": facts, "ratios": ratios(times, fastest), "red": red, "notes": notes,
        "profile": {arm.name: measure.remains(arm) for arm in green if arm.name in (fastest, "frozen")},
    }
    for arm in arms:
        arm.close()
    return result


def best(facts: dict[str, dict]) -> str | None:
    """The fastest arm of ours."""
    ours = {name: statistics.median(found["times_ms"]) for name, found in facts.items()
            if name.startswith("ours") and "times_ms" in found}
    return min(ours, key=ours.get) if ours else None


def ratios(times: dict[str, list[float]], ours: str | None) -> dict[str, dict]:
    """{"ours / frozen": {"median", "quartiles"}, ...}: of the medians, and of the ratios in each round."""
    pairs = [(ours, "frozen"), ("reference", ours), ("custom-diffusion", ours), ("lora", ours)]
    found = {}
    for over, under in pairs:
        if over in times and under in times:
            each = [a / b for a, b in zip(times[over], times[under], strict=True)]
            low, _, high = quartiles(each)
            median = statistics.median(times[over]) / statistics.median(times[under])
            found[f"{over} / {under}"] = {"median": median, "quartiles": [low, high]}
    return found


def run(
    model: str = "sd15", pixels: int | None = None, batch: int = 1, dtype: str | None = None, device: str | None = None,
    arms: list[str] | None = None, backends: list[str] | None = None, rounds: int = 9, seconds: float = 60.0, steps: int = 500,
    checkpointing: bool = False, diffusers_examples: Path | None = None, output: Path | None = None, **choices,
) -> dict:
    """Check, time, print and return one case; `output` also writes it as JSON, with pictures beside it.

    pixels        side of a picture; default: the model's own on a GPU, 64 on a CPU
    dtype         default: bfloat16 on a GPU, float32 on a CPU
    backends      of the operators in our step; default: the one that runs by default
    rounds        of which all arms take turns, as many as fit into about `seconds`
    steps         of a concept, for the seconds that one takes
    checkpointing recomputes the U-Net's activations in every arm, and lists what else lessens memory
    choices       options of our trainer for our step and the frozen one: channels_last, compile, attention

    Raises InputError for what is not known, and for examples that cannot be run.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    case = parse(model, pixels, batch, dtype, device, checkpointing, steps, choices)
    unknown = sorted(set(arms or ()) - set(ARMS))
    if unknown:
        raise InputError(f"arm must be one of {', '.join(ARMS)}, got {unknown[0]!r}")
    base = build(case.model, case.device, case.dtype)
    libraries = ("diffusers", "transformers", "accelerate")
    facts = {
        **machine.describe(case.device), **{name: machine.version(name) for name in libraries},
        "model": model, "configuration": case.model.source, "pixels": case.pixels, "batch": batch, "dtype": dtype,
        "steps": steps, "checkpointing": checkpointing, "choices": choices, "parameters": counted(base),
    }
    taught, ran_by = lesson(case, base), backends_of(case, backends)
    result = {"machine": facts, **measured(case, base, taught, list(arms or ARMS), ran_by, rounds, seconds)}
    gc.collect()
    if diffusers_examples is not None:
        result["scripts"] = run_scripts(diffusers_examples, case, base, taught)
    if checkpointing:
        result["levers"] = levers(case, base, taught, ran_by[0])
    show(result)
    if output is not None:
        write_json(output, result)
        if importlib.util.find_spec("matplotlib") is None:
            print(f"no plots, matplotlib is not installed; elsewhere: python -m stamina_fast.bench.step.plots {output}")
        else:
            draw(output)
    return result


def rows(result: dict) -> list[tuple[str, ...]]:
    table, arms = [], {name: found for name, found in result["arms"].items() if "times_ms" in found}
    floor = statistics.median(arms["frozen"]["times_ms"]) if "frozen" in arms else float("nan")
    for name, found in arms.items():
        low, median, high = quartiles(found["times_ms"])
        launched = " / ".join(str(count) for count in found["launches"].values())
        table.append((name, f"{median:.4g}", f"{low:.4g} to {high:.4g}", f"{median / floor:.2f}",
                      f"{found['images_per_s']:.3g}", launched, f"{found['memory']['peak'] / 1e9:.2f}",
                      f"{found['concept_s']:.4g}"))
    return table


def show(result: dict) -> None:
    """Print the table of arms, that of phases, the ratios, what is left out or red, and what remains by name."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # a log has no width, and no number may be cut short
    console.width = max(console.width, 150)
    facts, arms = result["machine"], {name: found for name, found in result["arms"].items() if "times_ms" in found}
    title = f"a training step of {facts['model']}, {facts['pixels']} x {facts['pixels']} pixels, batch {facts['batch']}, " \
        f"{facts['dtype']}{', checkpointing' if facts['checkpointing'] else ''}, random weights, on {facts['device']}"
    kinds = next((" / ".join(found["launches"]) for found in arms.values()), "")
    caption = f"launches: {kinds}; s a concept: computed, {facts['steps']} steps with set-up and looks; " \
        f"torch {facts['torch']}, diffusers {facts['diffusers']}, {facts['threads']} threads"
    table = Table(title=title, caption=caption, box=box.SIMPLE)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    split = Table(title="milliseconds by phase, waiting for the device at each (not the timed runs)", box=box.SIMPLE)
    for heading in ("phase", *arms):
        split.add_column(heading, justify="left" if heading == "phase" else "right", no_wrap=True)
    for phase in PHASES:
        split.add_row(phase, *(f"{found['phases_ms'][phase]:.3g}" for found in arms.values()))
    console.print(split)
    lines = [f"{name}: {found['note']}" for name, found in arms.items()]
    lines += [f"{name}: {ratio['median']:.3f}, by rounds {ratio['quartiles'][0]:.3f} to {ratio['quartiles'][1]:.3f}"
              for name, ratio in result["ratios"].items()]
    lines += [f"{name}: {script['ms_a_step']:.4g} ms a step" for name, script in result.get("scripts", {}).items()]
    for name, remaining in result["profile"].items():
        lines += [f"what remains of {name}, by name:"]
        lines += [f"  {row['ms']:8.3f} ms  {row['calls']:6.1f} x  {row['name'][:110]}" for row in remaining]
    lines += [f"{row['lever']}: {row['text']}" for row in result.get("levers", ())]
    print(*lines, *result["notes"], *(f"RED, not timed: {line}" for line in result["red"]), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stamina_fast.bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd15", choices=MODELS)
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name != "float16"])
    parser.add_argument("--device")
    parser.add_argument("--pixels", type=int)
    for name, default in (("batch", 1), ("rounds", 9), ("steps", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timed rounds")
    parser.add_argument("--arm", action="append", dest="arms", choices=ARMS)
    parser.add_argument("--backend", action="append", dest="backends")
    parser.add_argument("--checkpointing", action="store_true", help="in every arm; also lists what lessens memory")
    for flag, what in (("channels-last", "the U-Net's convolutions so"), ("compile", "torch.compile of the U-Net's blocks")):
        parser.add_argument(f"--{flag}", action="store_true", default=argparse.SUPPRESS, help=f"{what}, in ours and frozen")
    parser.add_argument("--attention", default=argparse.SUPPRESS, help="kernels of attention, in ours and frozen")
    parser.add_argument("--diffusers-examples", type=Path, help="diffusers' examples folder, to run its scripts themselves")
    parser.add_argument("--output", type=Path, help="a JSON file; pictures are put beside it")
    try:
        sys.exit(1 if run(**vars(parser.parse_args()))["red"] else 0)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
