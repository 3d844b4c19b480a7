"""Open a RUN again: its base model, adapters with its options, and its finished tasks in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .adapter.attach import Adapters, attach
from .adapter.config import StaminaConfig
from .errors import InputError
from .io.run import Run
from .pipeline.load import fingerprint, load_pipeline


def base_model(run: Run, model=None, device=None):
    """The pipeline that the run was trained from, in the run's dtype.

    model: where it is now; default: where the run's config says. Raises InputError if it is another model.
    """
    pipeline = load_pipeline(run.config["model"] if model is None else model, device, getattr(torch, run.config["dtype"]))
    if fingerprint(pipeline) != run.config["fingerprint"]:
        raise InputError(f"this model is not the one that {str(run.path)!r} was trained from; pass the base model that its "
                         f"config calls {run.config['model']!r}")
    return pipeline


@contextlib.contextmanager
def attached(run: Run, pipeline) -> Iterator[Adapters]:
    """Attach adapters with the run's options to its base model, and detach them when the block ends."""
    adapters = attach(pipeline, StaminaConfig.from_dict(run.config["stamina"]))
    try:
        yield adapters
    finally:
        adapters.detach()


def restore(adapters: Adapters, run: Run, names: Sequence[str]) -> None:
    """Rebuild weights and tokens from W_0 and the stored files of these tasks, in this order. All files are read first."""
    loaded = {name: run.load_task(name) for name in names}
    for name, task in loaded.items():
        adapters.add_task(name, task.factors)
        adapters.tokens.add(task.info["token"], task.token)
    if loaded:
        adapters.rewind(names)
