"""The set of concepts that all cells of an output folder learn and are measured on, prepared once.

    OUT/set/set.json                  what it was made from, and what it holds; written last
    OUT/set/concepts_list.json, concepts/, held-out/     renders of the identities, to learn and to compare with
    OUT/set/classifier.safetensors, kinds.safetensors    what names pictures
    OUT/set/samples/                  pictures of the scenes from the base model

With folders of pictures instead of identities there are no renders: every fourth picture of a concept is held out, and a
sample's name is that of the nearest held-out pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import FileError, InputError
from ..evaluate.classifier import Classifier
from ..evaluate.features import encoder
from ..evaluate.samples import Samples
from ..io.concepts import Concept, load_concepts
from ..io.files import make_folder, read_json, write_json
from ..io.images import crop, list_images, load_image, to_picture
from ..pipeline.load import fingerprint, load_pipeline, resolution_of
from ..tiny.concepts import write_concepts
from ..tiny.identities import GROUPS, KINDS, Identity, identity
from ..tiny.world import SIDES, scene
from ..training.record import digest_of
from .names import ByClassifier, ByNearest, of_subjects, of_words
from .plan import FIRST_IDENTITY, FIRST_TUNING_IDENTITY, Plan

# scenes of the world that the small model was not pre-trained on
FIRST_SCENE = 2**41
# what any text-to-image model can draw, for those that are not of the small world
PROMPTS = (
    "a photo of a dog on grass", "a photo of a cat on a chair", "a photo of a red car in a street", "fruit on a table",
    "a photo of a mountain lake", "a portrait of an old man", "a portrait of a young woman", "a wooden house in the snow",
    "a sailing boat on the sea", "a bunch of yellow flowers", "a city at night", "an oil painting of a forest",
)
LEFT_OUT = "identification and composition are left out: there are no renders to train a classifier on, and the layout " \
           "features do not tell subjects apart; pass --features clip or dino"


@dataclass(frozen=True)
class Setup:
    """What all cells of an output folder share, besides the sizes in the plan.

    concepts   folders of pictures, or None for identities of the small world
    features   encoders (`features.encoder`): MMD² is measured in the first, similarity in all but "layout"
    """

    model: str = "tiny"
    concepts: str | None = None
    features: tuple[str, ...] = ("layout",)
    device: str | None = None
    threads: int = 1
    keep: bool = False


def identities(plan: Plan) -> dict[str, Identity]:
    """The plan's identities by name, such as 'face-01-woman': as many faces as landmarks as things, or one more."""
    first, chosen = FIRST_TUNING_IDENTITY if plan.tuning else FIRST_IDENTITY, {}
    for i in range(plan.identities):
        group, turn = list(GROUPS)[i % len(GROUPS)], i // len(GROUPS)
        kind = GROUPS[group][turn % len(GROUPS[group])]
        chosen[f"{group}-{turn + 1:02d}-{kind}"] = identity(first + i, kind)
    return chosen


def scenes(count: int) -> list[tuple[str, str]]:
    """`count` captions of the pre-training world with one subject, seen whole, and its kind; kinds in equal shares."""
    most, found = -(-count // len(KINDS)), []
    for seed in itertools.count(FIRST_SCENE):
        if len(found) == count:
            return found
        caption = scene(seed, 8)[1]
        words = [word for word in caption.split() if word in KINDS]
        plain = caption.startswith(("a photo of", "a picture of")) and not any(side in caption for side in SIDES)
        known = any(caption == other for other, _ in found)
        if plain and not known and len(words) == 1 and sum(kind == words[0] for _, kind in found) < most:
            found.append((caption, words[0]))
    return found


def pairs(names: list[str], count: int) -> list[tuple[str, str]]:
    """`count` different ordered pairs of different names, or as many as there are; the same for every cell."""
    every = list(itertools.permutations(names, 2))
    chosen = np.random.default_rng(0).permutation(len(every))[:count]
    return [every[i] for i in chosen]


def split(concept: Concept) -> tuple[Concept, list[Path]]:
    """A concept without every fourth of its pictures, and these. Raises InputError for one with fewer than 8 pictures."""
    if len(concept.images) < 8:
        raise InputError(f"the concept {concept.name!r} has {len(concept.images)} pictures, and a benchmark holds out every "
                         "fourth; give at least 8")
    learned = [i for i in range(len(concept.images)) if i % 4 != 3]
    captions = None if concept.captions is None else tuple(concept.captions[i] for i in learned)
    held_out = [image for i, image in enumerate(concept.images) if i % 4 == 3]
    return dataclasses.replace(concept, images=tuple(concept.images[i] for i in learned), captions=captions), held_out


class Subjects:
    """The set in a folder. `facts` is the content of its set.json."""

    def __init__(self, path: Path, setup: Setup, facts: Mapping):
        self.path, self.setup, self.facts = path, setup, facts
        self.size, self.pairs = self.facts["made_from"]["size"], [tuple(pair) for pair in self.facts["pairs"]]
        self.scenes = [tuple(row) for row in self.facts["scenes"]]
        if setup.concepts is None:
            self.concepts = load_concepts(path / "concepts_list.json")
            self.held_out = {concept.name: list_images(path / "held-out" / concept.name) for concept in self.concepts}
        else:
            parts = [split(concept) for concept in load_concepts(Path(setup.concepts))]
            self.concepts = [concept for concept, _ in parts]
            self.held_out = {concept.name: held_out for concept, held_out in parts}

    @classmethod
    def open(cls, output: Path, setup: Setup) -> Subjects:
        """The set that `prepare` has made in an output folder."""
        return cls(output / "set", setup, read_json(output / "set" / "set.json"))

    @functools.cached_property
    def namer(self) -> ByClassifier | ByNearest | None:
        """What names pictures of the concepts; None if nothing can."""
        if self.setup.concepts is None:
            return ByClassifier(Classifier.load(self.path / "classifier.safetensors"))
        telling = [name for name in self.setup.features if name != "layout"]
        if not telling:
            return None
        return ByNearest(encoder(telling[0], self.setup.device or "cpu"), {name: self.squares(files) for name, files in
                                                                           self.held_out.items()})

    @functools.cached_property
    def kinds(self) -> Classifier | None:
        """What names the kinds of scenes; None for scenes without kinds."""
        return Classifier.load(self.path / "kinds.safetensors") if self.setup.concepts is None else None

    def squares(self, files: list[Path]) -> list[Image.Image]:
        """Pictures as squares of the model's size, from their middles."""
        return [to_picture(crop(load_image(file), self.size)[0]) for file in files]

    def ordered(self, order: int) -> list[Concept]:
        """The concepts in the order of a seed."""
        return [self.concepts[i] for i in np.random.default_rng([order, 4]).permutation(len(self.concepts))]

    def scene_samples(self, folder: Path) -> Samples:
        """The samples of the scenes in a folder, one sub-folder a scene."""
        made = self.facts["made_from"]
        return Samples(folder, count=made["scene_samples"], seed=1, steps=made["sampler_steps"], size=self.size)

    def draw_scenes(self, pipeline, folder: Path, stage: str) -> None:
        """Draw every scene with the pipeline as it is now, unless it is there."""
        samples = self.scene_samples(folder)
        for i, (prompt, _) in enumerate(self.scenes):
            samples.draw(pipeline, prompt, self.facts["made_from"]["guidance"], stage, f"{i:03d}")

    def read_scenes(self, folder: Path, stage: str) -> list[list[Image.Image]]:
        """The pictures of every scene."""
        samples = self.scene_samples(folder)
        return [samples.read(self.facts["made_from"]["guidance"], stage, f"{i:03d}") for i in range(len(self.scenes))]

    def pair_prompt(self, pair: tuple[str, str]) -> str:
        """A prompt with two concepts side by side."""
        tokens = {concept.name: concept.token for concept in self.concepts}
        return f"a photo of {tokens[pair[0]]} left of {tokens[pair[1]]}"

    def class_prompt(self, concept: Concept) -> str:
        """What a concept's picture shows in words that CLIP knows: its class prompt, or its name."""
        return concept.class_prompt or concept.prompt.replace(concept.token, concept.name)


def made_from(plan: Plan, setup: Setup, pipeline) -> dict:
    """Everything that a set depends on, as plain values."""
    made = {"fingerprint": fingerprint(pipeline), "size": resolution_of(pipeline), "features": list(setup.features)}
    shared = ("samples", "sampler_steps", "guidance", "scenes", "scene_samples", "pairs")
    made |= {name: getattr(plan, name) for name in shared}
    if setup.concepts is None:
        return made | {"identities": plan.identities, "tuning": plan.tuning, "renders": plan.renders.model_dump()}
    concepts = load_concepts(Path(setup.concepts))
    return made | {"concepts": {concept.name: digest_of(concept.images) for concept in concepts}}


def prepare(output: Path, plan: Plan, setup: Setup) -> Subjects:
    """The set in `output`, made unless it is there. It is for one process at a time.

    Where only set.json is left, as beside results in a repository, the rest is made again.

    Raises InputError for an encoder or pictures that cannot be used, and FileError if the folder holds another set.
    """
    path = output / "set"
    for name in setup.features:
        encoder(name)
    pipeline = load_pipeline(setup.model, setup.device)
    wanted = made_from(plan, setup, pipeline)
    known = (path / "set.json").is_file()
    if known:
        same(read_json(path / "set.json")["made_from"], wanted, output)
    # what `of_world` writes last
    if not known or (setup.concepts is None and not (path / "kinds.safetensors").is_file()):
        make_folder(path)
        facts = of_world(path, plan, wanted) if setup.concepts is None else of_folders(path, plan, setup, wanted)
        write_json(path / "set.json", facts)
    subjects = Subjects.open(output, setup)
    subjects.draw_scenes(pipeline, path, "base")
    return subjects


def of_world(path: Path, plan: Plan, wanted: Mapping) -> dict:
    """Write the renders and the classifiers of identities; return the facts of the set."""
    chosen, size = identities(plan), wanted["size"]
    write_concepts(path, chosen, size)
    classifier, named = of_subjects(chosen, size, plan.renders)
    classifier.save(path / "classifier.safetensors")
    kinds, kind = of_words(size, plan.renders)
    kinds.save(path / "kinds.safetensors")
    return {"made_from": wanted, "scenes": scenes(plan.scenes), "pairs": pairs(list(chosen), plan.pairs), "left_out": [],
            "accuracy": named | {"kinds": kind}}


def of_folders(path: Path, plan: Plan, setup: Setup, wanted: Mapping) -> dict:
    """The facts of a set of folders of pictures."""
    facts = {"made_from": wanted, "scenes": [(prompt, None) for prompt in PROMPTS[:plan.scenes]], "left_out": [LEFT_OUT],
             "pairs": pairs(list(wanted["concepts"]), plan.pairs), "accuracy": {}}
    subjects = Subjects(path, setup, facts)
    if subjects.namer is None:
        return facts
    return facts | {"left_out": [], "accuracy": {"nearest": of_learned(subjects)}}


def of_learned(subjects: Subjects) -> dict:
    """How well the nearest held-out pictures name the pictures that are learned: "mean" over the concepts, and the least."""
    each = {}
    for concept in subjects.concepts:
        found = subjects.namer.name(subjects.squares(list(concept.images)))
        each[concept.name] = sum(name == concept.name for name in found) / len(found)
    least = min(each, key=each.get)
    return {"mean": sum(each.values()) / len(each), "least": [least, each[least]]}


def same(was: Mapping, now: Mapping, output: Path) -> None:
    """Raise FileError, naming what differs, unless an output folder is used with the set that it was begun with."""
    different = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if different:
        raise FileError(f"{str(output)!r} was begun with another {', '.join(different)}; pass what it was begun with, or "
                        "another output folder")
