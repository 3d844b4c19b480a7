"""null-space: a task's residual is kept from reacting to the text that all concepts share and to earlier tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import InputError
from ...pipeline.projections import text_projection
from .base import NO_MASK, Method, Strategy


def basis_of(states: Tensor, energy: float) -> Tensor:
    """Orthonormal directions U [k, m] that hold at least a share `energy` of Σ ‖x‖² over the rows x of `states` [T, k].

    They are the eigenvectors of the largest eigenvalues of xᵀ x, which is not centred.
    m is as small as possible. Computed in float64 on the CPU; returns fp32 on the device of `states`.
    """
    states64 = states.detach().cpu().double()
    values, vectors = torch.linalg.eigh(states64.mT @ states64)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    share = values.cumsum(0) / values.sum()
    m = int((share < energy).sum()) + 1
    return vectors[:, :m].float().to(states.device)


@dataclass(eq=False)
class NullSpace(Strategy):
    """B ← B (I - U Uᵀ) at the start of a task and after every optimizer step, so that A B x = 0 for every x in span(U).

    U [k, m] are the main directions (`basis_of`) of the text states of the prompts of all earlier concepts, of this concept's
    prompt without its token, and of the empty prompt. This is the null space of Adam-NSCL (Wang et al. 2021, arXiv
    2103.07113) for the inputs of the projections. There the update is projected; here B itself. Adam scales each entry of
    a projected gradient apart, after which it is no longer orthogonal, whereas B is when it is folded, up to the rounding
    to the weight's dtype.

    null_energy  the share of the text states' energy that U holds, in [0, 1]: the larger, the less a task can change
    """

    null_energy: float = 0.99

    def __post_init__(self) -> None:
        self._number("null_energy", 0, 1)

    def start(self, trainer) -> None:
        self.basis: Tensor | None = None

    @contextlib.contextmanager
    def learning(self, trainer, task):
        self.basis = basis_of(self.states(trainer, task), self.null_energy)
        k, m = self.basis.shape
        if m == k:
            name = trainer.concepts[task].name
            raise InputError(f"null_energy {self.null_energy:g} leaves none of {k} directions to {name!r}; lower it")
        self.stepped(trainer)
        yield

    @torch.no_grad()
    def stepped(self, trainer) -> None:
        for stack in trainer.adapters.stacks:
            basis = self.basis.to(stack.b)
            stack.b.sub_(stack.b @ basis @ basis.mT)

    @torch.no_grad()
    def states(self, trainer, task: int) -> Tensor:
        """The text states [T, k] that the residual of this task must not react to."""
        concept = trainer.concepts[task]
        shared = " ".join(concept.prompt.replace(concept.token, "").split())
        return text_states(trainer, ["", shared, *(earlier.prompt for earlier in trainer.concepts[:task])])


def text_states(trainer, prompts: Sequence[str]) -> Tensor:
    """What the projections see of prompts: all their text states, one below the other, fp32 [tokens, k]."""
    backbone = trainer.backbone
    states, _ = backbone.encode([ids.to(trainer.device) for ids in backbone.tokenise(list(prompts))])
    between = text_projection(backbone.unet)
    states = states if between is None else between(states)
    return states.flatten(0, 1).float()


METHOD = Method(
    "low-rank residuals that do not react to shared words and earlier tokens (after Adam-NSCL, arXiv 2103.07113)",
    NO_MASK | {"residual": "low-rank", "forgetting_weight": 0.0}, strategy=NullSpace,
)
