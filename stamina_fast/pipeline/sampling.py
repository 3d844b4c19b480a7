"""Pictures from a pipeline: each from noise of its own, whatever the batch and the number of pictures.

The rounding of a product may depend on the batch: such pictures are equal to a level of eight bits or so, not to the bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..seeds import derive_seed
from .projections import find_projections, text_projection

# text states whose projections are kept: those of one prompt, before and behind a U-Net's own projection of them
KEPT = 2


class Known:
    """What each projection made of the last text states, found by identity and version of everything it was made of."""

    def __init__(self):
        self.states: list[tuple[Tensor, int, dict[nn.Module, tuple]]] = []

    def of(self, x: Tensor) -> dict[nn.Module, tuple]:
        """What is known of these text states, as they are now; the oldest ones are forgotten."""
        for seen, version, made in self.states:
            if seen is x and version == x._version:
                return made
        self.states = [*self.states, (x, x._version, {})][-KEPT:]
        return self.states[-1][2]


class CachedLinear(nn.Linear):
    """A projection that looks its output up. A module takes this class in `cached_projections`, and its own back after it."""

    def forward(self, x: Tensor) -> Tensor:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in (x, *parameters)):
            # such tensors do not count the writes to them
            return super().forward(x)
        made, marks = self.known.of(x), [(p.data_ptr(), p._version) for p in parameters]
        if self in made:
            y, version, then, _ = made[self]
            if version == y._version and then == marks:
                return y
        y = super().forward(x)
        # the memory of the parameters is kept too, since another's could come to lie at its address
        made[self] = y, y._version, marks, [p.detach() for p in parameters]
        return y

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a U-Net with cached projections cannot be copied or pickled; leave `cached_projections` first")


@contextlib.contextmanager
def cached_projections(unet_or_pipeline) -> Iterator[None]:
    """K and V of the text computed once for all denoising steps of a plain U-Net, or of a pipeline's, to the same bits.

    A diffusers pipeline hands the same text states to every step. Their projections are kept, for the last two states seen,
    and found again as long as states, weights and results are the same tensors and nothing was written to them (torch does
    not count writes through `.data`, which must wait until the block ends). Under autograd, autocast, inference mode and
    torch.compile they are computed each time. The classes of the modules are restored afterwards.

    Raises InputError where a projection is no plain Linear: with adapters attached, with LoRA, and in a second such block.
    """
    unet = getattr(unet_or_pipeline, "unet", unet_or_pipeline)
    unet = getattr(unet, "_orig_mod", unet)
    slots = find_projections(unet)
    for name, slot in slots.items():
        if type(slot) is not nn.Linear:
            raise InputError(
                f"{name} must be a plain torch.nn.Linear to be cached, got {type(slot).__module__}.{type(slot).__name__}; "
                "fold and detach the adapters, and unload LoRA layers first"
            )
    modules, before = list(slots.values()), text_projection(unet)
    if type(before) is nn.Linear:
        # its output is the text states of the others, and so has to be the same tensor at every step
        modules.append(before)
    known = Known()
    for module in modules:
        module.__class__, module.known = CachedLinear, known
    try:
        yield
    finally:
        for module in modules:
            del module.known
            module.__class__ = nn.Linear


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
    negative_prompt: str | None = None, size: int | None = None, cache_projections: bool = False,
) -> Tensor:
    """`count` pictures of `prompt`, fp32 [count, 3, H, W] in [0, 1] on the CPU.

    Picture i starts from the noise of `derive_seed(seed, "sample", i)`, drawn on the CPU. guidance 1: no guidance.
    size: height and width in pixels, the model's own by default. cache_projections: K and V of the text are computed once
    for all steps (see `cached_projections`). Raises InputError for a <token> it has not learned.
    """
    check_tokens(pipeline, prompt)
    generators = [torch.Generator().manual_seed(derive_seed(seed, "sample", i)) for i in range(count)]
    shown = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(disable=True)
    try:
        with cached_projections(pipeline) if cache_projections else contextlib.nullcontext():
            parts = [
                pipeline(
                    prompt, num_images_per_prompt=len(part), generator=part, guidance_scale=guidance,
                    num_inference_steps=steps, negative_prompt=negative_prompt, height=size, width=size, output_type="pt",
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
