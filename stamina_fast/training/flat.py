"""Parameters as views of one fp32 vector, so that clipping, checking and AdamW take a few launches for any model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# in floats: views start at multiples of 256 bytes, so that kernels see aligned addresses
ALIGN = 64


class Flat:
    """Parameters as views of `values`, and their gradients as views of `grads`, both fp32 [size].

    The Parameter objects are never replaced, only their data. `names` are in the order of the views. The gaps between views
    hold zeros and stay zero, since their gradients are always zero.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]):
        named = list(named)
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        starts, end = [], 0
        for p in self.parameters:
            starts.append(end)
            end += -(-p.numel() // ALIGN) * ALIGN
        device = self.parameters[0].device if named else None
        self.values = nn.Parameter(torch.zeros(end, device=device))
        self.grads = torch.zeros(end, device=device)
        self.values.grad = self.grads
        self.views = [self.values.data[i : i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters, strict=True)]
        self.grad_views = [self.grads[i : i + p.numel()].view_as(p) for i, p in zip(starts, self.parameters, strict=True)]
        self.tie_()

    def tie_(self) -> None:
        """Turn parameters whose data was replaced into views again, with their present values."""
        for p, view, grad in zip(self.parameters, self.views, self.grad_views, strict=True):
            if p.data_ptr() != view.data_ptr():
                view.copy_(p.detach())
                p.data = view
            p.grad = grad

    def non_finite(self) -> list[str]:
        """Names of the parameters that hold a NaN or an infinity. Waits for the device."""
        return [name for name, p in zip(self.names, self.parameters, strict=True) if not torch.isfinite(p.detach()).all()]

    def __len__(self) -> int:
        return self.values.numel()


class Optimizer:
    """One fused AdamW over flat vectors, each with its own learning rate. Rates and moments are on the device.

    The moments are allocated here and only written in place after that, so that a captured step may use their addresses.
    """

    # the host keeps nothing that changes from step to step
    capturable = True

    def __init__(self, rates: list[tuple[Flat, float]], betas: tuple[float, float], weight_decay: float):
        rates = [(flat, rate) for flat, rate in rates if len(flat)]
        self.flats, self.peaks = [flat for flat, _ in rates], [rate for _, rate in rates]
        self.names = [name for flat in self.flats for name in flat.names]
        self.grads = [grad for flat in self.flats for grad in flat.grad_views]
        self.values = [view for flat in self.flats for view in flat.views]
        self._start(betas, weight_decay)
        self.reset_()
        self.set_rate_(1.0)

    def _start(self, betas: tuple[float, float], weight_decay: float) -> None:
        device = self.flats[0].values.device
        self.rates = [torch.tensor(rate, device=device) for rate in self.peaks]
        groups = [{"params": [flat.values], "lr": lr} for flat, lr in zip(self.flats, self.rates, strict=True)]
        # torch asks for this on a GPU if the step may be captured; the arithmetic is the same
        capturable = device.type == "cuda"
        self.adamw = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True, capturable=capturable)
        # or torch warns at the first uncaptured step, such as those before a recording
        self.adamw._warned_capturable_if_run_uncaptured = True
        # torch allocates the moments in the first step: make one whose rate is zero
        self.set_rate_(0.0)
        self.adamw.step()

    def reset_(self) -> None:
        """Zero the moments and the step count in place, and make parameters views again."""
        for moment in self.moments().values():
            moment.zero_()
        for flat in self.flats:
            flat.tie_()
            flat.grads.zero_()

    def moments(self) -> dict[str, Tensor]:
        """What the optimizer keeps from step to step, moments and the count of steps: "I.KEY" for its I-th vector."""
        states = [self.adamw.state[flat.values] for flat in self.flats]
        return {f"{i}.{key}": value for i, state in enumerate(states) for key, value in sorted(state.items())}

    def restore_(self, moments: dict[str, Tensor]) -> None:
        """Set what `moments` returned at some step of the same task."""
        for name, moment in self.moments().items():
            moment.copy_(moments[name])

    def tensors(self) -> list[Tensor]:
        """The tensors that `step_` reads and writes, apart from parameters and gradients."""
        return [*self.moments().values(), *self.rates]

    def set_rate_(self, factor: float) -> None:
        for rate, peak in zip(self.rates, self.peaks, strict=True):
            rate.fill_(peak * factor)

    def norms(self) -> Tensor:
        """L2 norm of the gradient of each parameter, fp32 [len(names)], in the order of `names`."""
        return torch.stack(torch._foreach_norm(self.grads))

    def value_norms(self) -> Tensor:
        """L2 norm of each parameter, fp32 [len(names)], in the order of `names`."""
        return torch.stack(torch._foreach_norm(self.values))

    def scale_grads_(self, factor: Tensor) -> None:
        for flat in self.flats:
            flat.grads.mul_(factor)

    def zero_grads_(self) -> None:
        for flat in self.flats:
            flat.grads.zero_()

    def step_(self) -> None:
        self.adamw.step()
