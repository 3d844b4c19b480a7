"""joint: all concepts are learned at once, in one training. It bounds what learning them one after another can reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ...adapter.tokens import TokenBank
from ...errors import InputError
from ...io.images import load_image
from ...seeds import derive_seed
from ..data import Drawn
from .base import NO_MASK, Method, Strategy


class Joint(Strategy):
    """The first task of N makes N · steps steps on the pictures of all N concepts, and trains all tokens and one residual.

    Every picture is equally likely in every row of a batch. The other tasks make no step: their residual is zero, and they
    store the token that the first task has trained. So the model after every task is the model after all, and the RUN folder
    is like any other. The residual has rank `config.rank`, where N tasks of another method have that rank each.
    """

    banks: Sequence[TokenBank] = ()

    def start(self, trainer) -> None:
        if trainer.options.prior_weight:
            raise InputError("joint cannot use class pictures; leave prior_weight out")
        config = trainer.config
        # a bank has one active token, so that each further token needs a bank of its own
        self.banks = [
            TokenBank(trainer.pipeline, config, mlp=config.token_mlp, init=config.token_init) for _ in trainer.concepts[1:]
        ]
        trainer.lengthen(len(trainer.concepts))

    def restore(self, trainer, run) -> None:
        for task in run.tasks()[:1]:
            kept = run.load_task(task["name"]).kept
            for i, bank in enumerate(self.banks):
                bank.makers.load_state_dict({key: kept[f"{i}.{key}"] for key in bank.makers.state_dict()})

    def steps(self, trainer, task: int) -> int:
        return 0 if task else trainer.options.steps

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for i, bank in enumerate(self.banks):
            yield from bank.named_parameters(prefix=f"tokens.{i}")

    def pictures(self, trainer, task: int) -> Drawn | None:
        others = [] if task else trainer.concepts[1:]
        images = [load_image(path) for concept in others for path in concept.images]
        for i, (bank, concept) in enumerate(zip(self.banks, others, strict=False), 1):
            # the seeds of the tokens are those of sequential tasks, from which their untrained embeddings are known
            start = derive_seed(derive_seed(trainer.options.seed, "task", i), "token"), concept.initializer_token
            bank.begin(concept.token, *start)
        texts = [text for concept in others for text in concept.texts]
        own = len(trainer.concepts[0].images)
        return Drawn(images, texts, len(images) / (own + len(images)), cut=True) if images else None

    @contextlib.contextmanager
    def learning(self, trainer, task):
        if task:
            # what the first task has trained, in the place of the fresh maker of this token
            trainer.adapters.tokens.makers.load_state_dict(self.banks[task - 1].makers.state_dict())
        try:
            yield
        finally:
            for bank in reversed(self.banks):
                if bank.active is not None:
                    bank.discard()

    def end(self, trainer, task: int) -> dict[str, Tensor]:
        """After the first task: what makes the other tokens, as "I.KEY" of bank I."""
        states = [] if task else [bank.makers.state_dict() for bank in self.banks]
        return {f"{i}.{key}": tensor for i, state in enumerate(states) for key, tensor in state.items()}

    def close(self) -> None:
        for bank in reversed(self.banks):
            bank.detach()


METHOD = Method(
    "all concepts at once, in as many steps: not continual, a bound on what the other methods can reach",
    NO_MASK | {"forgetting_weight": 0.0}, strategy=Joint,
)
