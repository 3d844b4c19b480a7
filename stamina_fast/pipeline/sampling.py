"""Pictures from a pipeline. The noise of each depends on the seed and its number, not on the batch.

The rounding of a product may depend on the batch. The same picture from another batch may then differ by about one of its
256 levels.
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

# two sets of text states: those of a prompt, and what a U-Net's own module (`text_projection`) makes of them
KEPT = 2


class Known:
    """The outputs of each projection for the last text states, while the states are the same tensors with the same values."""

    def __init__(self):
        self.states: list[tuple[Tensor, int, dict[nn.Module, tuple]]] = []

    def of(self, x: Tensor) -> dict[nn.Module, tuple]:
        """The outputs known for these text states, by projection. New states push out the oldest."""
        for seen, version, made in self.states:
            if seen is x and version == x._version:
                return made
        self.states = [*self.states, (x, x._version, {})][-KEPT:]
        return self.states[-1][2]


class CachedLinear(nn.Linear):
    """A projection that keeps its outputs. `cached_projections` gives a module this class, and its own back at the end."""

    def forward(self, x: Tensor) -> Tensor:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        if torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in (x, *parameters)):
            # inference tensors have no version, so a write to them would not be seen
            return super().forward(x)
        made, marks = self.known.of(x), [(p.data_ptr(), p._version) for p in parameters]
        if self in made:
            y, version, then, _ = made[self]
            if version == y._version and then == marks:
                return y
        y = super().forward(x)
        # hold the parameters' memory, or other weights could later lie at the same address
        made[self] = y, y._version, marks, [p.detach() for p in parameters]
        return y

    def __reduce_ex__(self, protocol):
        raise RuntimeError("a U-Net with cached projections cannot be copied or pickled; leave `cached_projections` first")


@contextlib.contextmanager
def cached_projections(unet_or_pipeline) -> Iterator[None]:
    """Compute K and V of the text once for all denoising steps of a plain U-Net, or of a pipeline's, with the same bits.

    A diffusers pipeline gives the same text states to every step. The outputs for the last two text states are kept. They
    are used again while states, weights and outputs are the same tensors and nothing was written to them. A write through
    `.data` is not noticed: make it after the block. Under autograd, autocast, inference mode and torch.compile nothing is
    kept. The modules get their own class back when the block ends.

    Raises InputError if a projection is not a plain Linear: with adapters attached, with LoRA, or in a second such block.
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
        # its output is what K and V see, so it must be the same tensor at every step
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


def with_all_vectors(prompts: list[str], tokenizer) -> list[str]:
    """The prompts with all vectors of each token, as diffusers' pipelines write them: <cat> becomes '<cat> <cat>_1 …'."""
    from diffusers.loaders import TextualInversionLoaderMixin

    return TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)


def check_tokens(pipeline, prompt: str) -> None:
    """Raise InputError when `prompt` holds a <token> that the pipeline's tokenizers do not know."""
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        added = set(tokenizer.get_added_vocab())
        for token in re.findall(r"<[^<>\s]+>", prompt):
            if token not in added:
                # the vectors of a token are named after it
                names = {t for t in added if not t.startswith("<|") and re.sub(r"_\d+$", "", t) not in added - {t}}
                known = ", ".join(sorted(names)) or "none"
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
