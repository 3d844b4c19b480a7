"""One cell: train, sample, measure; RUN in CELL/run, and everything that a report needs in CELL/result.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

from ..bench.machine import describe, version
from ..evaluate import evaluate_run, keep_held_out
from ..evaluate.features import encoder, text_encoder
from ..evaluate.mmd import interval, resamples
from ..evaluate.naming import tensor_of
from ..evaluate.samples import Samples, after
from ..io.files import make_folder, remove, write_json
from ..io.run import FILES, Run
from ..pipeline.load import frozen, load_pipeline
from ..reopen import attached, base_model, restore
from ..training import train
from ..training.methods import METHODS
from . import measures
from .names import half
from .plan import Cell
from .subjects import Subjects

PAIRS, APART = "pairs", "apart"
DRAWS = 1000


def run_cell(cell: Cell, subjects: Subjects, folder: Path, on_task: Callable | None = None) -> dict:
    """Train and measure a cell in `folder`, or go on where a kill left it; write result.json last, and return its content.

    on_task: called after every learned concept, with any arguments.
    """
    start, setup, made = time.perf_counter(), subjects.setup, subjects.facts["made_from"]
    concepts, path = subjects.ordered(cell.order), make_folder(folder) / "run"
    train(setup.model, concepts, path, method=cell.method, resume=True, progress=False, device=setup.device, on_task=on_task,
          **cell.options, seed=cell.seed)
    for concept in concepts:
        keep_held_out(path, concept.name, subjects.held_out[concept.name])
    metrics = evaluate_run(
        path, samples=made["samples"], steps=made["sampler_steps"], guidance=(made["guidance"],), features=setup.features[0],
        model=setup.model, device=setup.device, progress=False, triangle=cell.triangle, base=False,
    )
    run = Run.open(path)
    draw_at_the_end(run, subjects)
    if METHODS[cell.method].strategy.apart:
        draw_apart(run, subjects)
    samples = Read(run, subjects)
    result = {
        "id": cell.id, "label": cell.label, "cell": cell.as_dict(), "set": made, "accuracy": subjects.facts["accuracy"],
        "left_out": subjects.facts["left_out"], "machine": machine(setup.device), "concepts": samples.names,
        "mmd": of_mmd(metrics), "tasks": tasks_of(run, metrics, samples), "by_age": measures.by_age(samples.shares()),
        "scenes": samples.scenes(), "retention": samples.retention(), "pairs": samples.pairs(),
        "changes": changes_of(run, setup), "parameters": metrics["parameters"],
        "settings": metrics["settings"] | {"stamina": run.config["stamina"], "train": run.config["train"]},
    }
    training = sum(task["seconds"] for task in result["tasks"])
    # of this process alone, if the cell was resumed
    result["seconds"] = {"training": training, "all": time.perf_counter() - start}
    write_json(folder / "result.json", result)
    if not setup.keep:
        lighten(folder)
    return result


def draw_at_the_end(run: Run, subjects: Subjects) -> None:
    """Draw the pairs and the scenes with the model after the last task."""
    pipeline, samples = load_pipeline(run.path / "model", subjects.setup.device), Samples.of(run.path)
    for pair in subjects.pairs:
        samples.draw(pipeline, subjects.pair_prompt(pair), subjects.facts["made_from"]["guidance"], PAIRS, pair_name(pair))
    subjects.draw_scenes(pipeline, run.path / "scenes", "end")


def draw_apart(run: Run, subjects: Subjects) -> None:
    """Draw each concept with its own residual alone: adapters kept apart."""
    setup, samples = subjects.setup, Samples.of(run.path)
    pipeline = base_model(run, setup.model, setup.device)
    with frozen(pipeline), attached(run, pipeline) as adapters:
        restore(adapters, run, [concept.name for concept in subjects.concepts])
        for concept in subjects.concepts:
            adapters.rewind([concept.name])
            samples.draw(pipeline, concept.prompt, subjects.facts["made_from"]["guidance"], APART, concept.name)


def pair_name(pair: tuple[str, str]) -> str:
    return f"{pair[0]} and {pair[1]}"


def machine(device: str | None) -> dict:
    """What a result says of where it was made: processor, threads, versions and the commit, None where unknown."""
    default = "cuda:0" if torch.cuda.is_available() else "cpu"
    return describe(device or default) | {name: version(name) for name in ("diffusers", "transformers", "stamina-fast")}


def lighten(folder: Path) -> None:
    """Remove what is large in a finished cell: the model, and the factors of its tasks. Samples and records stay."""
    remove(folder / "run" / "model")
    for task in (folder / "run" / "tasks").glob("*"):
        for file in (FILES[0], "method.safetensors"):
            remove(task / file)


def of_mmd(metrics: Mapping) -> dict:
    """A_mmd, F_mmd and the mean of P_mmd, each with a 95% interval over the concepts."""
    found = {}
    for name, key in (("A", "mmd_end"), ("F", "forgetting"), ("P", "mmd_after")):
        values = [task[key] for task in metrics["tasks"] if task[key] is not None]
        found[name] = {"mean": sum(values) / len(values), "interval": over(values)}
    return found


def over(values: list[float], seed: int = 0) -> list[float]:
    """The 95% bootstrap interval of the mean of some values."""
    times = resamples(len(values), DRAWS, seed)
    return interval(times @ times.new_tensor(values) / len(values))


def tasks_of(run: Run, metrics: Mapping, samples: Read) -> list[dict]:
    """A row for each concept, in the order learned: facts of its task, MMD², and what its samples are named."""
    rows = []
    for position, (record, measured) in enumerate(zip(run.tasks(), metrics["tasks"], strict=True)):
        rows.append(measured | {"position": position, "sha256": record["sha256"], "files": record["files"]}
                    | samples.named(position) | samples.similarity(position))
    return rows


def changes_of(run: Run, setup) -> dict:
    """Which tasks changed the same weights (`measures.changes`)."""
    pipeline = base_model(run, setup.model, setup.device)
    with attached(run, pipeline) as adapters:
        names = [task["name"] for task in run.tasks()]
        for name in names:
            adapters.add_task(name, run.load_task(name).factors)
        return measures.changes(adapters, names)


class Read:
    """The samples of a run and what the measures make of them. Where there is nothing to tell, a measure is left out."""

    def __init__(self, run: Run, subjects: Subjects):
        self.run, self.subjects, self.samples = run, subjects, Samples.of(run.path)
        self.guidance = subjects.facts["made_from"]["guidance"]
        self.names = [task["name"] for task in run.tasks()]
        self.concepts = {concept.name: concept for concept in subjects.concepts}
        device = subjects.setup.device or "cpu"
        self.first = encoder(subjects.setup.features[0], device)
        telling = [name for name in subjects.setup.features if name != "layout"]
        self.encoders = [(encoder(name, device), text_encoder(name, device)) for name in telling]

    def at(self, stage: str, name: str) -> list[Image.Image]:
        return self.samples.read(self.guidance, stage, name)

    def shares(self) -> dict[tuple[int, int], float]:
        """The share of concept j's samples after task t that are named rightly, for every (t, j) that was drawn."""
        if self.subjects.namer is None:
            return {}
        return {(t, j): measures.share(self.subjects.namer.name(self.at(after(t), name)), name)
                for j, name in enumerate(self.names) for t in range(j, len(self.names))
                if self.samples.drawn(self.guidance, after(t), name)}

    def named(self, j: int) -> dict:
        if self.subjects.namer is None:
            return {}
        stages, name = {"after": after(j), "end": after(len(self.names) - 1)}, self.names[j]
        if self.samples.drawn(self.guidance, APART, name):
            stages["apart"] = APART
        return {f"named_{when}": measures.share(self.subjects.namer.name(self.at(stage, name)), name)
                for when, stage in stages.items()}

    def similarity(self, j: int) -> dict:
        """CLIP-I, CLIP-T and DINO just after the concept's task and at the end, by the encoders that are given."""
        concept, found = self.concepts[self.names[j]], {}
        for encode, texts in self.encoders:
            real = encode(self.subjects.squares(self.subjects.held_out[concept.name]))
            for when, stage in (("after", after(j)), ("end", after(len(self.names) - 1))):
                drawn = encode(self.at(stage, concept.name))
                found[f"{'dino' if texts is None else 'clip_i'}_{when}"] = measures.cosine(drawn, real)
                if texts is not None:
                    found[f"clip_t_{when}"] = measures.cosine(drawn, texts([self.subjects.class_prompt(concept)]))
        return found

    def both(self) -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
        """The scenes' pictures from the base and from the final model."""
        return (self.subjects.read_scenes(self.subjects.path, "base"),
                self.subjects.read_scenes(self.run.path / "scenes", "end"))

    def scenes(self) -> list[dict]:
        """How far each scene still shows its kind."""
        kinds, found = self.subjects.kinds, []
        for (prompt, kind), base, end in zip(self.subjects.scenes, *self.both(), strict=True):
            known = {} if kinds is None else measures.kept(kinds.name(tensor_of(base)), kinds.name(tensor_of(end)), kind)
            found.append({"prompt": prompt, "kind": kind, **known})
        return found

    def retention(self) -> dict:
        """Over all scenes: MMD² between base and end, from the same noise, and drift where an encoder is given."""
        base, end = (list(chain.from_iterable(part)) for part in self.both())
        if len(base) < 2:
            return {}
        found = {"mmd2": measures.drawn_apart(self.first(base), self.first(end))}
        for encode, texts in self.encoders:
            found["drift_dino" if texts is None else "drift_clip"] = measures.drift(encode(base), encode(end))
        return found

    def pairs(self) -> list[dict]:
        """How often both concepts of a pair are named, each in its half."""
        if self.subjects.namer is None:
            return []
        found = []
        for pair in self.subjects.pairs:
            drawn = self.at(PAIRS, pair_name(pair))
            left, right = (self.subjects.namer.name(half(drawn, side)) for side in (False, True))
            found.append({"pair": list(pair), **measures.both_named(left, right, pair)})
        return found
