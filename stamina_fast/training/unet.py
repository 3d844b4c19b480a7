"""Set the U-Net up for training as the options say, and restore it afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from .attention import KERNELS, check_kernel
from .options import TrainOptions

# blocks to compile one by one: they repeat, so few compiled programs serve all of them
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")


@contextlib.contextmanager
def prepared(unet, options: TrainOptions) -> Iterator[None]:
    """What must hold for a whole run: memory order, xformers, compiled blocks.

    Raises InputError for an option that this U-Net or this machine does not support.
    """
    dropout = unet.config.get("dropout", 0.0)
    if options.gradient_checkpointing and dropout > 0:
        raise InputError(f"gradient_checkpointing needs a U-Net without dropout, got {dropout:g}; train without it")
    with contextlib.ExitStack() as stack:
        if options.channels_last:
            stack.enter_context(in_channels_last(unet))
        if options.attention == "xformers":
            stack.enter_context(with_xformers(unet))
        elif options.attention in KERNELS:
            check_kernel(unet, options.attention)
        if options.compile:
            stack.enter_context(with_compiled_regions(unet))
        yield


@contextlib.contextmanager
def in_channels_last(unet) -> Iterator[None]:
    """Hold the weights of convolutions in channels-last order, which tensor cores read."""
    unet.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def with_compiled_regions(unet) -> Iterator[None]:
    """Compile the repeating blocks with `torch.compile`: faster to compile than the whole U-Net."""
    blocks = [module for module in unet.modules() if type(module).__name__ in REGIONS]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            # undoes `Module.compile`, which has no opposite
            block._compiled_call_impl = None


@contextlib.contextmanager
def with_xformers(unet) -> Iterator[None]:
    """Run the U-Net's attention with xformers."""
    try:
        unet.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"attention 'xformers' cannot run here: {first}; pip install 'stamina-fast[xformers]' on a machine "
                         "with a GPU, or choose sdpa") from error
    try:
        yield
    finally:
        unet.disable_xformers_memory_efficient_attention()


@contextlib.contextmanager
def stepping(unet, options: TrainOptions) -> Iterator[None]:
    """What must hold for the steps of a task: the kernel of attention, and gradient checkpointing."""
    with contextlib.ExitStack() as stack:
        if options.attention in KERNELS:
            # the chosen kernel may not support the text encoder's attention, so the others stay allowed after it
            order = dict.fromkeys([KERNELS[options.attention], *KERNELS.values()])
            stack.enter_context(sdpa_kernel(list(order), set_priority=True))
        if options.gradient_checkpointing:
            stack.enter_context(recomputing_activations(unet))
        yield


@contextlib.contextmanager
def recomputing_activations(unet) -> Iterator[None]:
    """Recompute the U-Net's activations in the backward pass (gradient checkpointing).

    diffusers does so in train mode only, in which dropout would be active: the U-Net must have none.
    """
    # no random state is saved, since nothing is drawn and a captured step could not read it
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    unet.train()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
