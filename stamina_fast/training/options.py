"""The options of the trainer: checked once, written into the RUN folder, compared when a run is resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import InputError

# "sdpa": torch chooses a kernel; then torch's kernels by name, another library, and the fastest of torch's kernels
ATTENTION = ("sdpa", "math", "flash", "efficient", "cudnn", "xformers", "measured")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainOptions:
    """Everything about training that is not the method itself (that is `StaminaConfig`).

    steps                   optimizer steps of a concept
    batch                   pictures in a step, of each process if there are several
    optimizer               "adamw"; "adamw8bit": moments in 8 bits (bitsandbytes); "prodigy": finds its step size itself
                            (prodigyopt, arXiv 2306.06101). Only adamw's update is part of a captured step
    learning_rate           of the low-rank factors and the masks; None: 4e-4, or 1 for prodigy, whose step size it multiplies
    token_learning_rate     of what makes the concept's token, in sizes of a word; None: 5e-2, or 1 for prodigy
    scale_lr                multiply both rates by batch · processes / 4: the defaults are meant for 4 pictures a step
    lr_schedule             "constant", or "linear" or "cosine", which fall to zero over a concept
    warmup                  steps of linear rise before that
    betas, weight_decay     of the optimizer; decay pulls the residual to zero, so it is off by default
    gradient_clip           largest L2 norm of the whole gradient; None: no clipping
    min_snr                 gamma of min-SNR weighting (5 is usual); None: every timestep counts the same
    resolution              side of the square crops in pixels; None: the model's own
    aspect_buckets          crop each picture to the allowed size nearest to its aspect ratio instead of to a square. Allowed
                            are sizes of about resolution² pixels with sides in multiples of 8 latents (64 pixels). A batch
                            has one size; each size has its own CUDA graph, which takes memory
    prior_weight            weight of the class pictures in the loss (prior preservation). A step then has as many of them as
                            of the concept's; 0: none are used
    crops                   variants of each picture that are encoded, once
    crop_scale              least side of a variant, as a share of the largest possible one
    flip                    mirror half of the variants
    seed                    of everything random, together with the task and the step
    accumulate              parts in which the batch goes through the model, one after another: less memory, more time
    gradient_checkpointing  recompute the U-Net's activations in the backward pass: less memory, more time
    channels_last           the U-Net's convolutions in channels-last order, which tensor cores read
    compile                 torch.compile of the U-Net's repeating blocks, which takes a minute or more once
    attention               "sdpa": torch chooses a kernel; "math", "flash", "efficient", "cudnn": torch's kernel of that name;
                            "xformers"; "measured": the fastest of torch's kernels here, which a resumed run keeps
    cache_latents           folder that keeps encoded pictures for other runs; None: they are encoded again
    read_every              steps between reads of losses and non-finite values from the device; each waits for the device
    save_every              steps between checkpoints within a concept, from which --resume goes on; 0: none
    capture                 run the step as one CUDA graph, with the same results; None: if there is a GPU
    """

    steps: int = 500
    batch: int = 4
    optimizer: str = "adamw"
    learning_rate: float | None = None
    token_learning_rate: float | None = None
    scale_lr: bool = False
    lr_schedule: str = "constant"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    gradient_clip: float | None = 1.0
    min_snr: float | None = None
    resolution: int | None = None
    aspect_buckets: bool = False
    prior_weight: float = 0.0
    crops: int = 8
    crop_scale: float = 0.75
    flip: bool = True
    seed: int = 0
    accumulate: int = 1
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    attention: str = "sdpa"
    cache_latents: str | None = None
    read_every: int = 20
    save_every: int = 0
    capture: bool | None = None

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch", "crops", "accumulate", "read_every"):
            self._whole(name, 1)
        for name in ("warmup", "seed", "save_every"):
            self._whole(name, 0)
        for name in ("weight_decay", "prior_weight"):
            self._number(name, 0.0)
        for name in ("learning_rate", "token_learning_rate"):
            if getattr(self, name) is not None:
                self._number(name, 0.0)
        for name in ("gradient_clip", "min_snr"):
            if getattr(self, name) is not None:
                self._number(name, 0.0, strictly=True)
        if not isinstance(self.scale_lr, bool):
            raise InputError(f"scale_lr must be true or false, got {self.scale_lr!r}; it multiplies the learning rates")
        if self.batch % self.accumulate:
            raise InputError(f"accumulate must divide batch, got {self.accumulate} for {self.batch}; pass a divisor")
        if self.capture is not None and not isinstance(self.capture, bool):
            raise InputError(f"capture must be true, false or None, got {self.capture!r}; None: wherever there is a GPU")
        for name in ("flip", "aspect_buckets", "gradient_checkpointing", "channels_last", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}; adamw is the default")
        if self.attention not in ATTENTION:
            raise InputError(f"attention must be one of {', '.join(ATTENTION)}, got {self.attention!r}; sdpa is the default")
        if self.cache_latents is not None:
            object.__setattr__(self, "cache_latents", str(self.cache_latents))
        if self.resolution is not None:
            self._whole("resolution", 8)
        if self.seed >= 2**63:
            raise InputError(f"seed must be below 2**63, got {self.seed}; pass a smaller one")
        if not 0 < self.crop_scale <= 1:
            raise InputError(f"crop_scale must lie in (0, 1], got {self.crop_scale}; 1 keeps the whole picture")
        if self.lr_schedule not in SCHEDULES:
            raise InputError(f"lr_schedule must be one of {', '.join(SCHEDULES)}, got {self.lr_schedule!r}; pass one of these")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be two numbers in [0, 1), got {self.betas}; (0.9, 0.99) is the default")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}; pass a larger one")

    def _number(self, name: str, least: float, strictly: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least or (
            strictly and value == least
        ):
            bound = f"{'above' if strictly else 'at least'} {least:g}"
            raise InputError(f"{name} must be {bound}, got {value!r}; pass a finite number")

    def rate(self, step: int) -> float:
        """The schedule's factor on both learning rates at `step`, which counts from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.lr_schedule]

    def scale(self, processes: int) -> float:
        """The factor of `scale_lr` on both learning rates; 1 without it."""
        return self.batch * processes / TrainOptions.batch if self.scale_lr else 1.0

    def learning_rates(self, processes: int) -> tuple[float, float]:
        """(rate of factors and masks, rate of the token) for this many processes, before the schedule."""
        usual = (1.0, 1.0) if self.optimizer == "prodigy" else (4e-4, 5e-2)
        rates = zip((self.learning_rate, self.token_learning_rate), usual, strict=True)
        return tuple((default if given is None else given) * self.scale(processes) for given, default in rates)

    def as_dict(self) -> dict:
        """Plain values for YAML and JSON."""
        return asdict(self) | {"betas": list(self.betas)}
