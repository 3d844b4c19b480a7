"""Plans: which cells a benchmark has. A cell is one method, with changed options, trained once on all concepts in one order.

A plan is a YAML file in `plans/`, or one of your own:

    about: what it is for
    identities: 50
    train: {steps: 250, batch: 8}     options of every cell
    samples: 16                       pictures of every prompt
    sampler_steps: 20
    guidance: 2.0
    cells:                            a cell for each method, seed and change
      - methods: [stamina, lora]
        seeds: [0, 1, 2]
      - methods: [c-lora]
        train: {learning_rate: 0.0005}
        changes: [{forgetting_weight: 1.0}, {forgetting_weight: 100.0}]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..adapter.config import StaminaConfig
from ..errors import InputError
from ..io.files import read_yaml, sha256
from ..io.names import safe_name
from ..training.methods import settings
from ..training.options import TrainOptions

PLANS = resources.files(__package__) / "plans"
# sets of identities that share none: those that results are published from, and those that options are tuned on
FIRST_IDENTITY, FIRST_TUNING_IDENTITY, MOST_IDENTITIES = 10_000, 90_000, 10_000

AtLeast1, AtLeast2 = Annotated[int, Field(ge=1)], Annotated[int, Field(ge=2)]
Count, Seed = Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0, lt=2**31)]
Options = dict[str, Any]


class _Group(BaseModel):
    """A cell for each method, seed and change.

    order   seed of the concepts' order; default: the seed of the training
    train   options of the group's cells that win over the plan's; no part of their label
    """

    model_config = ConfigDict(extra="forbid")
    methods: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    order: Seed | None = None
    train: Options = {}
    changes: Annotated[list[Options], Field(min_length=1)] = [{}]


class Renders(BaseModel):
    """How much the classifiers are trained on: pictures of each name, of it whole and of its half each; steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    each: AtLeast1 = 120
    steps: AtLeast1 = 2000


class Plan(BaseModel):
    """A plan, checked. The sizes that all its cells share, and `groups`, from which `cells` makes them.

    identities       how many concepts are learned, if they are identities of the small model's world
    tuning           use the identities that options may be tuned on, none of which is in the benchmark
    samples          pictures of every concept, before, just after and at the end
    scenes           prompts that the base model knows already, for retention; `scene_samples` pictures of each
    pairs            pairs of concepts in one prompt; `samples` pictures of each
    triangle         sample every concept after every later task too, not only after its own and at the end
    renders          how much the classifiers are trained on
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: str = ""
    identities: Annotated[int, Field(ge=2, le=MOST_IDENTITIES)]
    tuning: bool = False
    train: Options = {}
    samples: AtLeast2 = 16
    sampler_steps: AtLeast1 = 20
    guidance: Annotated[float, Field(ge=1)] = 2.0
    scenes: Count = 46
    scene_samples: AtLeast1 = 2
    pairs: Count = 20
    triangle: bool = False
    renders: Renders = Renders()
    groups: Annotated[list[_Group], Field(alias="cells", min_length=1)]

    def cells(self) -> list[Cell]:
        """The cells in the order in which they are begun: first one seed of everything, then the next."""
        made = []
        for group in self.groups:
            for method, seed, changes in itertools.product(group.methods, group.seeds, group.changes):
                order = seed if group.order is None else group.order
                made.append(Cell(method, self.identities, seed, order, changes, {**self.train, **group.train}, self.triangle))
        ids = [cell.id for cell in made]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise InputError(f"the plan has the cell {twice[0]} twice; remove one of them")
        return sorted(made, key=lambda cell: cell.seed)


@dataclass(frozen=True)
class Cell:
    """One training of one method. Everything that its result depends on, apart from the set of concepts and the model.

    seed      of the training
    order     seed of the order in which the concepts are learned
    changes   options that make this cell another than others of its method
    train     options that cells of the plan or of its group share; `changes` win over them
    """

    method: str
    identities: int
    seed: int
    order: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    triangle: bool = False

    @property
    def label(self) -> str:
        """The method and its changes: what cells of other seeds share."""
        return " ".join([self.method, *(f"{key}={value}" for key, value in self.changes.items())])

    @property
    def id(self) -> str:
        """The name of the cell's folder: readable, and with a hash of all settings."""
        readable = safe_name(self.label.replace("=", "-").replace(" ", "-"))
        return f"{readable}-seed{self.seed}-{sha256(json.dumps(self.as_dict(), sort_keys=True).encode())[:8]}"

    @property
    def options(self) -> dict[str, Any]:
        """What `train` is given besides method and seed."""
        return {**self.train, **self.changes}

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and for the hash."""
        return asdict(self)

    def problem(self) -> str | None:
        """Why the cell cannot be trained, or None. Nothing is loaded to find out."""
        if "seed" in self.options:
            return "seed is no option of a plan; give the seeds of a group as seeds"
        try:
            settings(self.method, StaminaConfig(), TrainOptions(), {**self.options, "seed": self.seed})
        except InputError as error:
            return str(error)
        return None


def plan_names() -> list[str]:
    """The plans that travel with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in PLANS.iterdir() if path.name.endswith(".yaml"))


def load_plan(name: str | Path) -> Plan:
    """The plan of that name, or the one in a YAML file. Raises InputError or FileError that says what is wrong with it."""
    known = plan_names()
    path = PLANS / f"{name}.yaml" if str(name) in known else Path(name)
    if not path.is_file():
        raise InputError(f"there is no plan {str(name)!r}; give one of {', '.join(known)}, or a YAML file")
    content = read_yaml(path)
    try:
        return Plan.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"the plan {str(path)!r} does not fit: {where}: {first['msg']}; correct it") from error


def check(cells: Sequence[Cell]) -> None:
    """Raise InputError, with every cell's method that does not exist or option that does not fit, before anything is begun."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if (problem := cell.problem()) is not None:
            found.setdefault(problem, []).append(cell.label)
    if found:
        said = "; ".join(f"{', '.join(dict.fromkeys(labels))}: {problem}" for problem, labels in found.items())
        raise InputError(f"{sum(map(len, found.values()))} of {len(cells)} cells cannot be trained: {said}")
