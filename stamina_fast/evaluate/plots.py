"""The plots: grids of samples beside real images, the task × concept heat map, training curves, bars of MMD²."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..io.files import make_folder, write_bytes

INK, QUIET, RULE = "#20242b", "#6b7280", "#d9dde3"
# inches that a concept's name may take beside or below a plot, and that a line of a title takes of its height
NAME, LINE = 0.95, 0.17
BASE, AFTER, END = "#b8bec8", "#2a78b5", "#e0812f"
STYLE = {
    "font.size": 10, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    "grid.color": RULE, "grid.linewidth": 0.7, "xtick.color": QUIET, "ytick.color": QUIET, "axes.titlesize": 11,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "figure.facecolor": "white", "savefig.facecolor": "white",
    # a dollar sign in a concept's name does not begin a formula
    "text.parse_math": False,
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1,
}


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write the figure in the format of the path's suffix, atomically, and close it."""
    data, kind = io.BytesIO(), path.suffix.removeprefix(".")
    try:
        figure.savefig(data, format=kind, dpi=dpi, pil_kwargs={"quality": 80} if kind == "webp" else {})
    finally:
        plt.close(figure)
    make_folder(path.parent)
    write_bytes(path, data.getvalue())


def width(text: str, size: float = 10, weight: str = "normal") -> float:
    """The width of a line of text in inches, in the font in force, or a little more."""
    dpi = 130
    font = FontProperties(size=size, weight=weight)
    # hinting fits letters to pixels, so that at another resolution a line may be wider by 3%
    return 1.03 * RendererAgg(1, 1, dpi).get_text_width_height_descent(text, font, ismath=False)[0] / dpi


def fit(text: str, inches: float, size: float = 10, weight: str = "normal") -> str:
    """The text, or as much of its start and end as these inches hold, with an ellipsis in between."""
    if width(text, size, weight) <= inches:
        return text
    # no letter is narrower than a fortieth of an inch
    for kept in range(min(len(text) - 1, int(40 * inches)), 0, -1):
        tail = kept // 3
        short = f"{text[: kept - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"
        if width(short, size, weight) <= inches:
            return short
    return "…"


def wrap(text: str, inches: float, size: float = 10, weight: str = "normal", most: int = 3) -> str:
    """The text in at most `most` lines of these inches; what is left over is shortened by `fit`."""
    lines, words = [""], text.split()
    for i, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if width(longer, size, weight) <= inches:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] = fit(" ".join([lines[-1], *words[i:]]), inches, size, weight)
            break
        else:
            lines += [fit(word, inches, size, weight)]
    return "\n".join(line for line in lines if line)


def mosaic(images: Sequence[Image.Image], columns: int, rows: int, side: int = 128, gap: int = 6) -> np.ndarray:
    """Up to columns × rows pictures as one uint8 picture on white. Small ones are enlarged without blur."""
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
    """One concept: rows of pictures, real, from the base, after its task and at the end. `rows`: label, note, pictures."""
    with plt.rc_context(STYLE):
        left = max(1.65, *(0.27 + width(note, 8.5) for _, note, _ in rows))
        across = left + 1.02 * columns + 0.1
        title = wrap(title, across - 0.24, 12, "bold", most=2)
        head = 0.25 + 0.2 * len(title.splitlines())
        height = head + 0.1 + 1.04 * len(rows)
        figure = plt.figure(figsize=(across, height))
        figure.text(0.12 / across, 1 - 0.1 / height, title, fontsize=12, weight="bold", va="top")
        for i, (label, note, images) in enumerate(rows):
            top = head + 1.04 * i
            figure.text(0.12 / across, 1 - (top + 0.42) / height, label, va="center", fontsize=10)
            figure.text(0.12 / across, 1 - (top + 0.64) / height, note, va="center", fontsize=8.5, color=QUIET)
            axes = figure.add_axes((left / across, 1 - (top + 0.98) / height, 1.02 * columns / across, 0.98 / height))
            axes.set_anchor("W")
            _show(axes, mosaic(images, columns, 1))
        save_figure(figure, path, dpi=140)


def overview(path: Path, title: str, stages: Sequence[str], concepts: Sequence[tuple[str, Sequence[Sequence[Image.Image]]]],
             columns: int = 3, rows: int = 2) -> None:
    """All concepts: a line for each concept, a column for each stage. `concepts`: name, and the pictures of each stage."""
    with plt.rc_context(STYLE):
        cell, gap, left, tall = 0.62 * columns, 0.22, 1.25, 0.62 * rows
        across = left + len(stages) * (cell + gap)
        title = wrap(title, across - 0.3, 12, "bold", most=2)
        head = 0.63 + 0.22 * len(title.splitlines())
        height = head + len(concepts) * (tall + gap)
        figure = plt.figure(figsize=(across, height))
        figure.text(0.15 / across, 1 - 0.14 / height, title, fontsize=12, weight="bold", va="top")
        for s, stage in enumerate(stages):
            x = left + s * (cell + gap)
            figure.text((x + cell / 2) / across, 1 - (head - 0.2) / height, stage, ha="center", va="center", color=QUIET)
        for c, (name, pictures) in enumerate(concepts):
            bottom = height - head - c * (tall + gap) - tall
            label = fit(name, left - 0.25, weight="bold")
            figure.text(0.15 / across, (bottom + tall / 2) / height, label, va="center", weight="bold")
            for s, images in enumerate(pictures):
                _show(figure.add_axes(((left + s * (cell + gap)) / across, bottom / height, cell / across, tall / height)),
                      mosaic(images, columns, rows))
        save_figure(figure, path)


def _title(figure: Figure, text: str) -> None:
    """A title of one line or more above everything else, as wide as the figure, which grows by its height."""
    across, height = figure.get_size_inches()
    text = "\n".join(wrap(line, across - 0.4) for line in text.splitlines())
    figure.set_size_inches(across, height + LINE * len(text.splitlines()))
    figure.suptitle(text, x=0.2 / across, ha="left", fontsize=10, linespacing=1.3)


def heat_map(path: Path, names: Sequence[str], ratios: Sequence[Sequence[float | None]], note: str) -> None:
    """Task × concept: `ratios[t][j]`, MMD² to concept j's real images after task t over the base's; None is blank."""
    with plt.rc_context(STYLE):
        count = len(names)
        values = np.array([[math.nan if x is None else x for x in row] for row in ratios], float)
        cell = 0.85 if count <= 12 else 10 / count
        across = max(6, 3.1 + cell * count)
        figure, axes = plt.subplots(figsize=(across, 1.7 + min(cell, 0.6) * count), layout="constrained")
        shown = axes.imshow(values, cmap="RdYlBu_r", vmin=0, vmax=2, aspect="auto")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        ticks = range(count) if count <= 12 else range(0, count, math.ceil(count / 12))
        labels = [fit(names[j], NAME) for j in ticks]
        # the labels on the left and the bar on the right take three inches
        crowded = max(map(width, labels)) > (across - 3) / count * ticks.step - 0.08
        axes.set_xticks(list(ticks), labels, rotation=35 if crowded else 0, ha="right" if crowded else "center")
        axes.set_yticks(list(ticks), [f"after {label}" for label in labels])
        if count <= 12:
            for (t, j), value in np.ndenumerate(values):
                if not math.isnan(value):
                    dark = value < 0.3 or value > 1.7
                    axes.text(j, t, f"{value:.2f}", ha="center", va="center", color="white" if dark else INK, fontsize=9)
        _title(figure, f"How far each concept is from its photographs\n{note}")
        bar = figure.colorbar(shown, ax=axes, ticks=[0, 0.5, 1, 1.5, 2], pad=0.03)
        bar.ax.set_yticklabels(["0  real", "0.5", "1  base model", "1.5", "≥ 2"])
        bar.outline.set_visible(False)
        save_figure(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over a tenth of the task."""
    window = max(1, len(values) // 10)
    ends = np.arange(1, len(values) + 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _spans(curves: Sequence[Sequence[dict]]) -> list[tuple[float, float]]:
    """The first step and the end of each task, on one axis for all tasks."""
    spans, start = [], 0.0
    for rows in curves:
        length = rows[-1]["step"] + 1
        spans.append((start, start + length))
        start += length
    return spans


def training_curves(path: Path, names: Sequence[str], curves: Sequence[Sequence[dict]]) -> None:
    """Loss, mask density and, if any task had one, the forgetting penalty, over all tasks in order.

    Each row of a curve has step, loss and forgetting. Some have density. A task that made no step is left out.
    """
    names, curves = [name for name, rows in zip(names, curves, strict=True) if rows], [rows for rows in curves if rows]
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
                axis.plot(start + points[:, 0], points[:, 1], color=AFTER, linewidth=1.7, marker=marker, markersize=3.5,
                          clip_on=False)
            axis.set_ylabel(label)
            axis.margins(x=0)
            axis.yaxis.set_major_locator(MaxNLocator(4))
        axes[1].set_ylim(0, 1.05)
        axes[-1].set_ylim(bottom=0)
        axes[-1].set_xlabel("training step, all tasks in order")
        if len(names) <= 12:
            for name, (start, end) in zip(names, spans, strict=True):
                label = fit(name, NAME, 9.5, "bold")
                axes[0].annotate(label, ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4),
                                 textcoords="offset points", ha="center", fontsize=9.5, weight="bold")
        figure.align_ylabels(axes)
        save_figure(figure, path)


def mmd_bars(path: Path, names: Sequence[str], tasks: Sequence[dict], note: str) -> None:
    """MMD² to the real images: base, just after the task (P_mmd), at the end; with 95% bootstrap intervals."""
    bars = (("mmd_base", "base model", BASE), ("mmd_after", "just after its task (P_mmd)", AFTER),
            ("mmd_end", "at the end", END))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(max(5.5, min(14, 2 + 1.3 * len(names))), 3.7), layout="constrained")
        x = np.arange(len(names))
        for i, (key, label, colour) in enumerate(bars):
            values = np.array([task[key] for task in tasks])
            low, high = np.array([task["intervals"][key] for task in tasks]).T
            errors = np.maximum(0, [values - low, high - values])
            axes.bar(x + (i - 1) * 0.26, values, 0.24, color=colour, label=label, yerr=errors,
                     error_kw={"ecolor": QUIET, "elinewidth": 1, "capsize": 2})
        crowded = len(names) > 8
        every = math.ceil(len(names) / 16)
        labels = [fit(name, NAME) for name in names[::every]]
        axes.set_xticks(x[::every], labels, rotation=35 if crowded else 0, ha="right" if crowded else "center")
        axes.margins(x=0.02)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_ylabel("MMD² to the real images")
        _title(figure, note)
        axes.legend(frameon=False, ncols=3, fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.1)
        save_figure(figure, path)
