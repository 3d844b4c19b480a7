"""replay: pictures of earlier concepts, drawn by the model itself, are mixed into the batches."""

from __future__ import annotations

from dataclasses import dataclass

from ...pipeline.sampling import sample
from ...seeds import derive_seed
from ..data import Drawn
from .base import NO_MASK, Method, Strategy


@dataclass(eq=False)
class Replay(Strategy):
    """Generative replay (Shin et al. 2017, arXiv 1705.08690): earlier concepts are rehearsed without keeping their photographs.

    At the start of task t the model with weights W_{t-1} draws pictures of every earlier concept from its prompt. Each row of
    a batch shows one of them with probability `replay_share`, and the concept's own pictures otherwise.

    Pictures are drawn anew for every task, also by a run that is resumed: they are a function of (seed, task) and the weights.

    replay_share     how likely a row shows an earlier concept, from 0 to 1
    replay_count     pictures of each earlier concept
    replay_steps     of the sampler
    replay_guidance  classifier-free guidance of the sampler; 1: none
    """

    replay_share: float = 0.5
    replay_count: int = 4
    replay_steps: int = 20
    replay_guidance: float = 3.0

    def __post_init__(self) -> None:
        self._number("replay_share", 0, 1)
        self._number("replay_count", 1, whole=True)
        self._number("replay_steps", 1, whole=True)
        self._number("replay_guidance", 1)

    def pictures(self, trainer, task: int) -> Drawn | None:
        images, texts = [], []
        for j, concept in enumerate(trainer.concepts[:task]):
            drawn = sample(
                trainer.pipeline, concept.prompt, self.replay_count, seed=derive_seed(trainer.options.seed, "replay", task, j),
                guidance=self.replay_guidance, steps=self.replay_steps, size=trainer.loader.side,
            )
            images += (drawn * 2 - 1).unbind()
            texts += [concept.prompt] * self.replay_count
        return Drawn(images, texts, self.replay_share) if images else None


METHOD = Method(
    "sequential low-rank adaptation on the concept's pictures and on drawn pictures of earlier concepts (arXiv 1705.08690)",
    NO_MASK | {"forgetting_weight": 0.0}, strategy=Replay,
)
