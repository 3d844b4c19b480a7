"""Pictures of a step's result: `python -m stamina_fast.bench.step.plots RESULT.json`. Needs matplotlib, and no GPU.

NAME.png: where the time of each arm goes, by phase, with the timed median. NAME-profile.png: what remains, by name.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from ..plots import new_figure
from .phases import PHASES

# a phase keeps its colour: greys before the model, blues forward, reds backward
COLOURS = dict(zip(PHASES, (
    "#c9c9c9", "#e0b341", "#9fc5a0", "#0b3d91", "#7fb3d5", "#6e6e6e", "#e8a79c", "#b03030", "#d97b29", "#8e5ea2",
), strict=True))


def described(result: dict) -> str:
    facts = result["machine"]
    return f"{facts['model']}, {facts['pixels']} x {facts['pixels']} pixels, batch {facts['batch']}, {facts['dtype']}, " \
        "random weights"


def stacked(result: dict):
    """One bar an arm, made of its phases. The black line is the median of the timed runs, which have no marks."""
    from matplotlib.patches import Patch

    arms = {name: found for name, found in result["arms"].items() if "times_ms" in found}
    figure, (axis,) = new_figure(11, 1.9 + 0.55 * len(arms), 1, f"where a training step goes: {described(result)}", [result])
    for place, found in enumerate(arms.values()):
        left = 0.0
        for phase in PHASES:
            share = found["phases_ms"][phase]
            axis.barh(place, share, left=left, height=0.62, color=COLOURS[phase], edgecolor="white", linewidth=0.4)
            left += share
        median = statistics.median(found["times_ms"])
        axis.plot([median] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.6)
        axis.annotate(f"{median:.4g}", (max(left, median), place), xytext=(5, 0), textcoords="offset points", va="center",
                      fontsize=8)
    axis.set_yticks(range(len(arms)), list(arms))
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.margins(x=0.08)
    axis.set_xlabel("milliseconds a step; bars: phases, marked one by one; black: median of the timed runs", fontsize=8)
    handles = {phase: Patch(color=COLOURS[phase]) for phase in PHASES}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def remains(result: dict):
    """One panel an arm: kernels (operators on a CPU) by their own time in a step."""
    panels = result["profile"]
    figure, axes = new_figure(7 * len(panels), 5, len(panels), f"what remains, by name: {described(result)}", [result])
    for axis, (name, rows) in zip(axes, panels.items(), strict=True):
        shown = [*rows[:14], {"name": "all others", **{key: sum(row[key] for row in rows[14:]) for key in ("ms", "calls")}}]
        axis.barh(range(len(shown)), [row["ms"] for row in shown], color="#1f77b4")
        axis.set_yticks(range(len(shown)), [f"{short(row['name'])}  {row['calls']:.0f} x" for row in shown], fontsize=7)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.set_xlabel("milliseconds a step", fontsize=8)
        axis.set_title(name, fontsize=9)
    return figure


def short(name: str) -> str:
    """The name of a kernel without its template arguments."""
    name = name.removeprefix("void ").split("(")[0]
    return name if len(name) <= 52 else f"{name[:34]}…{name[-16:]}"


def draw(path: Path) -> list[Path]:
    """Write the pictures of the result at `path` beside it; their paths."""
    path = Path(path)
    result, figures = json.loads(path.read_text()), {}
    if any("times_ms" in found for found in result["arms"].values()):
        figures[path.with_suffix(".png")] = stacked(result)
    if result["profile"]:
        figures[path.with_name(f"{path.stem}-profile.png")] = remains(result)
    for place, figure in figures.items():
        figure.savefig(place, dpi=130)
    return list(figures)


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1])), sep="\n")
