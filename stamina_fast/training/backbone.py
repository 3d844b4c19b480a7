"""The parts of a pipeline that a training step runs: tokenizers, text encoders and the U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..pipeline.sampling import with_all_vectors


class Backbone:
    """Turns prompts into ids, ids into text states, and text states into a prediction, with one text encoder or two.

    vectors: how many a concept's token has (`StaminaConfig.token_vectors`).
    """

    def __init__(self, pipeline, vectors: int = 1):
        self.unet, self.vectors = pipeline.unet, vectors
        second = getattr(pipeline, "text_encoder_2", None)
        self.double = second is not None
        self.tokenizers = [pipeline.tokenizer] + ([pipeline.tokenizer_2] if self.double else [])
        self.encoders = [pipeline.text_encoder] + ([second] if self.double else [])
        # the U-Net of Stable Diffusion XL also takes the pooled text and six numbers about the picture's frame
        self.framed = self.unet.config.addition_embed_type == "text_time"

    def check_prompts(self, prompts: list[str], token: str, earlier: Sequence[str] = ()) -> None:
        """Raise InputError for a prompt that the model would truncate.

        earlier: tokens that it will have learned by then, besides the prompts' own.
        """
        # each vector of a token will be one id, as "a" is
        ids = " ".join(["a"] * self.vectors)
        for tokenizer in self.tokenizers:
            for prompt in prompts:
                text = prompt.replace(token, ids)
                for known in earlier:
                    text = text.replace(known, ids)
                length = len(tokenizer(text).input_ids)
                if length > tokenizer.model_max_length:
                    most = tokenizer.model_max_length
                    raise InputError(f"the prompt {prompt!r} has {length} tokens, the model reads {most}; shorten it")

    def tokenise(self, prompts: list[str]) -> list[Tensor]:
        """Ids [prompts, length] int64 of each tokenizer, padded to the model's length, with all vectors of each token."""
        return [
            tokenizer(
                with_all_vectors(prompts, tokenizer), padding="max_length", max_length=tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def encode(self, ids: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Text states [batch, length, k], and the pooled text [batch, d] where the U-Net takes it."""
        if not self.double:
            return self.encoders[0](ids[0])[0], None
        first = self.encoders[0](ids[0], output_hidden_states=True)
        second = self.encoders[1](ids[1], output_hidden_states=True)
        # the XL pipeline concatenates the last layer but one of both encoders
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]

    def predict(self, noisy: Tensor, t: Tensor, states: Tensor, pooled: Tensor | None, frames: Tensor) -> Tensor:
        """The U-Net's output for noisy latents [batch, c, h, w]. frames [batch, 6]: original size, crop, target size."""
        added = {"text_embeds": pooled, "time_ids": frames.to(states.dtype)} if self.framed else None
        return self.unet(noisy.to(states.dtype), t, encoder_hidden_states=states, added_cond_kwargs=added).sample
