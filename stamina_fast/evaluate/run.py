"""evaluate_run: rebuild the model after every task, sample concepts, and compare with real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError
from ..io.files import write_json
from ..io.progress import Progress
from ..io.run import Run, Task
from ..pipeline.load import frozen, resolution_of
from ..reopen import attached, base_model
from ..seeds import derive_seed
from .features import encoder
from .measures import BANDWIDTH_RULE, measure
from .pictures import SHOWN, draw
from .real import real_images
from .samples import BASE, Samples, after


def evaluate_run(
    run_path: str | Path, *, samples: int = 32, guidance: Sequence[float] = (1.0, 3.0), steps: int = 20,
    features: str = "layout", seed: int = 0, model=None, real: str | Path | None = None, device=None, progress: bool = True,
    triangle: bool = True, base: bool = True,
) -> dict:
    """Measure what a run learned and forgot; write RUN/metrics.json, grids into its task folders, RUN/samples and RUN/plots.

    samples    how many pictures of concept j after every task t >= j, and from the base model; all from the same noise
    triangle   False: pictures of concept j only after its own task and after the last, which every measure needs
    base       False: no pictures from the base model, so neither ratios to it nor RUN/plots and grids, which show it
    guidance   values to measure at. The first gives the top level of metrics.json, the last one's samples are shown
    steps      of the sampler
    seed       of the samples and of the bootstrap
    features   "layout", "clip", "dino", or the folder or hub id of a CLIP or DINOv2 (`features.encoder`)
    model      the base model; default: where the run's config says
    real       a folder with one folder of real images for each concept; default: those of the run (`real.real_images`)

    Samples of the base model use the concept's prompt, with its token as it was at the start of its task, and no residual.
    Returns the content of metrics.json. Raises StaminaError in one line, and then leaves metrics.json as it was.
    """
    run = Run.open(Path(run_path))
    if samples < 2 or steps < 1 or not guidance or min(guidance) < 1:
        raise InputError(f"evaluate wants at least 2 samples, 1 step, and guidance from 1, got {samples}, {steps}, "
                         f"{list(guidance)}; raise them")
    names = [task["name"] for task in run.tasks()]
    if not names:
        raise InputError(f"{str(run.path)!r} has no finished task yet; let train finish one")
    tasks = [run.load_task(name) for name in names]
    pipeline = base_model(run, model, device)
    phi = encoder(features, pipeline.unet.device)
    size = run.config["train"]["resolution"] or resolution_of(pipeline)
    pictures, kind = real_images(run, size, real)
    kept = Samples(run.path, count=samples, seed=seed, steps=steps, size=size)
    count = len(tasks)
    rows = [columns(t, count, triangle) for t in range(count)]
    total = samples * len(guidance) * (base * count + sum(map(len, rows)))
    with frozen(pipeline), attached(run, pipeline) as adapters, Progress("all samples", total, shown=progress) as shown:
        sampler = Sampler(pipeline, adapters, run, tasks, guidance, kept, shown)
        if base:
            sampler.base()
        weights = sampler.after_tasks(triangle)
        adapters.rewind([])
    reals, by_guidance = [phi(images) for images in pictures], {}
    for g in guidance:
        before = [phi(kept.read(g, BASE, name)) for name in names] if base else None
        found = [{j: phi(kept.read(g, after(t), names[j])) for j in row} for t, row in enumerate(rows)]
        by_guidance[f"{g:g}"] = measure(reals, before, found, seed=seed)
    metrics = _metrics(tasks, by_guidance, weights) | {
        "settings": kept.how | {
            "guidance": list(guidance), "features": features, "estimator": "unbiased MMD², Gaussian kernel",
            "bandwidth": BANDWIDTH_RULE, "intervals": "95% bootstrap, 1000 draws", "real_images": kind,
            "real_counts": [len(images) for images in pictures],
        },
        # runs of older versions have not counted them
        "parameters": {"trainable": tasks[0].info.get("trained_parameters"),
                       "stored_per_task": sum(x.numel() for part in (tasks[0].factors, tasks[0].token, tasks[0].kept)
                                              for x in part.values())},
    }
    write_json(run.path / "metrics.json", metrics)
    if not base:
        return metrics
    stages = {"base": [BASE] * count, "after": [after(t) for t in range(count)], "end": [after(count - 1)] * count}
    shown = {stage: [kept.read(guidance[-1], folder, name)[:SHOWN] for folder, name in zip(folders, names, strict=True)]
             for stage, folders in stages.items()}
    draw(run, metrics, tasks, pictures, shown)
    return metrics


def _metrics(tasks: Sequence[Task], by_guidance: dict[str, dict], weights: list[dict]) -> dict:
    """The measures at the first guidance with facts about each task, and those at every guidance as "by_guidance"."""
    first, top = next(iter(by_guidance.items()))
    rows = [
        {"name": task.info["name"], **values, "seconds": task.info["seconds"], "density": task.info["density"], **weight}
        for task, values, weight in zip(tasks, top["tasks"], weights, strict=True)
    ]
    return {"A_mmd": top["A_mmd"], "F_mmd": top["F_mmd"], "P_mmd": top["P_mmd"], "tasks": rows, "guidance": float(first),
            "by_guidance": by_guidance}


class Sampler:
    """Draws every concept from the base and after tasks, into RUN/samples. `progress` counts the pictures."""

    def __init__(self, pipeline, adapters, run: Run, tasks: Sequence[Task], guidance, samples: Samples, progress: Progress):
        self.pipeline, self.adapters, self.run, self.tasks = pipeline, adapters, run, tasks
        self.guidance, self.samples, self.progress = guidance, samples, progress

    def _draw(self, stage: str, j: int) -> None:
        """Concept j from the model as it is now."""
        info = self.tasks[j].info
        for g in self.guidance:
            self.samples.draw(self.pipeline, info["prompt"], g, stage, info["name"])
            self.progress.advance(self.samples.how["count"])

    def base(self) -> None:
        """Draw every concept from W_0 with its token not yet trained."""
        tokens, seed = self.adapters.tokens, self.run.config["train"]["seed"]
        self.progress.begin("base model", self.samples.how["count"] * len(self.guidance) * len(self.tasks))
        for j, task in enumerate(self.tasks):
            # task.json of older runs names no word to start from
            start = derive_seed(derive_seed(seed, "task", j), "token"), task.info.get("initializer_token")
            tokens.begin(task.info["token"], *start)
            self._draw(BASE, j)
            tokens.discard()
        self.progress.end()

    def after_tasks(self, triangle: bool) -> list[dict]:
        """Rebuild the model after each task in turn and draw concepts. Returns `weight_change` of each task.

        triangle: all concepts so far; otherwise only the task's own, and all of them at the end.
        """
        names = [task.info["name"] for task in self.tasks]
        for name, task in zip(names, self.tasks, strict=True):
            self.adapters.add_task(name, task.factors)
            self.adapters.tokens.add(task.info["token"], task.token)
        weights, before = [], [None] * len(self.adapters.stacks)
        for t, name in enumerate(names):
            drawn = columns(t, len(names), triangle)
            self.progress.begin(f"after {name}", self.samples.how["count"] * len(self.guidance) * len(drawn))
            self.adapters.rewind(names[: t + 1])
            # copied, since the next rewind writes over them
            past = [stack.past().clone() for stack in self.adapters.stacks]
            weights.append(weight_change(past, before))
            before = past
            for j in drawn:
                self._draw(after(t), j)
            self.progress.end()
        return weights


def columns(t: int, count: int, triangle: bool) -> list[int]:
    """The concepts that are drawn after task t of `count`."""
    return list(range(t + 1)) if triangle or t == count - 1 else [t]


@torch.no_grad()
def weight_change(past: Sequence[torch.Tensor], before: Sequence[torch.Tensor | None]) -> dict:
    """What a task did to the K/V weights, from W_t - W_0 and W_{t-1} - W_0 (None: 0) of every stack, fp32 `[N, k]`.

    distance  ‖W_t - W_0‖
    step      ‖W_t - W_{t-1}‖
    overlap   the share of the entries changed by this task that earlier tasks had changed too; None for the first task, or
              if it changed nothing
    """
    steps = [now if old is None else now - old for now, old in zip(past, before, strict=True)]
    changed = sum(step.count_nonzero().item() for step in steps)
    again = sum(((step != 0) & (old != 0)).sum().item() for step, old in zip(steps, before, strict=True) if old is not None)
    first = all(old is None for old in before)

    def norm(parts):
        return sum(part.double().square().sum().item() for part in parts) ** 0.5

    return {"distance": norm(past), "step": norm(steps), "overlap": None if first or not changed else again / changed}
