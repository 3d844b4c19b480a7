"""Pictures from a pipeline: each from noise of its own, whatever the batch and the number of pictures.

The rounding of a product may depend on the batch: such pictures are equal to a level of eight bits or so, not to the bit.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .errors import InputError
from .seeds import derive_seed


def check_tokens(pipeline, prompt: str) -> None:
    """Raise InputError when `prompt` holds a <token> that the pipeline's tokenizers do not know."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        added = set(tokenizer.get_added_vocab())
        for token in re.findall(r"<[^<>\s]+>", prompt):
            if token not in added:
                known = ", ".join(sorted(t for t in added if not t.startswith("<|"))) or "none"
                raise InputError(f"the prompt holds {token}, which this model has not learned; it knows {known}")


@torch.no_grad()
def sample(
    pipeline, prompt: str, count: int = 1, *, seed: int = 0, guidance: float = 7.5, steps: int = 50, batch: int = 8,
    negative_prompt: str | None = None, size: int | None = None,
) -> Tensor:
    """`count` pictures of `prompt`, fp32 [count, 3, H, W] in [0, 1] on the CPU.

    Picture i starts from the noise of `derive_seed(seed, "sample", i)`, drawn on the CPU. guidance 1: no guidance.
    size: height and width in pixels, the model's own by default. Raises InputError for a <token> it has not learned.
    """
    check_tokens(pipeline, prompt)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", i)) for i in range(count)]
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        parts = [
            pipeline(
                prompt, num_images_per_prompt=len(part), generator=part, guidance_scale=guidance, num_inference_steps=steps,
                negative_prompt=negative_prompt, height=size, width=size, output_type="pt",
            ).images.float().cpu()
            for part in (generators[i : i + batch] for i in range(0, count, batch))
        ]
    finally:
        pipeline._progress_bar_config = shown
    return torch.cat(parts) if parts else torch.empty(0, 3, 0, 0)


def to_pil(images: Tensor) -> list:
    """PIL pictures from [count, 3, H, W] in [0, 1]."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]
