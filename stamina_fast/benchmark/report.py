"""The report of an output folder: report.md with its pictures in report/, and report.html, which holds them itself."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from ..errors import InputError
from ..evaluate import plots
from ..evaluate.real import held_out
from ..evaluate.samples import Samples, after
from ..io.files import make_folder, read_json, write_bytes
from . import figures
from .summary import (
    BY_KEY,
    MEASURES,
    Arms,
    arms_of,
    load_results,
    mean_of,
    orderings,
    ratio_of,
    values_of,
)

# concepts in a wall of samples, and groups of ages
SHOWN, TENTHS = 12, 10
# the least that tells the measures apart; the docstrings of `measures` and of evaluate/measures.py have the rest
EXPLAINED = (
    ("recognised", "share of a concept's samples that get its name, just after its task and after the last one"),
    ("recognised with its adapter alone", "the same for adapters kept apart, which lora-merge learns and then sums"),
    ("P_mmd, A_mmd", "MMD² of a concept's samples to held-out pictures, just after its task and after the last one"),
    ("F_mmd", "MMD² between the samples just after the task and those after the last one: how far they moved"),
    ("kinds kept", "of the pictures of everyday prompts in which the base model drew the right kind, the share in which the "
                   "final model still does"),
    ("both of a pair", "share of the pictures of two concepts side by side in which both are named rightly, each in its half"),
    ("CLIP-I, CLIP-T, DINO", "cosine of the samples' features with those of held-out pictures, and with a text"),
)
NAMED_BY = {
    "classifier": "A small classifier, trained on renders of the identities and of strangers, and another for kinds. This is "
                  "their accuracy on renders that they were not trained on. No method can be expected to score higher.",
    "nearest": "A sample gets the name of the concept whose held-out pictures are nearest, by their mean in the features. "
               "There is no name for strangers. This is how many of the pictures that are learned from get their own name.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #20242b; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 0.85em; display: block; overflow-x: auto; }}
th, td {{ padding: 0.25rem 0.6rem; border-bottom: 1px solid #d9dde3; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; }} code, pre {{ background: #f4f6f8; }} pre {{ padding: 0.6rem; overflow-x: auto; }}
</style></head><body>
{body}</body></html>
"""


def write_report(output: str | Path) -> Path:
    """Write OUTPUT/report.md and report.html from the cells that are done, and return the path of the second.

    It needs what the cells left, and neither the model nor the encoders. Raises InputError if the folder is not one that
    `run_benchmark` has begun.
    """
    output = Path(output)
    if not (output / "set" / "set.json").is_file():
        raise InputError(f"{str(output)!r} holds no benchmark: it has no set/set.json; give a folder that benchmark has begun")
    arms = arms_of(load_results(output))
    parts = [*opening(output, arms)]
    if arms:
        parts += [*table(arms), *costs(arms), *drawings(output, arms), *claims(arms), *walls(output, arms)]
    parts += [*open_cells(output), *again(output)]
    text = "\n\n".join(parts) + "\n"
    write_bytes(output / "report.md", text.encode())
    write_bytes(output / "report.html", page(text, output).encode())
    return output / "report.html"


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def value(found: Mapping | None) -> str:
    """A mean and its interval, to three digits."""
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['mean']:.3g} [{low:.3g}, {high:.3g}]"


def opening(output: Path, arms: Arms) -> list[str]:
    """What was run, where, and how well the pictures are named."""
    facts, count = read_json(output / "set" / "set.json"), sum(map(len, arms.values()))
    made = facts["made_from"]
    who = f"{len(made['concepts'])} concepts from folders of pictures" if "concepts" in made else \
        f"{made['identities']} identities of the small model's world{' for tuning' if made['tuning'] else ''}"
    parts = ["# Concepts learned one after another", f"{who}; {count} finished cells of {len(arms)} methods or settings. "
             f"{made['samples']} samples of each prompt, {made['sampler_steps']} steps of the sampler, guidance "
             f"{made['guidance']:g}, {made['size']} x {made['size']} pixels. MMD² is measured in the features "
             f"'{made['features'][0]}'."]
    shown = ("cpu", "device", "threads", "torch", "diffusers", "commit")
    machines = {", ".join(f"{key} {result['machine'].get(key)}" for key in shown)
                for results in arms.values() for result in results}
    parts += [f"Made with {said}." for said in sorted(machines)]
    parts += [f"Note: {said}." for said in facts["left_out"]]
    if facts["accuracy"]:
        named = [[what, f"{row['mean']:.1%}", f"{row['least'][0]}: {row['least'][1]:.1%}",
                  f"{row['other']:.1%}" if "other" in row else ""] for what, row in facts["accuracy"].items()]
        parts += ["## What names the pictures", NAMED_BY["nearest" if "nearest" in facts["accuracy"] else "classifier"],
                  rows_of(["of", "accuracy", "least", "strangers"], named)]
    return parts


def table(arms: Arms) -> list[str]:
    """Methods and measures."""
    known = [measure for measure in MEASURES if any(values_of(results, measure) for results in arms.values())]
    rows = [[label, str(len(results)), *(value(mean_of(values_of(results, measure))) for measure in known)]
            for label, results in arms.items()]
    said = "\n".join(f"- {name}: {text}." for name, text in EXPLAINED)
    header = ["method", "seeds", *(f"{measure.title} ({'↑' if measure.better == 'higher' else '↓'})" for measure in known)]
    return ["## Measures", "Means over seeds and identities. In brackets, a 95% interval: each identity (scene, or pair) is "
            "averaged over the seeds, and the identities are drawn again 1000 times (bootstrap). So it tells how much the "
            "choice of identities matters; it does not hold for other seeds where there is one.", said, rows_of(header, rows)]


def costs(arms: Arms) -> list[str]:
    """What each method costs, and what it does to the weights: means over its cells."""
    def mean(results: Sequence[Mapping], of) -> str:
        values = [x for x in map(of, results) if x is not None]
        return f"{sum(values) / len(values):.4g}" if values else ""

    def of_tasks(key: str):
        def average(result: Mapping) -> float | None:
            values = [task[key] for task in result["tasks"] if task[key] is not None]
            return sum(values) / len(values) if values else None
        return average

    columns = (
        ("seconds a concept", of_tasks("seconds")), ("trained parameters", lambda r: r["parameters"]["trainable"]),
        ("stored a concept", lambda r: r["parameters"]["stored_per_task"]), ("mask density", of_tasks("density")),
        ("‖W_t - W_{t-1}‖", of_tasks("step")), ("‖W_N - W_0‖", lambda r: r["tasks"][-1]["distance"]),
        ("share of changed weights changed before", of_tasks("overlap")),
        ("MMD² of everyday prompts to the base's", lambda r: r["retention"].get("mmd2")),
        ("drift (CLIP)", lambda r: r["retention"].get("drift_clip")),
        ("drift (DINO)", lambda r: r["retention"].get("drift_dino")),
    )
    rows = [[label, *(mean(results, of) for _, of in columns)] for label, results in arms.items()]
    used = [i for i in range(len(columns) + 1) if any(row[i] for row in rows)]
    header = ["method", *(name for name, _ in columns)]
    return ["## Costs and weights", rows_of([header[i] for i in used], [[row[i] for i in used] for row in rows])]


def picture(name: str, said: str) -> str:
    return f"![{said}](report/{name}.webp)"


def drawings(output: Path, arms: Arms) -> list[str]:
    """The plots, each under its heading."""
    folder, parts = make_folder(output / "report"), []
    named = {label: (after_task, end) for label, results in arms.items()
             if (after_task := mean_of(values_of(results, BY_KEY["named_after"])))
             and (end := mean_of(values_of(results, BY_KEY["named_end"])))}
    if named:
        figures.arms(folder / "arms.webp", named)
        parts += ["## Learned, and still known", picture("arms", "share recognised just after and at the end")]
    kept = {label: ratio_of(*(values_of(results, BY_KEY[key]) for key in ("named_end", "named_after")))
            for label, results in arms.items()}
    by_name = any(kept.values())
    points = {}
    for label, results in arms.items():
        learned = mean_of(values_of(results, BY_KEY["named_after" if by_name else "P"]))
        moved = values_of(results, BY_KEY["F"])
        still = kept[label] if by_name else mean_of({name: -apart for name, apart in moved.items()})
        if learned and still:
            points[label] = (learned, still)
    if points:
        what = ["share recognised just after its task", "recognised at the end, as a share of that just after"]
        if not by_name:
            what = ["P_mmd just after each task: the lower, the better it was learned", "-F_mmd: how little the samples moved"]
        figures.stability(folder / "stability.webp", points, *what, lower_is_better=not by_name)
        parts += ["## Stability and plasticity", "Best is the top right: learned well, and kept.",
                  picture("stability", "stability over plasticity")]
    lines = {label: line for label, results in arms.items() if (line := by_age(results))}
    if lines:
        figures.ages(folder / "ages.webp", lines)
        parts += ["## Accuracy by age", "How many samples are recognised by how many concepts were learned since, and how many "
                  "of the same concepts' just after their tasks. The gap is what was forgotten.",
                  picture("ages", "accuracy by age of the concept")]
    of_stamina = [results[0] for results in arms.values() if results[0]["cell"]["method"] == "stamina"]
    if of_stamina:
        result = of_stamina[0]
        panels = {"share of row's changed weights\nthat column changed too": result["changes"]["shared"],
                  "cosine of the two changes": result["changes"]["cosine"]}
        figures.overlap(folder / "overlap.webp", result["concepts"], panels)
        parts += ["## Which tasks change the same weights", f"Cell {result['id']}; tasks in the order learned.",
                  by_chance(result), picture("overlap", "overlap between the changes of tasks")]
    return parts


def by_chance(result: Mapping) -> str:
    """How far the shares of a cell's changes are from those of independent masks, and the mean |cosine|."""
    changes, tasks = result["changes"], result["tasks"]
    pairs = [(t, i) for t, i in itertools.permutations(range(len(tasks)), 2) if changes["cosine"][t][i] is not None]
    apart = [changes["shared"][t][i] - tasks[i]["density"] for t, i in pairs]
    turned = [abs(changes["cosine"][t][i]) for t, i in pairs]
    if not pairs:
        return "There are no two tasks that changed weights."
    return (f"Independent masks would share as much as the density of the column's mask. The shares differ from it by "
            f"{sum(apart) / len(pairs):.4f} on average, and by {max(map(abs, apart)):.3f} at most; |cosine| is "
            f"{sum(turned) / len(pairs):.3f} on average.")


def by_age(results: Sequence[Mapping]) -> list[tuple[float, float, float]]:
    """(age, share recognised, share just after of the same concepts), means over up to TENTHS groups of neighbouring ages.

    The age is the number of tasks since; only concepts with a later task have one.
    """
    rows = []
    for result in results:
        first, whole = [task.get("named_after") for task in result["tasks"]], result["cell"]["triangle"]
        for row in result["by_age"]:
            if row["age"]:
                same = first[: len(first) - row["age"]] if whole else [first[-1 - row["age"]]]
                rows.append((row["age"], row["named"], sum(same) / len(same), row["concepts"]))
    wide = -(-max((age for age, *_ in rows), default=0) // TENTHS)
    groups: dict[int, list] = {}
    for row in rows:
        groups.setdefault(-(-row[0] // wide), []).append(row)

    def mean(group: Sequence, column: int) -> float:
        return sum(row[column] * row[3] for row in group) / sum(row[3] for row in group)

    return [tuple(mean(group, column) for column in range(3)) for _, group in sorted(groups.items())]


def claims(arms: Arms) -> list[str]:
    """The orderings of methods, each with what was found."""
    rows = [[row["claim"], row["found"], value(row if "mean" in row else None), row["said"]] for row in orderings(arms)]
    said = ("Each line is a difference that is above 0 if the claim holds. It is seen if its whole interval is above 0, not "
            "seen if it is below, and undecided otherwise. Both sides are paired over identities. Of a method with several "
            "settings the one that ends best is taken. That folded and unfolded weights give the same outputs is held by the "
            "package's tests.")
    return ["## What was asked", said, rows_of(["claim", "found", "difference", "of what"], rows)]


def walls(output: Path, arms: Arms) -> list[str]:
    """Samples of some concepts: a wall for each arm, from its first cell. One whose samples are gone stays as it was drawn."""
    parts = ["## Samples", "Rows are concepts in the order learned, every n-th if there are many. All samples of a row start "
             "from the same noise."]
    gone = []
    for label, results in arms.items():
        result, name = results[0], f"wall-{results[0]['id']}"
        run = output / "cells" / result["id"] / "run"
        if (run / "samples" / "settings.json").is_file():
            draw_wall(output / "report" / f"{name}.webp", label, result, run)
        if (output / "report" / f"{name}.webp").is_file():
            parts += [f"### {label}", picture(name, f"samples of {label}")]
        else:
            gone.append(label)
    return [*parts, f"The samples of these are not kept: {', '.join(gone)}."] if gone else parts


def draw_wall(path: Path, label: str, result: Mapping, run: Path) -> None:
    """Draw some concepts of one cell: held-out pictures, and samples just after the concept's task and at the end."""
    names, samples, guidance = result["concepts"], Samples.of(run), result["set"]["guidance"]
    end, rows = after(len(names) - 1), []
    for t in range(0, len(names), -(-len(names) // SHOWN)):
        # of 'landmark-01-tower' the end says enough
        shown = names[t] if "concepts" in result["set"] else names[t].partition("-")[2]
        drawn = [samples.read(guidance, stage, names[t])[:4] for stage in (after(t), end)]
        rows.append((shown, [held_out(run, names[t])[:4], *drawn]))
    plots.overview(path, f"{label}, {result['id']}", ["held-out pictures", "just after", "at the end"], rows, columns=4, rows=1)


def open_cells(output: Path) -> list[str]:
    """The cells that are begun or planned and not done."""
    rows = []
    for folder in sorted((output / "cells").glob("*")):
        if not (folder / "result.json").exists():
            error = folder / "error.txt"
            said = f"failed: {error.read_text().strip().splitlines()[-1]}" if error.exists() else "not finished"
            rows.append(f"- {folder.name}: {said}")
    return ["## Cells without a result", "\n".join(rows)] if rows else []


def again(output: Path) -> list[str]:
    """The commands that make all this again."""
    file = output / "commands.json"
    commands = [*(read_json(file) if file.is_file() else []), f"stamina-fast benchmark --report {output}"]
    return ["## How to make it again", "```sh\n" + "\n".join(commands) + "\n```"]


def page(text: str, output: Path) -> str:
    """The report as one HTML page, with its pictures inside."""
    renderer = MarkdownIt("commonmark").enable("table")

    def image(self, tokens, i, options, env) -> str:
        data = (output / tokens[i].attrs["src"]).read_bytes()
        tokens[i].attrs["src"] = "data:image/webp;base64," + base64.b64encode(data).decode()
        return self.image(tokens, i, options, env)

    renderer.add_render_rule("image", image)
    return PAGE.format(title="Concepts learned one after another", body=renderer.render(text))
