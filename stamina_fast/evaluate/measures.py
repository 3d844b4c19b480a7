"""A_mmd, F_mmd and P_mmd of a sequence of concepts, from features alone.

    P_mmd[j] = MMD²(D_j, X_{j,j})                     just after its task: plasticity
    A_mmd    = mean over j of MMD²(D_j, X_{N,j})      at the end                            lower is better
    F_mmd    = mean over j<N of MMD²(X_{j,j}, X_{N,j})  how far the pictures drifted        lower is better

D_j are features of real images of concept j, and X_{t,j} those of samples of concept j after task t. Sample i starts from the
same noise in every X. All comparisons of a concept use one bandwidth, the median distance between its real images, which
depends on no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import InputError
from ..seeds import derive_seed
from .mmd import bootstrap, interval, median_distance, mmd2, resamples

BANDWIDTH_RULE = "median distance between the concept's real images, the same for every comparison of the concept"


def _ratio(value: float, base: float) -> float | None:
    """`value` / `base`; None if the base's samples are as good as the real images, when a ratio means nothing."""
    return value / base if base > 0 else None


def _concept(real, base, after, end, bandwidth: float, draws: int, seed: int) -> dict:
    """The three MMD² of one concept to its real images, two ratios, and 95% bootstrap intervals of all five.

    Without samples of the base, its MMD² and the ratios to it are left out.
    """
    samples = ({} if base is None else {"mmd_base": base}) | {"mmd_after": after, "mmd_end": end}
    values = {key: mmd2(real, x, bandwidth) for key, x in samples.items()}
    # all three use the same resamples of the real images, since the two parts of a ratio are not independent
    times_real = resamples(len(real), draws, derive_seed(seed, "real"))
    redrawn = {key: bootstrap(real, x, bandwidth, times_real, resamples(len(x), draws, derive_seed(seed, key)))
               for key, x in samples.items()}
    if after is end:
        redrawn["mmd_end"] = redrawn["mmd_after"]
    for key in ("after", "end") if base is not None else ():
        values[f"ratio_{key}"] = _ratio(values[f"mmd_{key}"], values["mmd_base"])
        redrawn[f"ratio_{key}"] = redrawn[f"mmd_{key}"] / redrawn["mmd_base"]
    return values | {"bandwidth": bandwidth, "intervals": {key: interval(x) for key, x in redrawn.items()}}


def measure(
    real: Sequence[torch.Tensor], base: Sequence[torch.Tensor] | None, samples: Sequence[Mapping[int, torch.Tensor]],
    *, draws: int = 1000, seed: int = 0,
) -> dict:
    """All measures of N concepts. `real[j]`, `base[j]` and `samples[t][j]`, j <= t, are features `[n, d]`.

    Needed are samples[j][j], just after task j, and samples[N-1][j], at the end; others only fill "matrix". Without `base`
    there are no mmd_base, ratio_after and ratio_end.

    Returns "A_mmd", "F_mmd" (None for a single concept), "P_mmd" (a list), "tasks" (a dict a concept: mmd_base, mmd_after,
    mmd_end, ratio_after, ratio_end, bandwidth, forgetting, and their intervals) and "matrix": MMD² to the real images, row t
    after task t, column j of concept j, with None where there are no samples.
    """
    count = len(real)
    base = [None] * count if base is None else base
    whole = [t in row and set(row) <= set(range(t + 1)) for t, row in enumerate(samples)]
    if not count or not len(base) == len(samples) == count or not all(whole) or len(samples[-1]) != count:
        raise InputError(f"measure wants base[j], samples[j][j] and samples[-1][j] for {count} concepts, got {len(base)} and "
                         f"rows of {[sorted(row) for row in samples]}; sample each concept after its task and at the end")
    widths = [median_distance(x) for x in real]
    tasks, end = [], samples[-1]
    for j, h in enumerate(widths):
        task = _concept(real[j], base[j], samples[j][j], end[j], h, draws, derive_seed(seed, j))
        task["forgetting"] = mmd2(samples[j][j], end[j], h, paired=True) if j < count - 1 else None
        tasks.append(task)
    drift = [task["forgetting"] for task in tasks[:-1]]
    return {
        "A_mmd": sum(task["mmd_end"] for task in tasks) / count,
        "F_mmd": sum(drift) / len(drift) if drift else None,
        "P_mmd": [task["mmd_after"] for task in tasks],
        "tasks": tasks,
        "matrix": [[mmd2(real[j], row[j], widths[j]) if j in row else None for j in range(count)] for row in samples],
    }
