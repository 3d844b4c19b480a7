"""The demo: teach the small model six identities of its own world, with STAMINA, and beside it with plain sequential LoRA."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..bench.machine import describe
from ..errors import StaminaError
from ..evaluate import evaluate_run, keep_held_out, plots
from ..evaluate.classifier import OTHER, Classifier, train_classifier
from ..evaluate.naming import NAMED, named_in
from ..evaluate.samples import BASE, Samples, after
from ..io.files import write_json
from ..io.images import list_images, open_image
from ..io.names import token_for
from ..io.run import Run
from ..pipeline.load import TINY, load_pipeline, resolution_of
from ..quiet import quiet
from ..threads import threads
from ..tiny.concepts import write_concepts
from ..tiny.identities import Identity, identity
from ..tiny.renders import of_identities
from ..training import train
from .plan import Plan

IDENTITIES = {
    "ada": identity(13, "woman"), "belfry": identity(16, "tower"), "bruno": identity(0, "man"),
    "palace": identity(6, "castle"), "cleo": identity(6, "woman"), "viaduct": identity(15, "bridge"),
}
# two learned concepts in one prompt
PAIR, PAIRS = ("ada", "belfry"), "pairs"
GUIDANCE = 3.0
METHODS = ("stamina", "lora")
FULL = Plan({"steps": 300, "batch": 8, "learning_rate": 6e-4, "token_learning_rate": 5e-2, "lr_schedule": "cosine",
             "warmup": 10, "density": 0.5, "token_vectors": 4, "crops": 1, "flip": True}, samples=16, sampler_steps=20)
QUICK = Plan(FULL.train | {"steps": 10, "batch": 4, "warmup": 2, "read_every": 4}, samples=4, sampler_steps=4)


def run_demo(output: str | Path = "runs/demo", quick: bool = False, *, model=TINY, seed: int = 0, device=None,
             subjects: Mapping[str, Identity] = IDENTITIES, progress: bool = True) -> dict:
    """Teach `model` the subjects one after another with STAMINA into the RUN folder `output`, and say which it remembers.

    A second process does the same steps with plain sequential LoRA, into OUTPUT-lora. A classifier trained on renders of the
    subjects, and of strangers, then says how many of them it still recognises in the samples of each. OUTPUT/demo.png shows
    it. The subjects' pictures are beside the run, in OUTPUT-identities. A demo that was stopped goes on from there.

    quick: few steps and samples, to show that everything works but not what it can do. Returns the content of demo.json.
    """
    start, output, plan = time.perf_counter(), Path(output), QUICK if quick else FULL
    console = Console(quiet=not progress, markup=False, highlight=False, soft_wrap=True)
    pictures = output.with_name(f"{output.name}-identities")
    with threads(1):
        size = resolution_of(load_pipeline(model, "cpu"))
        concepts = write_concepts(pictures, subjects, size)
        folders = {"stamina": output, "lora": output.with_name(f"{output.name}-lora")}
        console.print(f"Teaching {len(subjects)} identities, one after another: {', '.join(subjects)}. STAMINA here, and plain "
                      "sequential LoRA in a second process beside it.")
        shared = (concepts, pictures, plan, model, seed, device)
        beside = multiprocessing.get_context("spawn").Process(target=learn_beside, args=("lora", folders["lora"], *shared))
        beside.start()
        try:
            learn("stamina", output, *shared, progress)
            classifier = recognise(subjects, size, plan)
            if beside.is_alive():
                console.print("STAMINA is done. Waiting for LoRA.")
            beside.join()
        finally:
            beside.kill()
        if beside.exitcode:
            raise StaminaError(f"the second process, with LoRA, ended with code {beside.exitcode}; its message is above")
        result = {method: outcome(Run.open(folder), classifier) for method, folder in folders.items()}
    result |= {"seconds": time.perf_counter() - start, "seed": seed, "steps": plan.train["steps"], "samples": plan.samples,
               "machine": describe(str(device or ("cuda:0" if torch.cuda.is_available() else "cpu")))}
    write_json(output / "demo.json", result)
    draw(output / "demo.png", folders, pictures, list(subjects), result)
    report(console, output, subjects, result)
    return result


@threads(1)
def learn(method: str, output: Path, concepts: Path, pictures: Path, plan: Plan, model, seed: int, device,
          progress: bool) -> None:
    """Learn all concepts with one method into the RUN folder `output`, and draw its samples."""
    run = train(model, concepts, output, method=method, device=device, resume=True, progress=progress, seed=seed, **plan.train)
    names = [task["name"] for task in run.tasks()]
    for name in names:
        keep_held_out(output, name, list_images(pictures / "held-out" / name))
    evaluate_run(output, samples=plan.samples, steps=plan.sampler_steps, guidance=(GUIDANCE,), model=model, device=device,
                 progress=progress, triangle=False)
    Samples.of(output).draw(load_pipeline(output / "model", device), prompt_of(names), GUIDANCE, PAIRS, PAIRS)


def learn_beside(*args) -> None:
    """`learn` in a process of its own, which prints nothing but an error, in one line."""
    quiet()
    try:
        learn(*args, progress=False)
    except StaminaError as error:
        sys.exit(f"stamina-fast, the second process: {error}")


def prompt_of(names: Sequence[str]) -> str:
    """A prompt with two of the concepts."""
    one, two = PAIR if set(PAIR) <= set(names) else (names[0], names[-1])
    return f"a photo of {token_for(one)} left of {token_for(two)}"


def recognise(subjects: Mapping[str, Identity], size: int, plan: Plan) -> Classifier:
    """A classifier of the subjects and of strangers, trained on renders that no concept was taught from.

    A third of its pictures are strangers, most of them of the kinds of the subjects: any woman must not pass for one.
    """
    each, steps = (150, 600) if plan is FULL else (8, 8)
    renders = of_identities(subjects, each, 2000, 6 * each, OTHER, size)
    return train_classifier(*renders, steps=steps, shares=[1.0] * len(subjects) + [len(subjects) / 2])


def outcome(run: Run, classifier: Classifier) -> dict:
    """For each concept the share of samples with its name, just after its task and at the end; and how many count as named."""
    samples, names = Samples.of(run.path), [task["name"] for task in run.tasks()]
    rows = {name: {"after": named_in(samples.read(GUIDANCE, after(t), name), name, classifier),
                   "end": named_in(samples.read(GUIDANCE, after(len(names) - 1), name), name, classifier)}
            for t, name in enumerate(names)}
    named = {f"named_{when}": sum(row[when] >= NAMED for row in rows.values()) for when in ("after", "end")}
    return {"concepts": rows, **named, "seconds": sum(run.load_task(name).info["seconds"] for name in names)}


def draw(path: Path, folders: Mapping[str, Path], pictures: Path, names: list[str], result: Mapping) -> None:
    """One picture: real, base, just after, at the end, and LoRA at the end; a line a concept."""
    ours, theirs = (Samples.of(folders[method]) for method in METHODS)
    last = after(len(names) - 1)
    rows = []
    for t, name in enumerate(names):
        real = [open_image(file) for file in list_images(pictures / "held-out" / name)]
        rows.append((name, [real, ours.read(GUIDANCE, BASE, name), ours.read(GUIDANCE, after(t), name),
                            ours.read(GUIDANCE, last, name), theirs.read(GUIDANCE, last, name)]))
    stages = ["real", "before learning", "just after", f"at the end ({result['stamina']['named_end']} of {len(names)} named)",
              f"LoRA at the end ({result['lora']['named_end']} of {len(names)})"]
    title = f"{len(names)} identities learned one after another. 'At the end' all of them have been learned"
    plots.overview(path, title, stages, rows)
    plots.concept_grid(path.with_name("pair.png"), f"\"{prompt_of(names)}\"",
                       [(label, "at the end", samples.read(GUIDANCE, PAIRS, PAIRS)[:8])
                        for label, samples in (("STAMINA", ours), ("LoRA", theirs))])


def report(console: Console, output: Path, subjects: Mapping[str, Identity], result: Mapping) -> None:
    """Say in words, and in one table, which concepts are remembered."""
    table = Table(title="Share of samples in which a classifier recognises the concept", title_justify="left")
    for column in ("concept", "kind", "just after", "at the end", "LoRA just after", "LoRA at the end"):
        table.add_column(column, justify="left" if column in ("concept", "kind") else "right")
    for name, subject in subjects.items():
        cells = [f"{result[method]['concepts'][name][when]:.0%}" for method in METHODS for when in ("after", "end")]
        table.add_row(name, subject.kind, *cells)
    console.print(table)
    count, ours, theirs = len(subjects), result["stamina"], result["lora"]
    console.print(f"After learning all {count}, the model still draws {ours['named_end']} of {count} so that a classifier "
                  f"recognises them (STAMINA); with plain LoRA it is {theirs['named_end']} of {count}.")
    mean = [sum(row["end"] for row in part["concepts"].values()) / count for part in (ours, theirs)]
    console.print(f"Just after each was learned it was {ours['named_after']} and {theirs['named_after']}. Of all samples at "
                  f"the end, {mean[0]:.0%} and {mean[1]:.0%} are recognised.")
    console.print(f"All took {result['seconds']:.0f} s; learning alone {ours['seconds']:.0f} s.")
    console.print(f"Look at {output / 'demo.png'} first, then at {output / 'pair.png'}: two concepts in one prompt.")
    console.print(f"{output / 'model'} is a plain pipeline: diffusers.DiffusionPipeline.from_pretrained loads it.")
