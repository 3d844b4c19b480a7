"""Plots of a folder of results: `python -m stamina_fast.bench.plots FOLDER`. Needs matplotlib, and no GPU.

roofline-DTYPE.png: what each arm reached under the two roofs measured in the same run.
ratios-SHAPE.png: the time of each arm beside the plain product's, and of each fold beside the copy's rate.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from .arms import BACKWARD

# an arm keeps its colour in every figure; ours come last and stand out
COLOURS = {
    "one product": "#222222", "separate projections": "#8c8c8c", "eager reference": "#c9a227", "compiled reference": "#d97b29",
    "PEFT LoRA, no mask": "#8e5ea2", "/reference": "#7fb3d5", "/cpu": "#1f77b4", "/triton": "#1f77b4", "/cuda": "#0b3d91",
}
MARKERS = {"small": "v", "sd15": "o", "sd21": "s", "sdxl": "D"}
PREFERRED = ("graph, cold", "graph, warm", "eager, warm", "cpu")


def load(folder: Path) -> list[dict]:
    """The results in a folder, by shape, dtype and size. Of two results of one case, the one with more arms is taken."""
    cases = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if isinstance(result, dict) and {"arms", "roofs", "machine"} <= result.keys():
            case = tuple(result["machine"][name] for name in ("shape", "dtype", "rank", "batch"))
            if case not in cases or len(result["arms"]) > len(cases[case]["arms"]):
                cases[case] = result
    return [cases[case] for case in sorted(cases)]


def colour(arm: str) -> str:
    return next((shade for name, shade in COLOURS.items() if arm.startswith(name) or name in arm), "#666666")


def median(result: dict, arm: str, mode: str) -> float | None:
    times = result["arms"].get(arm, {}).get(mode)
    return statistics.median(times) if times else None


def mode_of(results: list[dict]) -> str:
    """The mode that the figures show: the one in the results that is nearest to a training step."""
    modes = {mode for result in results for arm in result["arms"].values() for mode in arm}
    return next(mode for mode in PREFERRED if mode in modes)


def origin(result: dict) -> str:
    facts = result["machine"]
    state = f"{(facts['commit'] or facts['source'])[:10]}{' with changes' if facts['dirty'] else ''}"
    return f"{facts['device']}, torch {facts['torch']}, {state}, {facts['date'][:10]}"


def new_figure(width: float, height: float, panels: int, title: str, results: list[dict]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(f"{title}\n{origin(results[0])}", fontsize=10)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def legend(figure, handles: dict) -> None:
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def shorter(arm: str) -> str:
    """An arm's name without the ending for its mode."""
    name = arm.removesuffix(BACKWARD).removesuffix(" +master").removesuffix(" fold")
    return name.replace("fold_/", "ours: ").replace("masked_linear/", "ours: ")


def plain_numbers(axis, unit: float) -> None:
    """Ticks of a logarithmic axis as numbers in `unit`, three a decade where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e3 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axis.set_minor_formatter(NullFormatter())


def roofline(results: list[dict]):
    """One figure of results of one dtype: FLOP a second over FLOP a byte. Left: forward; right: forward + backward."""
    mode, handles = mode_of(results), {}
    copied = max(result["roofs"]["copy_bytes_per_s"] for result in results)
    multiplied = max(result["roofs"]["gemm_flop_per_s"] for result in results)
    title = f"what the K/V of a U-Net reach, {results[0]['machine']['dtype']}, {mode}"
    figure, axes = new_figure(10, 4.8, 2, title, results)
    for axis, what in zip(axes, ("forward", "backward"), strict=True):
        points = []
        for result in results:
            for arm, facts in result["facts"].items():
                time = median(result, arm, mode)
                if facts["what"] == what and time is not None:
                    points.append((facts["flop"] / facts["bytes"], 1e3 * facts["flop"] / time, arm, result["machine"]["shape"]))
        for x, y, arm, shape in points:
            label = f"{shorter(arm)}, {shape}"
            (handles[label],) = axis.plot(x, y, MARKERS.get(shape, "o"), color=colour(arm), markersize=6, alpha=0.85, ls="")
        ridge = multiplied / copied
        low, high = min([ridge / 3, *(p[0] / 2 for p in points)]), max([3 * ridge, *(2 * p[0] for p in points)])
        axis.plot([low, ridge, high], [low * copied, multiplied, multiplied], color="#b03030", linewidth=1.2)
        axis.annotate(f"{multiplied / 1e12:.3g} TFLOP/s multiplied", (high, multiplied), ha="right", va="bottom", fontsize=8,
                      xytext=(0, 3), textcoords="offset points", color="#b03030")
        axis.annotate(f"{copied / 1e9:.3g} GB/s copied", (low, low * copied), ha="left", va="top", fontsize=8,
                      xytext=(2, -6), textcoords="offset points", color="#b03030")
        axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
        axis.set_title("forward" if what == "forward" else "forward + backward", fontsize=9)
        plain_numbers(axis.xaxis, 1)
        plain_numbers(axis.yaxis, 1e12)
    legend(figure, handles)
    return figure


def bars(axis, rows: list[tuple[str, str, float]], label: str, note: str) -> None:
    """Horizontal bars in groups; rows are (group, arm, value), drawn from the top, each with its value."""
    place, ticks, groups = 0.0, [], {}
    for group, arm, value in rows:
        if group not in groups:
            place += 0.8 if groups else 0.0
            groups[group] = []
        groups[group].append(place)
        hatch = "///" if arm.endswith(" +master") else None
        axis.barh(place, value, color=colour(arm), height=0.8, hatch=hatch, edgecolor="white", linewidth=0)
        number = f"{value:.2g}" if value < 0.1 else f"{value:.2f}" if value < 10 else f"{value:.0f}"
        axis.annotate(number, (value, place), xytext=(3, 0), va="center",
                      textcoords="offset points", fontsize=7)
        place += 1
    for group, places in groups.items():
        ticks.append((statistics.mean(places), group))
    axis.set_yticks([place for place, _ in ticks], [group for _, group in ticks])
    axis.axvline(1, color="#b03030", linewidth=1)
    axis.invert_yaxis()
    axis.set_xscale("log")
    # room for the number behind the longest bar
    values = [1.0, *(value for *_, value in rows)]
    axis.set_xlim(min(values) / 2, 3 * max(values))
    axis.grid(False, axis="y")
    plain_numbers(axis.xaxis, 1)
    axis.set_xlabel(label, fontsize=8)
    axis.set_title(note, fontsize=9)


def ratios(results: list[dict]):
    """One figure of results of one shape: arms beside the plain product, folds beside the copy."""
    from matplotlib.patches import Patch

    mode, handles = mode_of(results), {}
    panels = {what: [] for what in ("forward", "backward", "fold")}
    for result in results:
        facts = result["machine"]
        group = f"batch {facts['batch']}\nrank {facts['rank']}\n{facts['dtype']}"
        copy = median(result, "copy of W", mode)
        for arm, known in result["facts"].items():
            time, what = median(result, arm, mode), known["what"].removesuffix(" with master")
            plain = median(result, "one product" + (BACKWARD if what == "backward" else ""), mode)
            if time is None or (what == "fold" and not copy) or (what != "fold" and not plain) or arm == "copy of W":
                continue
            share = known["bytes"] / time / (result["facts"]["copy of W"]["bytes"] / copy) if what == "fold" else time / plain
            panels[what].append((group, arm, share))
            handles.setdefault(shorter(arm), Patch(color=colour(arm)))
    handles["fold through an fp32 master"] = Patch(facecolor="#999999", edgecolor="white", hatch="///")
    most = max(len(rows) for rows in panels.values())
    title = f"{results[0]['machine']['shape']}: time beside the plain product's, {mode}"
    figure, axes = new_figure(11, 1.6 + 0.2 * most + 0.1 * len(results), 3, title, results)
    bars(axes[0], panels["forward"], "× one plain product, forward (less is better)", "forward")
    bars(axes[1], panels["backward"], "× one plain product, forward, dx and dW (less is better)", "forward + backward")
    bars(axes[2], panels["fold"], "share of the copy's bytes a second (more is better)", "fold")
    legend(figure, handles)
    return figure


def draw(folder: Path) -> list[Path]:
    """Write every figure that the results in `folder` allow. Returns their paths."""
    results, figures = load(folder), {}
    for kind, make, name in (("dtype", roofline, "roofline"), ("shape", ratios, "ratios")):
        for value in sorted({result["machine"][kind] for result in results}):
            chosen = [result for result in results if result["machine"][kind] == value and any(result["arms"].values())]
            if chosen:
                figures[folder / f"{name}-{value}.png"] = make(chosen)
    for path, figure in figures.items():
        figure.savefig(path, dpi=130)
    return list(figures)


if __name__ == "__main__":
    print(*draw(Path(sys.argv[1])), sep="\n")
