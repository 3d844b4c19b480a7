"""What a benchmark measures besides MMD², from names that classifiers gave and from features.

    identification   whether a sample is recognised as its concept
    retention        whether the model still draws what it could before it learned anything
    composition      whether two concepts can be drawn side by side
    similarity       cosines of image and text features: DINO, CLIP-I and CLIP-T of DreamBooth (arXiv 2208.12242), and drift,
                     as PEFT's comparison of methods for image generation names it
    changes          where two tasks change the same weights

T2I-ConBench (arXiv 2505.16875) asks the same questions with other judges: Unique-Sim (of a vision-language model) for
identification, FID and Comp for retention, and item + item for composition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ..adapter.attach import Adapters
from ..errors import InputError
from ..evaluate.classifier import share
from ..evaluate.mmd import median_distance, mmd2

# entries of the weights that changes of tasks are compared in, all tasks together
MOST_ENTRIES = 20_000_000


def by_age(shares: Mapping[tuple[int, int], float]) -> list[dict]:
    """Accuracy by the age of a concept, from `shares[t, j]`, the share of concept j's samples after task t that are named.

    The age is t - j, the number of tasks since. Returns {"age", "named", "concepts"}, by age; "named" is the mean over them.
    """
    found: dict[int, list[float]] = {}
    for (t, j), value in shares.items():
        found.setdefault(t - j, []).append(value)
    return [{"age": age, "named": sum(values) / len(values), "concepts": len(values)} for age, values in sorted(found.items())]


def kept(base: Sequence[str], end: Sequence[str], kind: str) -> dict:
    """How many samples of one prompt show its kind, from the names of those of the base and of the final model.

    base, end   the share that is named rightly
    both, seen  how many are named rightly in both, and in the base; sample i of both starts from the same noise
    """
    right = [one == kind for one in base]
    return {"base": share(base, kind), "end": share(end, kind), "seen": sum(right),
            "both": sum(was and now == kind for was, now in zip(right, end, strict=True))}


def both_named(left: Sequence[str], right: Sequence[str], pair: tuple[str, str]) -> dict:
    """Of pictures of a pair, from the names of their halves: the share with "left", "right" and "both" named rightly."""
    found = [(one == pair[0], two == pair[1]) for one, two in zip(left, right, strict=True)]
    count = len(found)
    return {"left": sum(one for one, _ in found) / count, "right": sum(two for _, two in found) / count,
            "both": sum(one and two for one, two in found) / count}


def drawn_apart(base: torch.Tensor, end: torch.Tensor) -> float:
    """MMD² between features `[n, d]` of the base's and of the final model's pictures; row i of both is from the same noise.

    The bandwidth is the median distance between the base's pictures.
    """
    return mmd2(base, end, median_distance(base), paired=True)


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    """The mean cosine over all pairs of rows of unit length, `[n, d]` and `[m, d]`: CLIP-I, DINO, and CLIP-T for a text."""
    return (x.double() @ y.double().mT).mean().item()


def drift(base: torch.Tensor, end: torch.Tensor) -> float:
    """1 - the mean cosine between row i of one and of the other, both `[n, d]` of unit length."""
    if base.shape != end.shape:
        raise InputError(f"drift compares picture by picture, got {list(base.shape)} and {list(end.shape)}; draw as many of "
                         "each, and give both to one encoder")
    return 1 - (base.double() * end.double()).sum(1).mean().item()


@torch.no_grad()
def changes(adapters: Adapters, names: Sequence[str]) -> dict[str, list[list[float | None]]]:
    """How much the weights that tasks changed are the same ones. `adapters` hold the tasks `names`; afterwards none is folded.

    shared  [t][i]: the share of the entries changed by task t that task i changed too; None for a task without a change
    cosine  [t][i]: the cosine of the two changes, as one long vector each; None where one of them is zero

    On a large model only every n-th entry is compared (MOST_ENTRIES).
    """
    entries = sum(stack.weight.numel() for stack in adapters.stacks)
    every = max(1, -(-entries * len(names) // MOST_ENTRIES))
    rows = []
    for name in names:
        adapters.rewind([name])
        rows.append(torch.cat([stack.past().flatten()[::every].float().cpu() for stack in adapters.stacks]))
    adapters.rewind([])
    return compare(torch.stack(rows))


def compare(rows: torch.Tensor) -> dict[str, list[list[float | None]]]:
    """`changes` from the change of each task as a row `[tasks, entries]`."""
    changed = (rows != 0).float()
    again, counts = changed @ changed.mT, changed.sum(1)
    dots, norms = rows @ rows.mT, rows.norm(dim=1)

    def table(values: torch.Tensor) -> list[list[float | None]]:
        # dividing by nothing gives no number. Four digits, since a result of 100 tasks has 20,000 of these
        return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in values.tolist()]

    return {"shared": table(again / counts[:, None]), "cosine": table(dots / norms[:, None] / norms)}
