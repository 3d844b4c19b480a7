"""The command line: `stamina-fast demo | train | sample | evaluate | export | benchmark | bench | doctor`.

Each command imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from .errors import StaminaError
from .quiet import quiet


def explain(error: Exception) -> str:
    """The one line that is printed for an error that the user can put right."""
    if isinstance(error, OSError) and not isinstance(error, StaminaError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        remedy = {
            errno.ENOSPC: "; free some space and run the command again",
            errno.EACCES: "; change its permissions or pass another place",
            errno.EROFS: "; pass a place that can be written",
        }.get(error.errno, "")
        return f"{where}{error.strerror}{remedy}"
    return " ".join(str(error).split()) or type(error).__name__


class Commands(TyperGroup):
    """Print a StaminaError or OSError as one line and exit with code 2. Any other error keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (StaminaError, OSError) as error:
            if ctx.params["debug"]:
                raise
            typer.secho(f"stamina-fast: {explain(error)}", fg="red", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Teach a Stable Diffusion model one concept after another: hard-masked low-rank residuals that fold into its weights.",
)


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    pass


Run = Annotated[Path, typer.Argument(help="The RUN folder that `train` or `demo` left.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str | None, typer.Option(help="For instance cpu or cuda:0. Default: a GPU where there is one.")]
Base = Annotated[str | None, typer.Option(help="The base model, if it is not where the run's config.yaml says.")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="The RUN folder to leave.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Few steps: shows that everything works, not what it can do.")] = False,
    photographs: Annotated[bool, typer.Option("--photographs", help="Photographs, of what the model cannot draw.")] = False,
    seed: Seed = 0,
) -> None:
    """Teach the small model that travels with the package six identities, one after another, and show what it remembers."""
    from .demo import run_demo, run_photographs

    quiet()
    if photographs:
        run_photographs(output, quick)
    else:
        run_demo(output, quick, seed=seed)


SEVERAL = "\n\n".join((
    "Several GPUs, each with --batch pictures of its own in a step; a run is resumed with as many as it was started with:",
    "torchrun --nproc_per_node 2 -m stamina_fast.cli train …",
    "accelerate launch --multi_gpu --num_processes 2 -m stamina_fast.cli train …",
    "A run of its own on each GPU, as for a comparison of seeds:",
    "for g in 0 1; do CUDA_VISIBLE_DEVICES=$g stamina-fast train … --seed $g --output runs/$g & done; wait",
))


@app.command(epilog=SEVERAL)
def train(
    model: Annotated[str, typer.Option(help="A diffusers folder, the id of a model in the local hub cache, or tiny.")],
    concepts: Annotated[Path, typer.Option(help="concepts_list.json, or a folder with one folder of pictures a concept.")],
    output: Annotated[Path, typer.Option(help="The RUN folder to make.")],
    method: Annotated[str, typer.Option(help="Which residual is trained; a wrong name lists them all.")] = "stamina",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps a concept.")] = 500,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the residual A B; default: the method's own.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures a step.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or prodigy.")] = "adamw",
    learning_rate: Annotated[float | None, typer.Option(help="Of the factors and masks.")] = None,
    scale_lr: Annotated[bool, typer.Option("--scale-lr", help="Learning rates times batch, times processes, over 4.")] = False,
    seed: Seed = 0,
    device: Device = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a batch, one after another: less memory.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")] = False,
    aspect_buckets: Annotated[bool, typer.Option("--aspect-buckets", help="Crops near each picture's own shape.")] = False,
    prior_weight: Annotated[float, typer.Option(min=0, help="Of class pictures (class_data_dir); 0: none.")] = 0.0,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Convolutions in channels-last order.")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile of the U-Net's repeating blocks.")] = False,
    attention: Annotated[str, typer.Option(help="sdpa, math, flash, efficient, cudnn, xformers, or measured.")] = "sdpa",
    cache_latents: Annotated[Path | None, typer.Option(help="Folder that keeps encoded pictures for other runs.")] = None,
    capture: Annotated[bool | None, typer.Option(help="The step as one CUDA graph. Default: where there is a GPU.")] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints within a concept; 0: none.")] = 0,
    initializer_token: Annotated[
        list[str] | None, typer.Option(metavar="WORD|NAME=WORD", help="Word that a token starts from; NAME=… may be repeated."),
    ] = None,
    token_vectors: Annotated[int, typer.Option(min=1, help="Vectors of a token: <cat>, <cat>_1, …, as in diffusers.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the last concept, or checkpoint, of RUN.")] = False,
) -> None:
    """Learn every concept in turn, and fold each into the weights before the next."""
    from .io.concepts import parse_initializers
    from .training import train as run
    from .training.ranks import rank_here

    quiet()
    options = {"rank": rank, "batch": batch, "learning_rate": learning_rate, "device": device, "cache_latents": cache_latents,
               "capture": capture, "initializer_token": parse_initializers(initializer_token) if initializer_token else None}
    given = {name: value for name, value in options.items() if value is not None}
    run(
        model, concepts, output, method=method, steps=steps, seed=seed, resume=resume, accumulate=accumulate, compile=compile,
        gradient_checkpointing=gradient_checkpointing, prior_weight=prior_weight, channels_last=channels_last,
        aspect_buckets=aspect_buckets, attention=attention, optimizer=optimizer, save_every=save_every, scale_lr=scale_lr,
        token_vectors=token_vectors,
        **given,
    )
    if rank_here() == 0:
        typer.echo(f"{output / 'model'} is a plain diffusers pipeline; stamina-fast evaluate {output} measures what it learned")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="A RUN folder, a diffusers folder, a hub id in the local cache, or tiny.")],
    prompt: Annotated[str, typer.Option(help="What to draw, for instance: a photo of <cat>")],
    count: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 4,
    seed: Seed = 0,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance; 1 is none.")] = 7.5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 50,
    output: Annotated[Path, typer.Option(help="The folder to make; one that is there must be empty.")] = Path("samples"),
    cache: Annotated[bool, typer.Option("--cache", help="Keys and values once for all steps; same pictures.")] = False,
    device: Device = None,
) -> None:
    """Draw pictures of a prompt, one PNG each. The noise of a picture depends only on the seed and its number."""
    from .io.files import new_folder
    from .pipeline.load import load_pipeline
    from .pipeline.sampling import sample as draw, to_pil

    quiet()
    run = Path(model)
    pipeline = load_pipeline(run / "model" if (run / "manifest.json").is_file() else model, device)
    with new_folder(output) as partial:
        options = {"seed": seed, "guidance": guidance, "steps": steps, "cache_projections": cache}
        for number, picture in enumerate(to_pil(draw(pipeline, prompt, count, **options))):
            picture.save(partial / f"{number:04d}.png")
    typer.echo(f"{count} picture{'s' * (count > 1)} in {output}")


@app.command()
def evaluate(
    run: Run,
    samples: Annotated[int, typer.Option(min=2, help="Pictures of every concept at a time.")] = 32,
    guidance: Annotated[list[float] | None, typer.Option(min=1.0, help="May be repeated. Default: 1 and 3.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    features: Annotated[str, typer.Option(help="layout, clip, dino, or the folder of a CLIP or DINOv2.")] = "layout",
    model: Base = None,
    real: Annotated[Path | None, typer.Option(help="One folder of real pictures a concept. Default: the run's.")] = None,
    seed: Seed = 0,
    device: Device = None,
    triangle: Annotated[bool, typer.Option(help="Every concept after every later task; or after its own and the last.")] = True,
) -> None:
    """Measure what was learned and what was forgotten (A_mmd, F_mmd, P_mmd), with grids and plots, into RUN."""
    from .evaluate import evaluate_run

    quiet()
    metrics = evaluate_run(
        run, samples=samples, guidance=guidance or (1.0, 3.0), steps=steps, features=features, seed=seed, model=model,
        real=real, device=device, triangle=triangle,
    )
    drift = "" if metrics["F_mmd"] is None else f", F_mmd {metrics['F_mmd']:.4f}"
    typer.echo(f"A_mmd {metrics['A_mmd']:.4f}{drift}; {run / 'metrics.json'} has the rest, {run / 'plots'} the pictures")


class Format(StrEnum):
    diffusers = "diffusers"


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="The folder to make; one that is there must be empty.")],
    format: Annotated[Format, typer.Option(help="diffusers: a folder that from_pretrained reads.")] = Format.diffusers,
    tasks: Annotated[str | None, typer.Option(help="Only these concepts, by name: cat,coffee. Default: all.")] = None,
    model: Base = None,
    device: Device = None,
) -> None:
    """Write a folded model that loads without this package."""
    from .export import export_diffusers

    quiet()
    names = None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    export_diffusers(run, output, names, model=model, device=device)
    typer.echo(f"{output}: load it with diffusers.DiffusionPipeline.from_pretrained({str(output)!r})")


@app.command()
def benchmark(
    plan: Annotated[str, typer.Option(help="quick, fifty, hundred, sweep, ablations, or a YAML file.")] = "quick",
    output: Annotated[Path, typer.Option(help="The folder for all cells; the same command goes on.")] = Path("runs/benchmark"),
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time, each in a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of each process. The small model is fastest with one.")] = 1,
    model: Annotated[str, typer.Option(help="A diffusers folder, the id of a model in the local hub cache, or tiny.")] = "tiny",
    concepts: Annotated[Path | None, typer.Option(help="One folder of pictures a concept. Default: the world of tiny.")] = None,
    features: Annotated[list[str] | None, typer.Option(help="May be repeated: layout, clip, dino, or a folder.")] = None,
    device: Device = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models and factors of finished cells, in every call.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try cells again that failed before.")] = False,
    report: Annotated[Path | None, typer.Option(help="Only write the report of this folder again.")] = None,
) -> None:
    """Compare methods on many concepts, learned one after another, and write a report. Fails if a cell is not done."""
    from .benchmark import run_benchmark, write_report

    quiet()
    if report is not None:
        typer.echo(f"{write_report(report)} says what the cells show")
        return
    left = run_benchmark(
        plan, output, workers=workers, threads=threads, model=model, concepts=None if concepts is None else str(concepts),
        features=tuple(features or ("layout",)), device=device, keep=keep, retry=retry,
        command=shlex.join(["stamina-fast", *sys.argv[1:]]),
    )
    raise typer.Exit(1 if left else 0)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="small, sd15, sd21 or sdxl: the K/V projections of that U-Net.")] = "small",
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Prompts a step.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of the residual and of the mask.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Times that every arm is sampled.")] = 15,
    backend: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: every one that runs here.")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also torch.compile the reference: a minute or more.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Fewer rounds where a comparison would take longer.")] = 10.0,
    output: Annotated[Path | None, typer.Option(help="Also write every time as JSON.")] = None,
) -> None:
    """Time masked K/V of a whole U-Net beside plain projections on this machine. Fails if a result is wrong."""
    from .bench.run import run as measure

    result = measure(
        shape=shape, device=device, dtype=dtype, batch=batch, rank=rank, rounds=rounds, backends=backend, output=output,
        compiled=compiled, seconds=seconds,
    )
    raise typer.Exit(1 if result["red"] else 0)


@app.command()
def doctor() -> None:
    """Say what this machine can run, what is missing, and how to get it. Fails only if something required is missing."""
    from rich.console import Console

    from .doctor import report

    raise typer.Exit(0 if report(Console()) else 1)


def main() -> None:
    app(prog_name="stamina-fast")


if __name__ == "__main__":
    sys.exit(main())
