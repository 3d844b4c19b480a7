"""What the results of many cells say together: a table of measures, and orderings of methods, each with its interval.

Cells that differ only in their seed and order are one arm. A measure has a value for each identity (or scene, or pair), which
is averaged over the seeds of the arm. Intervals are 95% bootstrap intervals over the identities. Differences between arms are
paired: both are redrawn with the same identities.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..evaluate.mmd import interval, resamples
from ..io.files import read_json, sha256
from .cell import DRAWS

SEEN, NOT_SEEN, UNDECIDED, NOT_MEASURED = "seen", "not seen", "undecided", "not measured"
# arms by their label, each with the results of its cells
Arms = Mapping[str, Sequence[Mapping]]


@dataclass(frozen=True)
class Measure:
    """A column of the table. `values` gives the value of each identity, scene or pair by name, from a result."""

    key: str
    title: str
    better: str
    values: Callable[[Mapping], dict[str, float]]


def _of_tasks(key: str) -> Callable[[Mapping], dict[str, float]]:
    return lambda result: {task["name"]: task[key] for task in result["tasks"] if task.get(key) is not None}


def _of_scenes(result: Mapping) -> dict[str, float]:
    return {scene["prompt"]: scene["both"] / scene["seen"] for scene in result["scenes"] if scene.get("seen")}


def _of_pairs(result: Mapping) -> dict[str, float]:
    return {" left of ".join(row["pair"]): row["both"] for row in result["pairs"]}


MEASURES = (
    Measure("named_after", "recognised just after", "higher", _of_tasks("named_after")),
    Measure("named_end", "recognised at the end", "higher", _of_tasks("named_end")),
    Measure("named_apart", "recognised with its adapter alone", "higher", _of_tasks("named_apart")),
    Measure("P", "P_mmd", "lower", _of_tasks("mmd_after")),
    Measure("A", "A_mmd", "lower", _of_tasks("mmd_end")),
    Measure("F", "F_mmd", "lower", _of_tasks("forgetting")),
    Measure("kinds", "kinds kept", "higher", _of_scenes),
    Measure("pairs", "both of a pair", "higher", _of_pairs),
    Measure("clip_i", "CLIP-I at the end", "higher", _of_tasks("clip_i_end")),
    Measure("clip_t", "CLIP-T at the end", "higher", _of_tasks("clip_t_end")),
    Measure("dino", "DINO at the end", "higher", _of_tasks("dino_end")),
)
BY_KEY = {measure.key: measure for measure in MEASURES}


def load_results(output: Path) -> list[dict]:
    """The results of all finished cells in an output folder, by id."""
    return [read_json(path) for path in sorted((output / "cells").glob("*/result.json"))]


def arms_of(results: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Results by arm, in the order of their labels. Arms of one label with other shared options get a hash after it."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for result in results:
        shared = {key: value for key, value in result["cell"].items() if key not in ("seed", "order")}
        found.setdefault((result["label"], sha256(json.dumps(shared, sort_keys=True).encode())[:4]), []).append(result)
    labels = [label for label, _ in found]
    return {label if labels.count(label) == 1 else f"{label} [{tag}]": rows for (label, tag), rows in sorted(found.items())}


def values_of(results: Sequence[Mapping], measure: Measure) -> dict[str, float]:
    """The measure's value for each identity, scene or pair, averaged over the seeds."""
    found: dict[str, list[float]] = {}
    for result in results:
        for unit, value in measure.values(result).items():
            found.setdefault(unit, []).append(value)
    return {unit: sum(values) / len(values) for unit, values in found.items()}


def bootstrap(count: int, statistic: Callable[[Tensor], Tensor]) -> dict | None:
    """{"mean", "interval"} of a statistic: a function of how often each of `count` units counts, float64 [n, count] to [n].

    None where it is not a finite number.
    """
    value = statistic(torch.ones(1, count, dtype=torch.float64)).item()
    redrawn = statistic(resamples(count, DRAWS, 0))
    redrawn = redrawn[redrawn.isfinite()]
    if not math.isfinite(value) or not len(redrawn):
        return None
    return {"mean": value, "interval": interval(redrawn)}


def mean_of(values: Mapping[str, float]) -> dict | None:
    """The mean of some values and its interval."""
    if not values:
        return None
    row = torch.tensor([values[unit] for unit in sorted(values)], dtype=torch.float64)
    return bootstrap(len(row), lambda times: times @ row / times.sum(1))


def ratio_of(above: Mapping[str, float], below: Mapping[str, float]) -> dict | None:
    """The ratio of two means over the same units, and its interval."""
    units = sorted(set(above) & set(below))
    if not units:
        return None
    rows = torch.tensor([[values[unit] for unit in units] for values in (above, below)], dtype=torch.float64)
    return bootstrap(len(units), lambda times: (times @ rows[0]) / (times @ rows[1]))


def difference(left: Mapping[str, float], right: Mapping[str, float]) -> dict | None:
    """The mean of left - right over the units that both have, and its interval."""
    return mean_of({unit: left[unit] - right[unit] for unit in set(left) & set(right)})


def rises(arms: Sequence[Sequence[Mapping]]) -> dict | None:
    """By how much P_mmd rises from the first task to the last, by a straight line; of two arms the first's minus the second's.

    The line is fitted to all tasks of all seeds, and an identity that is redrawn counts in all of them.
    """
    names = sorted({task["name"] for results in arms for result in results for task in result["tasks"]})
    if len(names) < 3:
        return None

    def slope(results: Sequence[Mapping], times: Tensor) -> Tensor:
        tasks = [task for result in results for task in result["tasks"]]
        w = times[:, [names.index(task["name"]) for task in tasks]]
        x = torch.tensor([task["position"] for task in tasks], dtype=torch.float64)
        y = torch.tensor([task["mmd_after"] for task in tasks], dtype=torch.float64)
        # the weighted means differ between draws
        apart = x - (w @ x / w.sum(1))[:, None]
        return (w * apart * y).sum(1) / (w * apart.square()).sum(1) * (len(names) - 1)

    def statistic(times: Tensor) -> Tensor:
        slopes = [slope(results, times) for results in arms]
        return slopes[0] - slopes[1] if len(slopes) == 2 else slopes[0]

    return bootstrap(len(names), statistic)


def best(arms: Arms, method: str) -> str | None:
    """The label of a method's arm that ends best: most recognised, or least A_mmd where nothing is recognised by name."""
    own = [label for label, results in arms.items() if results[0]["cell"]["method"] == method]

    def order(label: str) -> float:
        named, apart = (mean_of(values_of(arms[label], BY_KEY[key])) for key in ("named_end", "A"))
        return named["mean"] if named else -apart["mean"]

    return max(own, key=order, default=None)


def orderings(arms: Arms) -> list[dict]:
    """The orderings of methods that are asked about: {"claim", "said", "found", "mean", "interval"}.

    Each is a difference that is above 0 if the claim holds. "found" is SEEN if its whole interval is above 0, NOT_SEEN if it is
    below, UNDECIDED if 0 lies in it, and NOT_MEASURED if a method is missing. Of a method with several arms the best is taken.
    Where STAMINA and LoRA, or a random mask, have arms of the same changes, these are compared too.
    """
    chosen = {method: best(arms, method) for method in ("stamina", "lora", "c-lora")}

    def of(method: str, key: str) -> dict[str, float]:
        label = chosen.get(method, method)
        return values_of(arms[label], BY_KEY[key]) if label in arms else {}

    def apart(one: str, two: str, key: str, how: str) -> tuple[str, dict | None]:
        return f"{how}: {chosen[one] or one} minus {chosen[two] or two}", difference(of(one, key), of(two, key))

    def line(*methods: str) -> dict | None:
        own = [arms[chosen[method]] for method in methods if chosen[method]]
        return rises(own) if len(own) == len(methods) else None

    methods = {results[0]["cell"]["method"] for results in arms.values()} - {"lora"}
    others = {label: mean for label in sorted(best(arms, method) for method in methods)
              if (mean := mean_of(values_of(arms[label], BY_KEY["F"])))}
    chosen["worst"] = max(others, key=lambda label: others[label]["mean"], default=None)
    rows = [
        ("Sequential tuning without a mask forgets", f"recognised: just after minus at the end, {chosen['lora'] or 'lora'}",
         difference(of("lora", "named_after"), of("lora", "named_end"))),
        ("C-LoRA forgets less than sequential LoRA", *apart("lora", "c-lora", "F", "F_mmd")),
        ("C-LoRA learns later tasks worse", f"rise of P_mmd over the sequence, {chosen['c-lora'] or 'c-lora'}", line("c-lora")),
        ("C-LoRA's later tasks suffer more than sequential LoRA's",
         f"rise of P_mmd: {chosen['c-lora'] or 'c-lora'} minus {chosen['lora'] or 'lora'}", line("c-lora", "lora")),
        ("STAMINA ends with the better A_mmd than C-LoRA", *apart("c-lora", "stamina", "A", "A_mmd")),
        ("STAMINA ends with the better A_mmd than sequential LoRA", *apart("lora", "stamina", "A", "A_mmd")),
        ("More is recognised at the end with STAMINA than with C-LoRA", *apart("stamina", "c-lora", "named_end", "recognised")),
        ("More is recognised at the end with STAMINA than with sequential LoRA",
         *apart("stamina", "lora", "named_end", "recognised")),
        ("STAMINA forgets less than C-LoRA, which the papers do not establish", *apart("c-lora", "stamina", "F", "F_mmd")),
        ("Sequential LoRA is the worst forgetter, which it was not in C-LoRA's own figure",
         *apart("lora", "worst", "F", "F_mmd")),
    ]
    shared = [label.removeprefix("stamina ") for label in sorted(arms) if label.startswith("stamina ")]
    for changes, (rival, called) in itertools.product(shared, (("lora", "sequential LoRA"), ("random-mask", "a random mask"))):
        one, two = f"{rival} {changes}", f"stamina {changes}"
        if one not in arms:
            continue
        after, end, moved = ([values_of(arms[label], BY_KEY[key]) for label in (one, two)]
                             for key in ("named_after", "named_end", "F"))
        if rival == "lora":
            rows.append((f"Sequential tuning without a mask forgets, with {changes}",
                         "recognised by lora: just after minus at the end", difference(after[0], end[0])))
        rows += [
            (f"STAMINA forgets less than {called}, both with {changes}", f"F_mmd: {rival} minus stamina",
             difference(moved[0], moved[1])),
            (f"More is recognised at the end with STAMINA than with {called}, both with {changes}",
             f"recognised: stamina minus {rival}", difference(end[1], end[0])),
        ]
    return [{"claim": claim, "said": said, "found": verdict(value), **(value or {})} for claim, said, value in rows]


def verdict(value: Mapping | None) -> str:
    """What the interval of a difference says."""
    if value is None:
        return NOT_MEASURED
    low, high = value["interval"]
    return SEEN if low > 0 else NOT_SEEN if high < 0 else UNDECIDED
