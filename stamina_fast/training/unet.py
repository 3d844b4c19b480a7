"""The U-Net as the options want it while it trains, and as it was when that is over."""

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

# blocks that are compiled each by itself: they repeat, so that few programs serve them all
REGIONS = ("BasicTransformerBlock", "ResnetBlock2D")


@contextlib.contextmanager
def prepared(unet, options: TrainOptions) -> Iterator[None]:
    """For a whole run, since it moves weights. Raises InputError for what this U-Net or this machine cannot do."""
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
    """The weights of convolutions in channels-last order, which tensor cores want."""
    unet.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        unet.to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def with_compiled_regions(unet) -> Iterator[None]:
    """`torch.compile` of the blocks that repeat: seconds once, where the whole U-Net takes minutes."""
    blocks = [module for module in unet.modules() if type(module).__name__ in REGIONS]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            # what `Module.compile` sets, and has no opposite for
            block._compiled_call_impl = None


@contextlib.contextmanager
def with_xformers(unet) -> Iterator[None]:
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
    """For the steps of one task: the kernels of attention, and a backward pass that computes activations again."""
    with contextlib.ExitStack() as stack:
        if options.attention in KERNELS:
            # the text encoder's attention may be none that the kernel takes, so the others stay behind it
            order = dict.fromkeys([KERNELS[options.attention], *KERNELS.values()])
            stack.enter_context(sdpa_kernel(list(order), set_priority=True))
        if options.gradient_checkpointing:
            stack.enter_context(checkpointing(unet))
        yield


@contextlib.contextmanager
def checkpointing(unet) -> Iterator[None]:
    """Recompute the U-Net's activations in the backward pass. diffusers asks for train mode, so dropout must be none."""
    # nothing is drawn: no state of a generator is kept, which a captured step could not read
    unet.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    unet.train()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
