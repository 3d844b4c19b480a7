"""Pictures of a run: grids of samples beside real images, the task × concept map, training curves, bars of MMD²."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..io.files import make_folder, write_bytes

INK, QUIET, RULE = "#20242b", "#6b7280", "#d9dde3"
BASE, AFTER, END = "#b8bec8", "#2a78b5", "#e0812f"
STYLE = {
    "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": RULE, "grid.linewidth": 0.7, "xtick.color": QUIET, "ytick.color": QUIET, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "figure.facecolor": "white", "savefig.facecolor": "white",
    # a concept's name is shown as written: a dollar sign in it is no formula
    "text.parse_math": False,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write the figure as PNG, atomically, and close it."""
    data = io.BytesIO()
    try:
        figure.savefig(data, format="png", dpi=dpi)
    finally:
        plt.close(figure)
    make_folder(path.parent)
    write_bytes(path, data.getvalue())


def shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def mosaic(images: Sequence[Image.Image], columns: int, rows: int, side: int = 128, gap: int = 6) -> np.ndarray:
    """Up to columns × rows pictures in one uint8 picture on white; small ones grow by whole pixels, so that they stay crisp."""
    canvas = np.full((rows * (side + gap) - gap, columns * (side + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images[: columns * rows]):
        method = Image.Resampling.NEAREST if image.width <= side else Image.Resampling.LANCZOS
        y, x = (i // columns) * (side + gap), (i % columns) * (side + gap)
        canvas[y:y + side, x:x + side] = np.asarray(image.convert("RGB").resize((side, side), method))
    return canvas


def _show(axes, picture: np.ndarray) -> None:
    axes.imshow(picture, interpolation="nearest", aspect="equal")
    axes.set_axis_off()


def concept_grid(path: Path, title: str, rows: Sequence[tuple[str, str, Sequence[Image.Image]]], columns: int = 8) -> None:
    """One concept: a row of pictures each for real images, base, after its task, at the end. `rows`: label, note, pictures."""
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(1.75 + 1.02 * columns, 0.55 + 1.04 * len(rows)))
        width, height = figure.get_size_inches()
        figure.text(0.12 / width, 1 - 0.2 / height, shorten(title, 110), fontsize=12, weight="bold", va="center")
        for i, (label, note, images) in enumerate(rows):
            top = 0.45 + 1.04 * i
            figure.text(0.12 / width, 1 - (top + 0.42) / height, label, va="center", fontsize=10)
            figure.text(0.12 / width, 1 - (top + 0.64) / height, note, va="center", fontsize=8.5, color=QUIET)
            axes = figure.add_axes((1.65 / width, 1 - (top + 0.98) / height, 1.02 * columns / width, 0.98 / height))
            axes.set_anchor("W")
            _show(axes, mosaic(images, columns, 1))
        save_figure(figure, path, dpi=140)


def overview(path: Path, title: str, stages: Sequence[str], concepts: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
             columns: int = 3, rows: int = 2) -> None:
    """Every concept in one picture: a line a concept, a column a stage. `concepts`: name and the pictures of each stage."""
    with plt.rc_context(STYLE):
        cell, gap, left, head = 0.62 * columns, 0.22, 1.25, 0.85
        tall = 0.62 * rows
        width = left + len(stages) * (cell + gap)
        height = head + len(concepts) * (tall + gap)
        figure = plt.figure(figsize=(width, height))
        figure.text(0.15 / width, 1 - 0.25 / height, title, fontsize=12, weight="bold", va="center")
        for s, stage in enumerate(stages):
            x = left + s * (cell + gap)
            figure.text((x + cell / 2) / width, 1 - (head - 0.2) / height, stage, ha="center", va="center", color=QUIET)
        for c, (name, pictures) in enumerate(concepts):
            bottom = height - head - c * (tall + gap) - tall
            figure.text(0.15 / width, (bottom + tall / 2) / height, shorten(name, 14), va="center", weight="bold")
            for s, images in enumerate(pictures):
                _show(figure.add_axes(((left + s * (cell + gap)) / width, bottom / height, cell / width, tall / height)),
                      mosaic(images, columns, rows))
        save_figure(figure, path)


def heat_map(path: Path, names: Sequence[str], ratios: Sequence[Sequence[float | None]], note: str) -> None:
    """Task × concept: `ratios[t][j]`, MMD² to concept j's real images after task t over the base's; None is blank."""
    with plt.rc_context(STYLE):
        count = len(names)
        values = np.array([[math.nan if x is None else x for x in row] for row in ratios], float)
        cell = 0.85 if count <= 12 else 10 / count
        figure, axes = plt.subplots(figsize=(max(6, 3.1 + cell * count), 2.1 + min(cell, 0.6) * count), layout="constrained")
        shown = axes.imshow(values, cmap="RdYlBu_r", vmin=0, vmax=2, aspect="auto")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        ticks = range(count) if count <= 12 else range(0, count, math.ceil(count / 12))
        axes.set_xticks(list(ticks), [shorten(names[j], 12) for j in ticks], rotation=0 if count <= 6 else 35,
                        ha="center" if count <= 6 else "right")
        axes.set_yticks(list(ticks), [f"after {shorten(names[t], 12)}" for t in ticks])
        if count <= 12:
            for (t, j), value in np.ndenumerate(values):
                if not math.isnan(value):
                    dark = value < 0.3 or value > 1.7
                    axes.text(j, t, f"{value:.2f}", ha="center", va="center", color="white" if dark else INK, fontsize=9)
        axes.set_title(f"How far each concept is from its photographs\n{note}", fontsize=10, weight="normal", pad=10)
        bar = figure.colorbar(shown, ax=axes, ticks=[0, 0.5, 1, 1.5, 2], pad=0.03)
        bar.ax.set_yticklabels(["0  real", "0.5", "1  base model", "1.5", "≥ 2"])
        bar.outline.set_visible(False)
        save_figure(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a tenth of the task, so that the trend shows through the noise of single steps."""
    window = max(1, len(values) // 10)
    ends = np.arange(1, len(values) + 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _spans(curves: Sequence[Sequence[dict]]) -> list[tuple[float, float]]:
    """Where each task lies on one axis of steps: start and end."""
    spans, start = [], 0.0
    for rows in curves:
        length = rows[-1]["step"] + 1 if rows else 1
        spans.append((start, start + length))
        start += length
    return spans


def training_curves(path: Path, names: Sequence[str], curves: Sequence[Sequence[dict]]) -> None:
    """Loss, mask density and, where it was one, the forgetting penalty over all tasks, one after another.

    A row of a curve: step, loss, forgetting; density, in the rows where it was read.
    """
    panels = [("loss", "loss"), ("density", "mask density"), ("forgetting", "forgetting penalty")]
    panels = panels if any(row["forgetting"] for rows in curves for row in rows) else panels[:2]
    heights = (1.5, 1, 1)[: len(panels)]
    with plt.rc_context(STYLE):
        size = (min(14, 4 + 1.6 * len(names)), 1 + 1.5 * sum(heights))
        figure, axes = plt.subplots(len(panels), 1, figsize=size, sharex=True, layout="constrained", height_ratios=heights)
        spans = _spans(curves)
        for axis, (key, label) in zip(axes, panels, strict=True):
            for i, ((start, end), rows) in enumerate(zip(spans, curves, strict=True)):
                if i % 2:
                    axis.axvspan(start, end, color="#f4f6f8", zorder=0)
                points = np.array([(row["step"], row[key]) for row in rows if row.get(key) is not None], float).reshape(-1, 2)
                if key == "loss":
                    axis.plot(start + points[:, 0], points[:, 1], color=AFTER, alpha=0.25, linewidth=0.8)
                    points[:, 1] = _smooth(points[:, 1])
                marker = "o" if len(points) <= 10 else None
                axis.plot(start + points[:, 0], points[:, 1], color=AFTER, linewidth=1.7, marker=marker, markersize=3.5)
            axis.set_ylabel(label)
            axis.margins(x=0)
            axis.yaxis.set_major_locator(MaxNLocator(4))
        axes[1].set_ylim(0, 1.05)
        axes[-1].set_ylim(bottom=0)
        axes[-1].set_xlabel("training step, all tasks in order")
        if len(names) <= 12:
            for name, (start, end) in zip(names, spans, strict=True):
                axes[0].annotate(shorten(name, 12), ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
                                 textcoords="offset points", ha="center", fontsize=9.5, weight="bold")
        figure.align_ylabels(axes)
        save_figure(figure, path)


def mmd_bars(path: Path, names: Sequence[str], tasks: Sequence[dict], note: str) -> None:
    """MMD² to the real images: base, just after the task (P_mmd), at the end; with 95% bootstrap intervals."""
    bars = (("mmd_base", "base model", BASE), ("mmd_after", "just after its task (P_mmd)", AFTER),
            ("mmd_end", "at the end", END))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(max(5.5, min(14, 2 + 1.3 * len(names))), 3.9), layout="constrained")
        x = np.arange(len(names))
        for i, (key, label, colour) in enumerate(bars):
            values = np.array([task[key] for task in tasks])
            low, high = np.array([task["intervals"][key] for task in tasks]).T
            errors = np.maximum(0, [values - low, high - values])
            axes.bar(x + (i - 1) * 0.26, values, 0.24, color=colour, label=label, yerr=errors,
                     error_kw={"ecolor": QUIET, "elinewidth": 1, "capsize": 2})
        crowded = len(names) > 8
        every = math.ceil(len(names) / 16)
        axes.set_xticks(x[::every], [shorten(name, 12) for name in names[::every]], rotation=35 if crowded else 0,
                        ha="right" if crowded else "center")
        axes.margins(x=0.02)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_ylabel("MMD² to the real images")
        axes.set_title(note, fontsize=10, weight="normal", pad=26)
        axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.1)
        save_figure(figure, path)
