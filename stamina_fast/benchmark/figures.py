"""The plots of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..evaluate.plots import AFTER, END, NAME, QUIET, STYLE, fit, save_figure

Value = Mapping[str, object]


def arms(path: Path, rows: Mapping[str, tuple[Value, Value]]) -> None:
    """A line for each arm, the best on top: the share recognised just after and at the end, each {"mean", "interval"}."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes.grid(axis="x")
        ordered = sorted(rows.items(), key=lambda row: row[1][1]["mean"])
        for number, (label, colour, lift) in enumerate((("just after its task", AFTER, 0.13), ("at the end", END, -0.13))):
            values = [row[number] for _, row in ordered]
            means = np.array([value["mean"] for value in values])
            errors = np.abs(np.array([value["interval"] for value in values]).T - means)
            axes.errorbar(means, np.arange(len(values)) + lift, xerr=errors, fmt="o", color=colour, ecolor=QUIET,
                          elinewidth=0.9, markersize=5, label=label)
        axes.set_yticks(range(len(ordered)), [fit(label, 4, 8) for label, _ in ordered], fontsize=8)
        axes.set_xlim(-0.03, 1.03)
        axes.margins(y=0.02)
        axes.set_xlabel("share of samples recognised; 95% interval over the identities")
        axes.legend(frameon=False, ncols=2, fontsize=9, loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.1)
        save_figure(figure, path)


def stability(path: Path, points: Mapping[str, tuple[Value, Value]], xlabel: str, ylabel: str, lower_is_better: bool) -> None:
    """A point for each arm: how well it learned, and what it still knows at the end, each as {"mean", "interval"}."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        axes.grid(axis="x")
        for label, (x, y) in points.items():
            errors = [np.abs(np.array(value["interval"])[:, None] - value["mean"]) for value in (x, y)]
            axes.errorbar(x["mean"], y["mean"], xerr=errors[0], yerr=errors[1], fmt="o", color=AFTER, ecolor=QUIET,
                          elinewidth=0.7, markersize=5)
            axes.annotate(fit(label, 2.2, 8.5), (x["mean"], y["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=8.5)
        if lower_is_better:
            axes.invert_xaxis()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(0.12)
        save_figure(figure, path)


def ages(path: Path, lines: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """A panel for each arm: the share recognised by tasks since, and that of the same concepts just after their task.

    lines: for each arm (tasks since the concept was learned, share recognised then, share just after of the same concepts).
    """
    columns = min(4, len(lines))
    rows = math.ceil(len(lines) / columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(rows, columns, figsize=(max(5, 2.6 * columns), 0.7 + 1.75 * rows), layout="constrained",
                                    squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(lines):]:
            axes.set_visible(False)
        for axes, (label, line) in zip(grid.flat, lines.items(), strict=False):
            age, then, first = np.array(line, float).T
            axes.plot(age, first, color=AFTER, marker="o", markersize=3, linewidth=1, label="just after, the same concepts")
            axes.plot(age, then, color=END, marker="o", markersize=3, linewidth=1.5, label="after so many tasks")
            axes.set_title("\n".join(label.split(" ", 1)), fontsize=8)
            axes.set_ylim(-0.05, 1.05)
        figure.supxlabel("tasks since the concept was learned", fontsize=9)
        figure.supylabel("share of samples recognised", fontsize=9)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9)
        save_figure(figure, path)


def overlap(path: Path, names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float | None]]]) -> None:
    """A square a pair of tasks, for each matrix: row t and column i compare what tasks t and i changed."""
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1, len(panels), figsize=(1 + 4.5 * len(panels), 4.6), layout="constrained", squeeze=False)
        for axes, (title, matrix) in zip(grid[0], panels.items(), strict=True):
            values = np.array([[math.nan if value is None else value for value in row] for row in matrix], float)
            np.fill_diagonal(values, math.nan)
            known = values[~np.isnan(values)]
            most = max(abs(known).max(), 1e-3) if known.size else 1
            low, colours = (-most, "RdBu_r") if (known < 0).any() else (0, "viridis")
            shown = axes.imshow(values, cmap=colours, vmin=low, vmax=most)
            axes.grid(visible=False)
            axes.set_title(title, fontsize=10)
            ticks = range(0, len(names), math.ceil(len(names) / 12))
            axes.set_xticks(list(ticks), [fit(names[i], NAME, 8) for i in ticks], rotation=45, ha="right", fontsize=8)
            axes.set_yticks(list(ticks), [fit(names[i], NAME, 8) for i in ticks], fontsize=8)
            figure.colorbar(shown, ax=axes, shrink=0.8)
        save_figure(figure, path)
