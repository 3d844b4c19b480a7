"""A Stable Diffusion pipeline: loaded from files and checked, its fingerprint, and its parameters frozen for a while."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError

TINY = "tiny"
PARTS = ("unet", "vae", "text_encoder", "tokenizer")
# how many values of each tensor a fingerprint reads
SAMPLES = 64

# (module, name of its parameter, requires_grad)
Flags = list[tuple[nn.Module, str, bool]]


def load_pipeline(model, device=None, dtype: torch.dtype | None = None):
    """A Stable Diffusion pipeline on `device` in `dtype`.

    model   a pipeline (which keeps its device and dtype unless told otherwise), a diffusers folder, the id of a model in
            the local Hugging Face cache, or "tiny", the small model that travels with this package
    device  default: the first GPU where there is one
    dtype   default: bfloat16 on a GPU, float32 on a CPU; float16 is refused, its gradients underflow

    Raises InputError in one line. Only safetensors files are read, and nothing is downloaded.
    """
    if dtype == torch.float16:
        raise InputError("dtype must be float32 or bfloat16, got float16, whose gradients underflow; pass torch.bfloat16")
    if isinstance(model, str | Path):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        pipeline = _from_files(model, dtype)
    else:
        pipeline = model
    missing = [part for part in PARTS if getattr(pipeline, part, None) is None]
    if missing:
        raise InputError(
            f"the model must be a Stable Diffusion pipeline with {', '.join(PARTS)}, got {type(pipeline).__name__} without "
            f"{', '.join(missing)}; use a Stable Diffusion 1.5, 2.1 or XL model"
        )
    channels = pipeline.vae.config.latent_channels
    if pipeline.unet.config.in_channels != channels:
        raise InputError(
            f"the U-Net must take the VAE's {channels} channels, got {pipeline.unet.config.in_channels}; inpainting and "
            "instruction models cannot be trained, use their text-to-image base"
        )
    if pipeline.unet.dtype == torch.float16 and dtype is None:
        raise InputError("the pipeline is in float16, whose gradients underflow; load it in bfloat16 or float32, or pass dtype")
    if device is not None or dtype is not None:
        pipeline.to(device=device, dtype=dtype)
    pool_at_the_end(pipeline)
    return pipeline


def pool_at_the_end(pipeline) -> None:
    """Make text encoders pool at the end of the text, even if it holds learned tokens.

    Old configurations, such as Stable Diffusion XL's, give 2 as the end-of-text id. transformers then pools at the largest
    id in the text. For the base model that is the end of the text; a learned token has a larger id still.
    """
    for part, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        encoder, tokenizer = getattr(pipeline, part, None), getattr(pipeline, name, None)
        if encoder is None or encoder.config.eos_token_id != 2 or tokenizer.eos_token_id == 2:
            continue
        encoder.config.eos_token_id = tokenizer.eos_token_id
        for module in encoder.modules():
            if getattr(module, "eos_token_id", None) == 2:
                module.eos_token_id = tokenizer.eos_token_id


def _from_files(model: str | Path, dtype: torch.dtype):
    # imported here, since both take seconds and stamina_fast itself does not need them
    from diffusers import DiffusionPipeline

    if str(model) == TINY:
        source = resources.files("stamina_fast.tiny") / "model"
    else:
        source = Path(model).expanduser()
    if not (source / "model_index.json").is_file():
        if source.is_dir() or str(model) == TINY or str(model).count("/") != 1 or str(model).startswith((".", "~", "/")):
            raise InputError(f"{source} is no diffusers folder: it has no model_index.json; pass one, a hub id or 'tiny'")
        source = str(model)
    try:
        with no_bars():
            only = {"local_files_only": True, "use_safetensors": True}
            return DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **only)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hub = isinstance(source, str)
        hint = f"; a hub id is looked up on this machine only, fetch it with: hf download {source}" if hub else ""
        raise InputError(f"cannot load the model {source}: {first}{hint}") from error


@contextlib.contextmanager
def no_bars():
    """Hide the progress bars of diffusers and transformers until the block ends."""
    import diffusers
    import transformers

    shown = [library for library in (diffusers.utils.logging, transformers.utils.logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def resolution_of(pipeline) -> int:
    """The side in pixels of the pictures this model makes by default."""
    size = pipeline.unet.config.sample_size
    return (size if isinstance(size, int) else min(size)) * pipeline.vae_scale_factor


def modules_of(pipeline) -> list[nn.Module]:
    """The networks of a pipeline: U-Net, VAE, text encoders, and what else it has."""
    # what only looks like a diffusers pipeline has its parts as attributes
    parts = getattr(pipeline, "components", None) or vars(pipeline)
    return [part for part in parts.values() if isinstance(part, nn.Module)]


def freeze(modules: Iterable[nn.Module]) -> Flags:
    """Stop gradients to every parameter of these modules. Returns the flags as they were, for `unfreeze`."""
    parts = [part for module in modules for part in module.modules()]
    flags = [(part, name, p.requires_grad) for part in parts for name, p in part.named_parameters(recurse=False)]
    unfreeze((part, name, False) for part, name, _ in flags)
    return flags


def unfreeze(flags: Iterable[tuple[nn.Module, str, bool]]) -> None:
    """Set these flags. Parameters are found by name, since loading or growing a table puts new ones in their place."""
    for part, name, trainable in flags:
        parameter = part._parameters.get(name)
        if parameter is not None and parameter.requires_grad != trainable:
            # an inference tensor takes a flag only in the mode that made it
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(trainable)


@contextlib.contextmanager
def frozen(pipeline):
    """Freeze every module of a pipeline and put its layers in eval mode. Both are as before when the block ends."""
    modules = modules_of(pipeline)
    modes = [(part, part.training) for module in modules for part in module.modules()]
    flags = freeze(modules)
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        unfreeze(flags)
        for part, mode in modes:
            part.training = mode


def fingerprint(pipeline) -> str:
    """SHA-256 of the vocabularies and of up to 64 evenly spaced values of each tensor of the U-Net and text encoders."""
    digest = hashlib.sha256()
    for part in ("tokenizer", "tokenizer_2"):
        if getattr(pipeline, part, None) is not None:
            digest.update(repr(sorted(getattr(pipeline, part).get_vocab().items())).encode())
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if module is None:
            continue
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            spaced = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].double().cpu()
            digest.update(f"{part}.{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(spaced.numpy().tobytes())
    return digest.hexdigest()
