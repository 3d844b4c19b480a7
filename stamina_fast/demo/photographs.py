"""`demo --photographs`: teach the small model one subject after another, from photographs that scikit-image bundles."""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

from ..evaluate import evaluate_run, keep_held_out
from ..io.images import list_images
from ..io.run import Run
from ..pipeline.load import TINY, load_pipeline, resolution_of
from ..threads import threads
from ..training import train
from .plan import Plan


@dataclass(frozen=True)
class Subject:
    """Where a subject is in a photograph of `skimage/data`: the middle and the side of a square crop, in pixels."""

    photograph: str
    x: float
    y: float
    side: float


SUBJECTS = {
    "face": Subject("astronaut.png", 225, 102, 176),
    "cat": Subject("chelsea.png", 232, 152, 268),
    "coffee": Subject("coffee.png", 285, 198, 356),
    "rocket": Subject("rocket.jpg", 321, 272, 300),
    "motorcycle": Subject("motorcycle_left.png", 388, 250, 452),
}
# the motorcycle has too much detail for 32 x 32 pixels; it is for larger models
TAUGHT = ("face", "cat", "coffee", "rocket")
# a second photograph of the same subject, for its held-out crops: the other half of a stereo pair
SECOND_PHOTOGRAPHS = {"motorcycle": Subject("motorcycle_right.png", 350, 250, 452)}
# the samples at the last one are shown
GUIDANCE = (1.0, 2.0)
# the share of the base model's MMD² at which a concept counts as learned
NEAR = 0.6


# the pictures are crops and mirror images already, and are taken whole
PICTURES = {"crops": 8, "crop_scale": 1.0, "flip": False}
FULL = Plan({"steps": 500, "batch": 8, "learning_rate": 1e-3, "token_learning_rate": 5e-2, "lr_schedule": "cosine",
             "warmup": 10, "density": 0.5, "token_vectors": 4} | PICTURES, samples=16, sampler_steps=15)
QUICK = Plan({"steps": 20, "batch": 4, "warmup": 2, "read_every": 4} | PICTURES, samples=4, sampler_steps=5)

# shifts right and down as shares of the side, and the scale of a crop; no crop is in both
TRAINING_CROPS = ((-0.03, -0.02, 1.0), (0.03, 0.02, 1.0), (0.02, -0.03, 0.94), (-0.02, 0.03, 1.06))
HELD_OUT_CROPS = ((0.0, 0.0, 1.03), (0.0, 0.035, 0.97), (0.0, -0.035, 0.99), (0.035, 0.0, 1.04),
                  (-0.035, 0.0, 0.96), (0.03, -0.03, 1.06), (-0.03, 0.03, 0.94), (0.015, 0.015, 0.95))


def _crops(photograph: Image.Image, subject: Subject, crops, size: int) -> list[Image.Image]:
    """The square crops at size x size pixels, each followed by its mirror image. All are moved to lie within the picture."""
    pictures = []
    for right, down, scale in crops:
        side = min(subject.side * scale, photograph.width, photograph.height)
        left = min(max(subject.x + right * subject.side - side / 2, 0), photograph.width - side)
        top = min(max(subject.y + down * subject.side - side / 2, 0), photograph.height - side)
        picture = photograph.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        pictures += [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    return pictures


def _write(folder: Path, pictures: list[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:02d}.png")


def prepare_concepts(folder: str | Path, size: int = 32, subjects=tuple(SUBJECTS)) -> Path:
    """Write `folder`/concepts/NAME (8 training pictures each) and `folder`/held-out/NAME (16); return the first of the two.

    The pictures are crops of one photograph for each subject, and their mirror images. Held-out crops differ from those for
    training but overlap them. So they test whether the subject was learned, not whether it would be recognised from another
    side. Only the motorcycle's held-out crops come from a second photograph.
    """
    folder = Path(folder)
    for name in subjects:
        sources = {"concepts": (SUBJECTS[name], TRAINING_CROPS),
                   "held-out": (SECOND_PHOTOGRAPHS.get(name, SUBJECTS[name]), HELD_OUT_CROPS)}
        for kind, (subject, crops) in sources.items():
            with as_file(files("skimage") / "data" / subject.photograph) as path, Image.open(path) as photograph:
                _write(folder / kind / name, _crops(photograph.convert("RGB"), subject, crops, size))
    return folder / "concepts"


@threads(1)
def run_photographs(output: str | Path = "runs/demo", quick: bool = False, *, model=TINY, subjects=TAUGHT, device=None,
             progress: bool = True) -> dict:
    """Teach `model` the subjects one after another into the RUN folder `output`, measure, and say what was learned.

    quick: few steps and samples, to show that everything works but not what it can do. The photographs are written beside
    the run, in OUTPUT-photographs. A demo that was stopped goes on from there. Returns the content of metrics.json.
    """
    start, output, plan = time.perf_counter(), Path(output), QUICK if quick else FULL
    console = Console(quiet=not progress, markup=False, highlight=False, soft_wrap=True)
    pipeline = load_pipeline(model, device)
    photographs = output.with_name(f"{output.name}-photographs")
    concepts = prepare_concepts(photographs, resolution_of(pipeline), subjects)
    console.print(f"Teaching {len(subjects)} photographed subjects, one after another, on {pipeline.unet.device}: "
                  f"{', '.join(sorted(subjects))}.")
    run = train(model, concepts, output, device=device, resume=True, progress=progress, **plan.train)
    for name in subjects:
        keep_held_out(output, name, list_images(photographs / "held-out" / name))
    metrics = evaluate_run(output, samples=plan.samples, steps=plan.sampler_steps, guidance=GUIDANCE, model=model,
                           device=device, progress=progress)
    report(console, run, metrics, time.perf_counter() - start)
    return metrics


def report(console: Console, run: Run, metrics: dict, seconds: float) -> None:
    """Print the measures, what was learned, how long it took, and where to look."""
    tasks = metrics["tasks"]
    for guidance, measured in metrics["by_guidance"].items():
        console.print(measures_table(tasks, measured, guidance))
    times = ", ".join(f"{task['name']} {task['seconds']:.0f} s" for task in tasks)
    near = sum(task["ratio_after"] is not None and task["ratio_after"] <= NEAR for task in tasks)
    console.print(f"Learned {len(tasks)} concepts, each folded into the weights before the next, in {seconds:.0f} s: {times}.")
    console.print(f"{near} of {len(tasks)} were within {NEAR} of the base model's MMD² just after their task (no guidance).")
    console.print(f"Look at {run.path / 'plots' / 'overview.png'} first, then at the other plots and at tasks/*/grid.png in "
                  f"{run.path}.")
    console.print(f"{run.path / 'model'} is a plain pipeline: diffusers.DiffusionPipeline.from_pretrained loads it.")


def measures_table(tasks: list[dict], measured: dict, guidance: str) -> Table:
    """MMD² to held-out images, in brackets as a share of the base model's: a row for each concept, and the means."""
    table = Table(title=f"MMD² to held-out images, guidance {guidance} (share of the base model's)", title_justify="left")
    for column in ("concept", "training", "base", "just after (P_mmd)", "at the end", "drift"):
        table.add_column(column, justify="left" if column == "concept" else "right")
    for task, row in zip(tasks, measured["tasks"], strict=True):
        drift = "" if row["forgetting"] is None else f"{row['forgetting']:.3f}"
        table.add_row(task["name"], f"{task['seconds']:.0f} s", f"{row['mmd_base']:.3f}", _share(row, "after"),
                      _share(row, "end"), drift)
    table.add_section()
    drift = "" if measured["F_mmd"] is None else f"F_mmd {measured['F_mmd']:.3f}"
    table.add_row("mean", "", "", f"{sum(measured['P_mmd']) / len(tasks):.3f}", f"A_mmd {measured['A_mmd']:.3f}", drift)
    return table


def _share(row: dict, when: str) -> str:
    ratio = row[f"ratio_{when}"]
    return f"{row[f'mmd_{when}']:.3f}" + ("" if ratio is None else f" ({ratio:.2f})")
