"""Checkpoints: the state within a task, as tensors by name. What (seed, task, step) determine is not in it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FileError
from .step import Step


def state(step: Step, done: int, density: dict[int, float], seconds: float) -> dict[str, Tensor]:
    """The state after `done` steps of a task.

    value.NAME    each trained parameter, of the factors, the mask and the token, fp32
    moment.I.KEY  what the optimizer keeps, for each of its flat vectors
    losses        [done, 5] fp32, see `step.LOSSES`
    density       [reads, 2] fp64: a step after which the mask's density was read, and the density
    seconds       fp64: how long the steps took
    """
    reads = torch.tensor(list(density.items()), dtype=torch.float64).reshape(-1, 2)
    rest = {"losses": step.losses[:done], "density": reads, "seconds": torch.tensor(seconds, dtype=torch.float64)}
    return _kept(step) | rest


def restore_(step: Step, done: int, tensors: dict[str, Tensor]) -> tuple[dict[int, float], float]:
    """Set the state after `done` steps in place. Call it after `Step.begin_`. Returns (density, seconds).

    Raises FileError, and changes nothing, if a tensor is missing or does not fit this step.
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
    """The part of a state that parameters and optimizer hold."""
    optimizer = step.optimizer
    values = {f"value.{name}": view for name, view in zip(optimizer.names, optimizer.values, strict=True)}
    return values | {f"moment.{name}": moment for name, moment in optimizer.moments().items()}
