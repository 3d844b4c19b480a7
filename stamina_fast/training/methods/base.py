"""What a method is: options that it sets, and a strategy for what it does around the steps of a task."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ...errors import InputError

if TYPE_CHECKING:
    from ...io.run import Run
    from ..data import Drawn
    from ..loop import Trainer

# for methods whose residual is A B itself
NO_MASK = {"mask": "none", "sparsity_weight": 0.0}


@dataclass(eq=False)
class Strategy:
    """What a method does around the steps of a task. This one does nothing; a subclass overrides what it needs.

    The fields of the dataclass are the method's own options. They are set by `train(…, **changes)` under their names, written
    into config.yaml, and compared when a run is resumed. What a strategy keeps besides them it makes in `start`.

    A resumed run must end in the same bits. So whatever a strategy knows of earlier tasks follows from their factors
    (`adapters.tasks`), their tokens and the weights, or is stored by `end` and read again by `restore`.

    penalty  None, or a method: Tensor of adapters. It returns a 0-dim tensor, differentiable in the factors, which takes the
             place of C-LoRA's forgetting penalty: it is weighted by `config.forgetting_weight`, and is the column
             "forgetting" of the curve. It may become part of a CUDA graph. So it reads nothing back from the device, and
             of the strategy only tensors that `start` made and that are written in place after that.
    apart    whether every residual is learned from the base model, so that it can be used without the others
    """

    penalty: ClassVar[Callable[[object], Tensor] | None] = None
    apart: ClassVar[bool] = False

    def start(self, trainer: Trainer) -> None:
        """Begin a run, before a file is written. Raise InputError for what the method cannot do."""

    def restore(self, trainer: Trainer, run: Run) -> None:
        """Go on with a run whose finished tasks are in the model."""

    def steps(self, trainer: Trainer, task: int) -> int:
        """How many steps a task makes, at most `trainer.options.steps`."""
        return trainer.options.steps

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained besides the parameters of the adapters, at the token's learning rate. Asked after `start`."""
        return iter(())

    def pictures(self, trainer: Trainer, task: int) -> Drawn | None:
        """Pictures besides the concept's own. Called when a task's factors and token are fresh, before `learning`."""
        return None

    @contextlib.contextmanager
    def learning(self, trainer: Trainer, task: int) -> Iterator[None]:
        """Holds around the steps of a task: from fresh factors, or those of a checkpoint, to right before the fold.

        The part after `yield` also runs where the task fails or is killed by an exception: put it in `finally`.
        """
        yield

    def stepped(self, trainer: Trainer) -> None:
        """Called after every optimizer step. It runs outside of a CUDA graph, so it may do anything."""

    def end(self, trainer: Trainer, task: int) -> dict[str, Tensor]:
        """Called when a task is folded and not yet stored. Returns what is stored with it for `restore`, by name."""
        return {}

    def close(self) -> None:
        """Called when a run ends or fails, before the adapters are detached. It must also work without `start`."""

    def own(self) -> dict:
        """The method's own options by name, as plain values."""
        return dataclasses.asdict(self)

    def _number(self, name: str, least: float, most: float = math.inf, whole: bool = False) -> None:
        """Raise InputError unless an option is a finite number, or a whole one, from `least` to `most`."""
        value = getattr(self, name)
        kind = int if whole else int | float
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or not least <= value <= most:
            bound = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
            raise InputError(f"{name} must be a {'whole ' * whole}number {bound}, got {value!r}; pass one")


@dataclass(frozen=True)
class Method:
    """The options that a method sets, and its strategy.

    config    fields of StaminaConfig that define the method: they replace those of the given config
    options   the same for TrainOptions
    proposes  penalty weights that replace a weight of 0; any other weight is kept
    strategy  a class of `Strategy`; the default does nothing
    """

    summary: str
    config: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    proposes: Mapping[str, float] = field(default_factory=dict)
    strategy: type[Strategy] = Strategy
