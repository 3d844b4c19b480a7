"""The state within a task, as tensors by name: what a step reads that its seed, the task and the step do not say already."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FileError
from .step import Step


def state(step: Step, done: int, density: dict[int, float], seconds: float) -> dict[str, Tensor]:
    """Everything after `done` steps of a task.

    value.NAME    each trained parameter, of the factors, the mask and the token, fp32
    moment.I.KEY  what the optimizer remembers, for each of its flat vectors
    losses        [done, 5] fp32, see `step.LOSSES`
    density       [looks, 2] fp64: a step after which the mask was looked at, and its density
    seconds       fp64: how long the steps took
    """
    looks = torch.tensor(list(density.items()), dtype=torch.float64).reshape(-1, 2)
    rest = {"losses": step.losses[:done], "density": looks, "seconds": torch.tensor(seconds, dtype=torch.float64)}
    return _kept(step) | rest


def restore_(step: Step, done: int, tensors: dict[str, Tensor]) -> tuple[dict[int, float], float]:
    """Put the state after `done` steps back, in place, after `Step.begin_`. Returns (density, seconds).

    Raises FileError, and changes nothing, for a state that is not whole or not of this step.
    """
    kept = _kept(step)
    wanted = {name: (list(tensor.shape), tensor.dtype) for name, tensor in kept.items()}
    wanted |= {"losses": ([done, step.losses.shape[1]], torch.float32), "seconds": ([], torch.float64)}
    given = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if name != "density"}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong or "density" not in tensors or not 0 < done <= len(step.losses):
        first = wrong[0] if wrong else "density"
        raise FileError(f"the checkpoint after step {done} does not fit: {first!r} is {given.get(first, 'missing')}, must be "
                        f"{wanted.get(first, 'there')}; restore the run from a copy, or start it anew")
    for name, view in zip(step.optimizer.names, step.optimizer.values, strict=True):
        view.copy_(tensors[f"value.{name}"])
    step.optimizer.restore_({name: tensors[f"moment.{name}"] for name in step.optimizer.moments()})
    step.losses[:done].copy_(tensors["losses"])
    step.buffers.clock.fill_(done)
    return {int(at): value for at, value in tensors["density"].tolist()}, tensors["seconds"].item()


def _kept(step: Step) -> dict[str, Tensor]:
    """What a state holds of parameters and optimizer."""
    optimizer = step.optimizer
    values = {f"value.{name}": view for name, view in zip(optimizer.names, optimizer.values, strict=True)}
    return values | {f"moment.{name}": moment for name, moment in optimizer.moments().items()}
