"""How to train, as data: checked once, written into the RUN folder, compared when a run is resumed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import InputError

# "sdpa": torch chooses; then its kernels by name, a library of its own, and whichever kernel is fastest here
ATTENTION = ("sdpa", "math", "flash", "efficient", "cudnn", "xformers", "measured")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainOptions:
    """Everything about training that is not the method itself (that is `StaminaConfig`).

    steps, batch            optimizer steps of a concept, and pictures in a step, of each process where there are several
    optimizer               "adamw"; "adamw8bit": its moments in 8 bits (bitsandbytes); "prodigy": finds the size of its steps
                            itself (prodigyopt, arXiv 2306.06101). A CUDA graph holds the whole step with the first alone
    learning_rate           of the low-rank factors and the masks; None: 1e-3; with prodigy a factor on what it finds, None: 1
    token_learning_rate     of the MLP that makes the concept's token; None: 5e-3; with prodigy 1
    scale_lr                both rates are for 4 pictures a step, and grow with them: times batch, times processes, over 4
    lr_schedule, warmup     "constant", "linear" or "cosine" fall to zero over a concept, after `warmup` steps of linear rise
    betas, weight_decay     of the optimizer; the decay pulls the residual to zero, so it is off by default
    gradient_clip           largest L2 norm of the whole gradient; None: no clipping
    min_snr                 gamma of min-SNR weighting (5 is usual); None: every timestep counts the same
    resolution              side of the square crops in pixels; None: the model's own
    aspect_buckets          crops are not square but of the shape nearest to each picture's, among those of about resolution²
                            pixels with sides in multiples of 8 latents (64 pixels). A batch is of one shape, which has a CUDA
                            graph, and its memory, of its own
    prior_weight            of the class pictures in the loss (prior preservation): as many of them in a step as of the concept;
                            0: none, and they need not be there
    crops, crop_scale       variants of each picture that are encoded once; the least side of one as a share of the picture's
    flip                    half of the variants are mirrored
    seed                    of everything random, with the task and the step
    accumulate              parts in which the batch goes through the model, one after another: less memory, more time
    gradient_checkpointing  the U-Net recomputes its activations: less memory, more time
    channels_last           the U-Net's convolutions in channels-last order, the one that tensor cores read
    compile                 torch.compile of the U-Net's repeating blocks, which takes a minute or more once
    attention               "sdpa": torch chooses; one of its kernels, "math", "flash", "efficient" or "cudnn"; "xformers"; or
                            "measured": the fastest kernel here, which the run keeps when it is resumed
    cache_latents           folder that keeps encoded pictures for another run; None: they are encoded again
    read_every              steps between two looks of the host at losses and non-finite values (each waits for the device)
    save_every              steps between two checkpoints, from which --resume goes on within a concept; 0: none
    capture                 the step as one CUDA graph, with the same results; None: wherever there is a GPU
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
        """The factor on both learning rates at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.lr_schedule]

    def scale(self, processes: int) -> float:
        """The factor on both learning rates for the pictures of a step; 1 unless `scale_lr`."""
        return self.batch * processes / TrainOptions.batch if self.scale_lr else 1.0

    def learning_rates(self, processes: int) -> tuple[float, float]:
        """Of factors and masks, and of the token, where so many processes make a step."""
        usual = (1.0, 1.0) if self.optimizer == "prodigy" else (1e-3, 5e-3)
        rates = zip((self.learning_rate, self.token_learning_rate), usual, strict=True)
        return tuple((default if given is None else given) * self.scale(processes) for given, default in rates)

    def as_dict(self) -> dict:
        """Plain values for YAML and JSON."""
        return asdict(self) | {"betas": list(self.betas)}
