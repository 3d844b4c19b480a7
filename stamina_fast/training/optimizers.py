"""The optimizers by name: torch's AdamW, or that of another library over the same flat vectors."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import InputError
from .flat import Flat, Optimizer

# {option: (module, class, the extra that installs it, its own arguments)}; prodigy has those its authors advise for diffusion
LIBRARIES = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "8bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", "prodigy", {"use_bias_correction": True, "safeguard_warmup": True}),
}
# numbers that prodigy changes from step to step and keeps in its parameter group, not in its state
NUMBERS = ("k", "d", "d_max", "d_numerator")


def check_optimizer(name: str) -> None:
    """Raise InputError, which says how to install it, for an optimizer whose library is missing."""
    if name in LIBRARIES:
        class_of(name)


def class_of(name: str) -> type[torch.optim.Optimizer]:
    module, kind, extra, _ = LIBRARIES[name]
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, OSError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise InputError(f"optimizer {name!r} cannot run here: {first}; pip install 'stamina-fast[{extra}]'") from error


def make_optimizer(name: str, rates: list[tuple[Flat, float]], betas: tuple[float, float], weight_decay: float) -> Optimizer:
    """The optimizer called `name` over flat vectors, each with its own learning rate."""
    return Hosted(name, rates, betas, weight_decay) if name in LIBRARIES else Optimizer(rates, betas, weight_decay)


class Hosted(Optimizer):
    """Another library's optimizer: one for each flat vector, so that each has its own rate, or prodigy finds one for each.

    It reads the rate from Python and counts steps there, so its update cannot be captured.
    """

    capturable = False

    def __init__(self, name: str, *others):
        self.name = name
        super().__init__(*others)

    def _start(self, betas: tuple[float, float], weight_decay: float) -> None:
        # `set_rate_` sets the rate; prodigy refuses a rate of zero here
        options = LIBRARIES[self.name][3] | {"lr": 1.0, "betas": betas, "weight_decay": weight_decay}
        self.optimizers = [class_of(self.name)([flat.values], **options) for flat in self.flats]
        self.groups = [optimizer.param_groups[0] for optimizer in self.optimizers]
        self.fresh = [dict(group) for group in self.groups]

    def reset_(self) -> None:
        for flat in self.flats:
            flat.tie_()
            flat.grads.zero_()
        for optimizer, group, fresh, flat in zip(self.optimizers, self.groups, self.fresh, self.flats, strict=True):
            rate = group["lr"]
            optimizer.state.clear()
            group.update(fresh, lr=0.0)
            # a first step with a rate of zero allocates the state; it must not count
            optimizer.step()
            group["lr"] = rate
            optimizer.state[flat.values]["step"] = 0

    def _memory(self) -> Iterator[tuple[str, dict, str]]:
        """(name, dictionary, key in it) of everything that is kept from one step to the next."""
        for i, (optimizer, group, flat) in enumerate(zip(self.optimizers, self.groups, self.flats, strict=True)):
            state = optimizer.state[flat.values]
            yield from ((f"{i}.{key}", state, key) for key in sorted(state))
            yield from ((f"{i}.{key}", group, key) for key in NUMBERS if key in group)

    def moments(self) -> dict[str, Tensor]:
        """As `Optimizer.moments`; numbers kept by Python are returned as 0-dim fp64."""
        found = {name: memory[key] for name, memory, key in self._memory()}
        return {name: m if isinstance(m, Tensor) else torch.tensor(m, dtype=torch.float64) for name, m in found.items()}

    def restore_(self, moments: dict[str, Tensor]) -> None:
        for name, memory, key in self._memory():
            given, now = moments[name], memory[key]
            if isinstance(now, Tensor):
                now.copy_(given)
            else:
                memory[key] = type(now)(given.item())

    def tensors(self) -> list[Tensor]:
        return []

    def set_rate_(self, factor: float) -> None:
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def step_(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
