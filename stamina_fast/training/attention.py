"""Choose the kernel of torch's attention that a U-Net trains with: by name, or the fastest here."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from ..errors import InputError
from ..io.run import Run
from ..pipeline.load import resolution_of
from .options import TrainOptions
from .ranks import Ranks

KERNELS = {
    "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
log = logging.getLogger("stamina_fast")


class AttentionShape(NamedTuple):
    """Queries are [batch, heads, tokens, size], keys and values [batch, heads, keys, size]."""

    batch: int
    heads: int
    tokens: int
    keys: int
    size: int


class Attention:
    """Runs attention of one shape on random inputs, forward and backward, with a kernel by name."""

    def __init__(self, shape: AttentionShape, device: torch.device, dtype: torch.dtype):
        batch, heads, tokens, keys, size = shape
        draw = torch.Generator(device=device).manual_seed(0)
        self.inputs = [
            torch.randn(batch, heads, n, size, generator=draw, device=device, dtype=dtype).requires_grad_()
            for n in (tokens, keys, keys)
        ]

    def __call__(self, kernel: str) -> None:
        """Raises RuntimeError where the kernel cannot run."""
        with sdpa_kernel(KERNELS[kernel]):
            out = F.scaled_dot_product_attention(*self.inputs)
            torch.autograd.grad(out, self.inputs, torch.ones_like(out))

    def seconds(self, kernel: str) -> float:
        """The median time, including launches and the wait for the device."""
        # the default of the timer is one thread
        names, threads = {"attend": self, "kernel": kernel}, torch.get_num_threads()
        return Timer("attend(kernel)", globals=names, num_threads=threads).blocked_autorange(min_run_time=0.1).median


def check_kernel(unet, kernel: str) -> None:
    """Raise InputError unless this kernel can run all head sizes of the U-Net, forward and backward."""
    heads = {module.inner_dim // module.heads for module in unet.modules() if hasattr(module, "processor")}
    for size in sorted(heads):
        try:
            Attention(AttentionShape(1, 1, 64, 64, size), unet.device, unet.dtype)(kernel)
        except RuntimeError as error:
            raise InputError(
                f"attention {kernel!r} cannot run here, with heads of {size} in {unet.dtype} on {unet.device}; choose sdpa"
            ) from error


def attentions(unet, batch: int, side: int, words: int) -> Counter[AttentionShape]:
    """How many attentions of each shape the down blocks have, for latents of side x side and prompts of `words` tokens.

    The up blocks have the same shapes, and one more attention of each at every level.
    """
    found = Counter()
    for level, block in enumerate(unet.down_blocks):
        tokens = (side // 2**level) ** 2
        for module in block.modules():
            if hasattr(module, "processor"):
                keys = words if module.is_cross_attention else tokens
                found[AttentionShape(batch, module.heads, tokens, keys, module.inner_dim // module.heads)] += 1
    return found


def fastest_kernel(unet, batch: int, side: int, words: int) -> str:
    """The kernel of torch with which the attentions of one pass take the least time here. Logs the times.

    xformers, which replaces the U-Net's attention altogether, is not compared.
    """
    sums = {}
    for kernel in KERNELS:
        try:
            check_kernel(unet, kernel)
        except InputError:
            continue
        sums[kernel] = sum(
            count * Attention(shape, unet.device, unet.dtype).seconds(kernel)
            for shape, count in attentions(unet, batch, side, words).items()
        )
    best = min(sums, key=sums.get)
    times = ", ".join(f"{kernel} {1e3 * time:.3g} ms" for kernel, time in sums.items())
    log.info("attention %s, measured: %s", best, times)
    return best


def kernel_of_run(output: Path, resume: bool, pipeline, options: TrainOptions, ranks: Ranks) -> str:
    """The kernel that attention "measured" stands for: the fastest on rank 0, or the one that a resumed run began with."""
    if ranks.rank:
        return ranks.meet()[0]
    resumed = resume and (output / "manifest.json").is_file()
    found = Run.open(output).config.get("measured", {}).get("attention") if resumed else None
    if found is None:
        rows = options.batch // options.accumulate * (2 if options.prior_weight else 1)
        side = (options.resolution or resolution_of(pipeline)) // pipeline.vae_scale_factor
        found = fastest_kernel(pipeline.unet, rows, side, pipeline.tokenizer.model_max_length)
    return ranks.meet(found)[0]
