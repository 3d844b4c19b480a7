"""evaluate_run: rebuild the model after every task, sample all concepts so far, and compare with real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..errors import InputError
from ..io.files import write_json
from ..io.progress import Progress
from ..io.run import Run, Task
from ..pipeline.load import frozen, resolution_of
from ..pipeline.sampling import sample, to_pil
from ..reopen import attached, base_model
from ..seeds import derive_seed
from .features import encoder
from .measures import BANDWIDTH_RULE, measure
from .pictures import SHOWN, draw
from .real import real_images


def evaluate_run(
    run_path: str | Path, *, samples: int = 32, guidance: Sequence[float] = (1.0, 3.0), steps: int = 20,
    features: str = "layout", seed: int = 0, model=None, real: str | Path | None = None, device=None, progress: bool = True,
) -> dict:
    """Measure what a run learned and forgot; write RUN/metrics.json, grids into its task folders, and RUN/plots.

    samples    how many pictures of concept j after every task t >= j, and from the base model; all from the same noise
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
    how = {"count": samples, "seed": seed, "steps": steps, "size": size}
    total = samples * len(guidance) * (len(tasks) + len(tasks) * (len(tasks) + 1) // 2)
    with frozen(pipeline), attached(run, pipeline) as adapters, Progress("all samples", total, shown=progress) as shown:
        drawn = Sampler(pipeline, adapters, run, tasks, guidance, phi, how, shown)
        drawn.base()
        weights = drawn.after_every_task()
        adapters.rewind([])
    reals = [phi(images) for images in pictures]
    by_guidance = {f"{g:g}": measure(reals, drawn.base_features[g], drawn.features[g], seed=seed) for g in guidance}
    metrics = _metrics(tasks, by_guidance, weights) | {
        "settings": how | {
            "guidance": list(guidance), "features": features, "estimator": "unbiased MMD², Gaussian kernel",
            "bandwidth": BANDWIDTH_RULE, "intervals": "95% bootstrap, 1000 draws", "real_images": kind,
            "real_counts": [len(images) for images in pictures],
        },
        "parameters": {"trainable": sum(p.numel() for p in adapters.parameters()),
                       "stored_per_task": sum(x.numel() for part in tasks[0][:2] for x in part.values())},
    }
    write_json(run.path / "metrics.json", metrics)
    draw(run, metrics, tasks, pictures, drawn.shown)
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
    """Samples every concept from the base and after every task. Keeps their features, and a few pictures to show.

    base_features[g][j] and features[g][t][j], j <= t, are at guidance g. shown[stage][j] are PIL pictures at the last
    guidance, for the stages "base", "after" and "end".
    """

    def __init__(self, pipeline, adapters, run: Run, tasks: Sequence[Task], guidance, phi, how: dict, progress: Progress):
        self.pipeline, self.adapters, self.run, self.tasks = pipeline, adapters, run, tasks
        self.guidance, self.phi, self.how = guidance, phi, how
        self.base_features: dict[float, list[torch.Tensor]] = {g: [] for g in guidance}
        self.features: dict[float, list[list[torch.Tensor]]] = {g: [] for g in guidance}
        self.shown: dict[str, list[list[Image.Image]]] = {"base": [], "after": [], "end": []}
        self.progress = progress

    def _draw(self, j: int) -> tuple[dict[float, torch.Tensor], list[Image.Image]]:
        """Concept j from the model as it is now: features at every guidance, and some pictures at the last one."""
        found = {}
        for g in self.guidance:
            images = to_pil(sample(self.pipeline, self.tasks[j].info["prompt"], guidance=g, **self.how))
            found[g] = self.phi(images)
            self.progress.advance(self.how["count"])
        return found, images[:SHOWN]

    def base(self) -> None:
        """Sample every concept from W_0 with its token not yet trained. Afterwards every token is as its task left it."""
        tokens, seed = self.adapters.tokens, self.run.config["train"]["seed"]
        self.progress.begin("base model", self.how["count"] * len(self.guidance) * len(self.tasks))
        for j, task in enumerate(self.tasks):
            tokens.begin(task.info["token"], derive_seed(derive_seed(seed, "task", j), "token"))
            found, pictures = self._draw(j)
            for g in self.guidance:
                self.base_features[g].append(found[g])
            self.shown["base"].append(pictures)
            tokens.discard()
            tokens.add(task.info["token"], task.token)
        self.progress.end()

    def after_every_task(self) -> list[dict]:
        """Rebuild the model after each task in turn and sample all concepts so far. Returns `weight_change` of each task."""
        names = [task.info["name"] for task in self.tasks]
        for name, task in zip(names, self.tasks, strict=True):
            self.adapters.add_task(name, task.factors)
        weights, before = [], [None] * len(self.adapters.stacks)
        for t, name in enumerate(names):
            self.progress.begin(f"after {name}", self.how["count"] * len(self.guidance) * (t + 1))
            self.adapters.rewind(names[: t + 1])
            # copied, since the next rewind writes over them
            past = [stack.past().clone() for stack in self.adapters.stacks]
            weights.append(weight_change(past, before))
            before = past
            rows = [self._draw(j) for j in range(t + 1)]
            for g in self.guidance:
                self.features[g].append([found[g] for found, _ in rows])
            self.shown["after"].append(rows[-1][1])
            self.progress.end()
        self.shown["end"] = [pictures for _, pictures in rows]
        return weights


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
