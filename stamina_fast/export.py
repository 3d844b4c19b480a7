"""Export a RUN as a diffusers folder that loads without this package, with all of its concepts or some."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from .errors import FileError, InputError
from .io.files import new_folder
from .io.run import Run
from .pipeline.load import load_pipeline
from .reopen import attached, base_model, restore


def export_diffusers(
    run: str | Path, output: str | Path, tasks: Sequence[str] | None = None, *, model=None, device=None,
) -> Path:
    """Write the folded pipeline of a RUN to the new or empty folder `output`, and return that folder.

    tasks   names of the concepts to keep, in any order. The weights are then rebuilt from the base model and the stored
            factors. Default: all, by a copy of RUN/model
    model   the base model; default: where the run's config says. Used only with `tasks`
    device  where the weights are rebuilt. They have the bits of training on the device that the manifest names

    The result is loaded once as a check. Raises InputError for an unknown concept or another base model, and FileError for a
    damaged run or an `output` that is not empty. Then nothing is written.
    """
    run = Run.open(Path(run))
    known = [task["name"] for task in run.tasks()]
    for name in tasks or ():
        if name not in known:
            raise InputError(f"the run has no concept {name!r}; it has {', '.join(known) or 'none yet'}")
    if tasks is not None and not tasks:
        raise InputError(f"tasks must name at least one concept; the run has {', '.join(known) or 'none yet'}")
    with new_folder(Path(output)) as partial:
        if tasks is None:
            copy_model(run, partial)
        else:
            rebuild(run, [name for name in known if name in tasks], model, device).save_pretrained(partial)
        load_pipeline(partial, "cpu")
    return Path(output)


def copy_model(run: Run, target: Path) -> None:
    """Copy RUN/model. Raises FileError if the run is not finished."""
    source = run.path / "model"
    if not (source / "model_index.json").is_file():
        raise FileError(f"{str(source)!r} is no finished model; go on with train --resume, or name finished concepts as tasks")
    shutil.copytree(source, target, dirs_exist_ok=True)


def rebuild(run: Run, names: Sequence[str], model=None, device=None):
    """A plain pipeline with only these concepts of the run, folded in the order in which they were learned."""
    pipeline = base_model(run, model, device)
    with attached(run, pipeline) as adapters:
        restore(adapters, run, names)
    return pipeline
