"""How much say a token has where it starts: how far it moves the prediction, beside known words.

A token that moves nothing cannot be learned, however long the task is, and nothing else would show it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..errors import StaminaWarning
from ..io.concepts import Concept
from .backbone import Backbone
from .data import Feed
from .diffusion import Diffusion

# how many known words are asked, and the least share of their say that a token should start with
WORDS, LEAST = 5, 0.1


@torch.no_grad()
def share_of_a_word(backbone: Backbone, adapters, diffusion: Diffusion, feed: Feed, seed: int) -> float | None:
    """How far the active token moves the prediction, as a share of how far known words do (their median).

    An embedding moves it from what a zero vector in the token's place gives, for the first picture and its prompt, at the
    middle timestep, with noise of this seed. Takes WORDS + 2 forwards of batch 1. None where words move nothing.
    """
    tokens, mean = adapters.tokens, feed.bank.mean[:1]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
    t = torch.tensor([diffusion.steps // 2], device=mean.device)
    noisy, _ = diffusion.noised(feed.bank.draw(t.new_zeros(1), torch.zeros_like(mean)), noise, t)

    def predict() -> Tensor:
        states, pooled = backbone.encode([ids[:1] for ids in feed.ids])
        return backbone.predict(noisy, t, states, pooled, feed.frames[:1]).float()

    def with_embeddings(rows: dict[str, Tensor]) -> Tensor:
        with tokens.standing_in(rows):
            return predict()

    # what torch.compile makes of a batch of 1 would not be what it makes of the batch that is trained
    with adapters.disabled(), torch.compiler.set_stance("force_eager"):
        words = tokens.words(WORDS)
        nothing = with_embeddings({name: torch.zeros_like(row) for name, row in words[0].items()})
        known = torch.stack([(with_embeddings(rows) - nothing).norm() for rows in words]).median().item()
        own = (predict() - nothing).norm().item()
    return own / known if known > 0 else None


def warn_of_little_say(share: float | None, concept: Concept) -> None:
    """Warn (StaminaWarning) of a token whose `share_of_a_word` is below LEAST."""
    if share is not None and share < LEAST:
        warnings.warn(
            f"{concept.name}: the token {concept.token} starts with only {share:.2g} times the say that known words have in "
            "the picture; set initializer_token or token_init to a word for the thing", StaminaWarning, stacklevel=2,
        )
