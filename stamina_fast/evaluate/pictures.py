"""The plots of a run, from its measures, curves and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ..io.run import Run, Task
from . import plots

SHOWN = 8
STAGES = ("real", "base", "after", "end")
LABELS = {"real": "real images", "base": "base model", "after": "just after its task", "end": "at the end"}


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} of the base's MMD²"


def draw(run: Run, metrics: Mapping, tasks: Sequence[Task], real: Sequence[Sequence[Image.Image]],
         shown: Mapping[str, Sequence[Sequence[Image.Image]]]) -> None:
    """RUN/tasks/NN-NAME/grid.png for every concept; overview, heat_map, curves and mmd in RUN/plots.

    `real[j]` and `shown[stage][j]` are pictures of concept j, at the last guidance of `metrics`.
    """
    names = [task.info["name"] for task in tasks]
    settings = metrics["settings"]
    last = f"{settings['guidance'][-1]:g}"
    measured = metrics["by_guidance"][last]
    pictures = {"real": real, **shown}
    for j, (name, task, row) in enumerate(zip(names, tasks, measured["tasks"], strict=True)):
        notes = {"real": settings["real_images"], "base": f"MMD² {row['mmd_base']:.2f}", "after": _share(row["ratio_after"]),
                 "end": _share(row["ratio_end"])}
        plots.concept_grid(run.folder(name) / "grid.png", f"{name}: \"{task.info['prompt']}\", guidance {last}",
                           [(LABELS[stage], notes[stage], pictures[stage][j][:SHOWN]) for stage in STAGES])
    folder = run.path / "plots"
    note = f"guidance {last}, {settings['features']} features, {settings['count']} samples"
    plots.overview(folder / "overview.png", f"{len(names)} concepts, one after another ({note})" if len(names) > 1 else note,
                   [LABELS[stage] for stage in STAGES],
                   [(name, [pictures[stage][j] for stage in STAGES]) for j, name in enumerate(names)])
    base = [row["mmd_base"] for row in measured["tasks"]]
    ratios = [[None if value is None or base[j] <= 0 else value / base[j] for j, value in enumerate(row)]
              for row in measured["matrix"]]
    plots.heat_map(folder / "heat_map.png", names, ratios, f"MMD² as a share of the base model's; {note}")
    plots.training_curves(folder / "curves.png", names, [task.curve for task in tasks])
    plots.mmd_bars(folder / "mmd.png", names, measured["tasks"], f"{note}; 95% bootstrap intervals")
